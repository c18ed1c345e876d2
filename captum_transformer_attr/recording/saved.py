"""What operations save for the backward pass is kept as it is, also where the model has torch checkpoint or offload it.

A checkpoint would run its part of the model again during a backward pass, where nothing is recorded, and find that
other operations saved other tensors. Of a recording there is nothing to save: it keeps what its rules need anyway.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

HOOKS: Any = torch._C._autograd
LOOK = getattr(HOOKS, "_top_saved_tensors_default_hooks", None)  # not in older versions, which keep the hooks


def saving_hooks() -> Any:
    """The innermost active hooks on saved tensors (``torch.utils.checkpoint``, ``save_on_cpu``), None if there are
    none."""
    return None if LOOK is None else LOOK(True)


@contextlib.contextmanager
def saved_as_it_is() -> Iterator[None]:
    """Inside the context no hooks on saved tensors are active; those of the model are put back after it."""
    hooks = []
    while (innermost := saving_hooks()) is not None:
        hooks.append(innermost)
        HOOKS._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            HOOKS._push_saved_tensors_default_hooks(pack, unpack)

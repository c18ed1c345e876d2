"""Constants that torch's own operations bring in beside live values: written into a buffer, filled, scattered.

torch's backward drops what arrives at them. It is counted where the operation's signal arrives, whichever operation it
is: run again on NaN in the place of everything live, it shows where the constants lie, and what they are.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.names import LIKE_ANOTHER, base_name
from captum_transformer_attr.recording.nested import replaced
from captum_transformer_attr.recording.node import Node
from captum_transformer_attr.recording.tags import tag_of

if TYPE_CHECKING:
    from captum_transformer_attr.recording.recorder import Recorder
    from captum_transformer_attr.recording.signal import Signal

# Functions that also put in plain numbers; with a second live operand they put in that one instead.
FILLS = frozenset("fill masked_fill index_fill zero scatter setitem".split())


def share_of_constants(signal: Signal, tag: tags.Tag, live: Tensor, values: Tensor, arrived: Tensor) -> Tensor:
    """Relevance that arrived where constants lie among live values.

    What arrives as a modified gradient counts times the constant, except at a handle of token ids: there it is
    relevance already, and a handle has no value.
    """
    if signal.carries == "gradient" and tag.role != tags.IDS:
        return torch.where(live | (arrived == 0), 0, values * arrived)
    return torch.where(live, 0, arrived)


def tensor_written(written: Tensor) -> Tensor:
    """The tensor whose memory a write changes: the one that is written into, or the one that it is a view of."""
    return written if written._base is None else written._base


def stand_in(operand: Tensor) -> Tensor:
    """What stands for an operand when a call is repeated: NaN for a live one, a copy of a constant, which the model may
    overwrite."""
    if operand.requires_grad:
        return torch.full((), math.nan, dtype=operand.dtype, device=operand.device).expand(operand.shape)
    return operand.detach().clone()


class Constants(Node):
    """One call of torch's own that brings constants in. No operation of the graph: it watches one."""

    label = "constants moved"

    def __init__(
        self, recorder: Recorder, func: Any, operands: list[Tensor], args: Any, kwargs: Any, written: Tensor | None
    ) -> None:
        self.recorder, self.path, self.function = recorder, recorder.path, func
        held = {id(t): stand_in(t) for t in operands if t is not written}
        self.args, self.kwargs = replaced(args if written is None else args[1:], held), replaced(kwargs, held)
        if written is not None:
            whole = tensor_written(written)
            self.before = stand_in(whole)
            self.strides = whole.stride()
            self.view = (written.shape, written.stride(), written.storage_offset() - whole.storage_offset())
        self.writes = written is not None

    def values(self) -> Tensor:
        """The constants at their places in the result, or in the tensor that was written into; NaN elsewhere."""
        with torch.no_grad():
            if not self.writes:
                return self.function(*self.args, **self.kwargs)  # type: ignore[no-any-return]
            before = self.before
            whole = torch.empty_strided(before.shape, self.strides, dtype=before.dtype, device=before.device)
            whole.copy_(before)
            self.function(whole.as_strided(*self.view), *self.args, **self.kwargs)
        return whole

    def watch(self, out: Tensor) -> None:
        """Count from now on what arrives at the call that gave ``out``, or that wrote into it."""
        out = tensor_written(out) if self.writes else out
        tag = tag_of(out)
        if tag is None or out.grad_fn is None:
            return
        self.tag, self.layout = tag, tag.layout
        out.grad_fn.register_prehook(functools.partial(self.arrive, out.output_nr))

    def arrive(self, position: int, grads: tuple[Tensor | None, ...]) -> None:
        passing, g = self.recorder.passing, grads[position]
        if passing is None or g is None:
            return

        def arrived() -> Tensor:
            values = self.values()
            return share_of_constants(passing.signal, self.tag, values.isnan(), values, g)

        self.absorb(arrived)


def constants_in(
    recorder: Recorder, func: Any, name: str, operands: list[Tensor], args: Any, kwargs: Any, written: Tensor | None
) -> Constants | None:
    """What to ``watch`` after this call, which is about to be run; None if it brings no constants in."""
    if name in LIKE_ANOTHER:
        return None
    live = sum(t.requires_grad for t in operands)
    constant = any(not t.requires_grad and (t.is_floating_point() or t.is_complex()) for t in operands)
    if not constant and (live > 1 or base_name(name) not in FILLS):
        return None
    return Constants(recorder, func, operands, args, kwargs, written)

"""Tensors that pass a layer during a recording."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.recording.modules import modules_of
from captum_transformer_attr.recording.recorder import HANDLE, replaced, tensors_in
from captum_transformer_attr.recording.tags import tag_of


@dataclass
class Captured:
    """What passed the layers: per layer the tensors of its last recorded call, as they were before anything later wrote into them."""

    layers: Sequence[nn.Module]
    names: list[str]
    tensors: dict[int, list[Tensor]] = field(default_factory=dict)
    handles: list[Tensor] = field(default_factory=list)

    def factor(self, tensor: Tensor) -> Tensor | None:
        """What a modified gradient at this tensor is multiplied by; None for a handle of token ids, where relevance itself arrives."""
        return None if any(tensor is handle for handle in self.handles) else tensor.detach()

    def of(self, position: int) -> list[Tensor]:
        """Recorded tensors of one layer; for token ids the handle that stands for them.

        Raises:
            InputError: if the layer did not run or saw nothing that depends on the inputs.
        """
        found = self.tensors.get(position)
        if not found:
            raise InputError(f"layer: module '{self.names[position]}' saw nothing that depends on the inputs in this forward")
        return found


@contextlib.contextmanager
def captured(function: Any, layers: Sequence[nn.Module], of_input: bool) -> Iterator[Captured]:
    """Hooks, present inside the context only, that keep what enters (``of_input``) or leaves the layers while a recording runs.

    Raises:
        InputError: if a layer is not part of the model.
    """
    store = Captured(layers, [name_of(function, layer) for layer in layers])
    handles = []

    def keep(position: int, values: Any) -> dict[int, Tensor]:
        """Remember the recorded tensors among ``values``; what the model goes on with are copies."""
        recorded = [t for t in tensors_in((values,)) if live(t) is not None]
        if recorded:
            found = [t for t in map(live, recorded) if t is not None]
            store.tensors[position] = found
            store.handles += [t for t, given in zip(found, recorded, strict=True) if t is not given]
        return {id(t): t.clone() for t in recorded}

    try:
        for position, layer in enumerate(layers):
            if of_input:
                handles.append(layer.register_forward_pre_hook(entering(position, keep), with_kwargs=True))
            else:
                handles.append(layer.register_forward_hook(leaving(position, keep)))
        yield store
    finally:
        for handle in handles:
            handle.remove()


def entering(position: int, keep: Any) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        copies = keep(position, (args, kwargs))
        return (replaced(args, copies), replaced(kwargs, copies)) if copies else None

    return hook


def leaving(position: int, keep: Any) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        copies = keep(position, output)
        return replaced(output, copies) if copies else None

    return hook


def live(tensor: Tensor) -> Tensor | None:
    """The recorded tensor itself, the handle of recorded token ids, None for anything else."""
    if tensor.is_floating_point():
        return tensor if tensor.requires_grad and tag_of(tensor) is not None else None
    return getattr(tensor, HANDLE, None)


def name_of(function: Any, layer: nn.Module) -> str:
    """Module path of a layer.

    Raises:
        InputError: if it belongs to no module behind ``function``.
    """
    for root in modules_of(function):
        for path, module in root.named_modules():
            if module is layer:
                return path
    raise InputError(f"layer: this {type(layer).__name__} is not part of the model")

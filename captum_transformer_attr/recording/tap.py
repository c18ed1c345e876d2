"""Tensors that enter or leave chosen layers during a recording."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.layout import initial
from captum_transformer_attr.recording.modules import modules_of
from captum_transformer_attr.recording.nested import replaced, tensors_in
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.tags import HANDLE, tag_of


class Tap:
    """What passes some layers. After a recorded forward ``of`` gives the tensors of a layer's last call, as they were
    before anything wrote into them.

    Args:
        function: the model, or a function around one.
        layers: modules of the model.
        of_input: what enters a layer instead of what leaves it.

    Raises:
        InputError: if a layer is not part of the model.
    """

    def __init__(self, function: Any, layers: Sequence[nn.Module], of_input: bool) -> None:
        self.layers, self.of_input = layers, of_input
        self.names = [name_of(function, layer) for layer in layers]
        self.tensors: dict[int, list[Tensor]] = {}
        self.handles: list[Tensor] = []

    @contextlib.contextmanager
    def installed(self, recorder: Recorder) -> Iterator[None]:
        """Hooks on the layers, inside the context only."""
        self.tensors.clear()
        self.handles.clear()
        self.thread = threading.get_ident()
        hooks = []
        try:
            for position, layer in enumerate(self.layers):
                if self.of_input:
                    hooks.append(layer.register_forward_pre_hook(self.entering(recorder, position), with_kwargs=True))
                else:
                    hooks.append(layer.register_forward_hook(self.leaving(recorder, position)))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def entering(self, recorder: Recorder, position: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            copies = self.keep(recorder, position, (args, kwargs))
            return replaced(args, copies), replaced(kwargs, copies)

        return hook

    def leaving(self, recorder: Recorder, position: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return replaced(output, self.keep(recorder, position, output))

        return hook

    def keep(self, recorder: Recorder, position: int, values: Any) -> dict[int, Tensor]:
        """Remember the layer's recorded tensors; what the model goes on with are copies, by the id of what they
        replace."""
        if threading.get_ident() != self.thread:  # the same model, run elsewhere meanwhile
            return {}
        given = tensors_in((values,))
        tapped = [t for t in given if is_recorded(t)]
        fresh: dict[int, Tensor] = {}
        if not tapped:
            # Nothing here depends on the inputs: the recording starts at this layer.
            tapped = [t for t in given if t.is_floating_point()] or [
                t for t in given if t.dtype in (torch.int64, torch.int32)
            ]
            fresh = {id(t): started(recorder, t, self.names[position]) for t in tapped}
        live = [fresh.get(id(t), t) for t in tapped]
        self.tensors[position] = [getattr(t, HANDLE, t) for t in live]
        self.handles += [getattr(t, HANDLE) for t in live if hasattr(t, HANDLE)]
        return {id(t): now.clone() for t, now in zip(tapped, live, strict=True)}

    def of(self, position: int) -> list[Tensor]:
        """Recorded tensors of one layer; for token ids the handle that stands for them.

        Raises:
            InputError: if the layer did not run, or no tensor passed it.
        """
        found = self.tensors.get(position)
        if not found:
            raise InputError(
                f"layer: module '{self.names[position]}' did not run in this forward, or no tensor passed it"
            )
        return found

    def factor(self, tensor: Tensor) -> Tensor | None:
        """What a modified gradient at this tensor is multiplied by; None for a handle of token ids, where relevance
        itself arrives."""
        return None if any(tensor is handle for handle in self.handles) else tensor.detach()


def is_recorded(tensor: Tensor) -> bool:
    """Whether this tensor, or the ids it holds, depends on an input."""
    return hasattr(tensor, HANDLE) or (
        tensor.is_floating_point() and tensor.requires_grad and tag_of(tensor) is not None
    )


def started(recorder: Recorder, tensor: Tensor, name: str) -> Tensor:
    """A copy of a constant that the recording follows from here on."""
    recorder.counter += 1
    bit = 1 << recorder.counter
    tag = tags.Tag(origin=recorder.counter, ancestors=bit, carried=bit, layout=initial(f"layer {name}", tensor.shape))
    dtype = torch.float32 if recorder.promote and tensor.is_floating_point() else tensor.dtype
    if tensor.is_floating_point():
        leaf = tensor.detach().to(dtype).clone().requires_grad_()
        setattr(leaf, tags.ATTRIBUTE, tag)
        return leaf
    handle = torch.zeros(tensor.shape, dtype=recorder.handle_dtype, device=tensor.device, requires_grad=True)
    setattr(handle, tags.ATTRIBUTE, replace(tag, role=tags.IDS))
    ids = tensor.clone()
    setattr(ids, HANDLE, handle)
    return ids


def name_of(function: Any, layer: nn.Module) -> str:
    """Module path of a layer.

    Raises:
        InputError: if it belongs to no module behind ``function``.
    """
    for root in modules_of(function):
        for path, module in root.named_modules():
            if module is layer:
                return path
    if isinstance(layer, str):
        raise InputError(f"layer: expected a module, got a name; give model.get_submodule('{layer}')")
    raise InputError(f"layer: this {type(layer).__name__} is not part of the model")

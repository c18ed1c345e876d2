"""Any model as a function of float tensors, which is what Captum's methods can perturb, scale and differentiate.

Token ids have no gradient. Here they are exchanged for the output of the embedding that reads them: a hook, present
only during a forward, hands the given features on in place of the looked-up ones. The model itself is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.comparison.scores import over_features
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.recording.inputs import parse
from captum_transformer_attr.recording.outputs import unwrap
from captum_transformer_attr.recording.targets import Contrast, select


class FloatView:
    """A model and one batch of its inputs, seen as floats.

    Attributes:
        features: What a method may change: float inputs as they are, ids as their embeddings ``(N, T, E)``.
        others: The remaining tensors, in the order that :meth:`__call__` expects behind the features.

    Args:
        model: Any module.
        inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        contrast: A difference of two outputs, which is then all the view returns: Captum knows no such target.

    Raises:
        InputError: if nothing can be explained, or ids are not looked up in an ``nn.Embedding``.
    """

    def __init__(self, model: nn.Module, inputs: Any, contrast: Contrast | None = None) -> None:
        self.model, self.contrast = model, contrast
        self.inputs = parse(inputs)
        self.entries, self.explained = self.inputs.values, self.inputs.explained
        tensors = [self.entries[key] for key in self.explained]
        self.embeddings = _embeddings(model, self)
        self.features = tuple(
            self.embeddings[key](value).detach() if key in self.embeddings else value.detach()
            for key, value in zip(self.explained, tensors, strict=True)
        )
        self.other_keys = [
            key
            for key, value in self.entries.items()
            if isinstance(value, Tensor) and (key not in self.explained or key in self.embeddings)
        ]
        self.others = tuple(self.entries[key] for key in self.other_keys)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Scores from the features followed by the others."""
        count = len(self.explained)
        entries = {**self.entries, **dict(zip(self.other_keys, tensors[count:], strict=True))}
        substitutes = []
        for key, features in zip(self.explained, tensors[:count], strict=True):
            if key in self.embeddings:
                substitutes.append((self.embeddings[key], entries[key], features))
            else:
                entries[key] = features
        with _substituted(substitutes):
            output = unwrap(self.call(entries))
        return output if self.contrast is None else select(output, self.contrast)

    def call(self, entries: Mapping[str, Any]) -> Any:
        """The model's own output for complete entries."""
        positional, keywords = self.inputs.arguments(dict(entries))
        return self.model(*positional, **keywords)

    def restore(self, attributions: tuple[Tensor, ...]) -> Any:
        """Attributions of the features in the inputs' container; embeddings become one score per id."""
        return self.inputs.pack(
            {
                key: (over_features(values, -1) if key in self.embeddings else values).detach()
                for key, values in zip(self.explained, attributions, strict=True)
            }
        )


def _embeddings(model: nn.Module, view: FloatView) -> dict[str, nn.Embedding]:
    """Which embedding reads each explained entry of ids, seen in one forward."""
    wanted = {key: view.entries[key] for key in view.explained if not view.entries[key].is_floating_point()}
    found: dict[str, nn.Embedding] = {}

    def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        for key, ids in wanted.items():
            if key not in found and _same(arguments[0], ids):
                assert isinstance(module, nn.Embedding)
                found[key] = module

    handles = [
        module.register_forward_pre_hook(look)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and wanted
    ]
    try:
        if wanted:
            with torch.no_grad():
                view.call(view.entries)
    finally:
        for handle in handles:
            handle.remove()
    for key in wanted:
        if key not in found:
            raise InputError(f"input {key!r} holds integers that no nn.Embedding of the model reads")
    return found


def _same(given: Any, ids: Tensor) -> bool:
    return isinstance(given, Tensor) and given.shape == ids.shape and bool(torch.equal(given, ids.to(given)))


@contextmanager
def _substituted(substitutes: list[tuple[nn.Embedding, Tensor, Tensor]]) -> Iterator[None]:
    def substitute(ids: Tensor, features: Tensor) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return features if _same(arguments[0], ids) else None

        return hook

    handles = [module.register_forward_hook(substitute(ids, features)) for module, ids, features in substitutes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

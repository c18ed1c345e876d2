"""One call for many methods: same inputs, same target, same kinds of output."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_transformer_attr.comparison.methods import Method, resolve
from captum_transformer_attr.comparison.scores import element_scores, rank_correlation
from captum_transformer_attr.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from captum_transformer_attr.visualization.report import Example

DEFAULT_METHODS = (
    "TransformerRelevance",
    "AttentionRelevance",
    "AttentionRollout",
    "RawAttention",
    "IntegratedGradients",
    "InputXGradient",
)


@dataclass(frozen=True)
class MethodResult:
    """What one method said.

    Attributes:
        name: The method.
        attributions: In the container and the shapes of the inputs; ids get one score each.
        seconds: Wall-clock time of the call, device synchronised.
    """

    name: str
    attributions: Any
    seconds: float

    def scores(self, entry: str | int | None = None) -> Tensor:
        """One score per pixel or token.

        Args:
            entry: Which input, by name or position; the first by default.

        Returns:
            ``(N, H, W)`` for images, ``(N, T)`` for sequences.
        """
        return element_scores(_entry(self.attributions, entry))


@dataclass(frozen=True)
class Comparison:
    """Results of several methods for the same inputs and target."""

    inputs: Any
    target: Any
    results: tuple[MethodResult, ...]

    def __getitem__(self, name: str) -> MethodResult:
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(f"no result of {name!r}; methods: {', '.join(result.name for result in self.results)}")

    def table(self) -> str:
        """Seconds per method and the rank correlation of its scores with the first method's, as text."""
        first = self.results[0]
        width = max(len(result.name) for result in self.results)
        lines = [f"{'method':<{width}}  seconds  rank correlation with {first.name}"]
        for result in self.results:
            agreement = rank_correlation(first.scores(), result.scores())
            lines.append(f"{result.name:<{width}}  {result.seconds:7.3f}  {agreement:+.3f}")
        return "\n".join(lines)

    def example(
        self,
        index: int = 0,
        *,
        entry: str | int | None = None,
        picture: np.ndarray | None = None,
        tokens: Sequence[str] | None = None,
        title: str = "",
        label: str | None = None,
    ) -> Example:
        """One example of the batch for figures and pages.

        Args:
            index: Which example.
            entry: Which input, by name or position; the first by default.
            picture: ``(H, W, 3)`` uint8 to draw maps on; by default the input stretched to its own range.
            tokens: The words of a sequence; by default its positions.
            title: Heading.
            label: Name of the target; by default the target itself.

        Raises:
            InputError: for an example or an input that there is not.
        """
        from captum_transformer_attr.visualization.report import Example, ImagePanel, TextPanel

        if entry is None and isinstance(self.inputs, Mapping):
            entry = next(iter(self.results[0].attributions))
        examples = len(self.results[0].scores(entry))
        if not isinstance(index, int) or not -examples <= index < examples:
            raise InputError(f"index={index!r}: the batch has {examples} examples, 0 to {examples - 1}")
        label = label or f"target {_target_of(self.target, index)}"
        maps = {label: {result.name: result.scores(entry)[index].cpu().numpy() for result in self.results}}
        if next(iter(maps[label].values())).ndim == 2:
            shown = _stretched(_entry(self.inputs, entry)[index]) if picture is None else picture
            return Example(title, (ImagePanel("image", shown, maps),))
        count = next(iter(maps[label].values())).shape[0]
        words = tuple(tokens) if tokens is not None else tuple(str(position) for position in range(count))
        return Example(title, (TextPanel("text", words, maps),))

    def figure(self, index: int = 0, **options: Any) -> Figure:
        """A matplotlib figure of one example, methods side by side; options as :meth:`example`."""
        from captum_transformer_attr.visualization.figures import example_figures

        return example_figures(self.example(index, **options))[0]


def compare(
    model: nn.Module,
    inputs: Any,
    target: Any = None,
    methods: Sequence[str | Method | Any] = DEFAULT_METHODS,
) -> Comparison:
    """Explain the same target by several methods.

    Captum's methods run on embeddings where inputs are token ids, on squares or tokens where they perturb, and
    ``LayerGradCam`` on the last layer whose tokens all matter, so that every method gives the same kinds of output.

    Args:
        model: Any module; it is left as found.
        inputs: A tensor, a tuple of tensors, or a mapping of keyword arguments.
        target: As everywhere in Captum.
        methods: Names, ours and Captum's, with options (``"TransformerRelevance:start_layer=1"``), or attribution
            objects.

    Returns:
        Attributions and seconds per method, with a table and a figure.

    Raises:
        InputError: if a method is unknown or cannot be applied to the inputs.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    results = []
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    for method in resolve(methods):
        _synchronize(device)
        start = time.perf_counter()
        attributions = method.attribute(model, inputs, target)
        _synchronize(device)
        results.append(MethodResult(method.name, attributions, time.perf_counter() - start))
    return Comparison(inputs, target, tuple(results))


def _entry(container: Any, entry: str | int | None) -> Tensor:
    if isinstance(container, Mapping):
        key = next(iter(container)) if entry is None else entry
        if key not in container:
            raise InputError(f"no scores for input {key!r}; explained inputs: {', '.join(map(str, container))}")
        return container[key]
    inputs = (container,) if isinstance(container, Tensor) else container
    if entry is not None and entry not in range(len(inputs)):
        raise InputError(f"no scores for input {entry!r}; explained inputs are numbered 0 to {len(inputs) - 1}")
    return inputs[int(entry or 0)]


def _target_of(target: Any, index: int) -> Any:
    if isinstance(target, Tensor):
        return target.tolist() if target.ndim == 0 or target.numel() == 1 else target[index].tolist()
    return target[index] if isinstance(target, list) else target


def _stretched(image: Tensor) -> np.ndarray:
    values = image.detach().double().cpu()
    low, high = values.min(), values.max()
    shown = ((values - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
    return (shown if shown.shape[0] == 3 else shown[:1].expand(3, -1, -1)).permute(1, 2, 0).numpy()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

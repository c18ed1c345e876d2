"""What all attribution classes share: Captum's contract around one recorded forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from captum.attr._utils.attribution import GradientAttribution
from torch import Tensor, nn

import captum_transformer_attr.ops  # noqa: F401  registers the operations
from captum_transformer_attr.errors import InputError, UnsupportedModelError
from captum_transformer_attr.recording.inputs import Inputs, parse
from captum_transformer_attr.recording.mismatch import refuse_mismatch
from captum_transformer_attr.recording.node import LayoutLostError
from captum_transformer_attr.recording.outputs import OutputChoice
from captum_transformer_attr.recording.session import ONE_AT_A_TIME, Recording, recorded
from captum_transformer_attr.recording.tap import Tap
from captum_transformer_attr.recording.targets import target_of

Result = TypeVar("Result")
INTERPOLATIONS = ("bilinear", "nearest")
# What was compared with the plain forward of a model, by any object that explains it.
VERIFIED: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()


class TransformerAttribution(GradientAttribution):  # type: ignore[misc]
    """Base of the attribution classes.

    Args:
        model: any module built on softmax attention, or a function around one. Used as it is, in evaluation mode, and
            left as found.
        output: which tensor of a structured output is explained: its name, or a function of the output.
    """

    def __init__(self, model: nn.Module | Callable[..., Any], output: OutputChoice = None) -> None:
        check_model(model)
        GradientAttribution.__init__(self, model)
        self.output = output
        self.tap: Tap | None = None
        self._verified: set[Any] = set()
        self._constants = False  # whether attention among learned queries matters

    @property
    def multiplies_by_inputs(self) -> bool:
        """Relevance is a share of the output, not a slope."""
        return True

    def has_convergence_delta(self) -> bool:
        """Every class can say what its relevance does not account for."""
        return True

    def attribute_future(self, *args: Any, **kwargs: Any) -> Any:
        """Captum's asynchronous variant.

        Raises:
            NotImplementedError: always; the backward passes of one recording cannot be distributed.
        """
        raise NotImplementedError(f"{type(self).__name__} has no asynchronous variant; call attribute")

    def explain(
        self,
        inputs: Inputs,
        target: Any,
        compute: Callable[[Recording], Result],
        join: Callable[[list[Result]], Result],
    ) -> Result:
        """Record the forward, select the target and compute; example by example where a batch cannot be followed."""
        if inputs.packed:
            return self.explain_each(inputs, [target], compute, join)[0]
        try:
            return self.once(inputs, target, compute)
        except LayoutLostError:
            results = [
                self.once(inputs.example(i), target_of(target, i, inputs.batch), compute) for i in range(inputs.batch)
            ]
            return join(results)

    def explain_each(
        self,
        inputs: Inputs,
        targets: Sequence[Any],
        compute: Callable[[Recording], Result],
        join: Callable[[list[Result]], Result],
    ) -> list[Result]:
        """``explain`` for several targets of one recorded forward."""

        def run(inputs: Inputs, targets: Sequence[Any]) -> list[Result]:
            def each(recording: Recording) -> list[Result]:
                results = [compute(recording)]
                for target in targets[1:]:
                    self.choose(recording, target)
                    results.append(compute(recording))
                return results

            return self.once(inputs, targets[0], each)

        batch = inputs.batch
        if inputs.packed:
            parts = [run(inputs.part(i), [target_of(t, i, batch) for t in targets]) for i in range(batch)]
            return [join(list(results)) for results in zip(*parts, strict=True)]
        try:
            return run(inputs, targets)
        except LayoutLostError:
            alone = [run(inputs.example(i), [target_of(t, i, batch) for t in targets]) for i in range(batch)]
            return [join(list(results)) for results in zip(*alone, strict=True)]

    def once(self, inputs: Inputs, target: Any, compute: Callable[[Recording], Result]) -> Result:
        known = self._verified
        if isinstance(self.forward_func, nn.Module):
            known = VERIFIED.setdefault(self.forward_func, known)
        try:
            with (
                ONE_AT_A_TIME,
                recorded(self.forward_func, inputs, self.output, known, self._constants, self.tap) as recording,
            ):
                self.choose(recording, target)
                return compute(recording)
        except RuntimeError as error:
            refuse_mismatch(self.forward_func, inputs, error)
            raise

    def choose(self, recording: Recording, target: Any) -> None:
        """Select what is explained."""
        recording.select(target)


def check_model(model: Any) -> None:
    """
    Raises:
        InputError: for what cannot be called with inputs.
    """
    if isinstance(model, type) or not callable(model):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise InputError(f"model: expected a torch.nn.Module or a function around one, got {got}")


def check_number(name: str, value: Any) -> None:
    """
    Raises:
        InputError: if the option that counts attention calls is no whole number.
    """
    if not isinstance(value, int):
        raise InputError(f"{name}={value!r}: expected a whole number")


def check_interpolation(interpolate: str) -> None:
    """
    Raises:
        InputError: for an unknown mode.
    """
    if interpolate not in INTERPOLATIONS:
        raise InputError(f"interpolate={interpolate!r}: choose one of {', '.join(INTERPOLATIONS)}")


def finished(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Detached and contiguous, as Captum's consumers need it; in the dtype of the floating input ``like``.

    Raises:
        UnsupportedModelError: if the result is not finite.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise UnsupportedModelError(
            "the relevance is not finite: activations of this model overflow or cancel exactly; try float64 "
            "(model.double())"
        )
    dtype = like.dtype if like is not None and like.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype).contiguous()


def parsed(inputs: Any, additional_forward_args: Any) -> Inputs:
    """The arguments, checked."""
    return parse(inputs, additional_forward_args)


def joined(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Results of single examples as one batch."""
    return {name: torch.cat([r[name] for r in results]) for name in results[0]}

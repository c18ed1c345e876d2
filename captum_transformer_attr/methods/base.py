"""What all attribution classes share: Captum's contract around one recorded forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import captum_transformer_attr.ops  # noqa: F401  registers the operations
from captum_transformer_attr.captum_compat import GradientAttribution, log_usage
from captum_transformer_attr.errors import InputError, UnsupportedModelError
from captum_transformer_attr.methods.scored import Scored, join_scored
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

    def score(self, recording: Recording, delta: bool) -> Scored:
        """Explain the selected outputs of a recording; with ``delta`` also what nothing accounts for."""
        raise NotImplementedError

    def join(self, results: list[Any]) -> Any:
        """Results of ``score`` for single examples as one batch."""
        return join_scored(results)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        return_convergence_delta: bool = False,
        interpolate: str = "bilinear",
    ) -> Any:
        """Scores in the inputs' shape.

        Args:
            inputs: a Tensor, a tuple of Tensors (positional arguments) or a mapping (keyword arguments); floats and
                token ids alike.
            target: as in Captum: None, int, list, tensor, tuple(s); or a ``Contrast`` of two targets.
            additional_forward_args: further positional arguments of the model.
            return_convergence_delta: also return ``(N,)``: relevance sent back minus relevance that arrived at inputs
                and parameters.
            interpolate: how token scores are spread over pixels, ``"bilinear"`` or ``"nearest"``, 0 where no token
                reads them; relevance of pixels needs no interpolation.

        Returns:
            Tensor, tuple or dict as ``inputs``, each of its input's shape: float, detached, contiguous. Images
            under token-level methods: every pixel has its token's score, equal over channels. Ids ``(N, T)``: one score
            per id. With ``return_convergence_delta`` a pair.

        Raises:
            UnsupportedOperationError: if an operation has no rule.
            InputError: for an argument that cannot be used.
        """
        check_interpolation(interpolate)
        given = parsed(inputs, additional_forward_args)
        scored = self.explain(
            given, target, lambda recording: self.score(recording, return_convergence_delta), self.join
        )
        spread = scored.spread(given, interpolate)
        result = given.pack({name: finished(scores, given.values[name]) for name, scores in spread.items()})
        return (result, scored.delta) if return_convergence_delta else result

    def attribute_tokens(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> Any:
        """Scores per token, in the scale of the published formula, before they are spread over the input.

        Args:
            inputs, target, additional_forward_args: as in ``attribute``.

        Returns:
            Same container as ``inputs``: images ``(N, h, w)`` (finest stage, no class or register token), ids ``(N,
            T)``, feature sequences ``(N, K)``.
        """
        given = parsed(inputs, additional_forward_args)
        scored = self.explain(given, target, lambda recording: self.score(recording, False), self.join)
        return given.pack({name: finished(t.scores, given.values[name]) for name, t in scored.tokens.items()})

    def attribute_tokens_each(
        self, inputs: Any, targets: Sequence[Any], additional_forward_args: Any = None
    ) -> list[Any]:
        """Token scores for several targets of the same inputs: several detections of one image, every position of a
        generated text. They share one forward.

        Args:
            inputs, additional_forward_args: as in ``attribute``.
            targets: targets as in ``attribute``, each for the whole batch.

        Returns:
            For every target what ``attribute_tokens`` returns.

        Raises:
            InputError: for no target at all.
        """
        if not isinstance(targets, (list, tuple)):
            raise InputError(f"targets: expected a list of targets, got {type(targets).__name__}")
        if not targets:
            raise InputError("targets is empty; give at least one")
        given = parsed(inputs, additional_forward_args)
        found = self.explain_each(given, targets, lambda recording: self.score(recording, False), self.join)
        return [given.pack({n: finished(t.scores, given.values[n]) for n, t in s.tokens.items()}) for s in found]

    # ------------------------------------------------------------------ computation
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
        # A function of the output might hold the model, which would then never be let go.
        if isinstance(self.forward_func, nn.Module) and not callable(self.output):
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

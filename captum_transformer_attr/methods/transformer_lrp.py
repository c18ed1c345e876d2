"""TransformerLRP: relevance propagated to the input itself, by the rules of CVPR 2021, AttnLRP, conservative
propagation or LibraGrad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from captum.log import log_usage
from torch import Tensor, nn

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.flow.geometry import TokenScores, pooled_scores
from captum_transformer_attr.methods.base import TransformerAttribution, check_interpolation, finished, joined, parsed
from captum_transformer_attr.methods.layer_relevance import LayerRelevance, join_layer_relevance, layer_relevance
from captum_transformer_attr.methods.propagation import EXPLAINED, leaf_factors, propagate, start_of
from captum_transformer_attr.recording.outputs import OutputChoice
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.recording.signal import Signal
from captum_transformer_attr.rules.linear_rules import Composite
from captum_transformer_attr.rules.relevance_tables import composite_of, table


@dataclass(frozen=True)
class Explained:
    """Relevance and token scores of every input, what parameters took, what nothing accounts for."""

    relevance: dict[str, Tensor]
    tokens: dict[str, TokenScores]
    parameters: dict[str, Tensor]
    delta: Tensor | None


class TransformerLRP(TransformerAttribution):
    """Layer-wise relevance down to every pixel, feature or token id.

    ``deep_taylor`` (Chefer et al., CVPR 2021) sends a total of 1; ``attnlrp`` (Achtibat et al. 2024), ``cp`` (Ali et
    al. 2022) and ``libra`` (Mehri et al. 2025) send the selected output's value, as R = x ⊙ g with a modified gradient
    g. Unlike the token-level methods it needs no attention: any recorded model will do.

    Args:
        model: any module, or a function around one; used as it is, in evaluation mode, and left as found.
        rules: ``"deep_taylor"``, ``"attnlrp"``, ``"cp"`` or ``"libra"``.
        composite: which linear map gets which rule: a name (``"epsilon_plus"``, ``"attnlrp_vision"``, …) or a
            ``Composite``; None for the table's own.
        explained: ``"logit"``, or ``"probability"`` for the softmax probability over the output's last axis (not with
            ``deep_taylor``).
        output: name or function that chooses the explained tensor of a structured output.

    Raises:
        InputError: for an unknown option.

    Example:
        >>> relevance = TransformerLRP(model, rules="attnlrp").attribute(pixels, target=281)  # (N, C, H, W)
    """

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        rules: str = "deep_taylor",
        composite: str | Composite | None = None,
        explained: str = "logit",
        output: OutputChoice = None,
    ) -> None:
        TransformerAttribution.__init__(self, model, output)
        self.rules, self.composite, self.explained = rules, composite_of(composite, rules), explained
        signal = self.signal()
        if explained not in EXPLAINED or (explained == "probability" and signal.carries == "relevance"):
            raise InputError(
                f"explained={explained!r}: choose one of {', '.join(EXPLAINED)}; "
                "'probability' needs rules that carry gradients"
            )

    def signal(self) -> Signal:
        """A new signal of the chosen table."""
        return table(self.rules, self.composite)

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
        """Relevance in the inputs' shape.

        Args:
            inputs: a Tensor, a tuple of Tensors (positional arguments) or a mapping (keyword arguments); floats and
                token ids alike.
            target: as in Captum: None, int, list, tensor, tuple(s); or a ``Contrast`` of two targets.
            additional_forward_args: further positional arguments of the model.
            return_convergence_delta: also return ``(N,)``: relevance sent back minus relevance that arrived at inputs
                and parameters.
            interpolate: accepted for all classes alike; relevance of pixels needs no interpolation.

        Returns:
            Tensor, tuple or dict as ``inputs``, each of its input's shape: float, detached, contiguous. Ids ``(N, T)``:
            the sum over their embedding. With ``return_convergence_delta`` a pair.

        Raises:
            UnsupportedOperationError: if an operation has no rule.
            InputError: for an argument that cannot be used.
        """
        check_interpolation(interpolate)
        given = parsed(inputs, additional_forward_args)
        explained = self.explain(
            given, target, lambda recording: self.compute(recording, return_convergence_delta), join_explained
        )
        result = given.pack({name: finished(r, given.values[name]) for name, r in explained.relevance.items()})
        return (result, explained.delta) if return_convergence_delta else result

    def attribute_tokens(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> Any:
        """Relevance per token: sums over patches and channels.

        Args:
            inputs, target, additional_forward_args: as in ``attribute``.

        Returns:
            Same container as ``inputs``: images ``(N, h, w)`` (finest stage), ids ``(N, T)``, feature sequences
            ``(N, K)``.
        """
        given = parsed(inputs, additional_forward_args)
        explained = self.explain(given, target, lambda recording: self.compute(recording, False), join_explained)
        return given.pack({name: finished(t.scores, given.values[name]) for name, t in explained.tokens.items()})

    def attribute_tokens_each(
        self, inputs: Any, targets: Sequence[Any], additional_forward_args: Any = None
    ) -> list[Any]:
        """``attribute_tokens`` for several targets of the same inputs, which share one forward.

        Args:
            inputs, additional_forward_args: as in ``attribute``.
            targets: targets as in ``attribute``, each for the whole batch.

        Raises:
            InputError: for no target at all.
        """
        if not targets:
            raise InputError("targets is empty; give at least one")
        given = parsed(inputs, additional_forward_args)
        found = self.explain_each(given, targets, lambda recording: self.compute(recording, False), join_explained)
        return [given.pack({n: finished(t.scores, given.values[n]) for n, t in e.tokens.items()}) for e in found]

    def parameter_relevance(
        self, inputs: Any, target: Any = None, additional_forward_args: Any = None
    ) -> dict[str, Tensor]:
        """What did not reach the inputs: relevance of biases, norm shifts, positional embeddings and class tokens.

        Args:
            inputs, target, additional_forward_args: as in ``attribute``.

        Returns:
            Module path → ``(N,)``, in the order of the backward pass; together with the inputs' relevance it adds up to
            the explained output.
        """
        given = parsed(inputs, additional_forward_args)
        return self.explain(given, target, lambda recording: self.compute(recording, True), join_explained).parameters

    def relevance_by_layer(
        self, inputs: Any, target: Any = None, additional_forward_args: Any = None
    ) -> LayerRelevance:
        """Relevance block by block: of the residual stream, of every attention head, of the attention and MLP branches.

        Args:
            inputs, target, additional_forward_args: as in ``attribute``.

        Returns:
            A sequence of ``BlockRelevance`` in execution order; blocks are modules that stand in a list and contain an
            attention.
        """
        given = parsed(inputs, additional_forward_args)

        def compute(recording: Recording) -> LayerRelevance:
            signal = self.signal()
            return layer_relevance(recording, signal, start_of(recording, signal, self.explained))

        return self.explain(given, target, compute, join_layer_relevance)

    def compute(self, recording: Recording, accounting: bool) -> Explained:
        """One backward pass through a recording."""
        names = list(recording.inputs.leaves)
        signal = self.signal()
        leaves = [recording.inputs.leaves[n] for n in names]
        start = start_of(recording, signal, self.explained)
        result = propagate(recording, signal, start, leaves, leaf_factors(recording), accounting)
        relevance = dict(zip(names, result.relevance, strict=True))
        tokens = {name: tokens_of(recording, name, r) for name, r in relevance.items()}
        return Explained(relevance, tokens, result.parameters, result.delta)


def tokens_of(recording: Recording, name: str, relevance: Tensor) -> TokenScores:
    """Relevance of one input per token."""
    if recording.inputs.values[name].is_floating_point():
        return pooled_scores(recording, name, relevance)
    return TokenScores(relevance, tuple(range(1, relevance.ndim)))


def join_explained(results: list[Explained]) -> Explained:
    """Results of single examples as one batch."""
    first = results[0]
    tokens = {
        name: TokenScores(torch.cat([r.tokens[name].scores for r in results]), t.axes, t.stride)
        for name, t in first.tokens.items()
    }
    parameters = joined([r.parameters for r in results])
    deltas = [r.delta for r in results if r.delta is not None]
    return Explained(joined([r.relevance for r in results]), tokens, parameters, torch.cat(deltas) if deltas else None)

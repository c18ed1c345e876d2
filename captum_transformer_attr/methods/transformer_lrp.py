"""TransformerLRP: relevance propagated to the input itself, by the rules of CVPR 2021, AttnLRP, conservative
propagation or LibraGrad."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.flow.geometry import TokenScores, pooled_scores
from captum_transformer_attr.methods.base import TransformerAttribution, joined, parsed
from captum_transformer_attr.methods.layer_relevance import LayerRelevance, join_layer_relevance, layer_relevance
from captum_transformer_attr.methods.propagation import EXPLAINED, leaf_factors, propagate, start_of
from captum_transformer_attr.methods.scored import Scored, join_scored
from captum_transformer_attr.recording.inputs import Inputs
from captum_transformer_attr.recording.outputs import OutputChoice
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.recording.signal import Signal
from captum_transformer_attr.rules.linear_rules import Composite
from captum_transformer_attr.rules.relevance_tables import composite_of, table


@dataclass(frozen=True, kw_only=True)
class Explained(Scored):
    """Also the relevance of every input's elements, and what parameters took."""

    relevance: dict[str, Tensor]
    parameters: dict[str, Tensor]

    def spread(self, inputs: Inputs, interpolate: str) -> dict[str, Tensor]:
        return self.relevance


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
        return self.explain(given, target, lambda recording: self.score(recording, True), join_explained).parameters

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

    def join(self, results: list[Explained]) -> Explained:
        return join_explained(results)

    def score(self, recording: Recording, delta: bool) -> Explained:
        """One backward pass through a recording."""
        names = list(recording.inputs.leaves)
        signal = self.signal()
        leaves = [recording.inputs.leaves[n] for n in names]
        start = start_of(recording, signal, self.explained)
        result = propagate(recording, signal, start, leaves, leaf_factors(recording), delta)
        relevance = dict(zip(names, result.relevance, strict=True))
        tokens = {name: tokens_of(recording, name, r) for name, r in relevance.items()}
        return Explained(tokens, result.delta, relevance=relevance, parameters=result.parameters)


def tokens_of(recording: Recording, name: str, relevance: Tensor) -> TokenScores:
    """Relevance of one input per token."""
    if recording.inputs.values[name].is_floating_point():
        return pooled_scores(recording, name, relevance)
    return TokenScores(relevance, tuple(range(1, relevance.ndim)))


def join_explained(results: list[Explained]) -> Explained:
    """Results of single examples as one batch."""
    scored = join_scored(list(results))
    relevance, parameters = joined([r.relevance for r in results]), joined([r.parameters for r in results])
    return Explained(scored.tokens, scored.delta, relevance=relevance, parameters=parameters)

"""TokenStatisticsRelevance: Nguyen, Lee and Kim, Inspecting Explainability of Transformer Models with Additional
Statistical Information, 2023."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.flow.rollout import Passed, passed, roll_out, terminal_sums
from captum_transformer_attr.flow.statistics import Correction, StatisticsFlow, block_norms, merging_layers
from captum_transformer_attr.methods.token_level import TokenAttribution
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.ops.residual import Sum
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording.node import Node
from captum_transformer_attr.recording.outputs import OutputChoice
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.recording.signal import gradient_signal

STATISTICS = ("std", "none")
SIDES = ("key", "query", "row", "none")
STARTS = ("uniform", "gradient_x_activation")
MERGINGS = ("equal", "activation")


class TokenStatisticsRelevance(TokenAttribution):
    """Gradient × attention rolled out and corrected by layer-norm statistics (arXiv 2311.11378).

    For hierarchical and plain transformers.

    The paper's full text was not at hand: this is a re-derivation from the block's equation. With A and σ frozen, a
    pre-norm block is y_i = x_i + Σ_j Σ_h (A^h_ij / σ_j) W^h diag(γ)(I − 11ᵀ/C) x_j + const, hence R = I + Ā diag(1/σ̂)
    with Ā = E_h[(∇A ⊙ A)⁺] and σ̂_j = σ_j / mean_j σ_j, σ_j the standard deviation over channels of token j at the
    block's first layer norm.

    Args:
        model: any module built on softmax attention.
        statistic: ``"std"``, the standard deviation over channels (the root mean square for RMS norms); ``"none"`` puts
            1 in its place, which with ``side="row"`` leaves the row normalisation alone.
        side: ``"key"``: r ← r + (r Ā)/σ̂. ``"query"``: r ← r + (r/σ̂) Ā. ``"row"``: rows of diag(σ̂) + Ā divided by
            their sums. ``"none"``: r ← r + r Ā, without statistics. A norm behind the attention (Swin-V2: R = I +
            diag(1/σ̂) Ā) or behind the residual sum (BERT: R = diag(1/σ̂)(I + Ā)) divides whatever passes it, for every
            side but ``"none"``.
        merging: a merged token's relevance goes to its children in ``"equal"`` shares or by ``"activation"`` size.
        start: the read-out rows count ``"uniform"`` or by ``"gradient_x_activation"``: relu(Σ_c x ∂y/∂x) at the last
            residual sum behind an attention.
        start_layer: attention calls before this one count as identity.
        output: name or function that chooses the explained tensor of a structured output.

    The default was chosen by these figures (``benchmarks/faithfulness.py``; tables under ``docs/results``), 300
    pictures each: boxes of Tiny ImageNet (task ``vit-statistics``), removal of pixels on the ViT (``vit-imagenet``) and
    the Swin (``swin-statistics``), positive ↓ / negative ↑. On ViT-Tiny the key side lifts the plain rule's pointing
    to the level of TransformerRelevance, removal of pixels sees no difference; on the Swin the statistics change
    little, and what ``"row"`` gains there its row normalisation gains alone (``statistic="none"``: 23.0 / 40.2).

    ======================  ============  ===========  ============  =============  ============  ============
    variant                 ViT pointing  ViT corners  ViT removal   Swin pointing  Swin removal  Swin corners
    ======================  ============  ===========  ============  =============  ============  ============
    ``side="none"``         0.735         1.003        10.9 / 48.1   0.810          24.9 / 38.5   0.816
    ``side="key"``          0.832         0.859        11.3 / 47.9   0.808          24.9 / 38.1   0.805
    ``side="query"``        0.758         0.980        11.1 / 48.7   0.812          24.8 / 38.1   0.813
    ``side="row"``          0.790         0.936        11.0 / 48.8   0.782          23.5 / 40.7   0.703
    TransformerRelevance    0.795         0.764        11.0 / 45.8   0.766          26.9 / 38.5   0.863
    ======================  ============  ===========  ============  =============  ============  ============

    Example:
        >>> heat = TokenStatisticsRelevance(swin).attribute(pixels, target=3)  # (N, C, H, W)
    """

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        statistic: str | None = "std",
        side: str | None = "key",
        merging: str = "equal",
        start: str = "uniform",
        start_layer: int = 0,
        output: OutputChoice = None,
    ) -> None:
        TokenAttribution.__init__(self, model, start_layer, False, output)
        side, statistic = side or "none", statistic or "none"
        for name, value, known in (
            ("statistic", statistic, STATISTICS),
            ("side", side, SIDES),
            ("merging", merging, MERGINGS),
            ("start", start, STARTS),
        ):
            if value not in known:
                raise InputError(f"{name}={value!r}: choose one of {', '.join(known)}")
        self.statistic, self.side, self.merging, self.start = statistic, side, merging, start

    def weights(self, maps: Maps, node: Attention, rows: slice) -> Tensor:
        return (maps.gradient(node, rows) * node.probabilities(rows)).clamp_(min=0)

    def roll_out(
        self, recording: Recording, maps: Maps, leaves: list[Tensor], watched: Collection[Node]
    ) -> tuple[Passed, Passed]:
        weights, terminals, correction = (
            partial(self.weights, maps),
            terminal_sums(recording),
            self.correction(recording),
        )

        def passed_by(active: list[Attention], trunk_only: bool) -> Passed:
            signal = StatisticsFlow(weights, active, terminals, trunk_only, correction)
            return passed(recording, signal, leaves, watched)

        return roll_out(self.active_sets(recording), passed_by, self.normalize)

    def correction(self, recording: Recording) -> Correction:
        """What the options make of a recording's statistics."""
        return Correction(
            block_norms(recording),
            self.side,
            neutral=self.statistic == "none",
            merging_layers=merging_layers(recording) if self.merging == "activation" else (),
            starts=start_weights(recording) if self.start == "gradient_x_activation" else {},
        )


def start_weights(recording: Recording) -> dict[Sum, Tensor]:
    """relu(Σ_c x ∂y/∂x) per token at the last residual sums, broadcastable against them."""
    terminals = terminal_sums(recording)
    outputs = [recording.recorder.captured[node] for node in terminals]
    gradients = recording.send(gradient_signal(), outputs) if outputs else []
    result = {}
    for node, x, g in zip(terminals, outputs, gradients, strict=True):
        axes = lay.feature_axes(node.layout) or (-1,)
        result[node] = torch.clamp((x.value * g).sum(axes, keepdim=True), min=0)
    return result

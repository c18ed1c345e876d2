"""AttCAT: Qiang et al., AttCAT: Explaining Transformers via Attentive Class Activation Tokens, NeurIPS 2022."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.methods.layer_relevance import innermost
from captum_transformer_attr.methods.layer_sum import Deposit, LayerSumAttribution, of_blocks, read_out_attention
from captum_transformer_attr.methods.records import block_outputs
from captum_transformer_attr.methods.token_level import TokenAttribution
from captum_transformer_attr.recording.outputs import OutputChoice
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.recording.signal import gradient_signal


class AttCAT(LayerSumAttribution):
    """Σ over blocks of E_h[α_i] · Σ_c (∇h_i ⊙ h_i): a block's output tokens times their plain gradient, weighted by the
    read-out row's attention.

    Scores are signed. Needs blocks whose self-attention sees the block's own tokens in their order: no windows, no
    merging.

    Args:
        model: any module built on softmax attention; used as it is and left as found.
        output: name or function that chooses the explained tensor of a structured output.
    """

    needs_gradient = False

    def __init__(self, model: nn.Module | Callable[..., Any], output: OutputChoice = None) -> None:
        TokenAttribution.__init__(self, model, 0, False, output)

    def deposits(self, recording: Recording, maps: Maps) -> list[Deposit]:
        outputs = innermost(block_outputs(recording))
        rows = read_out_attention(recording)
        gradients = recording.send(gradient_signal(), list(outputs.values()))
        found = []
        for (name, output), g in zip(outputs.items(), gradients, strict=True):
            for node in of_blocks(recording, [name.partition("#")[0]])[name.partition("#")[0]]:
                if node in rows:
                    found.append(Deposit(output, output.value * g * matched(rows[node], output.value, node.path)))
        if not found:
            raise InputError(
                "AttCAT: no block with a self-attention that the read-out row takes part in; use TransformerLRP"
            )
        return found


def matched(row: Tensor, output: Tensor, path: str) -> Tensor:
    """A row of attention ``(B, keys)`` shaped for a block's output ``(B, N, C)``.

    Raises:
        InputError: if the keys are not the block's tokens.
    """
    if row.shape != output.shape[:2]:
        raise InputError(
            f"AttCAT: the attention in module '{path}' sees {tuple(row.shape)} keys, its block has tokens "
            f"{tuple(output.shape[:2])}; windows and merged tokens need another method"
        )
    return row[..., None]

"""FullGradPlus: activation × modified gradient of every layer, added up (Mehri et al., LibraGrad, CVPR 2025)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.methods.layer_relevance import innermost
from captum_transformer_attr.methods.layer_sum import Deposit, LayerSumAttribution
from captum_transformer_attr.methods.records import block_outputs
from captum_transformer_attr.methods.token_level import TokenAttribution
from captum_transformer_attr.recording.outputs import OutputChoice
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.rules.relevance_tables import TABLES, table


class FullGradPlus(LayerSumAttribution):
    """Σ over blocks of the relevance of their output's tokens: x ⊙ g summed over channels, g by the ``libra`` rules
    (FullGrad+).

    Every layer sees the explained class through what is still ahead of it; adding them up evens out where single layers
    are noisy.

    Args:
        model: any module built on softmax attention; used as it is and left as found.
        rules: a table of ``TransformerLRP``.
        output: name or function that chooses the explained tensor of a structured output.

    Raises:
        InputError: for an unknown table.
    """

    needs_gradient = False

    def __init__(
        self, model: nn.Module | Callable[..., Any], rules: str = "libra", output: OutputChoice = None
    ) -> None:
        TokenAttribution.__init__(self, model, 0, False, output)
        if rules not in TABLES:
            raise InputError(f"rules={rules!r}: choose one of {', '.join(TABLES)}")
        self.rules = rules

    def deposits(self, recording: Recording, maps: Maps) -> list[Deposit]:
        outputs = list(innermost(block_outputs(recording)).values())
        if not outputs:
            raise InputError("FullGradPlus: the model has no list of blocks with attention; use TransformerLRP")
        signal = table(self.rules)
        arrived: list[Tensor] = recording.send(signal, outputs)
        if signal.carries == "gradient":
            arrived = [x.value * g for x, g in zip(outputs, arrived, strict=True)]
        return [Deposit(x, r) for x, r in zip(outputs, arrived, strict=True)]

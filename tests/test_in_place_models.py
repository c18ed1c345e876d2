"""Models that go on in the memory of their activations, beside the same models that do not."""

import pytest
import torch
from tiny_models import randomise
from torch import nn

from captum_transformer_attr import (
    AttCAT,
    AttentionGradCam,
    AttentionRelevance,
    AttentionRollout,
    FullGradPlus,
    LeGrad,
    PartialLRP,
    TokenStatisticsRelevance,
    TransformerLRP,
    TransformerRelevance,
)

C, N, CLASSES = 16, 6, 4
TOKENS = torch.randn(2, N, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Written(nn.Module):
    """A block that goes on in the memory of what it has, or in new memory."""

    def __init__(self, fused, in_place):
        super().__init__()
        self.qkv, self.out, self.local = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.Linear(C, C)
        self.norm = nn.LayerNorm(C)
        self.fused, self.in_place = fused, in_place

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.mT / C**0.5).softmax(-1) @ v
        gate, bias = v.sigmoid(), self.local(v)
        if self.in_place:
            y *= gate
            y += bias
            y.mul_(0.5)
            x += self.out(y)  # the block before gave this memory
            return x
        return x + self.out((y * gate + bias) * 0.5)


class Writing(nn.Module):
    def __init__(self, fused, in_place):
        super().__init__()
        self.first = nn.Linear(C, C)
        self.blocks = nn.ModuleList(Written(fused, in_place) for _ in range(3))
        self.head = nn.Linear(C, CLASSES)

    def forward(self, x):
        x = self.first(x)
        for one in self.blocks:
            x = one(x)
        return self.head(x[:, 0])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        TransformerRelevance,
        AttentionRelevance,
        AttentionRollout,
        TransformerLRP,
        AttentionGradCam,
        LeGrad,
        PartialLRP,
        FullGradPlus,
        AttCAT,
        TokenStatisticsRelevance,
        lambda model: TokenStatisticsRelevance(model, start="gradient_x_activation"),
    ],
)
def test_what_a_model_writes_into_an_activation_comes_after_it(method, fused):
    """``y *= gate`` on an attention's output, ``x += y`` on the output of the block before."""
    got, want = (
        method(randomise(Writing(fused, in_place).double())).attribute(TOKENS, 1) for in_place in (True, False)
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert want.abs().max() > 0


@pytest.mark.parametrize("rules", ["deep_taylor", "cp"])
def test_layers_of_a_model_that_writes_into_their_outputs(rules):
    got, want = (
        TransformerLRP(randomise(Writing(False, in_place).double()), rules=rules).relevance_by_layer(TOKENS, 1)
        for in_place in (True, False)
    )
    assert len(got.blocks) == len(want.blocks) == 3
    for a, b in zip(got.blocks, want.blocks, strict=True):
        torch.testing.assert_close(a.stream, b.stream, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(a.attention, b.attention, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fused", [False, True])
def test_streams_of_a_model_that_writes_into_its_activations(fused):
    got, want = (
        AttentionRelevance(randomise(Writing(fused, in_place).double())).attention_records(TOKENS, 1)
        for in_place in (True, False)
    )
    assert [(r.query_stream, r.key_stream, r.name) for r in got] == [
        (r.query_stream, r.key_stream, r.name) for r in want
    ]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.gradient, b.gradient, rtol=1e-12, atol=1e-14)

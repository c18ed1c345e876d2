"""Linear attention, Q (softmax(K)ᵀ V), and linear maps inside patches, rolled out by hand.

Small denominators and fused sums of products by formula.
"""

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm
from timm.layers.lambda_layer import LambdaLayer
from tiny_models import WatchedAttention, randomise
from torch import nn

from captum_transformer_attr import AttentionRollout, TransformerLRP, TransformerRelevance
from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.ops.division import STABILISER, divide

WIDTH, HEADS, TOKENS = 8, 2, 9


class FactorAttention(nn.Module):
    """CoaT's factorised attention; ``local`` adds its position encoding Q ∘ conv(V).

    ``maps``: softmax over tokens, ``(N, heads, channels, tokens)``.
    """

    def __init__(self, local):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH) if local else None
        self.maps = []

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        pooling = k.softmax(2).transpose(-1, -2)
        self.maps.append(pooling.detach())
        y = 0.5 * (q @ (pooling @ v))
        if self.conv is not None:
            around = self.conv(v.transpose(-1, -2).reshape(b, c, n)).reshape(b, HEADS, c // HEADS, n)
            y = y + q * around.transpose(-1, -2)
        return x + self.proj(y.transpose(1, 2).reshape(b, n, c))


class Model(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.embed, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x)).mean(1))


def conserved_per_example(model, x):
    method = TransformerRelevance(model)
    scores, delta = method.attribute(x, 1, return_convergence_delta=True)
    assert delta.abs().max() < 1e-6
    assert torch.allclose(scores[:1], method.attribute(x[:1], 1), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("local", [False, True])
def test_factorised_attention_rolled_out_by_hand(local):
    """Every token reads the same tokens, Ā = 1 mᵀ with m the mean over heads and channels of softmax(K)ᵀ.

    Queries bring no identity of their own.
    """
    model = randomise(Model([FactorAttention(local), FactorAttention(local)]).double())
    x = torch.randn(2, TOKENS, 3, dtype=torch.float64)
    model(x)
    eye = torch.eye(TOKENS, dtype=torch.float64)
    first, second = (eye + block.maps[0].mean((1, 2))[:, None].expand(-1, TOKENS, -1) for block in model.blocks)
    got = AttentionRollout(model, normalize=False).attribute_tokens(x, 1)
    assert torch.allclose(got, (second @ first - eye).mean(1), rtol=1e-10, atol=0)
    conserved_per_example(model, x)


class LambdaBlock(nn.Module):
    """timm's lambda layer on a 3 × 3 image inside a residual; keeps softmax(K)."""

    def __init__(self):
        super().__init__()
        self.layer = LambdaLayer(WIDTH, num_heads=HEADS, dim_head=4, r=3)

    def forward(self, x):
        b, n, c = x.shape
        image = x.transpose(1, 2).reshape(b, c, 3, 3)
        with torch.no_grad():
            keys = self.layer.qkv(image)[:, HEADS * 4 : HEADS * 4 + 4]
            self.map = keys.reshape(b, 4, n).softmax(-1)
        return x + self.layer(image).flatten(2).transpose(1, 2)


def test_lambda_layer_rolled_out_by_hand():
    """The content lambda is a linear attention; the position lambda, a convolution, is local and counts as identity."""
    model = randomise(Model([LambdaBlock()]).double())
    x = torch.randn(2, TOKENS, 3, dtype=torch.float64)
    model(x)
    got = AttentionRollout(model, normalize=False).attribute_tokens(x, 1)
    assert torch.allclose(got, model.blocks[0].map.mean(1), rtol=1e-10, atol=0)
    conserved_per_example(model, x)


class Blocks(nn.Module):
    """Linear maps over rows and columns of 2 × 2 blocks (a cosine transform), then attention among the 3 × 3 blocks."""

    def __init__(self, whole=False):
        super().__init__()
        self.rows, self.columns, self.mix = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(TOKENS, TOKENS)
        self.embed, self.attend, self.head, self.whole = (
            nn.Linear(4, WIDTH),
            WatchedAttention(WIDTH),
            nn.Linear(WIDTH, 4),
            whole,
        )

    def forward(self, x):
        x = x.reshape(len(x), 3, 2, 3, 2).permute(0, 1, 3, 2, 4)
        x = self.columns(self.rows(x).transpose(-1, -2)).flatten(3).flatten(1, 2)
        x = self.embed(x)
        if self.whole:
            x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.attend(x)).mean(1))


def test_linear_map_inside_patches_is_local():
    model = randomise(Blocks().double())
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    model(x)
    got = AttentionRollout(model, normalize=False).attribute_tokens(x, 1)
    assert torch.allclose(got.flatten(1), model.attend.maps[0].mean(1), rtol=1e-10, atol=0)
    conserved_per_example(model, x)


def test_linear_map_over_all_tokens_is_refused_by_name():
    with pytest.raises(UnsupportedOperationError, match="'mix' mixes tokens by a linear layer"):
        TransformerRelevance(randomise(Blocks(whole=True))).attribute(torch.randn(1, 1, 6, 6), 1)


def test_global_response_norm_is_a_sum_and_a_gate():
    """``x + weight · x · n(x)``: R splits between x and its rescaled self as |Σ| : |Σ|, and both parts are all x's."""
    model = randomise(nn.Sequential(GlobalResponseNorm(3), nn.Flatten(), nn.Linear(12, 1, bias=False)).double())
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64)
    grn, linear = model[0].requires_grad_(False), model[2].requires_grad_(False)
    grn.bias.zero_()
    size = x.norm(dim=(1, 2), keepdim=True)
    extra = grn.weight * x * size / (size.mean(-1, keepdim=True) + grn.eps)
    y = x + extra
    z = y.reshape(1, 12) * linear.weight
    r = (z.clamp(min=0) / z.clamp(min=0).sum()).reshape(y.shape)
    share = r / y
    a, b = x * share, extra * share
    total = a.sum().abs() + b.sum().abs()
    expected = a * (a.sum().abs() / total * r.sum() / a.sum()) + b * (b.sum().abs() / total * r.sum() / b.sum())
    got = TransformerLRP(model).attribute(x, 0)
    assert torch.allclose(got, expected, rtol=1e-6)


def test_addcmul_is_its_parts():
    """Live in every position, and scaled: gradient and relevance are those of the sum written out."""

    class Fused(nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.a, self.b, self.fused = nn.Linear(4, 4), nn.Linear(4, 4), fused

        def forward(self, x):
            a, b = self.a(x), self.b(x).sigmoid()
            return torch.addcmul(x, a, b, value=0.5) if self.fused else x + 0.5 * (a * b)

    x = torch.randn(2, 4, dtype=torch.float64)
    fused, plain = (TransformerLRP(randomise(Fused(f).double())).attribute(x, 1) for f in (True, False))
    assert torch.allclose(fused, plain, rtol=1e-12, atol=1e-12)


def test_division_by_small_numbers_conserves_relevance():
    """The published stabiliser where a denominator is large beside it.

    In float64 nothing is lost where it is small; 0 where it is 0.
    """
    b = torch.tensor([2.0, 0.1, 1e-5, 1e-7, -1e-9, 1e-25, 1e-310, 0.0], dtype=torch.float64)
    got = divide(torch.ones(8, dtype=torch.float64), b)
    assert torch.equal(got[:3], 1 / (b[:3] + STABILISER))
    assert torch.equal(got[3:6], 1 / b[3:6])
    assert torch.equal(got[6:], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(divide(torch.ones(8), b.float()), torch.where(b.float() == 0, 0, 1 / (b.float() + STABILISER)))

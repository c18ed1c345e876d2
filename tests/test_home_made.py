"""Models that belong to no library's zoo, each against the formulas written out in ``hand_relevance.py``."""

import math

import einops
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hand_relevance import Layer, transformer_relevance
from tiny_models import randomise
from torch import nn

from captum_transformer_attr import (
    AttentionRelevance,
    AttentionRollout,
    TransformerLRP,
    TransformerRelevance,
    UnsupportedOperationError,
)
from captum_transformer_attr.recording.inputs import parse
from captum_transformer_attr.recording.session import recorded
from captum_transformer_attr.recording.signal import gradient_signal

C, H, N, CLASSES = 16, 2, 6, 4
TOKENS = torch.randn(2, N, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def weights(module):
    """Weight and bias, of a norm also its epsilon."""
    found = (module.weight.detach(), None if module.bias is None else module.bias.detach())
    return (*found, module.eps) if isinstance(module, nn.LayerNorm) else found


def check(model, inputs, wanted, target=1, spare=0):
    """Token scores, conservation, and that a batch is its examples.

    ``spare``: class tokens in front that are no input.
    """
    method = TransformerRelevance(model)
    tokens = method.attribute_tokens(inputs, target).flatten(1)
    _, delta = method.attribute(inputs, target, return_convergence_delta=True)
    assert delta.abs().max() < 1e-6
    for i in range(len(inputs)):
        want, reached = wanted(i)
        assert want.abs().max() > 0 and abs(float(reached.sum()) - 1) < 1e-12
        torch.testing.assert_close(tokens[i], want[spare:], rtol=1e-5, atol=1e-6 * float(want.abs().max()))
        alone = method.attribute_tokens(inputs[i : i + 1], target).flatten(1)
        torch.testing.assert_close(tokens[i : i + 1], alone, rtol=1e-8, atol=1e-12)


# ---------------------------------------------------------------------- torch.nn.TransformerEncoder
def encoder_layer(m):
    attention = m.self_attn
    qkv = (attention.in_proj_weight.detach(), attention.in_proj_bias.detach())
    parts = map(weights, (attention.out_proj, m.norm1, m.norm2, m.linear1, m.linear2))
    return Layer(qkv, *parts, attention.num_heads, m.norm_first, F.gelu if m.activation is F.gelu else F.relu)


class Encoder(nn.Module):
    """nn.TransformerEncoder and a classifier of the first token or of the mean."""

    def __init__(self, norm_first, batch_first, activation, pooled):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            C, H, 24, activation=activation, batch_first=batch_first, norm_first=norm_first
        )
        final = nn.LayerNorm(C) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, 2, norm=final)
        self.head, self.batch_first, self.pooled = nn.Linear(C, CLASSES), batch_first, pooled

    def forward(self, x, padding=None):
        y = self.encoder(x if self.batch_first else x.transpose(0, 1), src_key_padding_mask=padding)
        y = y if self.batch_first else y.transpose(0, 1)
        return self.head(y.mean(1) if self.pooled else y[:, 0])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder(norm_first, batch_first, activation):
    model = randomise(Encoder(norm_first, batch_first, activation, pooled=activation == "gelu").double())
    layers = [encoder_layer(m) for m in model.encoder.layers]
    final = weights(model.encoder.norm) if norm_first else None
    read = "mean" if model.pooled else 0
    check(model, TOKENS, lambda i: transformer_relevance(layers, TOKENS[i], read, weights(model.head), 1, final))


@pytest.mark.parametrize("norm_first", [True, False])
def test_padding_of_the_fast_path(norm_first):
    """In evaluation torch packs padded batches into nested tensors.

    The explanation of a short example is that of the example without padding.
    """
    model = randomise(Encoder(norm_first, True, "relu", pooled=False).double())
    padding = torch.zeros(2, N, dtype=torch.bool)
    padding[1, 4:] = True
    method = TransformerRelevance(model)
    got = method.attribute_tokens(TOKENS, 1, padding)
    assert (got[1, 4:] == 0).all() and got[1].abs().max() > 0
    short = method.attribute_tokens(TOKENS[1:, :4], 1, padding[1:, :4])
    torch.testing.assert_close(got[1:, :4], short, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(got[:1], method.attribute_tokens(TOKENS[:1], 1), rtol=1e-8, atol=1e-12)


class EncoderDecoder(nn.Module):
    def __init__(self, norm_first, batch_first):
        super().__init__()
        self.transformer = nn.Transformer(
            C, H, 2, 2, 24, activation="gelu", batch_first=batch_first, norm_first=norm_first
        )
        self.head, self.batch_first = nn.Linear(C, CLASSES), batch_first

    def forward(self, source, asked):
        causal = nn.Transformer.generate_square_subsequent_mask(asked.shape[1], dtype=asked.dtype)
        if not self.batch_first:
            source, asked = source.transpose(0, 1), asked.transpose(0, 1)
        y = self.transformer(source, asked, tgt_mask=causal)
        return self.head(y[:, -1] if self.batch_first else y[-1])


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_decoder(norm_first):
    """Axis orders agree, relevance is conserved, a batch is its examples, no decoder token sees a later one."""
    first, last = (randomise(EncoderDecoder(norm_first, order).double()) for order in (True, False))
    last.load_state_dict(first.state_dict())
    inputs = (TOKENS, TOKENS[:, :4].flip(1) * 0.5)
    for method_class in (TransformerRelevance, AttentionRelevance):
        got, delta = method_class(first).attribute(inputs, 2, return_convergence_delta=True)
        other = method_class(last).attribute(inputs, 2)
        assert delta.abs().max() < 1e-6
        for a, b in zip(got, other, strict=True):
            assert a.abs().amax((1, 2)).min() > 0
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
        for i in range(2):
            alone = method_class(first).attribute(tuple(t[i : i + 1] for t in inputs), 2)
            torch.testing.assert_close(got[0][i : i + 1], alone[0], rtol=1e-8, atol=1e-12)
            torch.testing.assert_close(got[1][i : i + 1], alone[1], rtol=1e-8, atol=1e-12)
    maps = [r.attention for r in AttentionRelevance(first).attention_records(inputs, 2)]
    own = [a for a in maps if a.shape[-2:] == (4, 4)]
    assert len(maps) == 6 and len(own) == 2 and all((a.triu(1) == 0).all() for a in own)


# ---------------------------------------------------------------------- written by hand, in every style
class Attention(nn.Module):
    """Self-attention; a subclass says how maps are made and applied."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C)

    def forward(self, x):
        return self.out(self.mix(*self.qkv(x).chunk(3, -1)))


class Fused(Attention):
    def mix(self, q, k, v):
        q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Einops(Attention):
    """As in lucidrains' ViT."""

    def mix(self, q, k, v):
        q, k, v = (einops.rearrange(t, "b n (h d) -> b h n d", h=H) for t in (q, k, v))
        dots = torch.matmul(q, k.transpose(-1, -2)) * (C // H) ** -0.5
        return einops.rearrange(torch.matmul(nn.Softmax(dim=-1)(dots), v), "b h n d -> b n (h d)")


class Einsum(Attention):
    def mix(self, q, k, v):
        q, k, v = (t.reshape(*t.shape[:-1], H, C // H) for t in (q, k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / (C // H) ** 0.5
        return torch.einsum("...hij,...jhd->...ihd", scores.softmax(-1), v).flatten(2)


class ByHand(Attention):
    """One head after the other, the softmax from exponentials."""

    def mix(self, q, k, v):
        mixed = []
        for a, b, c in zip(q.split(C // H, -1), k.split(C // H, -1), v.split(C // H, -1), strict=True):
            scores = (a @ b.mT) / (C // H) ** 0.5
            mixed.append(torch.softmax(scores, 2).bmm(c))
        return torch.cat(mixed, -1)


class TokensFirst(Attention):
    """Sequence-first in the middle of a batch-first model, scores transposed."""

    def mix(self, q, k, v):
        q, k, v = (t.transpose(0, 1).reshape(t.shape[1], len(t) * H, C // H).transpose(0, 1) for t in (q, k, v))
        scores = torch.baddbmm(torch.zeros((), dtype=q.dtype), q * (C // H) ** -0.5, k.mT, beta=0)
        y = torch.bmm(torch.softmax(scores, -1), v).transpose(0, 1)
        return y.reshape(y.shape[0], -1, C).transpose(0, 1)


def split_heads(*tensors):
    return [t.unflatten(-1, (H, -1)).transpose(1, 2) for t in tensors]


class Exponentials(Attention):
    """The softmax from exponentials over their sum."""

    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        e = torch.exp(q @ k.mT / (C // H) ** 0.5)
        return ((e / e.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)


class StableExponentials(Attention):
    """The largest score is taken off, without a gradient; the sum is applied as a factor."""

    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        scores = q @ k.mT / (C // H) ** 0.5
        e = (scores - scores.amax(-1, keepdim=True).detach()).exp()
        return ((e * (1 / e.sum(-1)).unsqueeze(-1)) @ v).transpose(1, 2).flatten(2)


class DividedLast(Attention):
    """As flash attention: the values are mixed before the sum divides."""

    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        e = torch.exp(q @ k.mT / (C // H) ** 0.5)
        return ((e @ v) / e.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)


class ShiftedScores(Attention):
    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        scores = q @ k.mT / (C // H) ** 0.5
        return ((scores - scores.max(-1, keepdim=True)[0]).softmax(-1) @ v).transpose(1, 2).flatten(2)


class LogSoftmax(Attention):
    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        return ((q @ k.mT / (C // H) ** 0.5).log_softmax(-1).exp() @ v).transpose(1, 2).flatten(2)


class PowersOfTwo(Attention):
    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        e = torch.exp2(q @ k.mT / (C // H) ** 0.5 / math.log(2))
        return ((e / e.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)


class PowersOfAConstant(Attention):
    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        e = 3.0 ** (q @ k.mT / (C // H) ** 0.5 / math.log(3))
        return ((e / e.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)


class LogSumExp(Attention):
    """The logarithm of the sum is taken off the scores."""

    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        scores = q @ k.mT / (C // H) ** 0.5
        return ((scores - scores.logsumexp(-1, keepdim=True)).exp() @ v).transpose(1, 2).flatten(2)


class LogOfSum(Attention):
    """The same from its parts, the axis put back afterwards."""

    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        scores = q @ k.mT / (C // H) ** 0.5
        largest = scores.amax(-1, keepdim=True)
        total = (scores - largest).exp().sum(-1).log()[..., None] + largest
        return (scores.sub(total).exp() @ v).transpose(1, 2).flatten(2)


class SummedProducts(Attention):
    """No matrix product at all."""

    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        scores = (q[..., :, None, :] * k[..., None, :, :]).sum(-1) / (C // H) ** 0.5
        return (scores.softmax(-1)[..., None] * v[..., None, :, :]).sum(-2).transpose(1, 2).flatten(2)


class InPlace(Attention):
    """Every step overwrites the scores; what the largest one was taken of is gone when a signal goes back."""

    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        scores = q @ k.mT
        scores /= (C // H) ** 0.5
        scores -= scores.amax(-1, keepdim=True).detach()
        scores.exp_()
        scores /= scores.sum(-1, keepdim=True)
        return (scores @ v).transpose(1, 2).flatten(2)


class ShiftedInPlace(Attention):
    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        scores = q @ k.mT / (C // H) ** 0.5
        scores -= scores.amax(-1, keepdim=True)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


WRITTEN_OUT = [Exponentials, StableExponentials, DividedLast, ShiftedScores, LogSoftmax, PowersOfTwo, LogSumExp]
WRITTEN_OUT += [LogOfSum, SummedProducts, PowersOfAConstant, InPlace, ShiftedInPlace]


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + x


def block(attention):
    mlp = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 24), nn.GELU(), nn.Linear(24, C))
    return nn.Sequential(Residual(nn.Sequential(nn.LayerNorm(C), attention())), Residual(mlp))


def layer_of(b):
    (norm1, attention), (norm2, up, _, down) = b[0].inner, b[1].inner
    return Layer(*map(weights, (attention.qkv, attention.out, norm1, norm2, up, down)), H)


@pytest.mark.parametrize("attention", [Fused, Einops, Einsum, ByHand, TokensFirst, *WRITTEN_OUT])
def test_residuals_in_sequential(attention):
    """The whole model is one nn.Sequential."""
    model = nn.Sequential(block(attention), block(attention), nn.LayerNorm(C), Take(), nn.Linear(C, CLASSES)).double()
    randomise(model)
    layers = [layer_of(model[0]), layer_of(model[1])]
    check(model, TOKENS, lambda i: transformer_relevance(layers, TOKENS[i], 0, weights(model[4]), 1, weights(model[2])))


@pytest.mark.parametrize("attention", [Einops, Einsum, ByHand, TokensFirst])
def test_rollout_does_not_depend_on_the_style(attention):
    """Rows are normalised by what the attention sends through joined heads, views and transposes."""
    models = [
        nn.Sequential(block(style), block(style), nn.LayerNorm(C), Take(), nn.Linear(C, CLASSES)).double()
        for style in (attention, Fused)
    ]
    got, want = (AttentionRollout(randomise(model)).attribute_tokens(TOKENS, 1) for model in models)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


class Take(nn.Module):
    def forward(self, x):
        return x[:, 0]


@pytest.mark.parametrize("rules", ["deep_taylor", "attnlrp", "cp", "libra"])
@pytest.mark.parametrize("attention", WRITTEN_OUT)
def test_relevance_does_not_depend_on_how_a_softmax_is_written(attention, rules):
    models = [
        nn.Sequential(block(style), block(style), nn.LayerNorm(C), Take(), nn.Linear(C, CLASSES)).double()
        for style in (attention, Fused)
    ]
    got, want = (TransformerLRP(randomise(model), rules=rules).attribute(TOKENS, 1) for model in models)
    # The stabilisers of quotients see scores before or after their scaling.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


class MaskedSink(Attention):
    """Zeros hide exponentials; a constant is added to every sum of them."""

    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        return (self.weights(q @ k.mT / (C // H) ** 0.5) @ v).transpose(1, 2).flatten(2)

    def weights(self, scores):
        e = scores.exp() * torch.ones(N, N, dtype=scores.dtype).tril()
        return e / (e.sum(-1, keepdim=True) + 0.5)


class SinkColumn(MaskedSink):
    """The constant as a further key without a value."""

    def weights(self, scores):
        scores = scores.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf)
        sink = torch.full((*scores.shape[:-1], 1), math.log(0.5), dtype=scores.dtype)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


@pytest.mark.parametrize("method", [TransformerRelevance, AttentionRelevance, AttentionRollout, TransformerLRP])
def test_mask_and_sink_of_a_written_softmax(method):
    models = [
        nn.Sequential(block(style), block(style), Last(), nn.Linear(C, CLASSES)).double()
        for style in (MaskedSink, SinkColumn)
    ]
    got, want = (method(randomise(model)).attribute(TOKENS, 1) for model in models)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


class Last(nn.Module):
    def forward(self, x):
        return x[:, -1]


class Kept(Attention):
    """Its maps can be looked at."""

    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        self.map = (q @ k.mT / (C // H) ** 0.5).softmax(-1)
        return (self.map @ v).transpose(1, 2).flatten(2)


class ReadOut(nn.Module):
    """Two blocks and any read-out of their tokens."""

    def __init__(self, read):
        super().__init__()
        self.blocks, self.norm = nn.Sequential(block(Kept), block(Kept)), nn.LayerNorm(C)
        self.head, self.other, self.read = nn.Linear(C, CLASSES), nn.Linear(C, C), read

    def forward(self, x):
        return self.head(self.read(self, self.norm(self.blocks(x))))


READ_OUTS = {
    "class token and mean of the others": (lambda m, x: x[:, 0] + x[:, 1:].mean(1), range(N)),
    "class token and mean, scaled": (lambda m, x: 0.3 * x[:, 0] + 0.7 * x.mean(1), range(N)),
    "largest and mean": (lambda m, x: x.amax(1) + x.mean(1), range(N)),
    "two tokens, each in its own way": (lambda m, x: m.other(x[:, 0]) + torch.tanh(x[:, 2]), (0, 2)),
    "difference of two tokens": (lambda m, x: x[:, 3] - x[:, 1], (1, 3)),
    "deviation": (lambda m, x: x.std(1), range(N)),
    "mean and variance": (lambda m, x: m.other(x.mean(1)) + x.var(1), range(N)),
    "norm over tokens": (lambda m, x: x.norm(dim=1), range(N)),
}


@pytest.mark.parametrize("name", READ_OUTS)
def test_read_outs(name):
    """Rows of (Ā_2 + I)(Ā_1 + I) − I by autograd (ICCV 2021, eq. 5-6), all that are read with the same weight.

    Relevance arrives in full.
    """
    read, rows = READ_OUTS[name]
    model = randomise(ReadOut(read).double())
    logits = model(TOKENS.clone().requires_grad_())
    maps = [b[0].inner[1].map for b in model.blocks]
    gradients = torch.autograd.grad(logits[:, 1].sum(), maps)
    first, second = ((a * g).clamp(min=0).mean(1).detach() for a, g in zip(maps, gradients, strict=True))
    weights_of_rows = torch.zeros(N, dtype=TOKENS.dtype)
    weights_of_rows[list(rows)] = 1 / len(rows)
    eye = torch.eye(N, dtype=TOKENS.dtype)
    want = weights_of_rows @ ((second + eye) @ (first + eye) - eye)
    got = AttentionRelevance(model).attribute_tokens(TOKENS, 1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    for rules in ("deep_taylor", "cp", "libra"):
        _, delta = TransformerLRP(model, rules=rules).attribute(TOKENS, 1, return_convergence_delta=True)
        assert float(delta.abs().max()) < 1e-6


class Unprojected(Attention):
    """The tokens themselves are the values, and nothing follows: channels stay with their heads."""

    def forward(self, x):
        q, k, _ = self.qkv(x).chunk(3, -1)
        q, k, v = split_heads(q, k, x)
        self.map = (q @ k.mT).softmax(-1)
        return (self.map @ v).transpose(1, 2).flatten(2)


class RelativeValues(Attention):
    """Shaw et al. (2018): the map also weighs vectors that belong to pairs of places."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.zeros(N, N, C // H))

    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        self.map = (q @ k.mT).softmax(-1)
        placed = torch.einsum("bhnm,nmd->bhnd", self.map, self.places)
        return (self.map @ v + placed).transpose(1, 2).flatten(2)


class SharedMap(Attention):
    """One map, the mean over heads, for the values of all heads."""

    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        self.map = (q @ k.mT).softmax(-1).mean(1, keepdim=True)
        return (self.map @ v).transpose(1, 2).flatten(2)


class TwoSteps(Attention):
    """The square of a map."""

    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        once = (q @ k.mT).softmax(-1)
        self.map = once @ once
        return (self.map @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("attention", [Unprojected, RelativeValues, SharedMap, TwoSteps])
def test_unusual_maps(attention):
    """Every path on which a map matters is in ∇A, Ā is the mean over heads; relevance is complete with frozen maps."""
    model = randomise(
        nn.Sequential(block(attention), block(attention), nn.LayerNorm(C), Take(), nn.Linear(C, CLASSES)).double()
    )
    logits = model(TOKENS.clone().requires_grad_())
    maps = [b[0].inner[1].map for b in model[:2]]
    gradients = torch.autograd.grad(logits[:, 1].sum(), maps)
    first, second = ((a * g).clamp(min=0).mean(1).detach() for a, g in zip(maps, gradients, strict=True))
    eye = torch.eye(N, dtype=TOKENS.dtype)
    want = ((second + eye) @ (first + eye) - eye)[:, 0]
    torch.testing.assert_close(AttentionRelevance(model).attribute_tokens(TOKENS, 1), want, rtol=1e-9, atol=1e-12)
    for rules in ("deep_taylor", "cp", "libra"):
        _, delta = TransformerLRP(model, rules=rules).attribute(TOKENS, 1, return_convergence_delta=True)
        assert float(delta.abs().max()) < 1e-6
    if attention is RelativeValues:
        with pytest.raises(UnsupportedOperationError, match="relative positions"):
            AttentionRollout(model).attribute_tokens(TOKENS, 1)
        return
    rows = [a.mean(1).detach() + eye for a in maps]
    first, second = (a / a.sum(-1, keepdim=True) for a in rows)
    want = (second @ first)[:, 0]
    got = AttentionRollout(model).attribute_tokens(TOKENS, 1)  # without the identity term of the read-out row
    torch.testing.assert_close(got[:, 1:], want[:, 1:], rtol=1e-9, atol=1e-12)


class Parallel(nn.Module):
    """Attention and MLP of one norm, in two orders of summation."""

    def __init__(self, joined):
        super().__init__()
        self.attention, self.norm, self.joined = Kept(), nn.LayerNorm(C), joined
        self.mlp = nn.Sequential(nn.Linear(C, 24), nn.GELU(), nn.Linear(24, C))

    def forward(self, x):
        n = self.norm(x)
        return self.mlp(n) + self.attention(n) + x if self.joined else x + self.attention(n) + self.mlp(n)


@pytest.mark.parametrize("joined", [True, False])
def test_rollout_of_parallel_blocks(joined):
    """Rows of (E_h A + I) are normalised once per block, also where attention and MLP join as one sum (GPT-J)."""
    model = randomise(nn.Sequential(Parallel(joined), Parallel(joined), Take(), nn.Linear(C, CLASSES)).double())
    model(TOKENS)
    eye = torch.eye(N, dtype=TOKENS.dtype)
    first, second = (a / a.sum(-1, keepdim=True) for a in (b.attention.map.mean(1).detach() + eye for b in model[:2]))
    got = AttentionRollout(model).attribute_tokens(TOKENS, 1)  # without the identity term of the read-out row
    torch.testing.assert_close(got[:, 1:], (second @ first)[:, 0, 1:], rtol=1e-9, atol=1e-12)


class Queries(nn.Module):
    """Learned queries that look at one another before they have read anything; ``fused`` attention or written out."""

    def __init__(self, fused):
        super().__init__()
        self.queries, self.fused = nn.Parameter(torch.zeros(3, C)), fused
        self.own, self.cross = (nn.ModuleList([Kept(), Kept()]) for _ in range(2))
        self.head = nn.Linear(C, CLASSES)

    def attend(self, attention, x, y):
        weight = attention.qkv.weight
        q, k, v = split_heads(F.linear(x, weight[:C]), *F.linear(y, weight[C:]).chunk(2, -1))
        if self.fused:
            z = F.scaled_dot_product_attention(q, k, v)
        else:
            z = (q @ k.mT * (C // H) ** -0.5).softmax(-1) @ v
        return attention.out(z.transpose(1, 2).flatten(2))

    def forward(self, x):
        q = self.queries.expand(len(x), -1, -1)
        for own, cross in zip(self.own, self.cross, strict=True):
            q = q + self.attend(own, q, q)
            q = q + self.attend(cross, q, x)
        return self.head(q.mean(1))


def test_relevance_of_learned_queries_is_accounted_for():
    got = []
    for fused in (True, False):
        scores, delta = AttentionRelevance(randomise(Queries(fused).double())).attribute(
            TOKENS, 1, return_convergence_delta=True
        )
        assert float(delta.abs().max()) < 1e-6
        got.append(scores)
    torch.testing.assert_close(*got, rtol=1e-9, atol=1e-12)


class Pooled(nn.Module):
    """A block, then a softmax over tokens that pools them."""

    def __init__(self, pool):
        super().__init__()
        self.block, self.scores, self.head, self.pool = block(Kept), nn.Linear(C, 1), nn.Linear(C, CLASSES), pool

    def forward(self, x):
        x = self.block(x)
        return self.head(self.pool(self.scores(x).softmax(1), x))


POOLINGS = {
    "sum of products": lambda w, x: (w * x).sum(1),
    "sum that keeps its axis": lambda w, x: (x * w).sum(dim=1, keepdim=True)[:, 0],
    "matrix product": lambda w, x: (w.mT @ x)[:, 0],
    "einsum": lambda w, x: torch.einsum("bn,bnc->bc", w[..., 0], x),
}


@pytest.mark.parametrize("name", POOLINGS)
def test_attention_pooling(name):
    """A learned query that reads the tokens, however it is written: Ā_p (R̄ + I) with Ā_p = (∇w ⊙ w)⁺.

    ICCV 2021, eq. 5 and 8-10.
    """
    model = randomise(Pooled(POOLINGS[name]).double())
    x = model.block(TOKENS.clone().requires_grad_())
    weights_of_tokens = model.scores(x.detach()).softmax(1)
    logits = model.head((weights_of_tokens * x).sum(1))
    own = model.block[0].inner[1].map
    (g_pool,) = torch.autograd.grad(logits[:, 1].sum(), weights_of_tokens, retain_graph=True)
    # The scores depend on the tokens, too.
    full = model.head((model.scores(x).softmax(1) * x).sum(1))
    (g_own,) = torch.autograd.grad(full[:, 1].sum(), own)
    relation = (own * g_own).clamp(min=0).mean(1)
    relation = relation / relation.sum(-1, keepdim=True) + torch.eye(N, dtype=TOKENS.dtype)
    want = ((weights_of_tokens * g_pool).clamp(min=0).mT @ relation)[:, 0].detach()
    got = AttentionRelevance(model).attribute_tokens(TOKENS, 1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


SPREADS = {
    "all": ((), {}),
    "all, biased": ((False,), {}),
    "axis": ((-1,), {}),
    "axes": (((0, -1),), {}),
    "axis, biased": ((-1, False), {}),
    "axis, biased, kept": ((-1, False, True), {}),
    "by name": ((), {"dim": (-1,), "unbiased": False, "keepdim": True}),
    "correction": ((-1,), {"correction": 2, "keepdim": True}),
    "as in numpy": ((), {"axis": -1, "keepdims": True}),
}


@pytest.mark.parametrize("signature", SPREADS)
@pytest.mark.parametrize("name", ["var", "std", "var_mean", "std_mean"])
def test_spread_in_every_signature(name, signature):
    """What a recording gives are torch's own values, and its gradient is autograd's."""
    args, kwargs = SPREADS[signature]

    def model(x):
        result = getattr(torch, name)(x[0], *args, **kwargs)
        parts = result if isinstance(result, tuple) else (result,)
        return torch.stack([part.square().sum() * (i + 1) for i, part in enumerate(parts)]).sum()[None, None]

    one, leaf = TOKENS[:1], TOKENS[:1].clone().requires_grad_()
    want = model(leaf)
    (gradient,) = torch.autograd.grad(want.sum(), leaf)
    with recorded(model, parse(one), verified=set()) as recording:
        torch.testing.assert_close(recording.select(0), want[0].detach(), rtol=1e-12, atol=0)
        (got,) = recording.send(gradient_signal(), list(recording.inputs.leaves.values()))
    torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-13)


class Normalised(nn.Module):
    """A block, a norm, a block."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.second, self.affine = block(Einsum), block(Einsum), nn.LayerNorm(C)
        self.head, self.norm = nn.Linear(C, CLASSES), norm

    def forward(self, x):
        x = self.norm(self.first(x)) * self.affine.weight + self.affine.bias
        return self.head(self.second(x)[:, 0])


def mean_without_axis(x):
    return (x - x.mean(-1)[..., None]) / (x.var(-1, correction=0)[..., None] + 1e-5).sqrt()


def sums_over_channels(x):
    centred = x - x.sum(-1, keepdim=True) / C
    return centred * torch.rsqrt(centred.square().sum(-1, keepdim=True) / C + 1e-5)


def by_moments(spread, mean, x, power=0.5):
    return (x - mean) / (spread + 1e-5) ** power


def moments(x):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * ((x * x).mean(-1, keepdim=True) - mean * mean + 1e-5) ** -0.5


def root_mean_square(x):
    return F.rms_norm(x, (C,), eps=1e-6)


NORMS = {
    "mean without its axis": (mean_without_axis, lambda x: F.layer_norm(x, (C,))),
    "sums over channels": (sums_over_channels, lambda x: F.layer_norm(x, (C,))),
    "moments": (moments, lambda x: F.layer_norm(x, (C,))),
    "variance and mean in one call": (
        lambda x: by_moments(*torch.var_mean(x, -1, False, True), x),
        lambda x: F.layer_norm(x, (C,)),
    ),
    "deviation and mean in one call": (
        lambda x: by_moments(*torch.std_mean(x, axis=-1, keepdims=True), x, power=1),
        lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5),
    ),
    "squares by einsum": (
        lambda x: x * (torch.einsum("bnc,bnc->bn", x, x) / C + 1e-6).rsqrt()[..., None],
        root_mean_square,
    ),
    "sum of squares": (lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / C + 1e-6), root_mean_square),
    "mean of squares, unsqueezed": (lambda x: x * ((x**2).mean(-1) + 1e-6).pow(-0.5).unsqueeze(-1), root_mean_square),
}  # fmt: skip


@pytest.mark.parametrize("rules", ["deep_taylor", "attnlrp", "cp", "libra"])
@pytest.mark.parametrize("name", NORMS)
def test_norm_written_by_hand(name, rules):
    got, want = (
        TransformerLRP(randomise(Normalised(norm).double()), rules=rules).attribute(TOKENS, 1) for norm in NORMS[name]
    )
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("attention", [Fused, ByHand])
def test_a_module_called_again(attention):
    """Weight sharing: one block three times. Calls are counted, not modules."""

    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = block(attention), nn.Linear(C, CLASSES)

        def forward(self, x):
            return self.head(self.block(self.block(self.block(x))).mean(1))

    model = randomise(Again().double())
    layers = [layer_of(model.block)] * 3
    check(model, TOKENS, lambda i: transformer_relevance(layers, TOKENS[i], "mean", weights(model.head), 1))
    calls = 3 * (H if attention is ByHand else 1)
    assert len(TransformerRelevance(model).attention_records(TOKENS, 1)) == calls


def test_shared_parameters_of_two_modules():
    model = nn.Sequential(block(Fused), block(Einsum), Take(), nn.Linear(C, CLASSES)).double()
    model[1][0].inner[1].qkv = model[0][0].inner[1].qkv
    model[1][1].inner[1].weight = model[0][1].inner[1].weight
    randomise(model)
    layers = [layer_of(model[0]), layer_of(model[1])]
    check(model, TOKENS, lambda i: transformer_relevance(layers, TOKENS[i], 0, weights(model[3]), 1))


class LucidViT(nn.Module):
    """The widely copied ViT with einops: patches by a rearrangement, norms around the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, C), nn.LayerNorm(C))
        self.cls, self.position = nn.Parameter(torch.zeros(1, 1, C)), nn.Parameter(torch.zeros(1, 17, C))
        self.blocks = nn.ModuleList()
        for _ in range(2):
            mlp = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, C))
            self.blocks.append(nn.ModuleList([nn.Sequential(nn.LayerNorm(C), Einops()), mlp]))
        self.head = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, CLASSES))

    def tokens(self, images):
        x = self.embed(einops.rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4))
        cls = einops.repeat(self.cls, "1 1 d -> b 1 d", b=len(x))
        return torch.cat([cls, x], 1) + self.position

    def forward(self, images):
        x = self.tokens(images)
        for attention, mlp in self.blocks:
            x = attention(x) + x
            x = mlp(x) + x
        return self.head(x[:, 0])


def test_lucidrains_vit():
    model = randomise(LucidViT().double())
    layers = [
        Layer(weights(a[1].qkv), weights(a[1].out), weights(a[0]), weights(m[0]), weights(m[1]), weights(m[4]), H)
        for a, m in model.blocks
    ]
    x = model.tokens(IMAGES).detach()
    assert TransformerRelevance(model).attribute_tokens(IMAGES, 1).shape == (2, 4, 4)
    # The classifier's norm comes after the selection; over all tokens it is the same.
    final, head = map(weights, model.head)
    check(model, IMAGES, lambda i: transformer_relevance(layers, x[i], 0, head, 1, final), spare=1)


# ---------------------------------------------------------------------- torchvision
def test_torchvision_vit():
    model = torchvision.models.VisionTransformer(16, 8, 2, H, C, 24, num_classes=CLASSES)
    randomise(model.double())
    seen = []
    handle = model.encoder.layers[0].register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    model(IMAGES)
    handle.remove()
    layers = []
    for b in model.encoder.layers:
        a = b.self_attention
        qkv = (a.in_proj_weight.detach(), a.in_proj_bias.detach())
        layers.append(Layer(qkv, *map(weights, (a.out_proj, b.ln_1, b.ln_2, b.mlp[0], b.mlp[3])), H))
    head, final = weights(model.heads.head), weights(model.encoder.ln)
    check(model, IMAGES, lambda i: transformer_relevance(layers, seen[0][i], 0, head, 1, final), spare=1)
    assert TransformerRelevance(model).attribute_tokens(IMAGES, 1).shape == (2, 2, 2)


def swin_map(module, x, shift):
    """E_h A of a window attention over the whole grid ``(S·S, S·S)``, token by token."""
    size, side = module.window_size[0], x.shape[0]
    shift = 0 if size >= side else shift
    heads = module.num_heads
    q, k, _ = F.linear(x.reshape(-1, x.shape[-1]), *weights(module.qkv)).reshape(side * side, 3, heads, -1).unbind(1)
    result = torch.zeros(side * side, side * side, dtype=x.dtype)

    def place(token):
        """Window, place in the window and, of windows that wrap around, the part of the picture."""
        moved = [(c - shift) % side for c in divmod(token, side)]
        part = [int(shift > 0 and c >= side - size) + int(shift > 0 and c >= side - shift) for c in moved]
        return [c // size for c in moved], [c % size for c in moved], part

    for i in range(side * side):
        window, here, part = place(i)
        keys = [j for j in range(side * side) if place(j)[0] == window]
        for h in range(heads):
            scores = []
            for j in keys:
                _, there, other = place(j)
                row = (here[0] - there[0] + size - 1) * (2 * size - 1) + here[1] - there[1] + size - 1
                bias = module.relative_position_bias_table[row, h]
                hidden = -100.0 if part != other else 0.0
                scores.append(q[i, h] @ k[j, h] * q.shape[-1] ** -0.5 + bias + hidden)
            result[i, keys] += torch.stack(scores).softmax(0).detach() / heads
    return result


def test_torchvision_swin():
    """Rollout through shifted windows and a patch merging, with every map made token by token."""
    model = torchvision.models.SwinTransformer(
        [4, 4], 8, [2, 2], [2, 2], [2, 2], stochastic_depth_prob=0.0, num_classes=CLASSES
    )
    randomise(model.double())
    blocks = [*model.features[1], *model.features[3]]
    seen = {}
    handles = [b.norm1.register_forward_hook(lambda m, a, y, b=b: seen.__setitem__(b, y.detach())) for b in blocks]
    model(IMAGES)
    for handle in handles:
        handle.remove()
    got = AttentionRollout(model, normalize=False).attribute_tokens(IMAGES, 1)
    assert got.shape == (2, 4, 4)
    quarter = torch.full((2, 2), 0.25, dtype=torch.float64)
    for example in range(2):
        row, trunk = (torch.full((4,), 0.25, dtype=torch.float64) for _ in range(2))
        for b, shift in zip(blocks[:1:-1], (1, 0), strict=True):
            row = row + row @ swin_map(b.attn, seen[b][example], shift)
        # A merged token's share is that of its four parts.
        row, trunk = (torch.kron(t.reshape(2, 2), quarter).flatten() for t in (row, trunk))
        for b, shift in zip(blocks[1::-1], (1, 0), strict=True):
            row = row + row @ swin_map(b.attn, seen[b][example], shift)
        torch.testing.assert_close(got[example].flatten(), row - trunk, rtol=1e-8, atol=1e-12)
    method = TransformerRelevance(model)
    heat, delta = method.attribute(IMAGES, 1, return_convergence_delta=True)
    assert delta.abs().max() < 1e-6
    alone = torch.cat([method.attribute(IMAGES[i : i + 1], 1) for i in range(2)])
    torch.testing.assert_close(heat, alone, rtol=1e-8, atol=1e-12)


class Experts(nn.Module):
    """Two gated experts that look their tokens up among those of the whole batch; both halves are bounded."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(C, 2)
        self.gate_up = nn.ModuleList(nn.Linear(C, 16) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(8, C) for _ in range(2))

    def forward(self, x):
        tokens = x.reshape(-1, C)
        weight, chosen = self.router(tokens).softmax(-1).max(-1)
        result = torch.zeros_like(tokens)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            (rows,) = torch.where(chosen == expert)
            gate, up = gate_up(tokens[rows]).chunk(2, dim=-1)
            content = down(nn.functional.silu(gate.clamp(max=7)) * up.clamp(-7, 7))
            result.index_add_(0, rows, content * weight[rows, None])
        return result.view_as(x)


@pytest.mark.parametrize("rules", ["deep_taylor", "attnlrp", "cp", "libra"])
def test_experts_that_see_the_rows_of_a_batch(rules):
    """A row's channels stay channels where it is no longer known whose example it is: each gets what it gets alone."""
    model = nn.Sequential(block(Fused), Residual(nn.Sequential(nn.LayerNorm(C), Experts())), Take(), nn.Linear(C, 3))
    method = TransformerLRP(randomise(model.double()), rules=rules)
    together = method.attribute(TOKENS, target=[1, 2])
    for i in range(2):
        alone = method.attribute(TOKENS[i : i + 1], target=[1, 2][i])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12 * alone.abs().max().item())

"""Softmaxes that a model writes out in uncommon ways: what is one, and what only looks like one."""

import functools

import pytest
import torch
from test_home_made import TOKENS, Attention, C, Fused, H, N, Take, block, split_heads
from tiny_models import randomise
from torch import nn

from captum_transformer_attr import (
    AttentionRelevance,
    AttentionRollout,
    TransformerLRP,
    TransformerRelevance,
    UnsupportedModelError,
    UnsupportedOperationError,
)

METHODS = [
    TransformerRelevance,
    AttentionRelevance,
    AttentionRollout,
    *(lambda model, rules=rules: TransformerLRP(model, rules=rules) for rules in ("deep_taylor", "attnlrp", "cp")),
]


class Written(Attention):
    """Scores and values, the weights by ``weigh``."""

    def __init__(self, weigh):
        super().__init__()
        self.weigh = weigh

    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        self.map = self.weigh(q @ k.mT / (C // H) ** 0.5)
        return (self.map @ v).transpose(1, 2).flatten(2)


def two_blocks(attention):
    model = nn.Sequential(block(attention), block(attention), nn.LayerNorm(C), Take(), nn.Linear(C, 4))
    return randomise(model.double())


def same_as(weigh, attention):
    """Every method gives what it gives where the same attention is written the plain way."""
    for method in METHODS:
        got, want = (method(two_blocks(a)).attribute(TOKENS, 1) for a in (lambda: Written(weigh), attention))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- no softmax
NO_SOFTMAX = {
    "mean and a guard": lambda e: e / (e.mean(-1, keepdim=True) + 1e-6),
    "root and a guard": lambda e: e / (e.sum(-1, keepdim=True).sqrt() + 1e-6),
    "logarithm and one": lambda e: e / (1 + e.sum(-1, keepdim=True).log1p()),
    "another axis": lambda e: e / (e.sum(-2, keepdim=True).mT + 1),
    "those of others": lambda e: e.mT / e.sum(-1, keepdim=True),
}


@pytest.mark.parametrize("name", NO_SOFTMAX)
def test_a_divisor_that_is_no_sum_makes_no_softmax(name):
    model = two_blocks(lambda: Written(lambda scores: NO_SOFTMAX[name](scores.exp())))
    with pytest.raises(
        UnsupportedModelError, match="no softmax attention .*the exponential in module '0.0.inner.1' is"
    ):
        AttentionRelevance(model).attribute(TOKENS, 1)


class Blocks(Attention):
    """Keys and values come in two blocks; a subclass says how their softmax is put together."""

    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        scores = [q @ part.mT / (C // H) ** 0.5 for part in k.split(3, -2)]
        return self.join(scores, v.split(3, -2)).transpose(1, 2).flatten(2)


class Online(Blocks):
    """Flash attention written out: the largest score and the sum so far are carried from block to block."""

    def join(self, scores, values):
        largest = scores[0].new_full((*scores[0].shape[:-1], 1), -torch.inf)
        total, mixed = torch.zeros_like(largest), 0
        for s, v in zip(scores, values, strict=True):
            new = torch.maximum(largest, s.amax(-1, keepdim=True))
            e, correction = (s - new).exp(), (largest - new).exp()
            total, mixed = total * correction + e.sum(-1, keepdim=True), mixed * correction + e @ v
            largest = new
        return mixed / total


class Carried(Blocks):
    def join(self, scores, values):
        e = [s.exp() for s in scores]
        total = e[0].sum(-1, keepdim=True) + e[1].sum(-1, keepdim=True)
        return (e[0] @ values[0] + e[1] @ values[1]) * (1 / total)


class DividedApart(Blocks):
    def join(self, scores, values):
        e = [s.exp() for s in scores]
        total = e[0].sum(-1, keepdim=True) + e[1].sum(-1, keepdim=True)
        return e[0] / total @ values[0] + e[1] / total @ values[1]


class OfJoined(Blocks):
    def join(self, scores, values):
        e = torch.cat([s.exp() for s in scores], -1)
        return e / e.sum(-1, keepdim=True) @ torch.cat(values, -2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attention", [Online, Carried, DividedApart, OfJoined])
def test_a_softmax_in_pieces_is_refused_by_name(attention, method):
    """Local rules of its quotient would give another explanation than that of the same model with ``softmax``."""
    model = two_blocks(attention)
    torch.testing.assert_close(model(TOKENS), two_blocks(Fused)(TOKENS))
    with pytest.raises(
        UnsupportedOperationError, match=r"'0\.0\.inner\.1' computes a softmax piece by piece.*one softmax"
    ):
        method(model).attribute(TOKENS, 1)


SINKS = {
    "constant": lambda e: e / (e.sum(-1, keepdim=True) + 0.5),
    "two constants": lambda e: e / (0.2 + (e.sum(-1, keepdim=True) + 0.5)),
    "lower bound that is not reached": lambda e: e / (e.sum(-1, keepdim=True).clamp(min=1e-9) + 0.5),
    "one for every head": lambda e: e / (e.sum(-1, keepdim=True) + torch.tensor([0.5, 2.0]).view(2, 1, 1)),
    "reciprocal": lambda e: e * (1 / (e.sum(-1, keepdim=True) + 0.5)),
}


@pytest.mark.parametrize("name", SINKS)
def test_gradients_of_maps_with_a_sink(name):
    """Autograd's of the model as it is."""
    model = two_blocks(lambda: Written(lambda scores: SINKS[name](scores.exp())))
    logits = model(TOKENS.clone().requires_grad_())
    maps = [b[0].inner[1].map for b in model[:2]]
    gradients = torch.autograd.grad(logits[:, 1].sum(), maps)
    records = AttentionRelevance(model).attention_records(TOKENS, 1)
    for record, a, g in zip(records, maps, gradients, strict=True):
        torch.testing.assert_close(record.attention, a.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(record.gradient, g, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------- masks and sinks of exponentials
LATER = torch.ones(N, N, dtype=torch.bool).triu(1)


class Causal(Attention):
    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def shares(e):
    return e / e.sum(-1, keepdim=True)


def hidden_in_place(e):
    e.masked_fill_(LATER, 0)
    return shares(e)


HIDDEN = {
    "masked_fill": lambda e: shares(e.masked_fill(LATER, 0.0)),
    "masked_fill in place": hidden_in_place,
    "where": lambda e: shares(torch.where(LATER, 0.0, e)),
    "where, the other way round": lambda e: shares(torch.where(~LATER, e, torch.zeros((), dtype=e.dtype))),
    "lower triangle": lambda e: shares(e.tril()),
    "grouped, then hidden": lambda e: shares(e.flatten(0, 1).masked_fill(LATER, 0)).unflatten(0, e.shape[:2]),
    "hidden, then grouped": lambda e: shares(e.tril().flatten(0, 1)[:, None]).reshape(e.shape),
    "hidden twice": lambda e: shares(e.masked_fill(LATER, 0) * (~LATER).to(e.dtype)),
}
SHIFTS = {
    "": lambda scores: scores,
    "less the maximum": lambda scores: scores - scores.amax(-1, keepdim=True),
}


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", HIDDEN)
def test_exponentials_hidden_by_zeros(name, shift):
    """The causal attention."""
    same_as(lambda scores: HIDDEN[name](SHIFTS[shift](scores).exp()), Causal)


def test_grouped_exponentials():
    same_as(lambda scores: shares(SHIFTS["less the maximum"](scores).exp().flatten(0, 1)).view_as(scores), Fused)


def test_upper_triangle():
    def plain():
        return Written(lambda scores: scores.masked_fill(LATER.mT, -torch.inf).softmax(-1))

    same_as(lambda scores: shares(scores.exp().triu()), plain)


class ZeroKey(Attention):
    """A further key with a score and a value of zero (softmax1)."""

    def mix(self, q, k, v):
        q, k, v = split_heads(q, k, v)
        scores = nn.functional.pad(q @ k.mT / (C // H) ** 0.5, (0, 1))
        return (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2).flatten(2)


def stable_sink(scores):
    largest = scores.amax(-1, keepdim=True)
    e = (scores - largest).exp()
    return e / ((-largest).exp() + e.sum(-1, keepdim=True))


def stable_sink_reversed(scores):
    largest = scores.max(-1, keepdim=True)[0]
    e = torch.exp(scores - largest)
    return e / (e.sum(-1, keepdim=True) + torch.exp(-largest))


@pytest.mark.parametrize("weigh", [stable_sink, stable_sink_reversed])
def test_stable_softmax_with_a_sink(weigh):
    same_as(weigh, ZeroKey)


def test_another_exponential_in_the_divisor_makes_no_softmax():
    def weigh(scores):
        e = (scores - scores.amax(-1, keepdim=True)).exp()
        return e / ((-scores.amin(-1, keepdim=True)).exp() + e.sum(-1, keepdim=True))

    with pytest.raises(UnsupportedModelError, match="no softmax attention"):
        AttentionRelevance(two_blocks(lambda: Written(weigh))).attribute(TOKENS, 1)


def test_large_scores_with_a_sink():
    """What a sink is added to does not overflow where the model's own form does not."""
    models = [two_blocks(lambda: Written(lambda scores: stable_sink(scores * 1e4))), two_blocks(Huge)]
    got, want = (AttentionRelevance(model).attribute(TOKENS, 1) for model in models)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


class Huge(ZeroKey):
    def mix(self, q, k, v):
        return super().mix(q * 1e4, k, v)


# ---------------------------------------------------------------------- written into the scores themselves
def less_its_maximum(scores):
    scores -= scores.max(-1, keepdim=True)[0]
    return scores.softmax(-1)


def less_its_detached_maximum(scores):
    scores -= scores.amax(-1, keepdim=True).detach()
    return scores.softmax(-1)


def exponentials_in_place(scores):
    e = scores.exp_()
    return e / e.sum(-1, keepdim=True)


def all_in_place(scores):
    scores -= scores.max(-1, keepdim=True)[0]
    e = scores.exp_()
    e /= e.sum(-1, keepdim=True)
    return e


def power_overwritten(scores):
    """The scores are used for something else after their exponentials were taken."""
    e = scores.exp()
    scores *= 3
    return e / e.sum(-1, keepdim=True)


def logits_overwritten(scores):
    logarithm = scores.log_softmax(-1)
    scores *= 3
    return logarithm.exp()


IN_PLACE = [less_its_maximum, less_its_detached_maximum, exponentials_in_place, all_in_place]
IN_PLACE += [power_overwritten, logits_overwritten]


@pytest.mark.parametrize("weigh", IN_PLACE)
def test_softmax_in_place(weigh):
    same_as(weigh, Fused)


def doubled(scores):
    weights = scores.softmax(-1)
    weights *= 2
    return weights


def doubled_exponentials(scores):
    e = scores.exp()
    e *= 2
    return e / (2 * scores.exp().sum(-1, keepdim=True))


APART = {
    doubled: lambda scores: scores.softmax(-1) * 2,
    doubled_exponentials: lambda scores: scores.exp() * 2 / (2 * scores.exp().sum(-1, keepdim=True)),
}


@pytest.mark.parametrize("rules", ["deep_taylor", "attnlrp", "cp", "libra"])
@pytest.mark.parametrize("weigh", APART)
def test_results_that_the_model_writes_into(weigh, rules):
    """What the gradient of a function needs of its result is kept."""
    models = [two_blocks(functools.partial(Written, w)) for w in (weigh, APART[weigh])]
    got, want = (TransformerLRP(model, rules=rules).attribute(TOKENS, 1) for model in models)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)

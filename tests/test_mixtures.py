"""Softmax weights that mix what every token has of its own (experts, layers, heads) are no attention over tokens."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import randomise
from torch import nn

from captum_transformer_attr import AttentionRelevance, TransformerLRP

C, H, N, CLASSES = 8, 2, 5, 3
TOKENS = torch.randn(2, N, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class SelfAttention(nn.Module):
    """Keeps its map; a subclass says how it is made and applied."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + self.out(self.mix(q, k, v).transpose(1, 2).flatten(2))

    def mix(self, q, k, v):
        self.map = (q @ k.mT).softmax(-1)
        return self.map @ v


WEIGHTED = {
    "sum of products": lambda w, y: (w[..., None] * y).sum(-2),
    "einsum": lambda w, y: torch.einsum("...e,...ec->...c", w, y),
    "einsum of rows": lambda w, y: torch.einsum("te,tec->tc", w.flatten(0, 1), y.flatten(0, 1)).view(*w.shape[:2], C),
    "matmul": lambda w, y: (w[..., None, :] @ y)[..., 0, :],
    "transposed matmul": lambda w, y: (y.mT @ w[..., None])[..., 0],
}


class Experts(nn.Module):
    """Every token asks three experts."""

    def __init__(self, weighted):
        super().__init__()
        self.first, self.second, self.head = SelfAttention(), SelfAttention(), nn.Linear(C, CLASSES)
        self.router, self.experts = nn.Linear(C, 3), nn.ModuleList(nn.Linear(C, C) for _ in range(3))
        self.weighted = weighted

    def forward(self, x):
        x = self.first(x)
        answers = torch.stack([F.gelu(expert(x)) for expert in self.experts], -2)
        return self.head(self.second(x + self.weighted(self.router(x).softmax(-1), answers)).mean(1))


class SharedProjection(Experts):
    """The experts' outputs are one linear layer, cut up."""

    def __init__(self, weighted):
        super().__init__(weighted)
        self.all = nn.Linear(C, 3 * C)

    def forward(self, x):
        x = self.first(x)
        answers = F.gelu(self.all(x)).unflatten(-1, (3, C))
        return self.head(self.second(x + self.weighted(self.router(x).softmax(-1), answers)).mean(1))


class Buffered(Experts):
    """The experts' outputs are written into place."""

    def forward(self, x):
        x = self.first(x)
        answers = torch.zeros(*x.shape[:2], 3, C, dtype=x.dtype)
        for i, expert in enumerate(self.experts):
            answers[:, :, i] = F.gelu(expert(x))
        return self.head(self.second(x + self.weighted(self.router(x).softmax(-1), answers)).mean(1))


class Sorted(Experts):
    """Every expert answers the rows that chose it, of the whole batch; answers go back to their rows."""

    def forward(self, x):
        x = self.first(x)
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        order = chosen.flatten().argsort(stable=True)
        parts = x.flatten(0, 1)[order // 2].split(chosen.flatten().bincount(minlength=3).tolist())
        rows = torch.cat([F.gelu(expert(part)) for expert, part in zip(self.experts, parts, strict=True)])
        answers = torch.empty_like(rows)
        answers[order] = rows
        return self.head(self.second(x + self.weighted(weights, answers.view(*x.shape[:2], 2, C))).mean(1))


class Batched(Experts):
    """All experts in one product over the rows of the whole batch."""

    def forward(self, x):
        x = self.first(x)
        weight, bias = (torch.stack([getattr(e, name) for e in self.experts]) for name in ("weight", "bias"))
        answers = F.gelu(torch.einsum("tc,edc->ted", x.flatten(0, 1), weight) + bias).view(*x.shape[:2], 3, C)
        return self.head(self.second(x + self.weighted(self.router(x).softmax(-1), answers)).mean(1))


PER_EXPERT = {
    "batched product": lambda t, w, b: torch.bmm(t.expand(3, -1, -1), w.mT) + b[:, None],
    "batched product with bias": lambda t, w, b: torch.baddbmm(b[:, None], t.expand(3, -1, -1), w.mT),
    "broadcast": lambda t, w, b: t @ w.mT + b[:, None],
    "repeated": lambda t, w, b: t.repeat(3, 1).view(3, -1, C) @ w.mT + b[:, None],
    "repeated along a new axis": lambda t, w, b: t.repeat(3, 1, 1) @ w.mT + b[:, None],
    "einsum": lambda t, w, b: torch.einsum("tc,edc->etd", t, w) + b[:, None],
}


class PerExpert(Experts):
    """The experts' answers lie behind one another: (experts, tokens of the batch, channels)."""

    def forward(self, x):
        x = self.first(x)
        weight, bias = (torch.stack([getattr(e, name) for e in self.experts]) for name in ("weight", "bias"))
        answers = F.gelu(self.weighted(x.flatten(0, 1), weight, bias))
        gates = self.router(x).softmax(-1).flatten(0, 1).T
        return self.head(self.second(x + (answers * gates[..., None]).sum(0).view_as(x)).mean(1))


class Depth(Experts):
    """Every token weighs what it was after each layer by a learned query."""

    def forward(self, x):
        layers = [x, self.first(x)]
        layers.append(self.second(layers[-1]))
        layers = torch.stack(layers, 2)
        return self.head(self.weighted((layers @ self.router.weight[0]).softmax(-1), layers).mean(1))


EYE = torch.eye(N, dtype=TOKENS.dtype)


def relations(model, maps):
    """Ā = E_h (A ∘ ∇A)⁺ of every map, its gradient by autograd (ICCV 2021, eq. 5)."""
    logits = model(TOKENS.clone().requires_grad_())
    found = [m.map for m in maps]
    gradients = torch.autograd.grad(logits[:, 1].sum(), found)
    return [(a * g).clamp(min=0).mean(1).detach() for a, g in zip(found, gradients, strict=True)]


@pytest.mark.parametrize("form", WEIGHTED)
@pytest.mark.parametrize("kind", [Experts, SharedProjection, Buffered, Sorted, Batched])
def test_experts_are_no_attention(kind, form):
    """Ā_2 Ā_1 + Ā_2 + Ā_1 (eq. 6), read by the mean over tokens."""
    model = randomise(kind(WEIGHTED[form]).double())
    first, second = relations(model, (model.first, model.second))
    want = ((second + EYE) @ (first + EYE) - EYE).mean(1)
    torch.testing.assert_close(AttentionRelevance(model).attribute_tokens(TOKENS, 1), want, rtol=1e-9, atol=1e-12)
    assert len(AttentionRelevance(model).attention_records(TOKENS, 1)) == 2


@pytest.mark.parametrize("form", WEIGHTED)
def test_layers_are_no_tokens(form):
    model = randomise(Depth(WEIGHTED[form]).double())
    found = [tuple(r.attention.shape) for r in AttentionRelevance(model).attention_records(TOKENS, 1)]
    assert found == [(2, H, N, N)] * 2


@pytest.mark.parametrize("rules", ["deep_taylor", "attnlrp", "cp", "libra"])
@pytest.mark.parametrize("form", [name for name in WEIGHTED if name != "sum of products"])
@pytest.mark.parametrize("kind", [Experts, Depth])
def test_relevance_does_not_depend_on_how_a_mixture_is_written(kind, form, rules):
    """The weights are gates: what they multiply is what relevance goes to."""
    got, want = (
        TransformerLRP(randomise(kind(WEIGHTED[name]).double()), rules=rules).attribute(TOKENS, 1)
        for name in (form, "sum of products")
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rules", ["deep_taylor", "cp"])
def test_experts_in_one_product_are_experts(rules):
    """Their biases are biases, also where examples and tokens share an axis."""
    got, want = (
        TransformerLRP(randomise(kind(WEIGHTED["einsum"]).double()), rules=rules).attribute(TOKENS, 1)
        for kind in (Batched, Experts)
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rules", ["deep_taylor", "attnlrp", "cp", "libra"])
@pytest.mark.parametrize("form", PER_EXPERT)
def test_a_bias_for_every_expert_is_a_bias(form, rules):
    """Not a summand for every token: as in experts that are layers of their own, parameters' share included."""
    packed, plain = (
        TransformerLRP(randomise(model.double()), rules=rules)
        for model in (PerExpert(PER_EXPERT[form]), Experts(WEIGHTED["sum of products"]))
    )
    got, delta = packed.attribute(TOKENS, 1, return_convergence_delta=True)
    torch.testing.assert_close(got, plain.attribute(TOKENS, 1), rtol=1e-9, atol=1e-12)
    assert rules == "attnlrp" or delta.abs().max() < 1e-6
    shares = [sum(method.parameter_relevance(TOKENS, 1).values()) for method in (packed, plain)]
    torch.testing.assert_close(*shares, rtol=1e-6, atol=1e-9)


class DynamicConvolution(Experts):
    """Kernels that every token predicts by itself (Wu et al. 2019; ConvBERT) weigh its neighbours."""

    def forward(self, x):
        x = self.first(x)
        around = F.unfold(x.mT[..., None], (3, 1), padding=(1, 0)).mT.unflatten(-1, (C, 3))
        kernel = self.router(x).softmax(-1)
        return self.head(self.second(x + (around @ kernel[..., None])[..., 0]).mean(1))


def test_a_predicted_kernel_is_no_map():
    """It is a local branch; the maps' gradients go through it."""
    model = randomise(DynamicConvolution(None).double())
    first, second = relations(model, (model.first, model.second))
    want = ((second + EYE) @ (first + EYE) - EYE).mean(1)
    torch.testing.assert_close(AttentionRelevance(model).attribute_tokens(TOKENS, 1), want, rtol=1e-9, atol=1e-12)


class HeadsOfAToken(SelfAttention):
    """The heads of a token look at one another, by products or fused."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused

    def mix(self, q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0) if self.fused else (q @ k.mT).softmax(-1) @ v
        return y.transpose(1, 2)


@pytest.mark.parametrize("fused", [True, False])
def test_heads_that_look_at_one_another(fused):
    """Only the attention over tokens in front relates tokens."""
    model = randomise(nn.Sequential(SelfAttention(), HeadsOfAToken(fused), Mean(), nn.Linear(C, CLASSES)).double())
    (want,) = relations(model, (model[0],))
    got = AttentionRelevance(model).attribute_tokens(TOKENS, 1)
    torch.testing.assert_close(got, want.mean(1), rtol=1e-9, atol=1e-12)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


NEIGHBOURS = {
    "rolled": lambda t: torch.stack([t.roll(-i, 2) for i in range(3)], 3),
    "padded, cut": lambda t: torch.stack([F.pad(t, (0, 0, 0, 2))[:, :, i : i + N] for i in range(3)], 3),
    "cut, padded": lambda t: torch.stack([F.pad(t[:, :, i:], (0, 0, 0, i)) for i in range(3)], 3),
    "unfolded": lambda t: F.pad(t, (0, 0, 0, 2)).unfold(2, 3, 1).mT,
    "picked": lambda t: F.pad(t, (0, 0, 0, 2))[:, :, torch.arange(N)[:, None] + torch.arange(3)],
}


class Local(SelfAttention):
    """Every token reads itself and two neighbours, which lie on an axis of their own."""

    def __init__(self, neighbours):
        super().__init__()
        self.neighbours = neighbours

    def mix(self, q, k, v):
        k, v = self.neighbours(k), self.neighbours(v)
        self.map = torch.einsum("bhnd,bhnkd->bhnk", q, k).softmax(-1)
        return torch.einsum("bhnk,bhnkd->bhnd", self.map, v)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_are_tokens(name):
    """A map over three neighbours is one over all tokens, those out of the window hidden."""
    model = randomise(nn.Sequential(Local(NEIGHBOURS[name]), Mean(), nn.Linear(C, CLASSES)).double())
    (relation,) = relations(model, (model[0],))
    want = torch.zeros(2, N + 2, dtype=TOKENS.dtype)
    for i in range(N):
        want[:, i : i + 3] += relation[:, i] / N
    if name == "rolled":
        want[:, :2] += want[:, N:]
    got = AttentionRelevance(model).attribute_tokens(TOKENS, 1)
    torch.testing.assert_close(got, want[:, :N], rtol=1e-9, atol=1e-12)

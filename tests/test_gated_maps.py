"""Attention maps that a gate computed from the tokens scales stay maps."""

import pytest
import torch
from test_home_made import TOKENS, Attention, C, H, N, Residual, Take, split_heads
from tiny_models import randomise
from torch import nn

from captum_transformer_attr import AttentionRelevance, AttentionRollout, TransformerLRP, TransformerRelevance

GATED = {
    "every query": lambda a, g: a * g[..., None],
    "every key": lambda a, g: g[..., None, :] * a,
    "every head": lambda a, g: a * g[..., :1, None],
    "every key, sums restored": lambda a, g: (a * g[..., None, :]) / (a * g[..., None, :]).sum(-1, keepdim=True),
    "two maps": lambda a, g: g[..., None] * a + (1 - g[..., None]) * a.mT.softmax(-1),
}


class Gated(Attention):
    def __init__(self, scaled, activation):
        super().__init__()
        self.gate, self.scaled, self.activation, self.frozen = nn.Linear(C, H), scaled, activation, False

    def forward(self, x):
        q, k, v = split_heads(*self.qkv(x).chunk(3, -1))
        gate = self.activation(self.gate(x)).mT
        self.map = self.scaled((q @ k.mT / (C // H) ** 0.5).softmax(-1), gate)
        return self.out(((self.map.detach() if self.frozen else self.map) @ v).transpose(1, 2).flatten(2))


def gated(name, activation=torch.sigmoid):
    blocks = [Residual(Gated(GATED[name], activation)) for _ in range(2)]
    return randomise(nn.Sequential(*blocks, Take(), nn.Linear(C, 4)).double())


@pytest.mark.parametrize("name", GATED)
def test_relations_of_gated_maps(name):
    """Ā = E_h (A ∘ ∇A)⁺ with the map that multiplies the values, gate included; its gradient by autograd."""
    model = gated(name)
    logits = model(TOKENS.clone().requires_grad_())
    maps = [m.inner.map for m in model[:2]]
    gradients = torch.autograd.grad(logits[:, 1].sum(), maps)
    first, second = ((a * g).clamp(min=0).mean(1).detach() for a, g in zip(maps, gradients, strict=True))
    eye = torch.eye(N, dtype=TOKENS.dtype)
    want = ((second + eye) @ (first + eye) - eye)[:, 0]
    torch.testing.assert_close(AttentionRelevance(model).attribute_tokens(TOKENS, 1), want, rtol=1e-9, atol=1e-12)
    first, second = (a.mean(1).detach() + eye for a in maps)
    got = AttentionRollout(model, normalize=False).attribute_tokens(TOKENS, 1)
    torch.testing.assert_close(got, (second @ first - eye)[:, 0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rules", ["cp", "libra"])
@pytest.mark.parametrize("activation", [torch.sigmoid, torch.relu])
@pytest.mark.parametrize("name", GATED)
def test_everything_goes_to_the_values(name, activation, rules):
    """Gradient × input of the model whose maps, gates included, are constants (Ali et al. 2022, eq. 8)."""
    model = gated(name, activation)
    got = TransformerLRP(model, rules=rules).attribute(TOKENS, 1)
    for m in model[:2]:
        m.inner.frozen = True
    x = TOKENS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    torch.testing.assert_close(got, TOKENS * gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", GATED)
def test_relevance_of_gated_maps_is_accounted_for(name):
    _, delta = TransformerRelevance(gated(name)).attribute(TOKENS, 1, return_convergence_delta=True)
    assert float(delta.abs().max()) < 1e-6

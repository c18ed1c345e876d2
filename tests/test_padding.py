"""Tokens padded with zeros inside the model (windows that do not fit): products of zeros are accounted for."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import randomise
from torch import nn

from captum_transformer_attr import TransformerLRP, TransformerRelevance

WIDTH = 8


class Padded(nn.Module):
    """Two zero tokens behind five; keys without a bias, so that the padded keys and all their scores are exactly 0."""

    def __init__(self, fused, bias_of_values):
        super().__init__()
        self.embed, self.head, self.fused = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4), fused
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.v, self.proj = nn.Linear(WIDTH, WIDTH, bias=bias_of_values), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.embed(x)
        padded = F.pad(x, (0, 0, 0, 2))
        q, k, v = (t(padded).unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT / 2).softmax(-1) @ v
        return self.head((x + self.proj(y.transpose(1, 2).flatten(2))[:, :5]).mean(1))


@pytest.mark.parametrize("bias_of_values", [True, False])
def test_relevance_is_accounted_for(bias_of_values):
    """Fused and written-out attention agree, all relevance arrives somewhere, an example alone is as in the batch."""
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    found = []
    for fused in (True, False):
        method = TransformerRelevance(randomise(Padded(fused, bias_of_values).double()))
        scores, delta = method.attribute(x, 1, return_convergence_delta=True)
        assert delta.abs().max() < 1e-6
        assert torch.allclose(scores[1:], method.attribute(x[1:], 1), rtol=1e-10, atol=1e-14)
        found.append(scores)
    assert torch.allclose(*found, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype, tiny", [(torch.float64, 1e-312), (torch.float32, 1e-41)])
def test_inputs_that_underflow_count_as_zero(dtype, tiny):
    """A layer whose inputs are denormal: nothing is sent to them, all is accounted for, nothing overflows."""
    layer = nn.Linear(3, 2).to(dtype)
    x = torch.full((1, 3), tiny, dtype=dtype)
    scores, delta = TransformerLRP(layer).attribute(x, 1, return_convergence_delta=True)
    assert torch.equal(scores, torch.zeros_like(x)) and delta == 0

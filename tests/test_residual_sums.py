"""Which operand of a sum is the residual trunk: the token flow against a rollout by hand, for every way to write it."""

import pytest
import torch
from tiny_models import WatchedAttention, randomise
from torch import nn

from captum_transformer_attr import AttentionRollout, TransformerRelevance

WIDTH, TOKENS = 8, 5


class Model(nn.Module):
    """Linear embedding, two blocks of the given kind, average of the tokens, head."""

    def __init__(self, block):
        super().__init__()
        self.embed, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.Sequential(block(), block())

    def forward(self, x):
        return self.head(self.blocks(self.embed(x)).mean(1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.other = WatchedAttention(WIDTH), WatchedAttention(WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.zeros(2, WIDTH))


class ScaledTrunk(Block):
    """CAFormer: the trunk is multiplied by a learned scale before either branch is added."""

    def forward(self, x):
        x = self.scale[0] * x + self.attend(x)
        return self.scale[1] * x + self.mlp(x)

    def layer(self, eye):
        return eye + self.attend.maps[0]


class ProjectedTrunk(Block):
    """The trunk goes through a linear layer of its own beside the attention, and beside the MLP."""

    def forward(self, x):
        x = self.first(x) + self.attend(x)
        return self.second(x) + self.mlp(x)

    def layer(self, eye):
        return eye + self.attend.maps[0]


class BranchOfBoth(Block):
    """Parallel blocks: attention and MLP are added to each other first."""

    def forward(self, x):
        return x + (self.attend(x) + self.mlp(x))

    def layer(self, eye):
        return eye + self.attend.maps[0]


class OneAfterTheOther(Block):
    """``((x + f(x)) + g(x)) + h(x)``, two attentions and an MLP of one trunk."""

    def forward(self, x):
        return x + self.attend(x) + self.mlp(x) + self.other(x)

    def layer(self, eye):
        return eye + self.attend.maps[0] + self.other.maps[0]


class TrunkLast(Block):
    """The branch stands on the left of the sum."""

    def forward(self, x):
        x = self.attend(x) + x
        return self.mlp(x) + self.scale[1] * x

    def layer(self, eye):
        return eye + self.attend.maps[0]


KINDS = (ScaledTrunk, ProjectedTrunk, BranchOfBoth, OneAfterTheOther, TrunkLast)


@pytest.mark.parametrize("kind", KINDS)
def test_rolled_out_by_hand(kind):
    """``mean over rows of (Ā₂ + I)(Ā₁ + I) − I``: every attention once, no MLP, one identity per block."""
    model = randomise(Model(kind).double())
    x = torch.randn(2, TOKENS, 3, dtype=torch.float64)
    model(x)
    eye = torch.eye(TOKENS, dtype=torch.float64)
    first, second = (block.layer(eye) for block in model.blocks)
    expected = (second @ first - eye).mean(1)
    got = AttentionRollout(model, normalize=False).attribute_tokens(x, 1)
    assert torch.allclose(got, expected, rtol=1e-10, atol=0)
    scores, delta = TransformerRelevance(model).attribute(x, 1, return_convergence_delta=True)
    assert delta.abs().max() < 1e-6
    assert torch.allclose(scores[:1], TransformerRelevance(model).attribute(x[:1], 1), rtol=1e-10, atol=1e-14)


class TwoStreams(nn.Module):
    """Each of two streams attends to itself with a residual of its own; then they are added."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
        self.first, self.second = WatchedAttention(WIDTH), WatchedAttention(WIDTH)

    def forward(self, a, b):
        a, b = self.left(a), self.right(b)
        return self.head((a + self.first(a) + (b + self.second(b))).mean(1))


def test_streams_that_are_added_are_no_trunk_of_each_other():
    """Each input is explained by its own attention alone; the read-out rows' identity is taken out of both."""
    model = randomise(TwoStreams().double())
    a, b = (torch.randn(2, TOKENS, 3, dtype=torch.float64) for _ in range(2))
    model(a, b)
    first, second = AttentionRollout(model, normalize=False).attribute_tokens((a, b), 1)
    assert torch.allclose(first, model.first.maps[0].mean(1), rtol=1e-10, atol=0)
    assert torch.allclose(second, model.second.maps[0].mean(1), rtol=1e-10, atol=0)

"""Which operand of a sum is the residual trunk: the token flow against a rollout by hand, for every way to write it."""

import functools

import pytest
import torch
from tiny_models import WatchedAttention, randomise
from torch import nn

from captum_transformer_attr import (
    AttentionRelevance,
    AttentionRollout,
    FullGradPlus,
    TransformerLRP,
    TransformerRelevance,
    UnsupportedOperationError,
)

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


W = torch.tensor([0.6, 0.8], dtype=torch.float64)
JOINED = {
    "sum of a scaled stack": lambda x, y: (torch.stack([x, y]) * W[:, None, None, None]).sum(0),
    "sum that keeps the axis": lambda x, y: (torch.stack([x, y]) * W[:, None, None, None]).sum(0, keepdim=True)[0],
    "mean of a scaled stack": lambda x, y: (torch.stack([x, y], 1) * W[:, None, None]).mean(1) * 2,
    "a divided stack": lambda x, y: (torch.stack([x, y], 2) / (1 / W[:, None])).sum(2),
    "einsum": lambda x, y: torch.einsum("k,kbnc->bnc", W, torch.stack([x, y])),
    "einsum, a weight per channel": lambda x, y: torch.einsum(
        "bnkc,kc->bnc", torch.stack([x, y], 2), W[:, None].expand(2, WIDTH)
    ),
    "tensordot": lambda x, y: torch.tensordot(W, torch.stack([x, y]), dims=1),
    "product with a vector": lambda x, y: torch.stack([x, y], -1) @ W,
    "product with a column": lambda x, y: (torch.stack([x, y], -1) @ W[:, None])[..., 0],
    "product with a row": lambda x, y: (W[None] @ torch.stack([x, y], -2))[..., 0, :],
    "vstack": lambda x, y: (torch.vstack([x[None], y[None]]) * W[:, None, None, None]).sum(0),
    "dstack": lambda x, y: (torch.dstack([x[:, :, None], y[:, :, None]]) * W[:, None]).sum(2),
    "cat of new axes": lambda x, y: (torch.cat([x[None], y[None]]) * W[:, None, None, None]).sum(0),
    "cat of scaled parts": lambda x, y: torch.cat([0.6 * x[:, None], 0.8 * y[:, None]], 1).sum(1),
    "taken out of the stack": lambda x, y: 0.6 * torch.stack([x, y])[0] + 0.8 * torch.stack([x, y]).unbind()[1],
    "axes of the stack reordered": lambda x, y: (torch.stack([x, y]).permute(1, 2, 3, 0) * W).sum(-1),
}  # fmt: skip


class JoinedTrunk(Block):
    """Trunk and branch of the attention are joined in some way: a function of both, or of the block as well."""

    def __init__(self, joined):
        super().__init__()
        self.joined = joined

    def forward(self, x):
        own = () if self.joined.__code__.co_argcount == 2 else (self,)
        x = self.joined(*own, x, self.attend(x))
        return x + self.mlp(x)


METHODS = (
    AttentionRelevance,
    TransformerRelevance,
    FullGradPlus,
    *(functools.partial(TransformerLRP, rules=rules) for rules in ("deep_taylor", "attnlrp", "cp", "libra")),
)


def same(joined, plain):
    """Models that join trunk and branch in these two ways have the same explanations."""
    x = torch.randn(2, TOKENS, 3, dtype=torch.float64)
    joined, plain = (randomise(Model(functools.partial(JoinedTrunk, way)).double()) for way in (joined, plain))
    torch.testing.assert_close(joined(x), plain(x))
    for method in METHODS:
        got, want = (method(model).attribute(x, 1) for model in (joined, plain))
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", JOINED)
def test_weighted_sum_of_a_stack_is_the_sum_of_its_parts(name):
    same(JOINED[name], lambda x, y: 0.6 * x + 0.8 * y)


MOVED = {
    "contiguous": lambda s: s.contiguous(),
    "clone": lambda s: s.clone(),
    "cast": lambda s: s.double(),
    "flatten": lambda s: s.flatten(2).unflatten(2, (TOKENS, WIDTH)),
    "new axis": lambda s: s.unsqueeze(1)[:, 0],
    "new axis by an index": lambda s: s[:, None].squeeze(1),
    "reordered and copied": lambda s: s.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "scaled in place": lambda s: s.mul_(2) / 2,
}


@pytest.mark.parametrize("name", MOVED)
def test_a_stack_that_was_copied_or_regrouped_is_one(name):
    same(lambda x, y: MOVED[name](torch.stack([x, y])).sum(0), lambda x, y: x + y)


def gates(block, x):
    return torch.stack([block.first(x).sigmoid(), block.second(x).sigmoid()])


def weights(block, x):
    return block.first(x)[..., :2].softmax(-1)


def routes(block, x):
    """A gate for each branch, the same for all tokens."""
    return block.first(x).mean(1)[:, :2].sigmoid()


def by_gates(block, x, y):
    return block.first(x).sigmoid() * x + block.second(x).sigmoid() * y


def by_weights(block, x, y):
    w = weights(block, x)
    return w[..., :1] * x + w[..., 1:] * y


def by_routes(block, x, y):
    g = routes(block, x)[:, None]
    return g[..., :1] * x + g[..., 1:] * y


def by_gates_and_scales(block, x, y):
    return block.first(x).sigmoid() * (0.6 * x) + block.second(x).sigmoid() * (0.8 * y)


def taken_apart(block, x, y):
    gated = gates(block, x) * torch.stack([x, y])
    return gated[0] + gated[1]


GATED = {
    "sum": (lambda b, x, y: (torch.stack([x, y]) * gates(b, x)).sum(0), by_gates),
    "mean of a copy": (lambda b, x, y: (gates(b, x) * torch.stack([x, y]).clone()).mean(0) * 2, by_gates),
    "in place": (lambda b, x, y: torch.stack([x, y]).mul_(gates(b, x)).sum(0), by_gates),
    "taken apart": (taken_apart, by_gates),
    "scaled, too": (
        lambda b, x, y: (W[:, None, None, None] * torch.stack([x, y]) * gates(b, x)).sum(0),
        by_gates_and_scales,
    ),
    "softmax": (lambda b, x, y: (weights(b, x)[..., None, :] * torch.stack([x, y], -1)).sum(-1), by_weights),
    "einsum": (lambda b, x, y: torch.einsum("bnk,kbnc->bnc", weights(b, x), torch.stack([x, y])), by_weights),
    "row": (lambda b, x, y: (weights(b, x)[..., None, :] @ torch.stack([x, y], 2))[..., 0, :], by_weights),
    "column": (lambda b, x, y: (torch.stack([x, y], -1) @ weights(b, x)[..., None])[..., 0], by_weights),
    "routes": (lambda b, x, y: (routes(b, x)[:, None, :, None] * torch.stack([x, y], 2)).sum(2), by_routes),
    "einsum of routes": (lambda b, x, y: torch.einsum("bk,bknc->bnc", routes(b, x), torch.stack([x, y], 1)), by_routes),
}  # fmt: skip


@pytest.mark.parametrize("name", GATED)
def test_a_stack_with_a_gate_for_every_branch_is_a_sum_of_gated_branches(name):
    same(*GATED[name])


def written(x, y):
    buffer = torch.empty(2, *x.shape, dtype=x.dtype)
    buffer[0], buffer[1] = x, y
    return buffer.sum(0)


def written_along_the_last_axis(x, y):
    buffer = x.new_zeros(*x.shape, 2)
    buffer[..., 1], buffer[..., 0] = y, x
    return buffer.mean(-1)


def with_overwritten_gates(x, y):
    gates = torch.stack([x, y]).sigmoid()
    gated = torch.stack([x, y]) * gates
    gates.zero_()
    return gated.sum(0)


LOST = {
    "an activation": lambda x, y: torch.stack([x, y]).tanh().sum(0),
    "a norm": lambda x, y: nn.functional.layer_norm(torch.stack([x, y]), (WIDTH,)).sum(0),
    "another order": lambda x, y: torch.stack([x, y]).flip(0).mean(0),
    "some tokens": lambda x, y: torch.stack([x, y])[:, :, 1:].sum(0),
    "a divisor": lambda x, y: (torch.stack([x, y]) / (1 + torch.stack([x, y]).sigmoid())).sum(0),
    "an activation of a cat": lambda x, y: torch.cat([x[None], y[None]]).tanh().sum(0),
    "a pooling": lambda x, y: nn.functional.adaptive_avg_pool1d(torch.stack([x, y], -1).flatten(0, 1), 1).view_as(x),
    "a convolution": lambda x, y: nn.functional.conv1d(
        torch.stack([x, y], -1).flatten(0, 1).mT, torch.ones(1, 2, 1, dtype=x.dtype)
    ).view_as(x),
    "a buffer": written,
    "a buffer, along its last axis": written_along_the_last_axis,
    "gates overwritten": with_overwritten_gates,
}


@pytest.mark.parametrize("method", [AttentionRelevance, TransformerLRP])
@pytest.mark.parametrize("name", LOST)
def test_a_stack_whose_trunk_cannot_be_told_is_refused_by_name(name, method):
    model = randomise(Model(functools.partial(JoinedTrunk, LOST[name])).double())
    with pytest.raises(UnsupportedOperationError, match=r"'blocks\.0' stacks the trunk.*add the branches"):
        method(model).attribute(torch.randn(2, TOKENS, 3, dtype=torch.float64), 1)


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

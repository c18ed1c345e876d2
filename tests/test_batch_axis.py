"""Where the batch is: arguments that have no batch axis, and inputs and outputs that have it elsewhere.

The reference is a twin that has the argument as a buffer of its own, or takes its batch first.
"""

import pytest
import torch
from tiny_models import randomise
from torch import nn

from captum_transformer_attr import (
    AttentionRelevance,
    InputError,
    TransformerLRP,
    TransformerRelevance,
    UnsupportedModelError,
    coverage,
)

N, C, H = 4, 8, 2
GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


TOKENS = draw(N, N, C)  # as many examples as tokens
SHARED = {
    "mask": torch.ones(N, N, dtype=torch.bool).tril(),
    "position_ids": torch.arange(N).flip(0),
    "table": draw(N, C),
    "bias": draw(H, N, N),
}
METHODS = {
    "attention": AttentionRelevance,
    "deep_taylor": TransformerRelevance,
    "attnlrp": lambda model: TransformerLRP(model, rules="attnlrp"),
}


class Attending(nn.Module):
    """One block with whatever mask, bias and positions it is given; ``change`` is what the tokens pass first."""

    def __init__(self, change=None, **buffers):
        super().__init__()
        self.qkv, self.proj, self.head = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.Linear(C, 3)
        self.positions = nn.Embedding(N, C)
        self.change = change
        randomise(self.double())
        for name, value in buffers.items():
            self.register_buffer(f"own_{name}", value)

    def forward(self, x, mask=None, position_ids=None, table=None, bias=None, padding_mask=None):
        given = {"mask": mask, "position_ids": position_ids, "table": table, "bias": bias}
        mask, ids, table, bias = (getattr(self, f"own_{name}", value) for name, value in given.items())
        x = x if self.change is None else self.change(x)
        x = x if ids is None else x + self.positions(ids)
        x = x if table is None else x + table
        q, k, v = self.qkv(x).unflatten(-1, (3, H, C // H)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / 2
        scores = scores if bias is None else scores + bias
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        scores = scores if padding_mask is None else scores.masked_fill(~padding_mask[:, None, None], -torch.inf)
        return self.head((x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))).mean(1))


def split(x):
    """Cut along the batch and joined again: nothing follows the examples through that, so they are explained alone."""
    return torch.cat([x[:1] * 2, x[1:] * 2])


def examples(name):
    return TOKENS[: len(SHARED[name])]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", [None, split])
@pytest.mark.parametrize("name", SHARED)
def test_argument_as_long_as_the_batch_by_chance(name, change, method):
    """Batches in which the argument is as long as the batch, together and example by example."""
    x, value = examples(name), SHARED[name]
    want = METHODS[method](Attending(change, **{name: value})).attribute(x, target=1)
    model = Attending(change)
    position = ["mask", "position_ids", "table", "bias"].index(name)
    for _ in range(2):  # the second call finds the comparison made
        got = METHODS[method](model).attribute(x, 1, (*[None] * position, value))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_shared_and_own_masks_are_told_apart():
    """A causal mask for all and a padding mask of every example's own, both ``(4, 4)``."""
    padding = torch.ones(N, N, dtype=torch.bool).tril(1)
    inputs = {"x": TOKENS, "mask": SHARED["mask"], "padding_mask": padding}
    for change in (None, split):
        twin = TransformerLRP(Attending(change, mask=SHARED["mask"]), rules="attnlrp")
        # Parts of the batch, of which nothing is as long but what belongs to it.
        parts = [{"x": TOKENS[rows], "padding_mask": padding[rows]} for rows in (slice(0, 3), slice(3, 4))]
        want = torch.cat([twin.attribute(part, 1)["x"] for part in parts])
        got = TransformerLRP(Attending(change), rules="attnlrp").attribute(inputs, 1)["x"]
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_repeated_calls_pay_nothing():
    calls = []
    model = Attending()
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    explainer = AttentionRelevance(model)
    counts = []
    for _ in range(2):
        calls.clear()
        explainer.attribute({"x": TOKENS, "mask": SHARED["mask"]}, 1)
        counts.append(len(calls))
    assert counts[0] > 1 and counts[1] == 1


@pytest.mark.parametrize("name", ["table", "bias"])
@pytest.mark.parametrize("change", [None, split])
def test_argument_to_explain_without_a_batch_axis_is_refused(name, change):
    """A mapping's floats are explained; of one that all examples share there is no share of each."""
    with pytest.raises(InputError, match=f"'{name}' is the same for every example"):
        TransformerLRP(Attending(change), rules="cp").attribute({"x": examples(name), name: SHARED[name]}, 1)


def test_what_nothing_tells_apart_is_refused():
    """Where examples influence each other, none alone gives what the batch gives, whichever way it is cut."""
    explainer = AttentionRelevance(Attending(lambda x: x - x.mean(0, keepdim=True) / 2))
    with pytest.raises(InputError, match="additional_forward_args\\[0\\] may be one per example or the same for all"):
        explainer.attribute(TOKENS, 1, SHARED["mask"])
    x = TOKENS[:3]
    want = torch.cat([explainer.attribute(x[i : i + 1], 1, SHARED["mask"]) for i in range(3)])
    torch.testing.assert_close(explainer.attribute(x, 1, SHARED["mask"]), want)


# ---------------------------------------------------------------------- the batch elsewhere
class Encoder(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(C, H, 12, batch_first=batch_first)
        self.head, self.tokens = nn.Linear(C, 3), int(batch_first)
        randomise(self.double())

    def forward(self, x):
        return self.head(self.layer(x).mean(self.tokens))


class BatchFirst(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.transpose(0, 1))


@pytest.mark.parametrize("shape", [(5, 1), (5, 2), (1, 2), (5, 5)])
@pytest.mark.parametrize("method", METHODS)
def test_sequence_first_input_is_refused(shape, method):
    """Tokens would be taken for examples; the way out that the message names gives what a batch-first model gives."""
    x = draw(*shape, C)
    model = Encoder(batch_first=False)
    with pytest.raises(UnsupportedModelError, match="batch first.*x.transpose"):
        METHODS[method](model).attribute(x, target=1)
    want = METHODS[method](Encoder(batch_first=True)).attribute(x.transpose(0, 1), target=1)
    got = METHODS[method](BatchFirst(model)).attribute(x.transpose(0, 1), target=1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_coverage_says_that_the_batch_is_elsewhere():
    table = coverage(Encoder(batch_first=False), draw(5, 1, C))
    assert not table and "batch first" in str(table)


def test_one_number_for_a_whole_batch_is_refused():
    """Its share per example would depend on what the number is (a sum, a mean); of one example it is a number."""

    class Total(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Encoder(batch_first=True)

        def forward(self, x):
            return self.model(x)[:, 1].sum()

    x = draw(2, 5, C)
    explainer = TransformerLRP(Total(), rules="attnlrp")
    with pytest.raises(UnsupportedModelError, match="one row per example"):
        explainer.attribute(x)
    want = TransformerLRP(Encoder(batch_first=True), rules="attnlrp").attribute(x[:1], target=1)
    torch.testing.assert_close(explainer.attribute(x[:1]), want, rtol=1e-9, atol=1e-12)

"""Token ids on their way to a table: followed exactly, or refused where a table is read as no handle can follow."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import TinyViT, randomise
from torch import nn

from captum_transformer_attr import (
    AttentionRelevance,
    TransformerLRP,
    TransformerRelevance,
    UnsupportedModelError,
    UnsupportedOperationError,
    coverage,
)

IDS = torch.tensor([[3, 1, 5, 2, 6], [4, 4, 1, 6, 3]])
START = 0
TABLES = ("deep_taylor", "cp", "libra")


class Text(nn.Module):
    """A table of tokens, another one that ``second`` reads, and the blocks of a ViT; reads its first token."""

    def __init__(self, first=None, second=None):
        super().__init__()
        self.vit, self.embed = randomise(TinyViT().double()), nn.Embedding(7, 16).double()
        randomise(self.embed, seed=1, scale=1)
        table = torch.randn(7, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        self.table = nn.Parameter(table, requires_grad=False)
        self.first, self.second = first, second

    def forward(self, ids):
        x = self.embed(ids if self.first is None else self.first(ids))
        if self.second is not None:
            x = x + self.second(ids, self.table)
        return self.vit.head(self.vit.norm(self.vit.blocks(x))[:, 0])


# ---------------------------------------------------------------------- constants among the ids
def shifted(ids):
    new = ids.new_zeros(ids.shape)
    new[:, 1:] = ids[:, :-1].clone()
    new[:, 0] = START
    return new


def shifted_by_views(ids):
    new = torch.full_like(ids, START)
    new[:, 1:].copy_(ids[:, :-1])
    return new


def replaced_in_place(ids):
    ids = ids.roll(1, 1)
    ids[:, 0].fill_(START)
    return ids


SHIFTS = {
    "setitem": shifted,
    "copy_ into a view": shifted_by_views,
    "fill_ of a view": replaced_in_place,
    "pad": lambda ids: F.pad(ids[:, :-1], (1, 0), value=START),
    "cat": lambda ids: torch.cat([torch.full_like(ids[:, :1], START), ids[:, :-1]], 1),
    "where": lambda ids: torch.where(torch.arange(5) == 0, START, ids.roll(1, 1)),
    "where as a method": lambda ids: ids.roll(1, 1).where(torch.arange(5) > 0, torch.full_like(ids, START)),
    "masked_fill_": lambda ids: ids.roll(1, 1).masked_fill_(torch.arange(5) == 0, START),
}


@pytest.mark.parametrize("rules", TABLES)
@pytest.mark.parametrize("name", SHIFTS)
def test_a_start_token_that_the_model_puts_in_has_the_relevance_it_has_as_an_input(name, rules):
    shift = SHIFTS[name]
    assert torch.equal(shift(IDS.clone()), shifted(IDS))
    method = TransformerLRP(Text(shift), rules=rules)
    got, delta = method.attribute(IDS, target=1, return_convergence_delta=True)
    plain = TransformerLRP(Text(), rules=rules)
    given = plain.attribute(shifted(IDS), target=1)
    torch.testing.assert_close(got, torch.cat([given[:, 1:], torch.zeros_like(given[:, :1])], 1))
    assert delta.abs().max() < 1e-6 and given[:, 0].abs().min() > 1e-4
    share = method.parameter_relevance(IDS, target=1)[""]
    rest = plain.parameter_relevance(shifted(IDS), target=1).get("", torch.zeros(()))
    torch.testing.assert_close(share, given[:, 0] + rest)


# ---------------------------------------------------------------------- ids used twice
TWICE = {
    "sum with itself": (lambda ids: (ids + ids) % 7, lambda ids: 2 * ids % 7),
    "sum with a multiple": (lambda ids: (3 * ids + ids) % 7, lambda ids: 4 * ids % 7),
    "sum with a copy": (lambda ids: (ids.clone() + ids) % 7, lambda ids: 2 * ids % 7),
    "sum of what was moved": (lambda ids: (ids.roll(1, 1) + ids.roll(1, 1)) % 7, lambda ids: 2 * ids.roll(1, 1) % 7),
    "in place": (lambda ids: ids.clone().add_(ids) % 7, lambda ids: 2 * ids % 7),
}
METHODS = (
    AttentionRelevance,
    TransformerRelevance,
    *(functools.partial(TransformerLRP, rules=rules) for rules in (*TABLES, "attnlrp")),
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TWICE)
def test_ids_that_are_added_to_themselves_are_embedded_once(name, method):
    got, want = (method(Text(first)).attribute(IDS, target=1) for first in TWICE[name])
    assert want.abs().max() > 0
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rules", TABLES)
def test_an_embedding_of_two_ids_belongs_to_both_by_halves(rules):
    """A bigram's hash: what a hashed id would get goes in equal shares to the id at its place and to the one before."""
    hashed = (3 * IDS + IDS.roll(1, 1)) % 7
    model = Text(lambda ids: (3 * ids + ids.roll(1, 1)) % 7)
    got, delta = TransformerLRP(model, rules=rules).attribute(IDS, target=1, return_convergence_delta=True)
    each = TransformerLRP(Text(), rules=rules).attribute(hashed, target=1)
    torch.testing.assert_close(got, (each + each.roll(-1, 1)) / 2, rtol=1e-9, atol=1e-12)
    assert delta.abs().max() < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_an_id_has_the_relevance_of_all_its_embeddings(method):
    """Embedded twice, by one table or by two: as by the one table that is their sum, up to the published stabiliser."""
    again, doubled = Text(second=lambda ids, table: F.embedding(ids, table)), Text()
    with torch.no_grad():
        doubled.embed.weight += again.table
    got, want = (method(model).attribute(IDS, target=1) for model in (again, doubled))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    again.table.data.copy_(again.embed.weight.detach())
    doubled.embed.weight.data.copy_(2 * again.embed.weight.detach())
    got, want = (method(model).attribute(IDS, target=1) for model in (again, doubled))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------- tables read in other ways
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bag_is_an_embedding_and_a_pooling(mode):
    def pooled(ids, table):
        rows = F.embedding(ids, table)
        return (rows.sum(1) if mode == "sum" else rows.mean(1))[:, None]

    bag, plain = Text(None, lambda ids, table: F.embedding_bag(ids, table, mode=mode)[:, None]), Text(None, pooled)
    for rules in TABLES:
        got, delta = TransformerLRP(bag, rules=rules).attribute(IDS, target=1, return_convergence_delta=True)
        torch.testing.assert_close(got, TransformerLRP(plain, rules=rules).attribute(IDS, target=1))
        assert delta.abs().max() < 1e-6
    torch.testing.assert_close(
        AttentionRelevance(bag).attribute(IDS, target=1), AttentionRelevance(plain).attribute(IDS, target=1)
    )


class Bags(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 16, **options).double(), nn.Linear(16, 3).double()

    def forward(self, ids):
        return self.head(self.bag(ids))


def test_a_model_with_nothing_but_an_embedding_bag():
    """A linear model: a token's relevance is its row's part of the logit."""
    model = Bags(mode="mean")
    got = TransformerLRP(model, rules="cp").attribute(IDS, target=1)
    torch.testing.assert_close(got, ((model.bag.weight @ model.head.weight[1]) / IDS.shape[1])[IDS].detach())


@pytest.mark.parametrize("options", [{"mode": "max"}, {"padding_idx": 1}])
def test_other_bags_are_refused_by_name(options):
    with pytest.raises(UnsupportedOperationError, match="'embedding_bag' in module 'bag'"):
        TransformerLRP(Bags(**options)).attribute(IDS, target=1)


def rows(numbers, table):
    return torch.stack([torch.stack([table[j] for j in row]) for row in numbers])


READ = {
    "tolist": lambda ids, table: rows(ids.tolist(), table),
    "item": lambda ids, table: rows([[i.item() for i in row] for row in ids], table),
    "item and arithmetic": lambda ids, table: rows([[6 - i.item() // 2 for i in row] for row in ids], table),
    "a tensor of numbers": lambda ids, table: table[torch.tensor(ids.tolist())],
    "a tensor of rows": lambda ids, table: table[torch.tensor([row.tolist() for row in ids])],
    "tensors of rows": lambda ids, table: table[torch.stack([torch.tensor(row.tolist()) for row in ids])],
    "NumPy of a list": lambda ids, table: table[torch.from_numpy(np.array(ids.tolist()))],
    "NumPy of rows": lambda ids, table: table[torch.tensor(np.array([row.tolist() for row in ids]))],
    "an array of a type": lambda ids, table: table[torch.tensor(np.asarray(ids.tolist(), dtype=np.int64))],
    "a NumPy table": lambda ids, table: torch.from_numpy(table.numpy()[ids.tolist()]),
    "a power": lambda ids, table: rows([[i**1 for i in row] for row in ids.tolist()], table),
    "quotient and rest": lambda ids, table: rows([[divmod(i, 7)[1] for i in row] for row in ids.tolist()], table),
    "rounded": lambda ids, table: rows([[round(i) for i in row] for row in ids.tolist()], table),
    "a float": lambda ids, table: table[torch.tensor([[float(i) for i in row] for row in ids.tolist()]).long()],
    "a quotient": lambda ids, table: table[torch.tensor([[i / 1 for i in row] for row in ids.tolist()]).long()],
    "int": lambda ids, table: rows([[int(i) for i in row] for row in ids], table),
    "int of item": lambda ids, table: rows([[int(i.item()) for i in row] for row in ids], table),
    "NumPy": lambda ids, table: table[torch.from_numpy(ids.numpy().copy())],
    "one-hot by hand": lambda ids, table: torch.zeros(2, 7, dtype=table.dtype).scatter(1, ids, 1.0)[:, None] @ table,
    "sort": lambda ids, table: table[ids.sort(1)[0]],
    "max": lambda ids, table: table[ids.max(1)[0]][:, None],
    "topk": lambda ids, table: table[ids.topk(2, 1)[0]].sum(1, keepdim=True),
    "int of a maximum": lambda ids, table: table[int(ids.max())],
    "unique": lambda ids, table: table[torch.unique(ids, return_inverse=True)[0]].sum(0),
    "inverse of unique": lambda ids, table: table[torch.unique(ids, return_inverse=True)[1]],
    "gather": lambda ids, table: table.expand(2, -1, -1).gather(1, ids[..., None].expand(-1, -1, 16)),
    "take_along_dim": lambda ids, table: torch.take_along_dim(table[None], ids[..., None], 1),
}


def one_hot_by_index(ids, table):
    z = torch.zeros(2, 7, dtype=table.dtype)
    z[torch.arange(2)[:, None], ids] = 1.0
    return (z @ table)[:, None]


def one_hot_by_number(ids, table):
    z = torch.zeros(2, 7, dtype=table.dtype)
    for i, row in enumerate(ids.tolist()):
        for j in row:
            z[i, j] = 1.0
    return (z @ table)[:, None]


READ |= {"one-hot by index": one_hot_by_index, "one-hot by number": one_hot_by_number}


@pytest.mark.parametrize("name", READ)
def test_a_table_read_where_no_handle_follows_is_refused(name):
    model = Text(None, READ[name])
    with pytest.raises((UnsupportedOperationError, UnsupportedModelError), match="token ids"):
        TransformerLRP(model, rules="cp").attribute(IDS, target=1)
    assert not coverage(model, IDS)


# What ids say of lengths and places reads no table: the model is explained as if it knew.
CHOOSE = {
    "length": lambda ids, table: table[: (ids != 9).sum(1).max().item()],
    "place of a token": lambda ids, table: table[None, : ids.tolist()[0].index(5) + 3],
    "a condition": lambda ids, table: table[:5] if ids[0, 0].item() < 9 and int((ids == 9).sum()) == 0 else table[:1],
    "place of a maximum": lambda ids, table: table[:5] + 0.0 * int(ids[:1].argmax()),
    "a size": lambda ids, table: table[:5] + torch.zeros(ids.max().item() - 1, 16, dtype=table.dtype),
}


@pytest.mark.parametrize("name", CHOOSE)
def test_numbers_that_only_choose_are_no_embedding(name):
    model, plain = Text(None, CHOOSE[name]), Text(None, lambda ids, table: table[:5])
    assert torch.equal(model(IDS), plain(IDS))
    got, delta = TransformerLRP(model, rules="cp").attribute(IDS, target=1, return_convergence_delta=True)
    torch.testing.assert_close(got, TransformerLRP(plain, rules="cp").attribute(IDS, target=1))
    assert delta.abs().max() < 1e-6

"""Constants that are written in beside live values: their relevance counts like that of joined constants."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TinyViT, randomise
from torch import nn

from captum_transformer_attr import TransformerLRP

WIDTH, ROWS = 16, [0, 3]
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TOKEN = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
MASK = torch.tensor([True, False, False, True, False])
TABLES = ("deep_taylor", "cp", "libra")


class Tokens(nn.Module):
    """The blocks of a ViT behind ``change``, which brings in a constant."""

    def __init__(self, change):
        super().__init__()
        self.vit, self.change = randomise(TinyViT().double()), change

    def forward(self, x):
        return self.vit.head(self.vit.norm(self.vit.blocks(self.change(x)))[:, 0])


def set_rows(x):
    x = x.clone()
    x[:, ROWS] = TOKEN
    return x


def set_mask(x):
    x = x.clone()
    x[MASK.expand(len(x), -1)] = TOKEN
    return x


def copied(x):
    x = x.clone()
    for row in ROWS:
        x[:, row].copy_(TOKEN)
    return x


def into_buffer(x):
    z = torch.empty_like(x, requires_grad=False)
    z[:, ROWS] = TOKEN
    z[:, 1:3], z[:, 4:] = x[:, 1:3], x[:, 4:]
    return z


def into_a_view(x):
    z = TOKEN.repeat(x.shape[1], len(x), 1).transpose(0, 1)  # tokens first in memory
    z[:, 4:].zero_()
    z[:, 4:].add_(x[:, 4:])
    z[:, 1:3].copy_(x[:, 1:3])
    return z


def overwritten_afterwards(x):
    token, mask = TOKEN.clone(), MASK[:, None].expand(5, WIDTH).clone()
    x = x.masked_scatter(mask, token.repeat(2 * len(x)))
    token.zero_()
    return x


def repeated(x, n=2):
    return TOKEN.expand(len(x), n, WIDTH).contiguous()


INDEX = torch.tensor(ROWS)
WRITTEN = {
    "setitem": set_rows,
    "setitem by a mask": set_mask,
    "copy_ into a view": copied,
    "a buffer": into_buffer,
    "views of a buffer": into_a_view,
    "overwritten afterwards": overwritten_afterwards,
    "index_copy": lambda x: x.index_copy(1, INDEX, repeated(x)),
    "scatter": lambda x: x.scatter(1, INDEX[None, :, None].expand(len(x), 2, WIDTH), repeated(x)),
    "index_put": lambda x: x.index_put((torch.arange(len(x))[:, None], INDEX), TOKEN),
    "select_scatter": lambda x: x.select_scatter(repeated(x)[:, 0], 1, 0).select_scatter(repeated(x)[:, 0], 1, 3),
    "slice_scatter": lambda x: x.slice_scatter(repeated(x), 1, 0, 4, 3),
    "hstack": lambda x: torch.hstack([repeated(x, 1), x[:, 1:3], repeated(x, 1), x[:, 4:]]),
}


def joined(x):
    return torch.where(MASK[:, None], TOKEN, x)


@pytest.mark.parametrize("rules", TABLES)
@pytest.mark.parametrize("name", WRITTEN)
def test_written_constants_count_like_joined_ones(name, rules):
    assert torch.equal(WRITTEN[name](X), joined(X))
    written, plain = (TransformerLRP(Tokens(change), rules=rules) for change in (WRITTEN[name], joined))
    got, delta = written.attribute(X, target=1, return_convergence_delta=True)
    torch.testing.assert_close(got, plain.attribute(X, target=1), rtol=1e-6, atol=1e-9)
    assert delta.abs().max() < 1e-6
    want = plain.parameter_relevance(X, target=1)
    assert want[""].abs().min() > 1e-3
    taken = written.parameter_relevance(X, target=1)
    assert taken.keys() == want.keys()
    for path, share in taken.items():
        torch.testing.assert_close(share, want[path], rtol=1e-7, atol=1e-9)


FILLED = {
    "masked_fill": lambda x: x.masked_fill(MASK[:, None], 0.5),
    "masked_fill_": lambda x: x.clone().masked_fill_(MASK[:, None], 0.5),
    "index_fill": lambda x: x.index_fill(1, INDEX, 0.5),
    "fill_": lambda x: torch.stack(
        [t.clone().fill_(0.5) if m else t for t, m in zip(x.unbind(1), MASK, strict=True)], 1
    ),
    "scatter": lambda x: x.scatter(1, INDEX[None, :, None].expand(len(x), 2, WIDTH), 0.5),
}


@pytest.mark.parametrize("name", FILLED)
def test_filled_numbers_keep_their_share(name):
    """A linear model: the share of what was filled in is its weight times the number."""
    weight = torch.randn(3, 5 * WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    class Linear(nn.Module):
        def forward(self, x):
            return F.linear(FILLED[name](x).flatten(1), weight)

    method = TransformerLRP(Linear(), rules="cp")
    got, delta = method.attribute(X, target=1, return_convergence_delta=True)
    rows = weight[1].reshape(5, WIDTH)
    torch.testing.assert_close(got, torch.where(MASK[:, None], 0, X * rows))
    assert delta.abs().max() < 1e-12
    share = method.parameter_relevance(X, target=1)[""]
    torch.testing.assert_close(share, (0.5 * rows[MASK].sum()).expand(2))


class Buffered(Tokens):
    """Writes its input into a registered buffer, or into a copy of it."""

    def __init__(self, copies):
        super().__init__(None)
        self.copies = copies
        self.register_buffer("memory", TOKEN.repeat(2, 6, 1))

    def forward(self, x):
        z = self.memory.clone() if self.copies else self.memory
        z[: len(x), 1:] = x
        return self.vit.head(self.vit.norm(self.vit.blocks(z[: len(x)]))[:, 0])


@pytest.mark.parametrize("rules", TABLES)
def test_what_was_written_into_a_buffer_is_explained_after_the_buffer_was_restored(rules):
    model = Buffered(False)
    got, delta = TransformerLRP(model, rules=rules).attribute(X, target=1, return_convergence_delta=True)
    torch.testing.assert_close(got, TransformerLRP(Buffered(True), rules=rules).attribute(X, target=1))
    assert delta.abs().max() < 1e-6
    assert torch.equal(model.memory, TOKEN.repeat(2, 6, 1))


class Pooled(nn.Module):
    """Channel attention from the maximum over the image (CBAM), before a ViT's blocks."""

    def __init__(self, pool):
        super().__init__()
        self.vit, self.pool = randomise(TinyViT().double()), pool

    def forward(self, x):
        x = self.vit.patches(x)
        x = x * torch.sigmoid(self.pool(x))
        return self.vit.head(self.vit.norm(self.vit.blocks(x.flatten(2).mT)).mean(1))


POOLS = {
    "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(1),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x.flatten(2), 1)[..., None],
    "with indices": lambda x: F.adaptive_max_pool2d(x, 1, return_indices=True)[0],
    "fractional": lambda x: F.fractional_max_pool2d(x, 2, output_size=1, _random_samples=X.new_zeros(len(x), 16, 2)),
}


@pytest.mark.parametrize("name", POOLS)
def test_adaptive_max_pooling_is_max_pooling(name):
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for rules in ("deep_taylor", "cp"):
        got = TransformerLRP(Pooled(POOLS[name]), rules=rules).attribute(images, target=1)
        want = TransformerLRP(Pooled(nn.MaxPool2d(2)), rules=rules).attribute(images, target=1)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)

"""Where token grids lie on inputs that their cells do not divide: what a stem leaves over, crops, pads, overlaps."""

import pytest
import torch
from tiny_models import Block, TinyViT, randomise
from torch import nn
from torch.nn import functional as F

from captum_transformer_attr import AttentionRelevance, TransformerLRP, TransformerRelevance


class Stemmed(nn.Module):
    """A stem ``(N, C, ...)`` to ``(N, width, *grid)``, two blocks on its flattened grid."""

    def __init__(self, stem, width=8):
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(Block(width, 2), Block(width, 2))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


class Cropped(nn.Module):
    """Patches of 4 of the middle 8 pixels."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 4, 4)

    def forward(self, x):
        return self.patches(x[..., 1:9, 2:10])


class Reshaped(nn.Module):
    """Patches of 4 cut out by reshaping, what they leave over cut off before."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Linear(32, 8)

    def forward(self, x):
        n, c, h, w = x.shape
        x = x[:, :, : h // 4 * 4, : w // 4 * 4].reshape(n, c, h // 4, 4, w // 4, 4)
        return self.patches(x.permute(0, 2, 4, 1, 3, 5).flatten(3)).permute(0, 3, 1, 2)


class Resized(nn.Module):
    """Brought to 8 pixels first: the patches divide all of the input."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 4, 4)

    def forward(self, x):
        return self.patches(F.interpolate(x, (8, 8), mode="bilinear", antialias=False))


class Residual(nn.Module):
    """Two convolutions in steps of 2 whose shortcut reads every other pixel only."""

    def __init__(self):
        super().__init__()
        self.first, self.shortcut = nn.Conv2d(2, 8, 2, 2), nn.Conv2d(2, 8, 1, 2)
        self.second = nn.Conv2d(8, 8, 2, 2)

    def forward(self, x):
        return self.second(F.relu(self.first(x) + self.shortcut(x)))


def placed(tokens, axis, size, start, step, mode):
    """One axis by the definition: cell i has its centre at start + (i + 1/2) step."""
    cells = tokens.shape[axis]
    rows = []
    for p in range(size):
        u = (p + 0.5 - start) / step - 0.5
        if mode == "nearest":
            rows.append(tokens.select(axis, min(max(round(u + 1e-9), 0), cells - 1)))
            continue
        u = min(max(u, 0), cells - 1)
        low = int(u)
        high = min(low + 1, cells - 1)
        rows.append((1 - (u - low)) * tokens.select(axis, low) + (u - low) * tokens.select(axis, high))
    return torch.stack(rows, axis)


def read_by(model, x, axis):
    """Which positions along an axis the answer depends on, by changing them."""
    found = []
    for p in range(x.shape[axis]):
        other = x.clone()
        other.select(axis, p).add_(1)
        found.append(not torch.equal(model(other), model(x)))
    return torch.tensor(found)


CASES = {
    # name: stem, input size, start and step per axis
    "patches": (lambda: nn.Conv2d(2, 8, 4, 4), (10, 11), [(0, 4), (0, 4)]),
    "one axis only": (lambda: nn.Conv2d(2, 8, 4, 4), (8, 11), [(0, 4), (0, 4)]),
    "overlapping": (lambda: nn.Conv2d(2, 8, 6, 4), (15, 19), [(1, 4), (1, 4)]),
    "two convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 2, 2)),
        (11, 12),
        # 3 + 2 = 5 elements are read from 4 i on: centres at 4 i + 2.5
        [(0.5, 4), (0.5, 4)],
    ),
    "average pooling": (lambda: nn.Sequential(nn.Conv2d(2, 8, 2, 2), nn.AvgPool2d(2)), (11, 10), [(0, 4), (0, 4)]),
    "residual": (Residual, (10, 14), [(0, 4), (0, 4)]),
    "crop in the middle": (Cropped, (11, 12), [(1, 4), (2, 4)]),
    "reshaped": (Reshaped, (10, 11), [(0, 4), (0, 4)]),
    "resized": (Resized, (10, 11), [(0, 5), (0, 5.5)]),
    "maxima": (
        lambda: nn.Sequential(nn.Conv2d(2, 8, 2, 2), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1)),
        (11, 12),
        [(0, 5.5), (0, 4)],
    ),
    "sound": (lambda: nn.Conv1d(2, 8, 5, 3), (13,), [(1, 3)]),
    "film": (lambda: nn.Conv3d(2, 8, 2, 2), (4, 5, 7), [(0, 2), (0, 2), (0, 2)]),
}


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("case", CASES)
def test_cells_lie_where_they_read_and_the_rest_is_zero(case, mode):
    stem, size, places = CASES[case]
    model = randomise(Stemmed(stem())).double()
    x = torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    method = AttentionRelevance(model)
    tokens = method.attribute_tokens(x, 1)
    expected = tokens
    for axis, (start, step) in enumerate(places, 1):
        if tokens.shape[axis] != x.shape[axis + 1]:
            expected = placed(expected, axis, x.shape[axis + 1], start, step, mode)
    if case != "maxima":
        for axis in range(len(size)):
            read = read_by(model, x[:1], axis + 2).double()
            expected = expected * read.view([-1 if i == axis + 1 else 1 for i in range(expected.ndim)])
    found = method.attribute(x, 1, interpolate=mode)
    assert tokens.abs().max() > 1e-6
    torch.testing.assert_close(found, expected[:, None].expand_as(found), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(8, 8), (10, 11), (12, 9)])
def test_an_example_alone_and_a_black_one_are_placed_alike(size):
    model = randomise(Stemmed(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(2, 8, 2, 2)))).double()
    x = torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1] = 0
    method = TransformerRelevance(model)
    together = method.attribute(x, 1, interpolate="nearest")
    alone = torch.cat([method.attribute(x[i : i + 1], 1, interpolate="nearest") for i in range(2)])
    torch.testing.assert_close(together, alone)
    tokens = method.attribute_tokens(x, 1)
    cells = tokens.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(together[:, 0, : cells.shape[1], : cells.shape[2]], cells)


@pytest.mark.parametrize("size", [8, 10, 11])
def test_pixel_relevance_is_summed_over_whole_patches(size):
    model = randomise(TinyViT(image=size)).double()
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    method = TransformerLRP(model)
    pixels = method.attribute(x, 1).sum(1)
    whole = size // 4 * 4
    expected = pixels[:, :whole, :whole].reshape(2, size // 4, 4, size // 4, 4).sum((2, 4))
    torch.testing.assert_close(method.attribute_tokens(x, 1), expected)


def test_a_padded_grid_reaches_beyond_the_input():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(2, 8, 4, 4)

        def forward(self, x):
            return self.patches(F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4)))

    model = randomise(Stemmed(Padded())).double()
    x = torch.randn(1, 2, 10, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    method = AttentionRelevance(model)
    cells = method.attribute_tokens(x, 1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(method.attribute(x, 1, interpolate="nearest")[:, 0], cells[:, :10, :11])
    pixels = TransformerLRP(model).attribute(x, 1).sum(1)
    padded = F.pad(pixels, (0, 1, 0, 2)).reshape(1, 3, 4, 3, 4).sum((2, 4))
    torch.testing.assert_close(TransformerLRP(model).attribute_tokens(x, 1), padded)

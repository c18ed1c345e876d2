"""Inputs without a batch axis against the same model with one.

Qwen's models read the patches of all images in one list.
"""

import pytest
import torch
from tiny_models import Block, randomise
from torch import nn

from captum_transformer_attr import (
    AttentionRelevance,
    AttentionRollout,
    InputError,
    TransformerLRP,
    TransformerRelevance,
    coverage,
)

T, K = 5, 4
IDS = torch.randint(0, 20, (2, T), generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(2, K, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
GRID = torch.tensor([[1, 2, 2], [1, 2, 2]])


class Reader(nn.Module):
    """Patches and words in one sequence. With a grid the patches come as one list."""

    def __init__(self):
        super().__init__()
        self.embed, self.patches = nn.Embedding(20, 16), nn.Linear(12, 16)
        self.tower, self.blocks = Block(16, 2), nn.Sequential(Block(16, 2), Block(16, 2))
        self.head = nn.Linear(16, 20)

    def forward(self, input_ids, pixel_values, image_grid_thw=None):
        x = self.patches(pixel_values)
        if image_grid_thw is not None:
            x = torch.stack(x.split(image_grid_thw.prod(-1).tolist()))
        x = torch.cat([self.tower(x), self.embed(input_ids)], 1)
        return self.head(self.blocks(x))


@pytest.mark.parametrize("method_class", [TransformerRelevance, AttentionRelevance, TransformerLRP])
@pytest.mark.parametrize("target", [(8, 3), [(8, 3), (6, 1)]])
def test_list_of_patches_equals_batch_of_patches(method_class, target):
    model = randomise(Reader().double())
    method = method_class(model)
    listed = {"input_ids": IDS, "pixel_values": ROWS.flatten(0, 1), "image_grid_thw": GRID}
    batched = {"input_ids": IDS, "pixel_values": ROWS}
    got, delta = method.attribute(listed, target, return_convergence_delta=True)
    want, without = method.attribute(batched, target, return_convergence_delta=True)
    assert got["pixel_values"].shape == (2 * K, 12) and got["input_ids"].shape == (2, T)
    torch.testing.assert_close(got["pixel_values"].reshape(2, K, 12), want["pixel_values"], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(got["input_ids"], want["input_ids"], rtol=1e-9, atol=1e-14)
    assert want["pixel_values"].abs().amax((1, 2)).min() > 0
    assert delta.shape == (2,) and delta.abs().max() < 1e-6 and without.abs().max() < 1e-6
    tokens, batches = method.attribute_tokens(listed, target), method.attribute_tokens(batched, target)
    torch.testing.assert_close(tokens["pixel_values"].reshape(2, K), batches["pixel_values"], rtol=1e-9, atol=1e-14)


def test_coverage_of_a_list_of_patches():
    listed = {"input_ids": IDS, "pixel_values": ROWS.flatten(0, 1), "image_grid_thw": GRID}
    assert coverage(randomise(Reader().double()), listed, target=(8, 3))


@pytest.mark.parametrize("method_class", [TransformerRelevance, TransformerLRP, AttentionRollout])
def test_images_of_different_sizes(method_class):
    """Every example is what it is alone, in its own rows."""

    class Longest(Reader):
        def forward(self, input_ids, pixel_values, image_grid_thw):
            x = self.patches(pixel_values).split(image_grid_thw.prod(-1).tolist())
            x = torch.cat([self.tower(t[None]).mean(1, keepdim=True) for t in x])
            return self.head(self.blocks(torch.cat([x, self.embed(input_ids)], 1)))

    method = method_class(randomise(Longest().double()))
    rows = torch.randn(10, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grid = torch.tensor([[1, 2, 3], [1, 2, 2]])
    together = {"input_ids": IDS, "pixel_values": rows, "image_grid_thw": grid}
    got = method.attribute(together, [(5, 3), (4, 1)])
    for i, (part, target) in enumerate(((slice(0, 6), (5, 3)), (slice(6, 10), (4, 1)))):
        alone = {"input_ids": IDS[i : i + 1], "pixel_values": rows[part], "image_grid_thw": grid[i : i + 1]}
        want = method.attribute(alone, target)
        assert want["pixel_values"].abs().max() > 0
        torch.testing.assert_close(got["pixel_values"][part], want["pixel_values"], rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(got["input_ids"][i : i + 1], want["input_ids"], rtol=1e-9, atol=1e-14)


def test_rows_that_belong_to_nobody_are_refused():
    listed = {"input_ids": IDS, "pixel_values": ROWS.flatten(0, 1), "image_grid_thw": torch.tensor([[1, 2, 1]] * 4)}
    with pytest.raises(InputError, match="one example at a time"):
        TransformerRelevance(randomise(Reader().double())).attribute(listed, (8, 3))

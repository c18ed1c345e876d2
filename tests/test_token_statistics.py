"""The flow through Swin against dense token-to-token matrices built by hand.

They go through windows, cyclic shifts, padding, mergings and layer-norm statistics.
"""

import pytest
import timm
import torch
import transformers
from tiny_models import TinyViT, randomise

from captum_transformer_attr import (
    AttentionRelevance,
    AttentionRollout,
    InputError,
    TokenStatisticsRelevance,
    TransformerRelevance,
)

torch.manual_seed(0)
IMAGES = torch.randn(2, 3, 28, 28, dtype=torch.float64)


def swin(size=28):
    """Windows of 4, every second block shifted by 2.

    At size 28: 14×14 tokens padded to 16, merged to 7×7 (padded to 8), merged (with padding) to 4×4.
    """
    model = timm.models.SwinTransformer(
        img_size=size, patch_size=2, num_classes=5, embed_dim=8, depths=(2, 2, 1), num_heads=(2, 2, 4), window_size=4
    )
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # so that the maps can be watched from outside
    return randomise(model).double()


class Watched:
    """Attention, its gradient, and the first layer norm's deviations of every block, taken with plain hooks."""

    def __init__(self, model, x, target):
        blocks = [b for stage in model.layers for b in stage.blocks]
        self.maps, self.inputs, handles = [], [], []
        for block in blocks:
            handles.append(
                block.attn.softmax.register_forward_hook(lambda m, i, o: (o.retain_grad(), self.maps.append(o))[0])
            )
            handles.append(block.norm1.register_forward_pre_hook(lambda m, i: self.inputs.append(i[0])))
        model(x)[:, target].sum().backward()
        for handle in handles:
            handle.remove()
        self.blocks = blocks

    def sigma(self, layer, example):
        x = self.inputs[layer][example].detach()
        sigma = (((x - x.mean(-1, keepdim=True)) ** 2).mean(-1) + self.blocks[layer].norm1.eps).sqrt().flatten()
        return sigma / sigma.mean()

    def windows(self, layer, example, weigh):
        """Head-averaged weights of every window of one example, and the grid cell of its rows (None for padding)."""
        height, width = self.inputs[layer].shape[1:3]
        window, shift = self.blocks[layer].window_size[0], self.blocks[layer].shift_size[0]
        across, down = -(-width // window), -(-height // window)
        for w in range(across * down):
            place = example * across * down + w
            weights = weigh(self.maps[layer][place].detach(), self.maps[layer].grad[place]).mean(0)
            cells = []
            for k in range(window * window):
                row, column = w // across * window + k // window, w % across * window + k % window
                inside = row < height and column < width
                cells.append((row + shift) % height * width + (column + shift) % width if inside else None)
            yield weights, cells

    def dense(self, layer, example, weigh):
        """Token-to-token matrix of one block, cell by cell."""
        tokens = self.inputs[layer].shape[1] * self.inputs[layer].shape[2]
        matrix = torch.zeros(tokens, tokens, dtype=torch.float64)
        for weights, cells in self.windows(layer, example, weigh):
            for i, query in enumerate(cells):
                for j, key in enumerate(cells):
                    if query is not None and key is not None:
                        matrix[query, key] += weights[i, j]
        return matrix

    def row_sums(self, layer, example, weigh):
        """Row sums of the attention itself, keys in the padding included."""
        sums = torch.zeros(self.inputs[layer].shape[1] * self.inputs[layer].shape[2], dtype=torch.float64)
        for weights, cells in self.windows(layer, example, weigh):
            for i, query in enumerate(cells):
                if query is not None:
                    sums[query] = weights[i].sum()
        return sums

    def merging(self, layer):
        """Every parent shares equally among four children; a child in the padding takes its share with it."""
        height, width = self.inputs[layer].shape[1:3]
        parents = -(-height // 2), -(-width // 2)
        matrix = torch.zeros(parents[0] * parents[1], height * width, dtype=torch.float64)
        for row in range(height):
            for column in range(width):
                matrix[row // 2 * parents[1] + column // 2, row * width + column] = 0.25
        return matrix


def rolled_out(watched, example, weigh, layer_matrix, share=1):
    """Start uniform on the last grid, multiply downwards, take the identity out: ``share`` of it per layer."""
    layers = len(watched.blocks)
    last = watched.inputs[-1].shape[1] * watched.inputs[-1].shape[2]
    row = identity = torch.full((last,), 1 / last, dtype=torch.float64)
    for layer in reversed(range(layers)):
        matrix = watched.dense(layer, example, weigh)
        row, identity = row @ layer_matrix(matrix, layer, example), share * identity
        if layer and watched.inputs[layer].shape[1:3] != watched.inputs[layer - 1].shape[1:3]:
            merge = watched.merging(layer - 1)
            row, identity = row @ merge, identity @ merge
    size = watched.inputs[0].shape[1:3]
    return (row - identity).reshape(size)


def gradient_times_attention(a, g):
    return (a * g).clamp(min=0)


def key(watched):
    def matrix(m, layer, example):
        return torch.eye(len(m), dtype=m.dtype) + m / watched.sigma(layer, example)[None, :]

    return matrix


def query(watched):
    def matrix(m, layer, example):
        return torch.eye(len(m), dtype=m.dtype) + m / watched.sigma(layer, example)[:, None]

    return matrix


def row(watched):
    def matrix(m, layer, example):
        sigma = watched.sigma(layer, example)
        return (torch.diag(sigma) + m) / (sigma + watched.row_sums(layer, example, gradient_times_attention))[:, None]

    return matrix


def none(watched):
    return lambda m, layer, example: torch.eye(len(m), dtype=m.dtype) + m


def half_and_half(watched):
    return lambda m, layer, example: (torch.eye(len(m), dtype=m.dtype) + m) / 2


CASES = {
    "key": (lambda m: TokenStatisticsRelevance(m, side="key"), gradient_times_attention, key),
    "query": (lambda m: TokenStatisticsRelevance(m, side="query"), gradient_times_attention, query),
    "row": (lambda m: TokenStatisticsRelevance(m, side="row"), gradient_times_attention, row),
    "none": (lambda m: TokenStatisticsRelevance(m, side="none"), gradient_times_attention, none),
    "gradient x attention": (AttentionRelevance, gradient_times_attention, none),
    "rollout": (AttentionRollout, lambda a, g: a, half_and_half),
}


@pytest.mark.parametrize("case", CASES)
def test_swin_against_dense_matrices(case):
    build, weigh, layer_matrix = CASES[case]
    model = swin()
    got = build(model).attribute_tokens(IMAGES, target=2)
    assert got.shape == (2, 14, 14)
    watched = Watched(model, IMAGES, 2)
    for example in range(2):
        want = rolled_out(watched, example, weigh, layer_matrix(watched), 0.5 if case == "rollout" else 1)
        assert (got[example] - want).abs().max() < 1e-9 * want.abs().max()


def test_gradient_x_activation_start():
    """The read-out rows are weighted by relu(Σ_c x ∂y/∂x) at the last residual sum with attention."""
    model = swin()
    got = TokenStatisticsRelevance(model, side="none", start="gradient_x_activation").attribute_tokens(IMAGES, target=2)
    watched = Watched(model, IMAGES, 2)
    caught = {}
    handle = model.layers[-1].blocks[-1].norm2.register_forward_pre_hook(lambda m, i: caught.update(x=i[0].detach()))
    model(IMAGES)
    handle.remove()
    side = 4
    x = caught["x"].reshape(2, side, side, -1).requires_grad_()
    (total,) = torch.autograd.grad(last_part(model, x), x)
    for example in range(2):
        weights = (x[example].detach() * total[example]).sum(-1).clamp(min=0).flatten()
        start = weights / weights.sum()
        row_vector = identity = start
        for layer in reversed(range(len(watched.blocks))):
            matrix = watched.dense(layer, example, gradient_times_attention)
            row_vector = row_vector @ (torch.eye(len(matrix), dtype=matrix.dtype) + matrix)
            if layer and watched.inputs[layer].shape[1:3] != watched.inputs[layer - 1].shape[1:3]:
                merge = watched.merging(layer - 1)
                row_vector, identity = row_vector @ merge, identity @ merge
        want = (row_vector - identity).reshape(14, 14)
        assert (got[example] - want).abs().max() < 1e-9 * want.abs().max()


def last_part(model, x):
    """From the last residual sum with attention to the selected logit, written out."""
    block = model.layers[-1].blocks[-1]
    b, h, w, c = x.shape
    y = x.reshape(b, -1, c)
    y = (y + block.mlp(block.norm2(y))).reshape(b, h, w, c)
    return model.head(model.norm(y))[:, 2].sum()


@pytest.mark.parametrize("side", ["key", "none"])
def test_bert_divides_behind_the_sum(side):
    """Post-norm: R = diag(1/σ̂)(I + Ā), σ̂ of the attention's output norm over the real tokens."""
    config = transformers.BertConfig(
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        num_hidden_layers=2,
        vocab_size=30,
        attn_implementation="eager",
    )
    model = randomise(transformers.BertForSequenceClassification(config)).double()
    inputs = {"input_ids": torch.randint(0, 30, (2, 6)), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    got = TokenStatisticsRelevance(model, side=side).attribute(inputs, target=1)["input_ids"]
    seen = []
    handles = [
        layer.attention.output.LayerNorm.register_forward_pre_hook(lambda m, i: seen.append(i[0].detach()))
        for layer in model.bert.encoder.layer
    ]
    out = model(**inputs, output_attentions=True)
    for a in out.attentions:
        a.retain_grad()
    out.logits[:, 1].sum().backward()
    for handle in handles:
        handle.remove()
    for example, length in enumerate((6, 4)):
        r = identity = torch.eye(6, dtype=torch.float64)[0, :length]
        for a, x in zip(reversed(out.attentions), reversed(seen), strict=True):
            abar = (a.detach() * a.grad)[example, :, :length, :length].clamp(min=0).mean(0)
            sigma = x[example, :length].var(-1, correction=0).add(config.layer_norm_eps).sqrt()
            sigma = sigma / sigma.mean() if side == "key" else torch.ones_like(sigma)
            r, identity = (r / sigma) @ (torch.eye(length, dtype=torch.float64) + abar), identity / sigma
        assert (got[example, :length] - (r - identity)).abs().max() < 1e-9
        assert (got[example, length:] == 0).all()


def test_swin_v2_divides_behind_the_attention():
    """Residual post-norm: R = I + diag(1/σ̂) Ā with the deviations of the attention branch's output."""
    model = timm.models.SwinTransformerV2(
        img_size=16, patch_size=2, num_classes=5, embed_dim=8, depths=(2,), num_heads=(2,), window_size=8
    )
    model = randomise(model).double()
    images = IMAGES[:, :, :16, :16]
    maps, seen, handles = [], [], []
    for block in model.layers[0].blocks:
        handles.append(block.attn.softmax.register_forward_hook(lambda m, i, o: (o.retain_grad(), maps.append(o))[0]))
        handles.append(block.norm1.register_forward_pre_hook(lambda m, i: seen.append(i[0].detach())))
    model(images)[:, 2].sum().backward()
    for handle in handles:
        handle.remove()
    got = TokenStatisticsRelevance(model, side="key").attribute_tokens(images, target=2)
    for example in range(2):
        start = row_vector = torch.full((64,), 1 / 64, dtype=torch.float64)
        for a, x in zip(reversed(maps), reversed(seen), strict=True):
            abar = (a.detach() * a.grad)[example].clamp(min=0).mean(0)
            sigma = (x[example].var(-1, correction=0) + 1e-5).sqrt().flatten()
            row_vector = row_vector @ (torch.eye(64, dtype=torch.float64) + abar / (sigma / sigma.mean())[:, None])
        assert (got[example].flatten() - (row_vector - start)).abs().max() < 1e-9


def test_conservation_in_every_stage():
    """Without padding every block passes on exactly what arrived; padding takes a share, which the delta counts."""
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    records = TransformerRelevance(swin(32)).attention_records(images, target=1)
    assert len(records.relevance_by_layer) >= 5
    for relevance in records.relevance_by_layer.values():
        assert (relevance.sum(1) - 1).abs().max() < 1e-6
    for model, x in ((swin(32), images), (swin(28), IMAGES)):
        _, delta = TransformerRelevance(model).attribute(x, target=1, return_convergence_delta=True)
        assert delta.abs().max() < 1e-6


@pytest.mark.parametrize("side", ["key", "query", "row", "none"])
def test_batch_equals_its_examples(side):
    for model, images in ((swin(), IMAGES), (randomise(TinyViT()).double(), IMAGES[:, :, :8, :8])):
        method = TokenStatisticsRelevance(model, side=side, merging="activation", start="gradient_x_activation")
        together = method.attribute(images, target=1)
        alone = torch.cat([method.attribute(images[i : i + 1], target=1) for i in range(2)])
        assert (together - alone).abs().max() <= 1e-12 * together.abs().max()


@pytest.mark.parametrize("option", [{"side": "left"}, {"statistic": "max"}, {"start": "cls"}, {"merging": "none"}])
def test_unknown_options(option):
    with pytest.raises(InputError, match=next(iter(option))):
        TokenStatisticsRelevance(TinyViT(), **option)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_part_in_the_mean_deviation(side):
    """Grouped-query attention repeats its keys; which of them are padding is read off all the same."""
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
    )
    model = randomise(transformers.LlamaForCausalLM(config).double())
    ids = torch.randint(3, 20, (2, 7), generator=torch.Generator().manual_seed(1))
    real = slice(3, 7) if side == "left" else slice(0, 4)
    mask = torch.ones_like(ids)
    mask[1] = 0
    mask[1, real] = 1
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    method = TokenStatisticsRelevance(model)
    got = method.attribute_tokens(inputs, [(6, 3), (real.stop - 1, 5)])["input_ids"]
    alone = method.attribute_tokens({"input_ids": ids[1:, real]}, [(3, 5)])["input_ids"]
    torch.testing.assert_close(got[1:, real], alone, rtol=1e-6, atol=1e-12)  # Llama computes its norms in float32
    assert (got[1][mask[1] == 0] == 0).all() and (alone != 0).any()

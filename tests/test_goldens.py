"""Outputs of the published implementations, example by example, against ours in one batch."""

import pytest
import torch
from golden_models import assert_relatively_close, published_bert, published_vit

from captum_transformer_attr import TransformerRelevance


@pytest.mark.parametrize("name", ["vit_small_grid", "vit_14x14"])
@pytest.mark.parametrize("start_layer, suffix", [(0, ""), (1, "_start1")])
def test_vit_maps(name, start_layer, suffix):
    golden, model = published_vit(name)
    method = TransformerRelevance(model, start_layer=start_layer)
    got = method.attribute_tokens(golden["images"], golden["targets"])
    assert_relatively_close(got.flatten(1), golden[f"map.transformer_attribution{suffix}"])


@pytest.mark.parametrize("fused", [True, False])
def test_vit_attention_gradient_and_relevance(fused):
    golden, model = published_vit("vit_small_grid")
    for block in model.blocks:
        block.attn.fused_attn = fused
    records = TransformerRelevance(model).attention_records(golden["images"], golden["targets"])
    for field, name in (
        ("attention", "attention"),
        ("gradient", "attention_gradient"),
        ("relevance", "attention_relevance"),
    ):
        assert_relatively_close(torch.stack([getattr(r, field) for r in records], 1), golden[name])
    assert [r.name for r in records] == [f"blocks.{i}.attn" for i in range(len(model.blocks))]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("start_layer", [0, 2])
@pytest.mark.parametrize("normalize, suffix", [(False, "plain"), (True, "rownorm")])
def test_bert_maps_padded(implementation, start_layer, normalize, suffix):
    golden, model = published_bert(implementation)
    inputs = {name: golden[name] for name in ("input_ids", "attention_mask")}
    method = TransformerRelevance(model, start_layer=start_layer, normalize=normalize)
    got = method.attribute_tokens(inputs, golden["targets"])
    assert set(got) == {"input_ids"}
    want = golden[f"map.transformer_attribution_start{start_layer}_{suffix}"]
    # The read-out token's own entry: the published code overwrites it, ours takes the identity out.
    assert_relatively_close(got["input_ids"][:, 1:], want[:, 1:])
    assert (got["input_ids"][inputs["attention_mask"] == 0] == 0).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bert_attention_gradient_and_relevance(implementation):
    golden, model = published_bert(implementation)
    inputs = {name: golden[name] for name in ("input_ids", "attention_mask")}
    records = TransformerRelevance(model).attention_records(inputs, golden["targets"])
    real = inputs["attention_mask"].double()
    real = real[:, None, None, :, None] * real[:, None, None, None, :]
    for field, name in (
        ("attention", "attention"),
        ("gradient", "attention_gradient"),
        ("relevance", "attention_relevance"),
    ):
        assert_relatively_close(torch.stack([getattr(r, field) for r in records], 1) * real, golden[name] * real)


@pytest.mark.parametrize(
    "build",
    [lambda: published_vit("vit_small_grid"), lambda: published_vit("vit_14x14"), lambda: published_bert("sdpa")],
)
def test_conservation_and_batch(build):
    golden, model = build()
    images = "images" in golden
    names = ("images",) if images else ("input_ids", "attention_mask")
    batch = {name: golden[name] for name in names}
    targets = golden["targets"]
    method = TransformerRelevance(model)

    def run(rows):
        part = {name: t[rows] for name, t in batch.items()}
        got, delta = method.attribute(part["images"] if images else part, targets[rows], return_convergence_delta=True)
        return (got if images else got["input_ids"]), delta

    together, delta = run(slice(None))
    assert delta.shape == targets.shape and delta.abs().max() < 1e-6
    alone = torch.cat([run(slice(i, i + 1))[0] for i in range(len(targets))])
    assert (together - alone).abs().max() <= 1e-12 * together.abs().max()

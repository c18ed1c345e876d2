"""AttentionRelevance against the published implementation (goldens), and its options."""

import pytest
import timm
import torch
import transformers
from golden_models import published
from hand_rules import Relations
from tiny_models import TinyViT, randomise

from captum_transformer_attr import AttentionRelevance, InputError, TransformerRelevance

VARIANTS = {
    "reference": {},
    "guarded": {},
    "unnormalized": {"normalize": False},
    "no_self_in_rule10": {"self_terms": False},
}


def error(got, want):
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max()).item()


# ---------------------------------------------------------------------- goldens, in one batch
@pytest.mark.parametrize("name", ["vit_small_grid", "vit_14x14"])
def test_vit(name):
    want, model = published(name, timm.models.VisionTransformer)
    got = AttentionRelevance(model).attribute_tokens(want["images"], want["targets"])
    assert error(got.flatten(1), want["map.generic_attention"]) < 1e-9


@pytest.mark.parametrize("variant", VARIANTS)
def test_lxmert(variant):
    want, model = published(
        "lxmert_generic_attention", transformers.LxmertForQuestionAnswering, transformers.LxmertConfig
    )
    inputs = {name: want[name] for name in ("input_ids", "visual_feats", "visual_pos")}
    got = AttentionRelevance(model, **VARIANTS[variant]).attribute_tokens(inputs, want["targets"])
    assert error(got["input_ids"][:, 1:], want[f"map.text.{variant}"][:, 1:]) < 1e-9
    assert error(got["visual_feats"], want[f"map.image.{variant}"]) < 1e-9
    # Features and boxes are added into one token: each reports its score.
    assert torch.equal(got["visual_pos"], got["visual_feats"])


@pytest.mark.parametrize("variant", ["guarded", "unnormalized"])
def test_detr(variant):
    cls, config = transformers.DetrForObjectDetection, transformers.DetrConfig
    want, model = published("detr_generic_attention", cls, config, transformers.ResNetConfig)
    inputs = {name: want[name] for name in ("pixel_values", "pixel_mask")}
    target = list(zip(want["query"].tolist(), want["target_class"].tolist(), strict=True))
    got = AttentionRelevance(model, **VARIANTS[variant]).attribute_tokens(inputs, target)["pixel_values"]
    assert got.shape == (2, 3, 4)
    assert error(got.flatten(1), want[f"map.{variant}"]) < 1e-9
    # What the attention among learned queries keeps for them is accounted for.
    delta = AttentionRelevance(model, **VARIANTS[variant]).attribute(inputs, target, return_convergence_delta=True)[1]
    assert delta.shape == (2,) and delta.abs().max() < 1e-6


def test_visualbert():
    cls, config = transformers.VisualBertForQuestionAnswering, transformers.VisualBertConfig
    want, model = published("visualbert_generic_attention", cls, config)
    inputs = {name: want[name] for name in ("input_ids", "attention_mask", "visual_embeds")}
    got = AttentionRelevance(model).attribute_tokens(inputs, want["targets"])
    assert error(got["visual_embeds"], want["map.image"]) < 1e-9
    text = want["map.text"]
    text[torch.arange(2), inputs["attention_mask"].sum(1) - 2] -= 1  # the read-out token's identity
    assert error(got["input_ids"], text) < 1e-9


@pytest.mark.parametrize("start_layer, layers", [(0, "all_layers"), (-1, "last_layer")])
def test_clip(start_layer, layers):
    want, model = published("clip_generic_attention", transformers.CLIPModel, transformers.CLIPConfig)
    inputs = {name: want[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    got = AttentionRelevance(model, start_layer).attribute_tokens(inputs, [0, 1])
    assert error(got["pixel_values"].flatten(1), want[f"map.image.{layers}"]) < 1e-5
    text = want[f"map.text.{layers}"]
    text[torch.arange(2), inputs["attention_mask"].sum(1) - 1] -= 1
    assert error(got["input_ids"], text) < 1e-5


# ---------------------------------------------------------------------- schedules of co-attention
def test_schedule_of_lxmert():
    want, model = published(
        "lxmert_generic_attention", transformers.LxmertForQuestionAnswering, transformers.LxmertConfig
    )
    inputs = {name: want[name] for name in ("input_ids", "visual_feats", "visual_pos")}
    schedule = AttentionRelevance(model).schedule(inputs, want["targets"])
    text, image = "input_ids", "visual_feats+visual_pos"
    hand = [f"{text}: 6"] * 2 + [f"{image}: 6"] * 2
    hand += [f"{text} <- {image}: 10", f"{image} <- {text}: 10", f"{text}: 6, 7", f"{image}: 6, 7"]
    hand += [f"{text} <- {image}: 10, 11", f"{image} <- {text}: 10, 11", f"{text}: 6, 7", f"{image}: 6, 7"]
    hand += [f"{text} <- {image}: 10, 11", f"{text}: 6, 7"]  # nobody reads the image after that
    assert [step.brief for step in schedule] == hand
    lines = str(schedule).splitlines()
    assert len(lines) == len(hand) + 1
    assert lines[5].split() == ["4", *hand[4].split(), "lxmert.encoder.x_layers.0.visual_attention.att"]


def test_records_name_the_streams():
    want, model = published(
        "lxmert_generic_attention", transformers.LxmertForQuestionAnswering, transformers.LxmertConfig
    )
    inputs = {name: want[name] for name in ("input_ids", "visual_feats", "visual_pos")}
    records = AttentionRelevance(model).attention_records(inputs, want["targets"])
    text, image = "input_ids", "visual_feats+visual_pos"
    assert [(r.query_stream, r.key_stream) for r in records[2:7]] == [
        (image, image),
        (image, image),
        (text, image),
        (image, text),
        (text, text),
    ]
    assert records[4].attention.shape == (2, 4, 8, 6)


def test_schedule_names_what_start_layer_leaves_out():
    want, model = published("clip_generic_attention", transformers.CLIPModel, transformers.CLIPConfig)
    inputs = {name: want[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    steps = [step.brief for step in AttentionRelevance(model, {"pixel_values": -1}).schedule(inputs, [0, 1])]
    assert steps == ["pixel_values: identity"] * 2 + ["pixel_values: 6"] + ["input_ids: 6"] * 3


# ---------------------------------------------------------------------- options
def test_start_layer_per_stream():
    want, model = published("clip_generic_attention", transformers.CLIPModel, transformers.CLIPConfig)
    inputs = {name: want[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    got = AttentionRelevance(model, {"input_ids": -1}).attribute_tokens(inputs, [0, 1])
    assert torch.equal(
        got["pixel_values"], AttentionRelevance(model, 0).attribute_tokens(inputs, [0, 1])["pixel_values"]
    )
    assert torch.equal(got["input_ids"], AttentionRelevance(model, -1).attribute_tokens(inputs, [0, 1])["input_ids"])


@pytest.mark.parametrize(
    "start_layer, message",
    [
        (3, "start_layer=3: the stream 'pixel_values' has 3 attention calls"),
        (-4, "start_layer=-4"),
        ({"image": 1}, "no stream 'image'; the streams are input_ids, pixel_values"),
    ],
)
def test_start_layer_out_of_range(start_layer, message):
    want, model = published("clip_generic_attention", transformers.CLIPModel, transformers.CLIPConfig)
    inputs = {name: want[name] for name in ("input_ids", "pixel_values")}
    with pytest.raises(InputError, match=message):
        AttentionRelevance(model, start_layer).attribute_tokens(inputs, [0, 1])


def test_start_layer_in_a_decoder():
    """With most layers left out, LXMERT's text reads the image once."""
    want, model = published(
        "lxmert_generic_attention", transformers.LxmertForQuestionAnswering, transformers.LxmertConfig
    )
    inputs = {name: want[name] for name in ("input_ids", "visual_feats", "visual_pos")}
    method = AttentionRelevance(model, {"input_ids": -2, "visual_feats": -1})
    steps = [step.brief for step in method.schedule(inputs, want["targets"])]
    assert [s for s in steps if not s.endswith("identity")] == [
        "visual_feats+visual_pos: 6",
        "input_ids <- visual_feats+visual_pos: 10",
        "input_ids: 6, 7",
    ]
    got = method.attribute_tokens(inputs, want["targets"])
    records = method.attention_records(inputs, want["targets"])
    averaged = [(r.attention * r.gradient).clamp(min=0).mean(1) for r in records]
    image, cross, text = averaged[-3], averaged[-2], averaged[-1]
    for i in range(2):
        relations = Relations(t=8, i=6)
        relations.own("i", image[i])
        relations.ask("t", "i", cross[i])
        relations.own("t", text[i])
        assert error(got["visual_feats"][i], relations.row("t", 0, "i")) < 1e-9
        assert error(got["input_ids"][i], relations.row("t", 0, "t")) < 1e-9


def test_relevance_instead_of_attention_is_transformer_relevance():
    """For self-attention alone (∇A ⊙ R_A)⁺ rolled out is the CVPR 2021 method."""
    model = randomise(TinyViT().double())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = AttentionRelevance(model, use_relevance=True).attribute_tokens(images, [0, 3])
    assert torch.equal(got, TransformerRelevance(model).attribute_tokens(images, [0, 3]))
    assert not torch.allclose(got, AttentionRelevance(model).attribute_tokens(images, [0, 3]))


def test_normalisation_changes_nothing_without_cross_attention():
    model = randomise(TinyViT().double())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = AttentionRelevance(model, normalize=False, self_terms=False).attribute_tokens(images, [0, 3])
    assert torch.equal(got, AttentionRelevance(model).attribute_tokens(images, [0, 3]))


# ---------------------------------------------------------------------- batches
def test_a_batch_is_its_examples():
    want, model = published(
        "lxmert_generic_attention", transformers.LxmertForQuestionAnswering, transformers.LxmertConfig
    )
    inputs = {name: want[name] for name in ("input_ids", "visual_feats", "visual_pos")}
    method = AttentionRelevance(model)
    together = method.attribute_tokens(inputs, want["targets"])
    for i in range(2):
        one = method.attribute_tokens({k: t[i : i + 1] for k, t in inputs.items()}, want["targets"][i : i + 1])
        for name, scores in one.items():
            assert error(together[name][i : i + 1], scores) < 1e-12


def test_padding_changes_nothing():
    want, model = published(
        "lxmert_generic_attention", transformers.LxmertForQuestionAnswering, transformers.LxmertConfig
    )
    inputs = {name: want[name] for name in ("input_ids", "visual_feats", "visual_pos")}
    method = AttentionRelevance(model)
    alone = method.attribute_tokens({k: t[:1] for k, t in inputs.items()}, want["targets"][:1])
    wider = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"][:1], (0, 3), value=7),
        "attention_mask": torch.tensor([[1] * 8 + [0] * 3]),
        "visual_feats": torch.nn.functional.pad(inputs["visual_feats"][:1], (0, 0, 0, 2), value=1.0),
        "visual_pos": torch.nn.functional.pad(inputs["visual_pos"][:1], (0, 0, 0, 2), value=1.0),
        "visual_attention_mask": torch.tensor([[1] * 6 + [0] * 2]),
    }
    got = method.attribute_tokens(wider, want["targets"][:1])
    for name, real in (("input_ids", 8), ("visual_feats", 6)):
        assert error(got[name][:, :real], alone[name]) < 1e-9
        assert (got[name][:, real:] == 0).all()
    full = method.attribute(wider, want["targets"][:1])
    assert {name: tuple(t.shape) for name, t in full.items()} == {
        "input_ids": (1, 11),
        "visual_feats": (1, 8, 20),
        "visual_pos": (1, 8, 4),
    }

"""VisualBERT, CLIP, LXMERT and DETR: the schedule against one written out by hand, the scores of a batch against the
rules computed in float64 from the eager attentions of every example alone (beside the goldens of the published code).
"""

import pytest
import torch
import transformers as T
from hand_rules import Relations, averaged, eager_maps
from small_hf_models import (
    FLOAT32_SOFTMAX,
    SEQ2SEQ,
    TEXT,
    VISION,
    alone,
    briefs,
    build,
    close,
    noise,
    padded,
)

from captum_transformer_attr import AttentionRelevance


def test_visualbert():
    """One joint sequence, read out at the last word before [SEP]; the second question's padding is in the middle."""
    config = T.VisualBertConfig(**TEXT, visual_embedding_dim=6, num_labels=5)
    inputs = {**padded(), "visual_embeds": noise(2, 3, 6)}
    inputs["visual_attention_mask"] = torch.ones(2, 3, dtype=torch.long)
    model = build(T.VisualBertForQuestionAnswering, config, "eager")
    method = AttentionRelevance(model)
    assert briefs(method.schedule(inputs, [1, 3])) == ["input_ids+visual_embeds: 6"] * 2
    got = method.attribute_tokens(inputs, [1, 3])
    for i, label in enumerate((1, 3)):
        one = alone(inputs, i)
        output = model(**one, output_attentions=True)
        a = averaged(output.logits[0, label], dict(enumerate(output.attentions)))
        words = one["input_ids"].shape[1]
        relations = Relations(j=words + 3)
        for layer in range(2):
            relations.own("j", a[layer])
        row = relations.row("j", int(one["attention_mask"].sum()) - 2, "j")
        close(got["input_ids"][i], row[:words])
        close(got["visual_embeds"][i], row[words:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_clip(attention):
    """Two towers, each by rule 6; the image is read at the class token, a text at its end token."""
    config = T.CLIPConfig(text_config=dict(TEXT, eos_token_id=61), vision_config=VISION)
    inputs = {"pixel_values": noise(2, 3, 16, 16), **padded()}
    inputs["input_ids"][0, 6] = inputs["input_ids"][1, 3] = 61
    method = AttentionRelevance(build(T.CLIPModel, config, attention))
    assert briefs(method.schedule(inputs, [0, 1])) == ["pixel_values: 6"] * 2 + ["input_ids: 6"] * 2
    got = method.attribute_tokens(inputs, [0, 1])
    model = build(T.CLIPModel, config, "eager")
    for i, end in enumerate((6, 3)):
        output, maps = eager_maps(model, lambda i=i: model(**alone(inputs, i)))
        a = averaged(output.logits_per_image[0, 0], maps)
        image, words = Relations(v=5), Relations(t=end + 1)
        for layer in range(2):
            image.own("v", a[f"vision_model.encoder.layers.{layer}.self_attn"])
            words.own("t", a[f"text_model.encoder.layers.{layer}.self_attn"])
        close(got["pixel_values"][i], image.row("v", 0, "v")[1:], FLOAT32_SOFTMAX)
        close(got["input_ids"][i], words.row("t", end, "t"), FLOAT32_SOFTMAX)


def test_lxmert(monkeypatch):
    """Two cross layers; both directions of a cross layer use what was there before it, by one shared module."""
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=24, vocab_size=64, max_position_embeddings=32)
    config = T.LxmertConfig(**sizes, num_qa_labels=5, l_layers=2, r_layers=1, x_layers=2, visual_feat_dim=6)
    inputs = {**padded(), "visual_feats": noise(2, 4, 6), "visual_pos": noise(2, 4, 4, seed=2)}
    model = build(T.LxmertForQuestionAnswering, config, "eager")
    method = AttentionRelevance(model)
    text, image = "input_ids", "visual_feats+visual_pos"
    hand = [f"{text}: 6", f"{text}: 6", f"{image}: 6"]
    hand += [f"{text} <- {image}: 10", f"{image} <- {text}: 10", f"{text}: 6, 7", f"{image}: 6, 7"]
    hand += [f"{text} <- {image}: 10, 11", f"{text}: 6, 7"]  # nobody reads the image after that
    assert briefs(method.schedule(inputs, [1, 3])) == hand

    got = method.attribute_tokens(inputs, [1, 3])
    made, softmax = [], torch.nn.functional.softmax
    for i, label in enumerate((1, 3)):
        one = alone(inputs, i)
        # The model does not hand out the maps of both directions, so its softmax is listened to.
        made.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "softmax", lambda *a, **k: made.append(softmax(*a, **k)) or made[-1])
            output = model(**one)
        order = ("text 0", "text 1", "image 0", "cross 0", "cross 1", "text 2", "image 1")
        order += ("cross 2", "unread", "text 3", "unread")
        maps = {name: m for name, m in zip(order, made, strict=True) if name != "unread"}
        a = averaged(output.question_answering_score[0, label], maps)
        r = Relations(t=one["input_ids"].shape[1], v=4)
        r.own("t", a["text 0"])
        r.own("t", a["text 1"])
        r.own("v", a["image 0"])
        before = dict(r.R["t"])
        r.ask("t", "v", a["cross 0"])
        asked, r.R["t"] = r.R["t"], before
        r.ask("v", "t", a["cross 1"])
        r.R["t"] = asked
        r.own("t", a["text 2"])
        r.own("v", a["image 1"])
        r.ask("t", "v", a["cross 2"])
        r.own("t", a["text 3"])
        close(got["input_ids"][i], r.row("t", 0, "t"))
        close(got["visual_feats"][i], r.row("t", 0, "v"))


def test_detr():
    """Encoder, then per decoder layer the queries among themselves and across; two queries of images in one batch."""
    backbone = T.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    settings = dict(num_queries=5, num_labels=4, auxiliary_loss=False, use_timm_backbone=False)
    config = T.DetrConfig(backbone_config=backbone, **SEQ2SEQ, **settings, use_pretrained_backbone=False)
    model = build(T.DetrForObjectDetection, config, "eager")
    inputs = {"pixel_values": noise(2, 3, 32, 32)}
    method = AttentionRelevance(model)
    target = [(2, 1), (4, 0)]
    asks = "queries <- pixel_values: 10"
    hand = ["pixel_values: 6"] * 2 + ["queries: 6", asks, "queries: 6, 7", asks]
    assert briefs(method.schedule(inputs, target)) == hand
    got = method.attribute_tokens(inputs, target)["pixel_values"]
    assert got.shape == (2, 4, 4)
    for i, (query, label) in enumerate(target):
        output = model(pixel_values=inputs["pixel_values"][i : i + 1], output_attentions=True)
        maps = {("e", n): m for n, m in enumerate(output.encoder_attentions)}
        maps |= {("d", n): m for n, m in enumerate(output.decoder_attentions)}
        maps |= {("x", n): m for n, m in enumerate(output.cross_attentions)}
        a = averaged(output.logits[0, query, label], maps)
        relations = Relations(e=16, d=5)
        for layer in range(2):
            relations.own("e", a["e", layer])
        for layer in range(2):
            relations.own("d", a["d", layer])
            relations.ask("d", "e", a["x", layer])
        close(got[i], relations.row("d", query, "e"))

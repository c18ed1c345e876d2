"""Hugging Face classes as they are: the schedule found against one written out by hand, the scores of a padded batch
against the rules computed by hand from the eager attentions of every example alone."""

import pytest
import torch
import transformers as T
from hand_rules import Relations, averaged, eager_maps
from small_hf_models import (
    FLOAT32_SOFTMAX,
    LLAMA,
    LONG,
    SEQ2SEQ,
    SPECIAL,
    TEXT,
    VISION,
    alone,
    briefs,
    build,
    close,
    ids,
    noise,
    padded,
)

from captum_transformer_attr import AttentionRelevance, UnsupportedOperationError


def by_hand(model, inputs, i, position, token):
    """The averaged attentions of one example, for an output ``logits[position, token]``."""
    output, maps = eager_maps(model, lambda: model(**alone(inputs, i)))
    return averaged(output.logits[0, position, token], maps)


# ---------------------------------------------------------------------- encoder-decoders
def encoder_decoder(family):
    """Model class, configuration, prefix of the paths of encoder and decoder layers, self- and cross-attention."""
    if family == "t5":
        config = T.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=64, **SPECIAL)
        paths = (
            "encoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.1.EncDecAttention",
        )
        return T.T5ForConditionalGeneration, config, paths
    paths = (
        "model.encoder.layers.{}.self_attn",
        "model.decoder.layers.{}.self_attn",
        "model.decoder.layers.{}.encoder_attn",
    )
    if family == "bart":
        return (
            T.BartForConditionalGeneration,
            T.BartConfig(**SEQ2SEQ, **SPECIAL, vocab_size=64, max_position_embeddings=32),
            paths,
        )
    config = T.WhisperConfig(
        **SEQ2SEQ, **SPECIAL, vocab_size=64, num_mel_bins=6, max_source_positions=10, max_target_positions=12
    )
    return T.WhisperForConditionalGeneration, config, paths


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_encoder_decoder(family, attention):
    cls, config, (encoder, decoder, cross) = encoder_decoder(family)
    source = "input_features" if family == "whisper" else "input_ids"
    inputs = {source: noise(2, 6, 20)} if family == "whisper" else padded()
    inputs["decoder_input_ids"] = ids(4, seed=2)
    method = AttentionRelevance(build(cls, config, attention))
    target = [(2, 5), (3, 9)]
    schedule = method.schedule(inputs, target)
    asks = f"decoder_input_ids <- {source}: 10"
    assert briefs(schedule) == [f"{source}: 6"] * 2 + ["decoder_input_ids: 6", asks, "decoder_input_ids: 6, 7", asks]
    modules = [
        encoder.format(0),
        encoder.format(1),
        decoder.format(0),
        cross.format(0),
        decoder.format(1),
        cross.format(1),
    ]
    assert [step.module for step in schedule] == modules

    got = method.attribute_tokens(inputs, target)
    model = build(cls, config, "eager")
    for i, (position, token) in enumerate(target):
        a = by_hand(model, inputs, i, position, token)
        relations = Relations(e=a[encoder.format(0)].shape[0], d=4)
        for layer in range(2):
            relations.own("e", a[encoder.format(layer)])
        for layer in range(2):
            relations.own("d", a[decoder.format(layer)])
            relations.ask("d", "e", a[cross.format(layer)])
        close(got[source][i], relations.row("d", position, "e"))
        close(got["decoder_input_ids"][i], relations.row("d", position, "d"))


def test_blip_answers_through_the_question():
    """Three streams in a chain: the answer asks the question, which asked the image."""
    text = dict(TEXT, encoder_hidden_size=16, sep_token_id=2, **SPECIAL)
    config = T.BlipConfig(text_config=text, vision_config=VISION, projection_dim=16)
    model = build(T.BlipForQuestionAnswering, config, "eager")

    def answer(pixel_values, input_ids, attention_mask, decoder_input_ids):
        image = model.vision_model(pixel_values=pixel_values)[0]
        question = model.text_encoder(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=image)[
            0
        ]
        return model.text_decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=question,
            encoder_attention_mask=attention_mask,
            reduction="mean",
        )

    # This class gives other logits when padding is masked, so the questions are equally long.
    inputs = {"pixel_values": noise(2, 3, 16, 16), **padded(), "decoder_input_ids": ids(3, seed=2)}
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    method = AttentionRelevance(answer)
    target = [(2, 5), (1, 9)]
    question = ["input_ids: 6", "input_ids <- pixel_values: 10", "input_ids: 6, 7", "input_ids <- pixel_values: 10"]
    asks = "decoder_input_ids <- input_ids: 10, 11"
    hand = ["pixel_values: 6"] * 2 + question + ["decoder_input_ids: 6", asks, "decoder_input_ids: 6, 7", asks]
    assert briefs(method.schedule(inputs, target)) == hand

    got = method.attribute_tokens(inputs, target)
    for i, (position, token) in enumerate(target):
        output, maps = eager_maps(model, lambda i=i: answer(**alone(inputs, i)))
        maps = {path: a for path, a in maps.items() if path.endswith(("self_attn", ".self"))}
        a = averaged(output.logits[0, position, token], maps)
        relations = Relations(v=5, q=len(alone(inputs, i)["input_ids"][0]), d=3)
        for layer in range(2):
            relations.own("v", a[f"vision_model.encoder.layers.{layer}.self_attn"])
        for s, path, asked in (("q", "text_encoder.encoder", "v"), ("d", "text_decoder.bert.encoder", "q")):
            for layer in range(2):
                relations.own(s, a[f"{path}.layer.{layer}.attention.self"])
                relations.ask(s, asked, a[f"{path}.layer.{layer}.crossattention.self"])
        close(got["pixel_values"][i], relations.row("d", position, "v")[1:])
        close(got["input_ids"][i], relations.row("d", position, "q"))
        close(got["decoder_input_ids"][i], relations.row("d", position, "d"))


# ---------------------------------------------------------------------- detectors
def test_conditional_detr():
    """Its queries are learned, and ask one another before they have seen anything."""
    backbone = T.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = T.ConditionalDetrConfig(
        backbone_config=backbone, **SEQ2SEQ, num_queries=5, num_labels=4, auxiliary_loss=False
    )
    model = build(T.ConditionalDetrForObjectDetection, config, "eager")
    inputs = {"pixel_values": noise(2, 3, 32, 32)}
    method = AttentionRelevance(model)
    target = [(2, 1), (4, 0)]
    asks = "queries <- pixel_values: 10"
    assert briefs(method.schedule(inputs, target)) == ["pixel_values: 6"] * 2 + [
        "queries: 6",
        asks,
        "queries: 6, 7",
        asks,
    ]

    got = method.attribute_tokens(inputs, target)
    assert got["pixel_values"].shape == (2, 4, 4)
    for i, (query, label) in enumerate(target):
        a = by_hand(model, inputs, i, query, label)
        relations = Relations(e=16, d=5)
        for layer in range(2):
            relations.own("e", a[f"model.encoder.layers.{layer}.self_attn"])
        for layer in range(2):
            relations.own("d", a[f"model.decoder.layers.{layer}.self_attn"])
            relations.ask("d", "e", a[f"model.decoder.layers.{layer}.encoder_attn"])
        close(got["pixel_values"][i], relations.row("d", query, "e"))


def test_deformable_attention_is_refused_by_name():
    backbone = T.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 20],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    settings = dict(
        SEQ2SEQ,
        encoder_layers=1,
        encoder_hidden_dim=16,
        encoder_in_channels=[12, 16, 20],
        decoder_in_channels=[16, 16, 16],
    )
    config = T.RTDetrConfig(backbone_config=backbone, **settings, num_queries=5, num_labels=4, anchor_image_size=None)
    model = build(T.RTDetrForObjectDetection, config, "eager")
    with pytest.raises(
        UnsupportedOperationError,
        match=r"'grid_sample' in module 'model\.decoder\.layers\.0\.encoder_attn\.attn': deformable attention",
    ):
        AttentionRelevance(model).attribute({"pixel_values": noise(1, 3, 64, 64)}, (0, 1))


# ---------------------------------------------------------------------- two towers
def test_siglip_pools_by_a_learned_query():
    """The pooling head's probe asks the image; its map is not returned, so the head is written out here."""
    config = T.SiglipConfig(text_config=TEXT, vision_config=VISION)
    inputs = {"pixel_values": noise(2, 3, 16, 16), "input_ids": ids(LONG)}
    method = AttentionRelevance(build(T.SiglipModel, config))
    target = [1, 0]
    hand = ["pixel_values: 6"] * 2 + ["queries <- pixel_values: 10"] + ["input_ids: 6"] * 2
    assert briefs(method.schedule(inputs, target)) == hand

    got = method.attribute_tokens(inputs, target)
    model = build(T.SiglipModel, config, "eager")
    for i in range(2):
        # Image i was matched with text 1 - i; the scores of text j are those of the image that chose it.
        vision, maps = eager_maps(model, lambda i=i: model.vision_model(inputs["pixel_values"][i : i + 1]))
        text, text_maps = eager_maps(model, lambda i=i: model.text_model(inputs["input_ids"][1 - i : 2 - i]))
        head, hidden = model.vision_model.head, vision.last_hidden_state[0]
        q, k, v = (
            (x @ w.T + b).reshape(-1, 2, 8).transpose(0, 1)
            for x, w, b in zip(
                (head.probe[0], hidden, hidden),
                head.attention.in_proj_weight.chunk(3),
                head.attention.in_proj_bias.chunk(3),
                strict=True,
            )
        )
        maps["head"] = (q @ k.mT / 8**0.5).softmax(-1)[None]
        pooled = head.attention.out_proj((maps["head"][0] @ v).transpose(0, 1).reshape(1, 16))
        pooled = (pooled + head.mlp(head.layernorm(pooled)))[0]
        assert torch.allclose(pooled, vision.pooler_output[0])
        match = (
            (pooled / pooled.norm()) @ (text.pooler_output[0] / text.pooler_output[0].norm()) * model.logit_scale.exp()
        )
        a = averaged(match, {k: m for k, m in {**maps, **text_maps}.items() if k.endswith("self_attn") or k == "head"})
        image, words = Relations(v=4, h=1), Relations(t=LONG)
        for layer in range(2):
            image.own("v", a[f"vision_model.encoder.layers.{layer}.self_attn"])
            words.own("t", a[f"text_model.encoder.layers.{layer}.self_attn"])
        image.ask("h", "v", a["head"])
        close(got["pixel_values"][i], image.row("h", 0, "v"), FLOAT32_SOFTMAX)
        close(got["input_ids"][1 - i], words.row("t", LONG - 1, "t"), FLOAT32_SOFTMAX)


# ---------------------------------------------------------------------- joint sequences
def test_vilt(monkeypatch):
    model = build(T.ViltForQuestionAnswering, T.ViltConfig(**TEXT, image_size=16, patch_size=8, num_labels=5), "eager")
    inputs = {"pixel_values": noise(2, 3, 16, 16), **padded()}
    method = AttentionRelevance(model)
    assert briefs(method.schedule(inputs, [1, 3])) == ["pixel_values+input_ids: 6"] * 2
    got = method.attribute_tokens(inputs, [1, 3])
    order = []  # ViLT puts the patches in an order of its own
    visual = model.vilt.embeddings.visual_embed
    monkeypatch.setattr(
        model.vilt.embeddings, "visual_embed", lambda *a, **k: order.append(visual(*a, **k)) or order[-1]
    )
    for i, label in enumerate((1, 3)):
        order.clear()
        one = alone(inputs, i)
        output = model(**one, output_attentions=True)
        a = averaged(output.logits[0, label], dict(enumerate(output.attentions)))
        words = len(one["input_ids"][0])
        relations = Relations(j=words + 5)
        for layer in range(2):
            relations.own("j", a[layer])
        row = relations.row("j", 0, "j")
        close(got["input_ids"][i], row[:words])
        patches = torch.zeros(2, 2, dtype=torch.float64)
        for (y, x), r in zip(order[0][2][0][0].tolist(), row[words + 1 :], strict=True):
            patches[y, x] = r
        close(got["pixel_values"][i], patches)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_causal_language_model(attention):
    inputs = padded()
    method = AttentionRelevance(build(T.LlamaForCausalLM, T.LlamaConfig(**LLAMA), attention))
    target = [(6, 5), (3, 9)]
    assert briefs(method.schedule(inputs, target)) == ["input_ids: 6"] * 2
    got = method.attribute_tokens(inputs, target)
    model = build(T.LlamaForCausalLM, T.LlamaConfig(**LLAMA), "eager")
    for i, (position, token) in enumerate(target):
        a = by_hand(model, inputs, i, position, token)
        relations = Relations(t=len(alone(inputs, i)["input_ids"][0]))
        for layer in range(2):
            relations.own("t", a[f"model.layers.{layer}.self_attn"])
        close(got["input_ids"][i], relations.row("t", position, "t"), FLOAT32_SOFTMAX)


def test_llava_image_tokens_lead_back_to_patches():
    config = T.LlavaConfig(
        text_config=T.LlamaConfig(**LLAMA),
        vision_config=T.CLIPVisionConfig(**dict(VISION, num_hidden_layers=3)),
        image_token_id=63,
    )
    text = ids(9)
    text[:, 1:5] = 63
    inputs = {"pixel_values": noise(2, 3, 16, 16), "input_ids": text}
    method = AttentionRelevance(build(T.LlavaForConditionalGeneration, config))
    target = [(8, 5), (7, 9)]
    # The language model reads the vision tower's last layer but one.
    assert briefs(method.schedule(inputs, target)) == ["pixel_values: 6"] * 2 + ["pixel_values+input_ids: 6"] * 2
    got = method.attribute_tokens(inputs, target)
    model = build(T.LlavaForConditionalGeneration, config, "eager")
    for i, (position, token) in enumerate(target):
        output, maps = eager_maps(model, lambda i=i: model(**alone(inputs, i)))
        maps = {path: a for path, a in maps.items() if not path.endswith("vision_tower.encoder.layers.2.self_attn")}
        a = averaged(output.logits[0, position, token], maps)
        joint, tower = Relations(j=9), Relations(v=5)
        for layer in range(2):
            joint.own("j", a[f"model.language_model.layers.{layer}.self_attn"])
            tower.own("v", a[f"model.vision_tower.encoder.layers.{layer}.self_attn"])
        row = joint.row("j", position, "j")
        close(got["pixel_values"][i], (row[1:5] @ tower.R["v"]["v"][1:])[1:], FLOAT32_SOFTMAX)
        words = row.clone()
        words[1:5] = got["input_ids"][i][1:5]
        close(got["input_ids"][i], words, FLOAT32_SOFTMAX)

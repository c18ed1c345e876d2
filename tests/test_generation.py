"""Scores of generated tokens against explaining the model at every step of the generation."""

import pytest
import torch
import transformers as T
from small_hf_models import LLAMA, LONG, SEQ2SEQ, SHORT, SPECIAL, VISION, build, ids, noise

from captum_transformer_attr import AttentionRelevance, InputError, TransformerRelevance
from captum_transformer_attr.generation import explain_generation


def llama():
    return build(T.LlamaForCausalLM, T.LlamaConfig(**LLAMA))


def padded_left():
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[1, : LONG - SHORT] = 0
    return {"input_ids": ids(LONG), "attention_mask": mask}


def same(got, want, tolerance=1e-5):
    """Parts of Llama are computed in float32."""
    assert want.abs().max() > 0
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("method_class", [AttentionRelevance, TransformerRelevance])
def test_language_model_padded_left(method_class):
    model, inputs = llama(), padded_left()
    generated = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    method = method_class(model)
    got = explain_generation(method, inputs, generated)
    assert got.positions.tolist() == list(range(LONG, LONG + 4))
    assert torch.equal(got.tokens, generated[:, LONG:])
    assert got.scores["input_ids"].shape == (2, 4, LONG + 3)
    for i, start in ((0, 0), (1, LONG - SHORT)):
        for step in range(4):
            prefix = generated[i : i + 1, start : LONG + step]
            # The token is what the model itself prefers there: the position is the right one.
            logits = model(prefix).logits[0, -1].detach()
            logits[model.config.eos_token_id] = -torch.inf  # kept back by min_new_tokens
            assert logits.argmax() == generated[i, LONG + step]
            want = method.attribute_tokens({"input_ids": prefix}, (prefix.shape[1] - 1, int(generated[i, LONG + step])))
            same(got.scores["input_ids"][i, step, start : LONG + step], want["input_ids"][0])
            assert (got.scores["input_ids"][i, step, LONG + step :] == 0).all()
            assert (got.scores["input_ids"][i, step, :start] == 0).all()


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoder_decoder(family):
    if family == "bart":
        config = T.BartConfig(**SEQ2SEQ, **SPECIAL, vocab_size=64, max_position_embeddings=32)
        model = build(T.BartForConditionalGeneration, config)
    else:
        config = T.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=64, **SPECIAL)
        model = build(T.T5ForConditionalGeneration, config)
    inputs = {"input_ids": ids(LONG), "attention_mask": torch.tensor([[1] * LONG, [1] * SHORT + [0] * (LONG - SHORT)])}
    generated = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1)
    method = AttentionRelevance(model)
    got = explain_generation(method, inputs, generated, positions=[1, -1])
    assert got.positions.tolist() == [1, generated.shape[1] - 1]
    for k, position in enumerate(got.positions.tolist()):
        step = {**inputs, "decoder_input_ids": generated[:, :position]}
        want = method.attribute_tokens(step, [(position - 1, int(t)) for t in generated[:, position]])
        same(got.scores["input_ids"][:, k], want["input_ids"], 1e-9)
        same(got.scores["decoder_input_ids"][:, k, :position], want["decoder_input_ids"], 1e-9)
        assert (got.scores["decoder_input_ids"][:, k, position:] == 0).all()


def test_image_and_prompt():
    config = T.LlavaConfig(
        text_config=T.LlamaConfig(**LLAMA), vision_config=T.CLIPVisionConfig(**VISION), image_token_id=63
    )
    model = build(T.LlavaForConditionalGeneration, config)
    text = ids(8)
    text[:, 1:5] = 63
    inputs = {"pixel_values": noise(2, 3, 16, 16), "input_ids": text, "attention_mask": torch.ones_like(text)}
    generated = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    got = explain_generation(AttentionRelevance(model), inputs, generated)
    assert got.scores["pixel_values"].shape == (2, 3, 2, 2)
    assert got.scores["input_ids"].shape == (2, 3, 10)
    whole = {**inputs, "input_ids": generated[:, :-1], "attention_mask": torch.ones_like(generated[:, :-1])}
    want = AttentionRelevance(model).attribute_tokens(whole, [(8, int(t)) for t in generated[:, 9]])
    same(got.scores["pixel_values"][:, 1], want["pixel_values"])


def test_nothing_behind_the_end_of_sequence():
    model = llama()
    prompt = ids(LONG)
    end = model.config.eos_token_id
    generated = torch.cat([prompt, torch.tensor([[9, end, 0, 0], [9, 8, 7, end]])], 1)
    got = explain_generation(AttentionRelevance(model), {"input_ids": prompt}, generated)
    assert got.explained.tolist() == [[True, True, False, False], [True, True, True, True]]
    assert (got.scores["input_ids"][0, 2:] == 0).all()
    assert (got.scores["input_ids"][~got.explained == 0].abs().sum(-1) > 0).all()


def test_models_that_return_only_what_they_wrote():
    model = llama()
    prompt = ids(LONG)
    written = torch.tensor([[9, 11], [8, 7]])
    alone = explain_generation(AttentionRelevance(model), {"input_ids": prompt}, written)
    full = explain_generation(AttentionRelevance(model), {"input_ids": prompt}, torch.cat([prompt, written], 1))
    assert torch.equal(alone.scores["input_ids"], full.scores["input_ids"])


@pytest.mark.parametrize(
    "generated, positions, message",
    [
        (0, None, "nothing behind the prompt"),
        (2, [3], "position 3 is none; the generated tokens are at 7 to 8"),
        (2, [], "empty"),
    ],
)
def test_bad_positions(generated, positions, message):
    prompt = ids(LONG)
    text = torch.cat([prompt, torch.full((2, generated), 9)], 1)
    with pytest.raises(InputError, match=message):
        explain_generation(AttentionRelevance(llama()), {"input_ids": prompt}, text, positions)


def test_without_a_configuration():
    with pytest.raises(InputError, match="no config"):
        explain_generation(AttentionRelevance(lambda input_ids: input_ids), {"input_ids": ids(3)}, ids(4))

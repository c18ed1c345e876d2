"""Every pair of images and texts against each pair explained alone."""

import pytest
import torch
import transformers as T
from golden_models import published
from small_hf_models import LONG, TEXT, VISION, build, ids, noise

from captum_transformer_attr import AttentionRelevance, InputError, TransformerRelevance
from captum_transformer_attr.pairs import explain_pairs


@pytest.mark.parametrize("images, texts", [(1, 3), (3, 1), (2, 2), (2, 3), (3, 2), (5, 3)])
def test_every_pair_is_what_it_is_alone(images, texts):
    model = build(T.SiglipModel, T.SiglipConfig(text_config=TEXT, vision_config=VISION))
    pixels, words = noise(images, 3, 16, 16), torch.cat([ids(LONG), ids(LONG, seed=3), ids(LONG, seed=4)])[:texts]
    method = AttentionRelevance(model)
    got = explain_pairs(method, {"pixel_values": pixels, "input_ids": words})
    assert got.image.shape == (images, texts, 2, 2) and got.text.shape == (images, texts, LONG)
    for i in range(images):
        for j in range(texts):
            one = {"pixel_values": pixels[i : i + 1], "input_ids": words[j : j + 1]}
            want = method.attribute_tokens(one, 0)
            assert torch.allclose(got.image[i, j], want["pixel_values"][0], rtol=1e-9, atol=1e-12)
            assert torch.allclose(got.text[i, j], want["input_ids"][0], rtol=1e-9, atol=1e-12)
            assert torch.allclose(got.logits[i, j], model(**one).logits_per_image[0, 0], rtol=1e-9)
            assert want["pixel_values"].abs().max() > 0 and want["input_ids"].abs().max() > 0


@pytest.mark.parametrize("method_class", [AttentionRelevance, TransformerRelevance])
def test_clip_with_padding(method_class):
    want, model = published("clip_generic_attention", T.CLIPModel, T.CLIPConfig)
    inputs = {name: want[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    method = method_class(model)
    got = explain_pairs(method, inputs)
    straight = method.attribute_tokens(inputs, [0, 1])
    crossed = method.attribute_tokens(inputs, [1, 0])
    for i in range(2):
        assert torch.allclose(got.image[i, i], straight["pixel_values"][i], rtol=1e-9, atol=1e-12)
        assert torch.allclose(got.image[i, 1 - i], crossed["pixel_values"][i], rtol=1e-9, atol=1e-12)
        assert torch.allclose(got.text[1 - i, i], crossed["input_ids"][i], rtol=1e-9, atol=1e-12)
    assert torch.allclose(got.logits, want["logits_per_image"])


def test_bad_inputs():
    model = build(T.SiglipModel, T.SiglipConfig(text_config=TEXT, vision_config=VISION))
    method = AttentionRelevance(model)
    with pytest.raises(InputError, match="needs 'pixel_values' and 'input_ids'"):
        explain_pairs(method, {"pixel_values": noise(1, 3, 16, 16)})
    with pytest.raises(InputError, match="0 images and 2 texts make no pair"):
        explain_pairs(method, {"pixel_values": noise(0, 3, 16, 16), "input_ids": ids(LONG)})
    with pytest.raises(InputError, match=r"returns shape \(2, 16\)"):
        explain_pairs(
            AttentionRelevance(model, output="text_embeds"),
            {"pixel_values": noise(2, 3, 16, 16), "input_ids": ids(LONG)},
        )

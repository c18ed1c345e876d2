"""The families that TransformerRelevance was made for: conserved, batch equal to singles, tokens on the right grid."""

import pytest
import timm
import torch
import transformers
from tiny_models import randomise

from captum_transformer_attr import TransformerRelevance

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}
IMAGE = {"image_size": 16, "patch_size": 8, "num_labels": 4, **SMALL}
TEXT = {"vocab_size": 40, "num_labels": 4, "max_position_embeddings": 16, **SMALL}


def vit(**more):
    arguments = {"img_size": 16, "patch_size": 8, "num_classes": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, **more}
    return timm.models.VisionTransformer(**arguments)


def deit(**more):
    return timm.models.deit.VisionTransformerDistilled(
        img_size=16, patch_size=8, num_classes=4, embed_dim=16, depth=2, num_heads=2, **more
    )


IMAGES = {
    "timm vit": (vit, (16, 16), (2, 2)),
    "timm vit, mean pooling": (lambda: vit(global_pool="avg", class_token=False), (16, 16), (2, 2)),
    "timm vit, registers": (lambda: vit(reg_tokens=3), (16, 16), (2, 2)),
    "timm vit, not square": (lambda: vit(img_size=(16, 32)), (16, 32), (2, 4)),
    "timm vit, other size": (lambda: vit(dynamic_img_size=True), (24, 16), (3, 2)),
    "timm vit, padded": (lambda: vit(img_size=16, dynamic_img_size=True, dynamic_img_pad=True), (20, 16), (3, 2)),
    "timm deit, distilled": (deit, (16, 16), (2, 2)),
    "hf vit": (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE)), (16, 16), (2, 2)),
    "hf deit": (lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**IMAGE)), (16, 16), (2, 2)),
    "hf deit with teacher": (
        lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**IMAGE)),
        (16, 16),
        (2, 2),
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    build, size, grid = IMAGES[name]
    model = randomise(build()).double()
    method = TransformerRelevance(model)
    pixels = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    heat, delta = method.attribute(pixels, target=[1, 3], return_convergence_delta=True)
    assert heat.shape == pixels.shape and delta.abs().max() < 1e-6
    tokens = method.attribute_tokens(pixels, target=[1, 3])
    assert tokens.shape == (2, *grid) and tokens.abs().max() > 0
    alone = torch.cat([method.attribute(pixels[i : i + 1], target=t) for i, t in enumerate((1, 3))])
    assert (heat - alone).abs().max() <= 1e-10 * heat.abs().max()
    nearest = method.attribute(pixels, target=[1, 3], interpolate="nearest")
    if size[0] % 8 == 0 and size[1] % 8 == 0:
        assert torch.equal(nearest[:, 0, ::8, ::8], tokens)


TEXTS = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**TEXT)),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            vocab_size=40, dim=16, n_heads=2, n_layers=2, hidden_dim=32, num_labels=4, max_position_embeddings=16
        )
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_padded_texts(name):
    model = randomise(TEXTS[name]()).double()
    method = TransformerRelevance(model)
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:], ids[1, 4:] = 0, 1
    scores, delta = method.attribute(
        {"input_ids": ids, "attention_mask": mask}, target=2, return_convergence_delta=True
    )
    assert delta.abs().max() < 1e-6 and (scores["input_ids"][1, 4:] == 0).all()
    for row, length in enumerate((7, 4)):
        alone = method.attribute(
            {"input_ids": ids[row : row + 1, :length], "attention_mask": mask[row : row + 1, :length]}, target=2
        )
        assert (scores["input_ids"][row, :length] - alone["input_ids"][0]).abs().max() <= 1e-9 * alone[
            "input_ids"
        ].abs().max()


def test_distilled_reads_out_both_tokens():
    """Class and distillation token are averaged: half of each row."""
    model = randomise(deit()).double()
    pixels = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    both = TransformerRelevance(model, start_layer=-1).attribute_tokens(pixels, target=1).flatten()
    record = TransformerRelevance(model).attention_records(pixels, target=1)[-1]
    rows = (record.gradient * record.relevance).clamp(min=0).mean(1)[0]
    assert torch.allclose(both, (rows[0, 2:] + rows[1, 2:]) / 2, rtol=1e-9, atol=1e-12)

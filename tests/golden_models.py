"""The published implementations' outputs (`goldens/`), and the models that they were computed on."""

import json
import pathlib

import timm
import transformers
from safetensors import safe_open

GOLDENS = pathlib.Path(__file__).parent / "goldens"


def published(name, model_class, config_class=None, backbone_class=None, **config_options):
    """The tensors of a golden by name, and its model in float64."""
    file = safe_open(GOLDENS / f"{name}.safetensors", "pt")
    metadata = file.metadata()
    settings = json.loads(metadata.get("kwargs") or metadata["config"])
    if backbone_class is not None:
        settings["backbone_config"] = backbone_class(**json.loads(metadata["backbone_config"]))
    settings |= config_options
    model = model_class(config_class(**settings)) if config_class else model_class(**settings)
    model = model.double().eval()
    tensors = {key: file.get_tensor(key) for key in file.keys()}
    model.load_state_dict({k.removeprefix("weights."): t for k, t in tensors.items() if k.startswith("weights.")})
    return tensors, model


def published_vit(name):
    return published(name, timm.models.VisionTransformer)


def published_bert(attention):
    model_class, config_class = transformers.BertForSequenceClassification, transformers.BertConfig
    return published("bert", model_class, config_class, attn_implementation=attention)


def assert_relatively_close(got, want, tolerance=1e-5):
    """The largest difference, relative to the largest wanted value."""
    assert got.shape == want.shape
    worst = ((got - want).abs().max() / want.abs().max()).item()
    assert worst < tolerance, worst


def assert_padding_changes_nothing(attribute_tokens):
    """Examples of a padded batch get what they get alone, and padding gets nothing.

    Args:
        attribute_tokens: of a method, given the published BERT: ``(model) -> attribute_tokens``.
    """
    golden, model = published_bert("sdpa")
    inputs = {name: golden[name] for name in ("input_ids", "attention_mask")}
    padded = attribute_tokens(model)(inputs, golden["targets"])["input_ids"]
    for i, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        cut = {name: t[i : i + 1, :length] for name, t in inputs.items()}
        alone = attribute_tokens(model)(cut, golden["targets"][i : i + 1])["input_ids"]
        assert (padded[i : i + 1, :length] - alone).abs().max() <= 1e-9 * alone.abs().max()
        assert (padded[i, length:] == 0).all()

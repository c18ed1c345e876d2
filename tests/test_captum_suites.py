"""Captum's generic suites (hook removal, targets) over our classes, in the schema of ``captum.testing``."""

import copy

import pytest
import torch
from captum.attr import NoiseTunnel
from captum.testing.attr.helpers.gen_test_utils import parse_test_config
from captum.testing.attr.helpers.test_config import config as captum_config
from tiny_models import TinyText, TinyViT, TwoInputs, randomise

import captum_transformer_attr as cta

torch.manual_seed(0)
IMAGES = torch.randn(4, 3, 8, 8)
IDS = torch.randint(0, 20, (4, 5))
LEFT, RIGHT = torch.randn(4, 3, 5), torch.randn(4, 2, 7)

TOKEN_LEVEL = [
    cta.TransformerRelevance,
    cta.AttentionRelevance,
    cta.TokenStatisticsRelevance,
    cta.TokenTM,
    cta.AttentionRollout,
    cta.RawAttention,
    cta.AttentionGradCam,
    cta.PartialLRP,
    cta.RelevanceRollout,
    cta.ConsensusRelevance,
]
INPUT_LEVEL = [cta.TransformerLRP]
FLOATS = TOKEN_LEVEL + INPUT_LEVEL


def entry(name, model, arguments, algorithms=FLOATS, **more):
    return {"name": name, "algorithms": algorithms, "model": randomise(model), "attribute_args": arguments, **more}


CONFIG = [
    entry("vit_single_target", TinyViT(), {"inputs": IMAGES, "target": 1}),
    entry("vit_multi_target", TinyViT(), {"inputs": IMAGES, "target": torch.tensor([0, 3, 1, 2])}),
    entry("vit_list_target", TinyViT(), {"inputs": IMAGES, "target": [0, 3, 1, 2]}),
    entry(
        "vit_extra_args",
        TinyViT(),
        {"inputs": IMAGES, "additional_forward_args": (torch.rand(4, 1) + 1,), "target": [0, 1, 1, 3]},
    ),
    entry("text_tuple_target", TinyText(), {"inputs": IDS, "target": (2, 7)}),
    entry("text_multi_tuple_target", TinyText(), {"inputs": IDS, "target": [(0, 1), (1, 1), (4, 19), (3, 0)]}),
    entry("two_inputs", TwoInputs(), {"inputs": (LEFT, RIGHT), "target": [0, 1, 2, 1]}),
    entry(
        "two_inputs_extra",
        TwoInputs(),
        {"inputs": (LEFT, RIGHT), "additional_forward_args": (torch.rand(4, 1),), "target": 1},
    ),
    entry(
        "vit_noise_tunnel",
        TinyViT(),
        {"inputs": IMAGES, "target": torch.tensor([0, 3, 1, 2]), "stdevs": 0.0, "nt_samples": 2},
        noise_tunnel=True,
    ),
]
# Captum's own models have no attention: only the class that needs none runs on its entries for gradient-based methods.
CONFIG += [
    {**entry, "algorithms": INPUT_LEVEL}
    for entry in captum_config
    if INPUT_LEVEL
    and "layer" not in entry
    and any(a.__name__ == "LRP" for a in entry["algorithms"])
    and "verbose" not in entry["attribute_args"]
]
CASES = [
    pytest.param(entry, algorithm, id=f"{entry['name']}-{algorithm.__name__}")
    for entry in CONFIG
    for algorithm in entry["algorithms"]
]


def build(entry, algorithm, model=None):
    _, original, arguments, _, noise_tunnel, _ = parse_test_config(entry)
    method = algorithm(copy.deepcopy(original) if model is None else model)
    return (NoiseTunnel(method) if noise_tunnel else method), dict(arguments)


def tensors(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("entry, algorithm", CASES)
def test_hooks_are_removed(entry, algorithm):
    """A forward that raises half-way leaves no hook behind."""
    model = copy.deepcopy(entry["model"])
    method, arguments = build(entry, algorithm, model)
    last = list(model.modules())[-1]

    def fail(module, inputs, output):
        raise RuntimeError("on purpose")

    handle = last.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        method.attribute(**arguments)
    handle.remove()
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("entry, algorithm", CASES)
def test_batch_equals_its_examples(entry, algorithm):
    """Captum's target suite: every example alone, with its own target, gives the batch's rows."""
    method, arguments = build(entry, algorithm)
    together = tensors(method.attribute(**arguments))
    inputs, target = arguments["inputs"], arguments.get("target")
    for i in range(len(tensors(inputs)[0])):
        alone = {
            **arguments,
            "inputs": tuple(t[i : i + 1] for t in tensors(inputs)) if isinstance(inputs, tuple) else inputs[i : i + 1],
        }
        if isinstance(target, (list, torch.Tensor)) and len(target) > 1:
            one = target[i]
            alone["target"] = (
                one.item()
                if isinstance(one, torch.Tensor) and one.numel() == 1
                else tuple(one)
                if isinstance(one, (tuple, torch.Tensor))
                else one
            )
        if arguments.get("additional_forward_args") is not None:
            extra = arguments["additional_forward_args"]
            cut = tuple(
                a[i : i + 1] if isinstance(a, torch.Tensor) else a
                for a in (extra if isinstance(extra, tuple) else (extra,))
            )
            alone["additional_forward_args"] = cut
        for whole, part in zip(together, tensors(method.attribute(**alone)), strict=True):
            assert whole.shape[0] == len(tensors(inputs)[0])
            scale = whole.abs().max().clamp(min=1e-6)
            assert ((whole[i : i + 1] - part).abs().max() / scale) < 2e-4


@pytest.mark.parametrize("algorithm", FLOATS)
@pytest.mark.parametrize("target", [9, [0, 1], (0, 1), torch.tensor([0, 1, 9, 1]), None])
def test_bad_targets_are_assertion_errors(algorithm, target):
    with pytest.raises(AssertionError, match="target="):
        algorithm(randomise(TinyViT())).attribute(IMAGES, target=target)


def test_every_attribute_is_logged():
    """NoiseTunnel and the neuron wrappers call ``attribute.__wrapped__``."""
    for algorithm in FLOATS:
        assert callable(algorithm.attribute.__wrapped__)

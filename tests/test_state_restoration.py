"""An attribution leaves model, arguments and process as it found them, also when something raises in the middle."""

import copy
import sys

import pytest
import timm
import torch
from tiny_models import TinyText, TinyViT, randomise
from torch import nn

from benchmarks import coverage_transformers
from captum_transformer_attr import TransformerRelevance, UnsupportedOperationError, register_rule, unregister_rule

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
HOOKS = [n for n in vars(nn.Module()) if "hook" in n]
GLOBALS = (
    "torch",
    "torch.nn.functional",
    "torch.autograd",
    "torch.nn.modules.linear",
    "torch.nn.modules.activation",
    "timm.layers",
    "transformers",
)


class Stateful(nn.Module):
    """Counts its calls in a buffer and an attribute, keeps activations, may raise or do something else on the way."""

    def __init__(self, disturb=None):
        super().__init__()
        self.vit = randomise(TinyViT())
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("kept", torch.zeros(2, 4))
        self.cache, self.count, self.disturb = {}, 0, disturb

    def forward(self, x):
        self.calls += 1
        self.count += 1
        y = self.vit(x)
        self.cache["last"] = y
        self.latest = y
        self.kept[: len(y)] = y
        if self.disturb is not None:
            self.disturb()
        return y


class Broken(nn.Module):
    def forward(self, x):
        return x


def snapshot(model):
    """Everything of a model that an attribution could change, and of the process."""
    modules = {}
    for path, m in model.named_modules():
        plain = {k: v for k, v in vars(m).items() if not isinstance(v, (torch.Tensor, dict))}
        modules[path] = (
            plain,
            {k: list(v) if hasattr(v, "__iter__") else v for k, v in ((h, getattr(m, h)) for h in HOOKS)},
            sorted(vars(m)),
        )
    tensors = {
        name: (
            id(t),
            t.detach().clone(),
            t.requires_grad,
            t.grad_fn,
            None if t.grad is None else t.grad.clone(),
            dict(t.__dict__),
        )
        for name, t in (*model.named_parameters(), *model.named_buffers())
    }
    process = {name: dict(vars(sys.modules[name])) for name in GLOBALS if name in sys.modules}
    flags = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )
    return modules, tensors, process, flags, torch.random.get_rng_state(), torch._C._len_torch_function_stack()


def assert_same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    for name, old in before[1].items():
        new = after[1][name]
        assert (old[0], old[2], old[3], old[5]) == (new[0], new[2], new[3], new[5]), name
        assert torch.equal(old[1], new[1]), name
        assert (old[4] is None) == (new[4] is None) and (old[4] is None or torch.equal(old[4], new[4])), name
    for name, old in before[2].items():
        new = after[2][name]
        assert {k for k in old if old[k] is not new.get(k)} == set(), name
    assert before[3] == after[3]
    assert torch.equal(before[4], after[4])
    assert before[5] == after[5]


def prepared(model):
    """Mixed training modes, a frozen parameter, a gradient, a hook of the user's."""
    model.train()
    model.vit.blocks[0].eval()
    model.vit.head.weight.requires_grad_(False)
    model.vit.head.bias.grad = torch.ones_like(model.vit.head.bias)
    model.vit.norm.register_forward_hook(lambda m, a, o: None)
    return model


def test_after_an_attribution():
    model = prepared(Stateful())
    twin = copy.deepcopy(model)
    before, other = snapshot(model), snapshot(twin)
    images = IMAGES.clone().requires_grad_()
    TransformerRelevance(model).attribute(images, target=1, return_convergence_delta=True)
    assert_same(before, snapshot(model))
    assert_same(other, snapshot(twin))
    assert model.cache == {} and not hasattr(model, "latest") and model.count == 0
    assert images.grad is None and torch.equal(images.detach(), IMAGES) and not images.__dict__


SAMPLE = [
    "bert [sdpa]",
    "llama [eager]",
    "qwen3_moe [sdpa]",
    "t5 [eager]",
    "swinv2 [eager]",
    "wav2vec2 [sdpa]",
    "clip [sdpa]",
    "qwen2_vl [sdpa]",
    "fnet [eager]",
]


def of_library(name):
    """A model of timm or transformers, its inputs and the target."""
    if name.startswith("timm "):
        model = timm.create_model(name.removeprefix("timm "), num_classes=3, img_size=32)
        return randomise(model), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), 1
    case = next(case for case in coverage_transformers.cases() if case[0] == name)
    return case[2](), case[3](), case[4]


@pytest.mark.parametrize("name", [*SAMPLE, "timm vit_tiny_patch16_224", "timm swin_tiny_patch4_window7_224"])
def test_library_models_are_left_as_they_are(name):
    """Model, another instance of its classes, the classes, inputs and process; also where the model is refused."""
    model, inputs, target = of_library(name)
    twin = copy.deepcopy(model)
    model.train()
    next(model.parameters()).requires_grad_(False)
    kept = copy.deepcopy(inputs)
    classes = {type(m): dict(vars(type(m))) for m in model.modules()}
    parameters = sum(p.numel() for p in model.parameters())
    before, other = snapshot(model), snapshot(twin)
    try:
        TransformerRelevance(model).attribute(inputs, target, return_convergence_delta=True)
    except UnsupportedOperationError:
        assert name == "fnet [eager]"
    assert_same(before, snapshot(model))
    assert_same(other, snapshot(twin))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(dict(vars(cls)) == old for cls, old in classes.items())
    pairs = zip(*((t.values() if isinstance(t, dict) else [t]) for t in (inputs, kept)), strict=True)
    assert all(torch.equal(a, b) and not a.__dict__ and a.grad_fn is None for a, b in pairs)


def stop():
    raise KeyboardInterrupt


def fail():
    raise RuntimeError("in the forward")


@pytest.mark.parametrize(("disturb", "error"), [(fail, RuntimeError), (stop, KeyboardInterrupt)])
def test_when_the_forward_raises(disturb, error):
    model = prepared(Stateful(disturb))
    before = snapshot(model)
    with pytest.raises(error):
        TransformerRelevance(model).attribute(IMAGES, target=1)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_when_a_rule_raises(error):
    def rule(inputs, output, relevance):
        raise error("in a rule")

    model = prepared(Stateful())
    model.vit.blocks[1].norm1 = nn.Sequential(model.vit.blocks[1].norm1, Broken())
    before = snapshot(model)
    register_rule(Broken, relevance=rule)
    try:
        with pytest.raises(error, match="in a rule"):
            TransformerRelevance(model).attribute(IMAGES, target=1, return_convergence_delta=True)
    finally:
        unregister_rule(Broken)
    assert_same(before, snapshot(model))


def test_when_the_target_does_not_fit():
    model = prepared(Stateful())
    before = snapshot(model)
    with pytest.raises(AssertionError):
        TransformerRelevance(model).attribute(IMAGES, target=(1, 2))
    assert_same(before, snapshot(model))


def test_ids_and_masks_are_left_alone():
    model = randomise(TinyText())
    ids = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(2))
    before = ids.clone()
    TransformerRelevance(model).attribute(ids, target=(4, 3))
    assert torch.equal(ids, before) and not ids.__dict__
    assert not any(p.__dict__ for p in model.parameters())


def test_a_key_value_cache_given_by_the_user_is_left_alone():
    class Cache:
        def __init__(self):
            self.keys = []

    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = randomise(TinyViT())

        def forward(self, x, cache):
            cache.keys.append(x)
            return self.vit(x) * len(cache.keys)

    cache = Cache()
    TransformerRelevance(Caching()).attribute(IMAGES, 1, cache)
    assert cache.keys == []


def test_training_goes_on_after_an_attribution():
    model = Stateful()
    TransformerRelevance(model).attribute(IMAGES, target=1)
    model.train()
    model(IMAGES)[:, 1].sum().backward()
    assert all(p.grad is not None for p in model.vit.head.parameters())


def test_model_made_in_inference_mode():
    """Its parameters refuse that their flag is put back outside of inference mode."""
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    want = TransformerRelevance(randomise(TinyViT())).attribute(images, 1)
    with torch.inference_mode():
        model = randomise(TinyViT())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(TransformerRelevance(model).attribute(images, 1), want)
    assert all(p.requires_grad for p in model.parameters())


def test_an_interrupt_while_the_state_is_put_back(monkeypatch):
    """Ctrl-C arrives where flags are being restored: the rest is restored, then it is raised."""
    model = randomise(TinyViT()).train()
    before = {name: (p.requires_grad, p) for name, p in model.named_parameters()}
    restore, arrived = nn.Parameter.requires_grad_, []

    def interrupted(parameter, flag=True):
        if flag and not arrived:
            arrived.append(True)
            raise KeyboardInterrupt
        return restore(parameter, flag)

    monkeypatch.setattr(nn.Parameter, "requires_grad_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TransformerRelevance(model).attribute(IMAGES, target=1)
    assert arrived and all(m.training for m in model.modules())
    assert all(p.requires_grad for _, p in before.values())
    assert not any(len(getattr(m, hooks)) for m in model.modules() for hooks in HOOKS if "forward" in hooks)

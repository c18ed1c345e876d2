"""Models with a path that could be missed: each is explained exactly like its plain twin, or refused by name."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import TinyViT, randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

from captum_transformer_attr import (
    TransformerRelevance,
    UnsupportedModelError,
    UnsupportedOperationError,
    coverage,
    register_rule,
    unregister_rule,
)

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


class View(torch.autograd.Function):
    """Has the name of an operation that needs no rule."""

    @staticmethod
    def forward(ctx, x):
        return x * torch.linspace(1, 2, x.shape[-1], dtype=x.dtype)

    @staticmethod
    def backward(ctx, g):
        return g * torch.linspace(1, 2, g.shape[-1], dtype=g.dtype)


class Changed(nn.Module):
    """A ViT whose tokens pass ``change`` between its two blocks."""

    def __init__(self, change):
        super().__init__()
        self.vit = randomise(TinyViT().double())
        self.change = Step(change)

    def forward(self, x):
        vit = self.vit
        x = vit.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls.expand(len(x), -1, -1), x], 1) + vit.position
        x = vit.blocks[1](self.change(vit.blocks[0](x)))
        return vit.head(vit.norm(x)[:, 0])


class Step(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


def no_grad_part(x):
    with torch.no_grad():
        y = x * 0.5
    return x + y


def no_grad_write(x):
    x = x * 1
    with torch.no_grad():
        x.mul_(2)
    return x


def data_write(x):
    x = x * 1
    x.data.mul_(2)
    return x


def data_assignment(x):
    x = x * 1
    x.data = x.data * 2
    return x


def alias_write(x):
    x = x * 1
    alias = x.detach()
    alias[:, 1] = 0
    return x


def straight_through(x):
    return x + (x.round() - x).detach()


def own_gradient(x):
    (g,) = torch.autograd.grad((x * x).sum(), x, create_graph=True)
    return x + g


HIDDEN = {
    "autograd.Function": (lambda x: Doubled.apply(x), "Doubled"),
    "autograd.Function named like a view": (lambda x: View.apply(x), "View"),
    "reentrant checkpoint": (lambda x: checkpoint(lambda t: t * 2, x, use_reentrant=True), "CheckpointFunction"),
    "detach": (lambda x: x + 0.5 * x.detach(), "'change' takes a value out"),
    "data": (lambda x: x + 0.5 * x.data, "'change' takes a value out"),
    "no_grad part": (no_grad_part, "'change' takes a value out"),
    "write under no_grad": (no_grad_write, "behind autograd's back"),
    "write through data": (data_write, "behind autograd's back"),
    "assignment to data": (data_assignment, "behind autograd's back"),
    "write through an alias": (alias_write, "behind autograd's back"),
    "straight-through rounding": (straight_through, "'change'"),
    "NumPy": (lambda x: x + torch.from_numpy(np.tanh(x.numpy())), "'change' hands a value"),
    "NumPy after detach": (lambda x: x + torch.from_numpy(np.tanh(x.detach().numpy())), "'change' hands a value"),
    "item": (lambda x: x / x.abs().max().item(), "'change' hands a value"),
    "cumulative sum": (lambda x: x.cumsum(1), "cumsum"),
    "Fourier transform": (lambda x: torch.fft.fft(x, dim=1).real, "fft"),
    "gradient in the forward": (own_gradient, "gradients of its own"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_path_is_refused_by_name(name):
    change, message = HIDDEN[name]
    model = Changed(change)
    with pytest.raises(UnsupportedOperationError, match=message) as caught:
        TransformerRelevance(model).attribute(IMAGES, target=1)
    assert "change" in str(caught.value)
    table = coverage(model, IMAGES)
    assert not table and "change" in str(table)


def in_place(x):
    x = x.clone()
    x += torch.tanh(x)
    x[:, 0] *= 2
    return x


def out_of_place(x):
    x = x + torch.tanh(x)
    return torch.cat([x[:, :1] * 2, x[:, 1:]], 1)


def mask_overwritten(x):
    mask = torch.ones(x.shape[-1], dtype=x.dtype)
    y = x * mask
    mask.zero_()  # the model reuses its buffer; what was multiplied stays multiplied by one
    return y


def value_overwritten(x):
    work = x * 1.5
    y = torch.tanh(work)
    work.zero_()
    return x + y


EXACT = {
    "in-place additions": (in_place, out_of_place),
    "non-reentrant checkpoint": (
        lambda x: checkpoint(lambda t: x + torch.tanh(t), x, use_reentrant=False),
        lambda x: x + torch.tanh(x),
    ),
    "a constant overwritten afterwards": (mask_overwritten, lambda x: x * 1.0),
    "a value overwritten afterwards": (value_overwritten, lambda x: x + torch.tanh(x * 1.5)),
    "cast like a live tensor under no_grad": (
        lambda x: x * torch.no_grad()(lambda: torch.full((1,), 2.0).to(x))(),
        lambda x: x * 2.0,
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_unusual_but_exact(name):
    unusual, plain = (Changed(change) for change in EXACT[name])
    got, delta = TransformerRelevance(unusual).attribute(IMAGES, target=1, return_convergence_delta=True)
    want = TransformerRelevance(plain).attribute(IMAGES, target=1)
    assert float(want.abs().max()) > 0
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert float(delta.abs().max()) < 1e-6


def test_values_that_are_only_looked_at_do_no_harm():
    seen = []

    def look(x):
        seen.append(x.detach().mean())
        if bool((x > 1e6).any()):
            raise AssertionError
        if x.requires_grad:
            x.register_hook(lambda g: g * 0)
        return x * 1.0

    got = TransformerRelevance(Changed(look)).attribute(IMAGES, target=1)
    want = TransformerRelevance(Changed(lambda x: x * 1.0)).attribute(IMAGES, target=1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert seen


def test_model_writes_into_its_input_and_mask():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = randomise(TinyViT().double())

        def forward(self, x, factor):
            factor.mul_(1.0)
            x.mul_(factor)
            factor.zero_()
            return self.vit(x)

    model, images, factor = Writes(), IMAGES.clone(), torch.full((1,), 2.0, dtype=torch.float64)
    got = TransformerRelevance(model).attribute(images, 1, factor)
    want = TransformerRelevance(model.vit).attribute(IMAGES * 2, 1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert torch.equal(images, IMAGES) and float(factor) == 2


def test_scripted_submodule_is_refused_by_name():
    model = Changed(lambda x: x)
    model.change = torch.jit.script(nn.Tanh())
    with pytest.raises(UnsupportedModelError, match="'change' is scripted"):
        TransformerRelevance(model).attribute(IMAGES, target=1)


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def test_scripted_function_is_refused():
    with pytest.raises(UnsupportedOperationError):
        TransformerRelevance(Changed(scripted)).attribute(IMAGES, target=1)


def test_compiled_model_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="compiled"):
        TransformerRelevance(torch.compile(Changed(torch.tanh))).attribute(IMAGES, target=1)


def test_compiled_function_runs_as_written():
    got = TransformerRelevance(Changed(torch.compile(lambda x: x * torch.sigmoid(x), backend="eager"))).attribute(
        IMAGES, target=1
    )
    want = TransformerRelevance(Changed(lambda x: x * torch.sigmoid(x))).attribute(IMAGES, target=1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_randomness_is_found_on_every_call():
    class Noisy(nn.Module):
        noise = 0.0

        def __init__(self):
            super().__init__()
            self.vit = randomise(TinyViT().double())

        def forward(self, x):
            return self.vit(x + self.noise * torch.randn_like(x))

    model = Noisy()
    explainer = TransformerRelevance(model)
    explainer.attribute(IMAGES, target=1)  # draws numbers that change nothing
    model.noise = 0.1
    with pytest.raises(UnsupportedModelError, match="random"):
        explainer.attribute(IMAGES, target=1)


def test_not_finite_output_is_refused():
    with pytest.raises(UnsupportedModelError, match="finite"):
        TransformerRelevance(Changed(lambda x: x / 0)).attribute(IMAGES, target=1)


def test_first_model_unharmed_by_refusals():
    model = Changed(torch.tanh)
    before = TransformerRelevance(copy.deepcopy(model)).attribute(IMAGES, target=1)
    for change, _ in HIDDEN.values():
        with pytest.raises(UnsupportedOperationError):
            TransformerRelevance(Changed(change)).attribute(IMAGES, target=1)
    assert torch.equal(TransformerRelevance(model).attribute(IMAGES, target=1), before)


class Swish(nn.Module):
    """An activation that hides in an autograd function."""

    def forward(self, x):
        return Doubled.apply(x) * torch.sigmoid(x) / 2


def with_activation(activation):
    model = randomise(TinyViT().double())
    for block in model.blocks:
        block.mlp[1] = activation
    return model


@pytest.fixture
def registered():
    yield register_rule
    unregister_rule(Swish)
    unregister_rule(nn.Linear)


def test_registered_identity_equals_the_built_in_activation(registered):
    with pytest.raises(UnsupportedOperationError, match="Doubled.*mlp.1"):
        TransformerRelevance(with_activation(Swish())).attribute(IMAGES, target=1)
    registered(Swish, relevance="identity")
    got, delta = TransformerRelevance(with_activation(Swish())).attribute(
        IMAGES, target=1, return_convergence_delta=True
    )
    want = TransformerRelevance(with_activation(nn.SiLU())).attribute(IMAGES, target=1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert float(delta.abs().max()) < 1e-6
    assert "registered: identity" in str(coverage(with_activation(Swish()), IMAGES))


def test_registered_function_is_called_with_the_published_rule(registered):
    def z_plus(inputs, output, relevance):
        (x,) = inputs
        weight = current.weight.detach()
        positive, negative = x.clamp(min=0), x.clamp(max=0)
        z = positive @ weight.clamp(min=0).T + negative @ weight.clamp(max=0).T
        s = relevance / z
        return positive * (s @ weight.clamp(min=0)) + negative * (s @ weight.clamp(max=0))

    class Projection(nn.Linear):
        pass

    model, twin = with_activation(nn.GELU()), with_activation(nn.GELU())
    current = Projection(32, 16).double()
    current.load_state_dict(model.blocks[0].mlp[2].state_dict())
    model.blocks[0].mlp[2] = current
    registered(Projection, relevance=z_plus)
    got = TransformerRelevance(model).attribute(IMAGES, target=1)
    unregister_rule(Projection)
    torch.testing.assert_close(got, TransformerRelevance(twin).attribute(IMAGES, target=1), rtol=1e-7, atol=1e-10)


def test_registered_rule_of_the_wrong_shape_is_refused_by_name(registered):
    registered(Swish, relevance=lambda inputs, output, relevance: relevance[..., :1])
    with pytest.raises(UnsupportedOperationError, match="blocks.0.mlp.1"):
        TransformerRelevance(with_activation(Swish())).attribute(IMAGES, target=1)

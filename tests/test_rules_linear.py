"""Rules of linear maps against their formulas as float64 loops over single contributions."""

import pytest
import torch
from torch import nn

from captum_transformer_attr import Composite, InputError, TransformerLRP
from captum_transformer_attr.rules.linear_rules import COMPOSITES, Epsilon, Gamma, ZBox, ZPlus

GENERATOR = torch.Generator().manual_seed(3)


def draw(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def dense(sizes, bias=True):
    """Linear layers with ReLU between them, weights of both signs."""
    layers = []
    for a, b in zip(sizes[:-1], sizes[1:], strict=True):
        layer = nn.Linear(a, b, bias=bias).double()
        layer.weight.data, layer.bias = draw(b, a), nn.Parameter(draw(b)) if bias else None
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def shared(x, weight, bias, y, r, share):
    """R_i = Σ_j share(z_ij, …) r_j with one Python number at a time."""
    weight, bias = weight.detach(), bias.detach()
    result = torch.zeros_like(x)
    for j in range(len(r)):
        z = [float(x[i] * weight[j, i]) for i in range(len(x))]
        parts = share(z, float(bias[j]), float(y[j])) if float(r[j]) else [0.0] * len(x)
        for i in range(len(x)):
            result[i] += parts[i] * float(r[j])
    return result


def epsilon_share(epsilon):
    def share(z, b, y):
        return [zi / (y + (epsilon if y >= 0 else -epsilon)) for zi in z]

    return share


def gamma_share(gamma):
    def share(z, b, y):
        keep = (lambda v: max(v, 0.0)) if y > 0 else (lambda v: min(v, 0.0))
        total = sum(zi + gamma * keep(zi) for zi in z) + b + gamma * keep(b)
        return [(zi + gamma * keep(zi)) / total for zi in z]

    return share


def z_plus_share(z, b, y):
    parts = [max(zi, 0.0) for zi in z]
    if sum(parts) == 0:
        parts = z  # nothing but negative contributions
    return [part / sum(parts) for part in parts]


SHARES = [
    (Epsilon(0.3), epsilon_share(0.3)),
    (Epsilon(0.0), epsilon_share(0.0)),
    (Gamma(0.4, 0.0), gamma_share(0.4)),
    (Gamma(0.0, 0.0), epsilon_share(0.0)),
    (ZPlus(), z_plus_share),
]


@pytest.mark.parametrize("rules", ["deep_taylor", "attnlrp", "cp", "libra"])
@pytest.mark.parametrize("rule, share", SHARES)
def test_one_layer(rules, rule, share):
    model, x = dense([6, 4]), draw(3, 6)
    got = TransformerLRP(model, rules, Composite(linear=rule)).attribute(x, target=[0, 1, 3])
    y = model(x).detach()
    for n, target in enumerate([0, 1, 3]):
        start = torch.zeros(4, dtype=torch.float64)
        start[target] = 1 if rules == "deep_taylor" else y[n, target]
        want = shared(x[n], model[0].weight, model[0].bias, y[n], start, share)
        assert torch.allclose(got[n], want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rules", ["deep_taylor", "libra"])
@pytest.mark.parametrize("rule, share", SHARES)
def test_layers_in_a_row(rules, rule, share):
    """ReLU passes relevance on unchanged: its slope f(x)/x is 1 where it is open, and where it is closed nothing
    arrives."""
    model, x = dense([6, 5, 4]), draw(1, 6)
    got = TransformerLRP(model, rules, Composite(linear=rule)).attribute(x, target=2)[0]
    hidden = model[0](x[0]).detach()
    y = model[2](hidden.relu()).detach()
    start = torch.zeros(4, dtype=torch.float64)
    start[2] = 1 if rules == "deep_taylor" else y[2]
    r = shared(hidden.relu(), model[2].weight, model[2].bias, y, start, share)
    want = shared(x[0], model[0].weight, model[0].bias, hidden, r, share)
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-8) and want.abs().max() > 0.01


def as_matrix(conv, image):
    """The convolution's matrix ``(outputs, inputs)``, column by column."""
    basis = torch.eye(image.numel(), dtype=torch.float64).reshape(-1, *image.shape)
    return nn.functional.conv2d(basis, conv.weight, None, conv.stride, conv.padding).flatten(1).T.detach()


@pytest.mark.parametrize("low, high", [(None, None), (-3.0, 4.0)])
def test_z_box(low, high):
    """The first convolution of an image model, against the matrix formula."""
    conv = nn.Conv2d(2, 3, 2, 2).double()
    conv.weight.data, conv.bias.data = draw(3, 2, 2, 2), draw(3)
    model = nn.Sequential(conv, nn.Flatten(), *dense([12, 2])).eval()
    images = draw(3, 2, 4, 4)
    composite = None if low is None else Composite(pixels=ZBox(low, high))
    got = TransformerLRP(model, "deep_taylor", composite).attribute(images, target=1)
    for image, map_ in zip(images, got, strict=True):
        x, w = image.flatten(), as_matrix(conv, image)
        hidden = conv(image[None]).detach().flatten()
        start = torch.tensor([0.0, 1.0], dtype=torch.float64)
        r = shared(hidden, model[2].weight, model[2].bias, model[2](hidden).detach(), start, z_plus_share)
        lowest, highest = (x.min(), x.max()) if low is None else (low, high)
        parts = x * w - lowest * w.clamp(min=0) - highest * w.clamp(max=0)
        want = (parts / parts.sum(1, keepdim=True) * r[:, None]).sum(0)
        assert torch.allclose(map_.flatten(), want, rtol=1e-6, atol=1e-9)
        assert abs(want.sum() - 1) < 1e-9


def test_z_box_of_each_example_alone():
    """Bounds are the example's own, not the batch's."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2, 2), nn.Flatten(), nn.Linear(8, 2)).double().eval()
    images = draw(2, 1, 4, 4) * torch.tensor([1.0, 50.0], dtype=torch.float64)[:, None, None, None]
    method = TransformerLRP(model)
    together = method.attribute(images, target=0)
    alone = torch.cat([method.attribute(images[i : i + 1], target=0) for i in range(2)])
    assert torch.allclose(together, alone, rtol=1e-12, atol=1e-12)


def test_composites_choose_by_kind_and_path():
    model = (
        nn.Sequential(nn.Conv2d(1, 2, 2, 2), nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2)).double().eval()
    )
    image = draw(1, 1, 4, 4)
    parts = {"convolution": Gamma(0.5), "linear": Epsilon(0.1)}
    reference = TransformerLRP(model, "cp", Composite(**parts)).attribute(image, target=0)
    named = Composite(linear=Epsilon(0.1), named=(("0", Gamma(0.5)),))
    assert torch.equal(TransformerLRP(model, "cp", named).attribute(image, target=0), reference)
    other = Composite(**parts, named=(("4", ZPlus()),))
    assert not torch.allclose(TransformerLRP(model, "cp", other).attribute(image, target=0), reference)


@pytest.mark.parametrize("rule", [Epsilon(1e-9), Gamma(0.3, 0.0)])
def test_bias_shares_are_counted(rule):
    model, x = dense([6, 5, 4]), draw(4, 6)
    got, delta = TransformerLRP(model, "cp", Composite(linear=rule)).attribute(
        x, target=1, return_convergence_delta=True
    )
    assert delta.abs().max() < 1e-7
    taken = TransformerLRP(model, "cp", Composite(linear=rule)).parameter_relevance(x, target=1)
    assert set(taken) >= {"0", "2"}
    total = got.sum(1) + sum(taken.values())
    # What ε takes is what the delta says is missing.
    assert torch.allclose(total + delta, model(x)[:, 1].detach(), rtol=1e-12, atol=1e-12)


def test_bad_options():
    model = dense([3, 2])
    with pytest.raises(InputError, match="composite='nope': choose one of epsilon, "):
        TransformerLRP(model, "cp", "nope")
    with pytest.raises(InputError, match="ZBox needs rules='deep_taylor'"):
        TransformerLRP(model, "attnlrp", "epsilon_gamma_box")
    with pytest.raises(InputError, match="rules='lrp': choose one of deep_taylor, attnlrp, cp, libra"):
        TransformerLRP(model, "lrp")
    with pytest.raises(InputError, match="explained='odds': choose one of logit, probability"):
        TransformerLRP(model, "cp", explained="odds")
    assert {"epsilon", "epsilon_plus", "epsilon_gamma_box", "attnlrp_vision"} <= set(COMPOSITES)

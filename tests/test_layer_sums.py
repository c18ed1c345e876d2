"""FullGradPlus, AttCAT and LeGrad against their formulas, with plain autograd on the model written out."""

import pytest
import torch
from golden_models import assert_padding_changes_nothing
from tiny_models import TinyText, TinyViT, randomise

from captum_transformer_attr import AttCAT, FullGradPlus, InputError, LayerTransformerLRP, LeGrad

IDS = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(1))
TARGET = (4, 3)


def written_out(model, ids):
    """Block outputs and attention maps of ``TinyText``, all on the graph."""
    x, outputs, maps = model.embed(ids), [], []
    for block in model.blocks:
        b, n, c = x.shape
        q, k, v = block.qkv(block.norm1(x)).reshape(b, n, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + block.proj((attention @ v).transpose(1, 2).reshape(b, n, c))
        x = x + block.mlp(block.norm2(x))
        maps.append(attention)
        outputs.append(x)
    return outputs, maps


@pytest.fixture
def model():
    return randomise(TinyText(depth=3).double())


def test_attcat(model):
    outputs, maps = written_out(model, IDS)
    gradients = torch.autograd.grad(model.head(outputs[-1])[:, 4, 3].sum(), outputs)
    want = sum(a[:, :, 4].mean(1) * (h * g).sum(-1) for a, h, g in zip(maps, outputs, gradients, strict=True)).detach()
    got = AttCAT(model).attribute_tokens(IDS, TARGET)
    assert torch.allclose(got, want, rtol=1e-8, atol=1e-12) and want.abs().max() > 1e-3


def test_legrad(model):
    outputs, maps = written_out(model, IDS)
    want = 0
    for h, a in zip(outputs, maps, strict=True):
        # The head reads every layer's tokens.
        (g,) = torch.autograd.grad(model.head(h)[:, 4, 3].sum(), a, retain_graph=True)
        want = want + g.clamp(min=0).mean((1, 2))
    got = LeGrad(model).attribute_tokens(IDS, TARGET)
    assert torch.allclose(got, want, rtol=1e-8, atol=1e-12) and want.abs().max() > 1e-3


@pytest.mark.parametrize("rules", ["libra", "cp", "deep_taylor"])
def test_fullgrad_plus(model, rules):
    layers = LayerTransformerLRP(model, list(model.blocks), rules=rules).attribute(IDS, TARGET)
    want = sum(layer.sum(-1) for layer in layers)
    got = FullGradPlus(model, rules=rules).attribute_tokens(IDS, TARGET)
    assert torch.allclose(got, want, rtol=1e-8, atol=1e-12) and want.abs().max() > 1e-3


@pytest.mark.parametrize("method", [AttCAT, LeGrad, FullGradPlus])
def test_images_and_class_tokens(method):
    """Scores of the class token do not reach the image; a batch gives what its examples give alone."""
    model = randomise(TinyViT().double())
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    together = method(model).attribute_tokens(images, [0, 3, 1])
    assert together.shape == (3, 2, 2)
    for i, target in enumerate([0, 3, 1]):
        assert torch.allclose(
            together[i : i + 1], method(model).attribute_tokens(images[i : i + 1], target), rtol=1e-8, atol=1e-12
        )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", [AttCAT, LeGrad, FullGradPlus])
def test_padding(method):
    assert_padding_changes_nothing(lambda model: method(model).attribute_tokens)


def test_bad_options(model):
    with pytest.raises(InputError, match="rules='x': choose one of"):
        FullGradPlus(model, rules="x")

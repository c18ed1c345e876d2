"""Float32 products in fewer digits (TF32, bfloat16): the model is followed, compared exactly, and the setting kept."""

import itertools

import pytest
import torch
from tiny_models import TinyViT, randomise
from torch import nn

from captum_transformer_attr import AttentionRelevance, TransformerRelevance, UnsupportedModelError
from captum_transformer_attr.recording.products import exact_products, switches

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def settings():
    return [(s.device, s.operation, getattr(s.owner, s.name)) for s in switches()]


@pytest.fixture(autouse=True)
def process_as_before():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


class Rounded(nn.Module):
    """Every call gives other digits behind the third, as long as products are reduced; ``mixes`` examples or not."""

    def __init__(self, mixes=0.0, always=False):
        super().__init__()
        self.vit, self.mixes, self.always, self.calls = randomise(TinyViT()), mixes, always, itertools.count(1)

    def forward(self, x):
        reduced = self.always or torch.get_float32_matmul_precision() != "highest"
        rounding = 1 + 1e-3 * next(self.calls) * reduced
        return self.vit(x + self.mixes * x.flip(0)) * rounding


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_fewer_digits_are_no_reason_to_refuse_or_to_go_one_by_one(precision):
    model = Rounded()
    exact = AttentionRelevance(model.vit).attribute(IMAGES, target=1)
    torch.set_float32_matmul_precision(precision)
    before = settings()
    method = AttentionRelevance(model)
    for expected in (5, 1):  # recorded twice, compared with a plain forward and two examples alone; then never again
        first = next(model.calls)
        got = method.attribute(IMAGES, target=1)
        assert next(model.calls) - first - 1 == expected
        torch.testing.assert_close(got, exact, rtol=0.1, atol=float(exact.abs().max()) / 50)
    assert settings() == before and torch.get_float32_matmul_precision() == precision


def test_examples_that_influence_each_other_are_still_seen():
    """By less than what the rounding changes."""
    torch.set_float32_matmul_precision("high")
    method = AttentionRelevance(Rounded(mixes=5e-3))
    got = method.attribute(IMAGES, target=1)
    alone = AttentionRelevance(randomise(TinyViT())).attribute(IMAGES, target=1)
    torch.testing.assert_close(got, alone, rtol=0.1, atol=float(alone.abs().max()) / 20)
    model = method.forward_func
    first = next(model.calls)
    method.attribute(IMAGES, target=1)
    assert next(model.calls) - first - 1 >= 3  # the batch, and each example


def test_a_random_model_is_still_refused():
    torch.set_float32_matmul_precision("high")
    with pytest.raises(UnsupportedModelError, match="differs from the plain one"):
        AttentionRelevance(Rounded(always=True)).attribute(IMAGES, target=1)


def test_this_machine_in_bfloat16():
    """Where the processor has such products; else the exact ones. The model is wide enough for them to be used."""
    model, images = randomise(TinyViT(width=256)), IMAGES
    exact = TransformerRelevance(model).attribute(images, target=1)
    torch.set_float32_matmul_precision("medium")
    got = TransformerRelevance(model).attribute(images, target=1)
    assert (got - exact).abs().max() < 0.1 * exact.abs().max()


def test_exact_products_put_every_setting_back():
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        before = settings()
        with exact_products():
            assert not any(switch.is_reduced() for switch in switches())
            assert torch.get_float32_matmul_precision() == "highest"
        assert settings() == before and torch.get_float32_matmul_precision() == precision


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="settings of torch 2.9")
def test_settings_apart_from_the_older_one():
    """Torch then refuses to say the older one."""
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        before = settings()
        with exact_products() as changed:
            assert changed and not any(switch.is_reduced() for switch in switches())
        assert settings() == before
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"

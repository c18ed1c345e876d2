"""What a process has set (default dtype and device, determinism, TF32, ...) changes no attribution, and stays set.

Float32 products in fewer digits (TF32, bfloat16) outside: none inside a recording.
"""

import contextlib
import subprocess
import sys
import warnings

import pytest
import torch
from every_class import CLASSES
from tiny_models import TinyViT, randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import captum_transformer_attr as cta
from captum_transformer_attr.recording.products import exact_products, settings

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def values():
    return [(setting.name, setting.value) for setting in settings()]


@pytest.fixture(autouse=True)
def process_as_before():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@contextlib.contextmanager
def setting(change, value, back):
    change(value)
    try:
        yield
    finally:
        change(back)


AROUND = {
    "default float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "another default device": lambda: setting(torch.set_default_device, "meta", None),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "anomaly detection": torch.autograd.detect_anomaly,
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("method", CLASSES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("around", AROUND)
def test_surroundings_change_nothing(around, method):
    model = randomise(TinyViT())
    want = method(model).attribute(IMAGES, target=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that anomaly detection slows down
        with AROUND[around]():
            got = method(model).attribute(IMAGES, target=1)
    assert got.dtype == want.dtype and got.device == want.device
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


def test_sharded_parameters_are_refused_by_name(tmp_path):
    """A process sees its own part of them only."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("fully_shard came with torch 2.6")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = fsdp.fully_shard(randomise(TinyViT()), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(cta.UnsupportedModelError, match="parameter 'cls' is spread over processes"):
            cta.AttentionRelevance(model).attribute(IMAGES, target=1)
    finally:
        torch.distributed.destroy_process_group()


class Products(TorchDispatchMode):
    """Counts products, and those made while some are reduced."""

    total = reduced = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward"):
            self.total += 1
            self.reduced += any(setting.value in setting.reduced for setting in settings())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", CLASSES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_every_product_of_an_attribution_is_exact(method, precision):
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = True
    before = values()
    with Products() as products:
        method(randomise(TinyViT())).attribute(IMAGES, target=1)
    assert products.total > 20 and products.reduced == 0
    assert values() == before and torch.get_float32_matmul_precision() == precision


class Rounded(nn.Module):
    """Every call gives other digits behind the third, as long as products are reduced."""

    def __init__(self):
        super().__init__()
        self.vit, self.calls = randomise(TinyViT()), 0

    def forward(self, x):
        self.calls += 1
        return self.vit(x) * (1 + 1e-3 * self.calls * (torch.get_float32_matmul_precision() != "highest"))


def test_fewer_digits_are_no_reason_to_refuse_or_to_go_one_by_one():
    model = Rounded()
    exact = cta.TransformerRelevance(model).attribute(IMAGES, target=1)
    torch.set_float32_matmul_precision("high")
    method = cta.TransformerRelevance(model)
    torch.testing.assert_close(method.attribute(IMAGES, target=1), exact, rtol=0, atol=0)
    calls = []
    model.vit.register_forward_hook(lambda *_: calls.append(1))
    method.attribute(IMAGES, target=1)
    assert len(calls) == 1


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_settings_are_put_back(precision, allowed):
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = allowed
    before = values()
    with pytest.raises(KeyError), exact_products():
        assert not any(setting.value in setting.reduced for setting in settings())
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
        with torch.backends.cudnn.flags(enabled=False):  # as models do; torch reads the older settings here
            raise KeyError
    assert values() == before
    assert torch.get_float32_matmul_precision() == precision and torch.backends.cudnn.allow_tf32 == allowed


newer = pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has no fp32_precision (2.9)"
)


@newer
def test_settings_apart_from_the_older_one():
    """Torch then refuses to tell the older one."""
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        before = values()
        with exact_products():
            assert not any(setting.value in setting.reduced for setting in settings())
        assert values() == before
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.backends.cudnn.conv.fp32_precision = "tf32"


@newer
def test_one_backend_set_by_the_older_setting_stays_the_only_one():
    """``allow_tf32`` sets the GPU's products alone, the older precision that it reads as would set the CPU's, too."""
    torch.backends.cuda.matmul.allow_tf32 = True
    before = values()
    with exact_products():
        assert not any(setting.value in setting.reduced for setting in settings())
    assert values() == before and torch.backends.mkldnn.matmul.fp32_precision != "tf32"


@newer
def test_what_follows_the_general_setting_goes_on_following_it():
    code = """
import torch
from captum_transformer_attr.recording.products import exact_products, settings
torch.backends.fp32_precision = "tf32"
with exact_products():
    assert not any(setting.value in setting.reduced for setting in settings())
assert torch.backends.mkldnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "tf32"
torch.backends.fp32_precision = "ieee"
assert torch.backends.mkldnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
"""
    subprocess.run([sys.executable, "-c", code], check=True)  # a fresh process: nothing was set before

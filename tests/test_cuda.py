"""On a GPU: the goldens again, every class against the CPU, half precision, memory. Skipped where there is no CUDA."""

import pytest
import torch
import transformers
from every_class import CLASSES
from golden_models import assert_relatively_close, published_bert, published_vit
from tiny_models import TinyViT, randomise

import captum_transformer_attr as cta

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["vit_small_grid", "vit_14x14"])
def test_vit_goldens(name):
    golden, model = published_vit(name)
    got = cta.TransformerRelevance(model.cuda()).attribute_tokens(golden["images"].cuda(), golden["targets"].cuda())
    assert got.is_cuda
    assert_relatively_close(got.flatten(1).cpu(), golden["map.transformer_attribution"])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bert_golden_padded(implementation):
    golden, model = published_bert(implementation)
    inputs = {name: golden[name].cuda() for name in ("input_ids", "attention_mask")}
    got = cta.TransformerRelevance(model.cuda()).attribute_tokens(inputs, golden["targets"])
    assert_relatively_close(got["input_ids"][:, 1:].cpu(), golden["map.transformer_attribution_start0_plain"][:, 1:])


@pytest.mark.parametrize("method", CLASSES, ids=lambda c: c.__name__)
def test_as_on_the_cpu(method):
    """float64, where nothing but rounding may differ; the model stays where it was, and so do the random numbers."""
    model = randomise(TinyViT()).double()
    want = method(model).attribute(IMAGES.double(), target=[0, 3, 1])
    model.cuda()
    state = torch.cuda.get_rng_state()
    got = method(model).attribute(IMAGES.double().cuda(), target=[0, 3, 1])
    assert got.device.type == "cuda" and next(model.parameters()).is_cuda
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert_relatively_close(got.cpu(), want, 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", CLASSES, ids=lambda c: c.__name__)
def test_half_precision(method, dtype):
    """A model in half precision is explained like the float32 model that has its rounded weights."""
    model = randomise(TinyViT()).to(dtype).cuda()
    images = IMAGES.to(dtype).cuda()
    got = method(model).attribute(images, target=[0, 3, 1])
    assert got.dtype == dtype and bool(got.isfinite().all())
    want = method(model.float()).attribute(images.float(), target=[0, 3, 1])
    # Float16 has no number between 0 and 6e-8: results below that are rounded to steps of it.
    steps = 2**-24 if dtype == torch.float16 else 0.0
    assert (got.float() - want).abs().max() < 0.02 * want.abs().max() + steps


def test_memory_grows_with_the_tokens_not_their_square():
    """No N × N map of any layer is kept: four times the tokens need less than five times the memory."""
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=16384,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().cuda()

    def peak(tokens):
        inputs = {"input_ids": torch.randint(0, 100, (1, tokens), device="cuda"), "logits_to_keep": 1}
        method = cta.TransformerRelevance(model)
        method.attribute(inputs, target=(0, 1))
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        method.attribute(inputs, target=(0, 1))
        return torch.cuda.max_memory_allocated() - before

    assert peak(8192) < 5 * peak(2048)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_tf32(precision):
    """Attribution computes in full whatever the process has set: batches stay together, results stay the same."""
    config = transformers.ViTConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=12, num_attention_heads=3, num_labels=10
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval().cuda()
    images = torch.randn(8, 3, 224, 224, device="cuda")
    want = cta.TransformerRelevance(model).attribute(images, target=1)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    torch.set_float32_matmul_precision(precision)
    try:
        method = cta.TransformerRelevance(model)
        method.attribute(images, target=1)
        calls.clear()
        got = method.attribute(images, target=1)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
        handle.remove()
    assert len(calls) == 1
    assert_relatively_close(got, want, 1e-4)

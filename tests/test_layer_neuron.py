"""Layer and neuron variants: against Captum's own on ReLU networks, against formulas on transformers, and in Captum's
consumers."""

import copy

import pytest
import torch
import transformers
from captum.attr import LayerGradientXActivation, LLMGradientAttribution, NeuronGradient, NoiseTunnel, TextTokenInput
from captum.testing.attr.helpers.test_config import config as captum_config
from golden_models import assert_relatively_close, published_bert
from tiny_models import Block, TinyText, TinyViT, randomise
from torch import nn

from benchmarks.data_folder import data_folder
from captum_transformer_attr import InputError, LayerTransformerLRP, NeuronTransformerLRP, TransformerLRP

DATA = data_folder()
IDS = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(1))


def entries(captum_class):
    return [
        pytest.param(e, id=e["name"])
        for e in captum_config
        if captum_class in e["algorithms"] and not e.get("noise_tunnel")
    ]


def module_of(model, path):
    return [model.get_submodule(p) for p in path] if isinstance(path, list) else model.get_submodule(path)


def flat(result):
    return [t for r in result for t in flat(r)] if isinstance(result, (list, tuple)) else [result]


def same_structure(a, b):
    if isinstance(b, (list, tuple)):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same_structure(x, y)
    else:
        assert a.shape == b.shape


# ---------------------------------------------------------------------- Captum's suites, on Captum's models
@pytest.mark.parametrize("entry", entries(LayerGradientXActivation))
@pytest.mark.parametrize("rules", ["libra", "cp"])
@pytest.mark.parametrize("of_input", [False, True])
def test_layers_of_relu_networks(entry, rules, of_input):
    """There the modified gradient is the gradient."""
    model = copy.deepcopy(entry["model"])
    arguments = {**entry["attribute_args"], "attribute_to_layer_input": of_input}
    layer = module_of(model, entry["layer"])
    want = LayerGradientXActivation(model, layer).attribute(**arguments)
    got = LayerTransformerLRP(model, layer, rules=rules).attribute(**arguments)
    same_structure(got, want)
    for a, b in zip(flat(got), flat(want), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("entry", entries(NeuronGradient))
@pytest.mark.parametrize("of_input", [False, True])
def test_neurons_of_relu_networks(entry, of_input):
    model = copy.deepcopy(entry["model"])
    arguments = {**entry["attribute_args"], "attribute_to_neuron_input": of_input}
    layer = module_of(model, entry["layer"])
    want = NeuronGradient(model, layer).attribute(**arguments)
    got = NeuronTransformerLRP(model, layer, rules="libra").attribute(**arguments)
    same_structure(got, want)
    for a, g, x in zip(flat(got), flat(want), flat(arguments["inputs"]), strict=True):
        assert torch.allclose(a, g * x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layered", [False, True])
def test_hooks_are_removed(layered):
    """A forward that raises half-way leaves nothing behind."""
    model = randomise(TinyViT())
    images = torch.randn(2, 3, 8, 8)

    def fail(module, inputs, output):
        raise RuntimeError("on purpose")

    handle = model.head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        if layered:
            LayerTransformerLRP(model, model.blocks[0]).attribute(images, 1)
        else:
            NeuronTransformerLRP(model, model.blocks[1]).attribute(images, (0, 1))
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------- transformers
def test_published_relevance_of_the_encoder_input():
    golden, model = published_bert("sdpa")
    inputs = {name: golden[name] for name in ("input_ids", "attention_mask")}
    got = LayerTransformerLRP(model, model.bert.embeddings).attribute(inputs, golden["targets"])
    assert_relatively_close(got.sum(-1), golden["map.full_lrp"])


@pytest.mark.parametrize("rules", ["deep_taylor", "attnlrp", "cp", "libra"])
def test_the_embedding_is_the_input(rules):
    """Relevance of the embedding's output, summed, is what the ids get; what enters the embedding are the ids
    themselves."""
    model = randomise(TinyText().double())
    whole = TransformerLRP(model, rules).attribute(IDS, (4, 3))
    layer = LayerTransformerLRP(model, model.embed, rules=rules)
    assert torch.allclose(layer.attribute(IDS, (4, 3)).sum(-1), whole, rtol=1e-9, atol=1e-12)
    assert torch.allclose(layer.attribute(IDS, (4, 3), attribute_to_layer_input=True), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rules", ["cp", "libra", "deep_taylor"])
def test_a_layer_that_everything_passes(rules):
    """Between the last block and the logit there are a norm and a head: relevance below is the logit less their
    constants."""
    model = randomise(TinyViT().double())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    layer = LayerTransformerLRP(model, [model.blocks[1], model.norm], rules=rules)
    blocks, norm = layer.attribute(images, 2)
    logit = model(images)[:, 2].detach()
    if rules == "deep_taylor":
        assert torch.allclose(blocks.sum((1, 2)), torch.ones(2, dtype=torch.float64), atol=1e-9)
        return
    assert torch.allclose(norm.sum((1, 2)), logit - model.head.bias[2].detach(), rtol=1e-9, atol=1e-12)
    shift = (model.norm.bias * model.head.weight[2]).sum().detach()
    assert torch.allclose(blocks.sum((1, 2)), logit - model.head.bias[2].detach() - shift, rtol=1e-9, atol=1e-12)


def test_modified_gradient_without_the_activation():
    model = randomise(TinyViT().double())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gradient = LayerTransformerLRP(model, model.norm, rules="libra", multiply_by_inputs=False).attribute(images, 2)
    assert torch.allclose(gradient[:, 0], model.head.weight[2].detach().expand(2, -1), rtol=1e-9, atol=1e-12)
    assert (gradient[:, 1:] == 0).all()
    with pytest.raises(InputError, match="multiply_by_inputs=False: rules='deep_taylor' carries relevance"):
        LayerTransformerLRP(model, model.norm, multiply_by_inputs=False)


class ReturnsMore(nn.Module):
    """A block that returns a tensor, nothing, and a list."""

    def __init__(self):
        super().__init__()
        self.block = Block(16, 2)

    def forward(self, x):
        y = self.block(x)
        return y, None, [y * 2]


def test_layer_that_returns_several_things():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = ReturnsMore(), nn.Linear(16, 3)

        def forward(self, x):
            y, _, (z,) = self.layer(x)
            return self.head((y + z).mean(1))

    model = randomise(Model().double())
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    first, second = LayerTransformerLRP(model, model.layer, rules="libra").attribute(x, 1)
    # The second output, 2 y, carries two thirds of y + 2 y; the first, from which it was made, all of it.
    total = model(x)[:, 1].detach() - model.head.bias[1].detach()
    assert torch.allclose(first.sum((1, 2)), total, rtol=1e-9, atol=1e-12)
    assert torch.allclose(second, first * 2 / 3, rtol=1e-9, atol=1e-12) and first.abs().max() > 0


def test_in_place_changes_behind_the_layer():
    """The layer's values are those that left it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.layer(x).add_(5.0))

    model = randomise(Model().double())
    x = torch.randn(3, 4, dtype=torch.float64)
    got = LayerTransformerLRP(model, model.layer, rules="libra").attribute(x, 0)
    assert torch.allclose(got, (model.layer(x) * model.head.weight[0]).detach(), rtol=1e-9, atol=1e-12)


def test_neuron_of_a_transformer():
    """A neuron of the head is the logit; slices add up; functions of the layer's output are recorded."""
    model = randomise(TinyViT().double())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for rules in ("deep_taylor", "attnlrp", "cp", "libra"):
        want = TransformerLRP(model, rules).attribute(images, 2)
        got = NeuronTransformerLRP(model, model.head, rules=rules).attribute(images, 2)
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    neuron = NeuronTransformerLRP(model, model.blocks[0], rules="cp")
    parts = [neuron.attribute(images, (1, c)) for c in (3, 4, 5)]
    assert torch.allclose(neuron.attribute(images, (1, slice(3, 6))), sum(parts), rtol=1e-9, atol=1e-12)
    assert torch.allclose(neuron.attribute(images, lambda y: 3 * y[:, 1, 3]), 3 * parts[0], rtol=1e-9, atol=1e-12)
    assert parts[0].abs().max() > 0


def test_bad_layers():
    model = randomise(TinyViT())
    images = torch.randn(1, 3, 8, 8)
    with pytest.raises(InputError, match="layer: this Linear is not part of the model"):
        LayerTransformerLRP(model, nn.Linear(2, 2)).attribute(images, 0)
    model.spare = nn.Linear(3, 3)
    with pytest.raises(InputError, match="layer: module 'spare' did not run"):
        LayerTransformerLRP(model, model.spare).attribute(images, 0)


# ---------------------------------------------------------------------- block by block
def test_relevance_by_layer():
    model = randomise(TinyText(depth=3).double())
    method = TransformerLRP(model, "libra")
    found = method.relevance_by_layer(IDS, (4, 3))
    assert [b.name for b in found] == ["blocks.0", "blocks.1", "blocks.2"]
    outputs = LayerTransformerLRP(model, list(model.blocks), rules="libra").attribute(IDS, (4, 3))
    attention = LayerTransformerLRP(model, [b.proj for b in model.blocks], rules="libra").attribute(IDS, (4, 3))
    heads = LayerTransformerLRP(model, [b.proj for b in model.blocks], rules="libra").attribute(
        IDS, (4, 3), attribute_to_layer_input=True
    )
    mlp = LayerTransformerLRP(model, [b.mlp for b in model.blocks], rules="libra").attribute(IDS, (4, 3))
    for i, block in enumerate(found):
        assert torch.allclose(block.stream, outputs[i].sum(-1), rtol=1e-9, atol=1e-12)
        assert torch.allclose(block.attention, attention[i].sum(-1), rtol=1e-9, atol=1e-12)
        assert torch.allclose(block.mlp, mlp[i].sum(-1), rtol=1e-9, atol=1e-12)
        per_head = heads[i].reshape(2, 6, 2, 8).sum(-1).transpose(1, 2)
        assert torch.allclose(block.heads[f"blocks.{i}"], per_head, rtol=1e-9, atol=1e-12)
    scores = found.head_scores()
    assert torch.allclose(scores["blocks.1"], found.by_name("blocks.1").heads["blocks.1"].sum(-1))
    with pytest.raises(KeyError, match="no block 'x'; blocks: blocks.0, blocks.1, blocks.2"):
        found.by_name("x")


def test_relevance_by_layer_conserves():
    """Under deep_taylor every stream holds the whole relevance, shared blocks count per call."""
    config = transformers.AlbertConfig(
        vocab_size=20,
        hidden_size=16,
        embedding_size=8,
        num_attention_heads=2,
        intermediate_size=32,
        num_hidden_layers=3,
    )
    model = randomise(transformers.AlbertForSequenceClassification(config).double(), scale=0.1)
    found = TransformerLRP(model).relevance_by_layer(IDS, 1)
    path = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    assert [b.name for b in found] == [path, f"{path}#2", f"{path}#3"]
    for block in found:
        assert torch.allclose(block.stream.sum(1), torch.ones(2, dtype=torch.float64), atol=1e-7)
        assert len(block.heads) == 1
    assert len(found.head_scores()) == 3
    assert not torch.allclose(found[0].stream, found[2].stream)


def test_relevance_by_layer_of_parallel_branches():
    """Attention and MLP side by side (GPT-J)."""
    config = transformers.GPTJConfig(
        vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16, rotary_dim=4, bos_token_id=0, eos_token_id=0
    )
    model = randomise(transformers.GPTJForCausalLM(config).double(), scale=0.2)
    found = TransformerLRP(model, "libra").relevance_by_layer(IDS, (5, 3))
    blocks = list(model.transformer.h)
    for kind, modules in (("attention", [b.attn.out_proj for b in blocks]), ("mlp", [b.mlp for b in blocks])):
        want = LayerTransformerLRP(model, modules, rules="libra").attribute(IDS, (5, 3))
        for block, relevance in zip(found, want, strict=True):
            assert torch.allclose(getattr(block, kind), relevance.sum(-1), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------- consumers
def test_noise_tunnel():
    model = randomise(TinyViT())
    images = torch.randn(2, 3, 8, 8)
    layer = LayerTransformerLRP(model, model.blocks[1], rules="attnlrp")
    tunnel = NoiseTunnel(layer).attribute(images, target=[0, 2], nt_samples=2, stdevs=0.0)
    assert torch.allclose(tunnel, layer.attribute(images, [0, 2]), atol=1e-5)
    neuron = NeuronTransformerLRP(model, model.blocks[1], rules="attnlrp")
    tunnel = NoiseTunnel(neuron).attribute(images, neuron_selector=(0, 2), nt_samples=2, stdevs=0.0)
    assert torch.allclose(tunnel, neuron.attribute(images, (0, 2)), atol=1e-5)


def test_llm_gradient_attribution():
    """Captum's wrapper for generated text replaces the forward function and feeds ids it makes itself."""
    folder = DATA / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there (set CTA_DATA)")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layer = LayerTransformerLRP(model, model.model.embed_tokens, rules="libra")
    prompt = "Once upon a time, there was a"
    result = LLMGradientAttribution(layer, tokenizer).attribute(
        TextTokenInput(prompt, tokenizer), target=" little girl"
    )
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    answer = tokenizer(" little girl", return_tensors="pt", add_special_tokens=False).input_ids[0]
    assert result.token_attr.shape == (len(answer), ids.shape[1])

    class LogProbability(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits[:, -1].log_softmax(-1)

    for step in range(len(answer)):
        prefix = torch.cat([ids, answer[None, :step]], 1)
        want = TransformerLRP(LogProbability(), "libra").attribute(prefix, int(answer[step]))
        assert torch.allclose(result.token_attr[step], want[0, : ids.shape[1]], atol=1e-6)

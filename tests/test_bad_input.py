"""Bad input: one clear error, and the model as it was."""

import pytest
import torch
import transformers
from tiny_models import TinyText, TinyViT, randomise
from torch import nn

from captum_transformer_attr import (
    AttentionRelevance,
    Composite,
    Contrast,
    InputError,
    LayerTransformerLRP,
    NeuronTransformerLRP,
    RawAttention,
    TargetError,
    TransformerLRP,
    TransformerRelevance,
    UnsupportedModelError,
    UnsupportedOperationError,
    coverage,
    register_rule,
    unregister_rule,
)

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def snapshot(model):
    if not isinstance(model, nn.Module):
        return None
    return [
        (
            m.training,
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            [(p.requires_grad, p.grad is None) for p in m.parameters(recurse=False)],
        )
        for m in model.modules()
    ]


def refused(model, error, message, inputs=IMAGES, target=0, **more):
    before = snapshot(model)
    with pytest.raises(error, match=message) as caught:
        TransformerRelevance(model).attribute(inputs, target=target, **more)
    assert "\n" not in str(caught.value)
    assert snapshot(model) == before


def test_model_without_attention():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    refused(model, UnsupportedModelError, "no softmax attention")
    for method in (TransformerRelevance, AttentionRelevance, RawAttention):
        with pytest.raises(UnsupportedModelError, match="no softmax attention"):
            method(model).attention_records(IMAGES, target=0)


class Swirl(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.flip(-1) * 2

    @staticmethod
    def backward(ctx, g):
        return g.flip(-1) * 2


class Swirling(nn.Module):
    def forward(self, x):
        return Swirl.apply(x)


def test_operation_without_a_rule():
    model = randomise(TinyViT())
    model.blocks[1].mlp[1] = Swirling()
    refused(model, UnsupportedOperationError, r"'Swirl' in module 'blocks\.1\.mlp\.1'.*register_rule")


def test_a_registered_rule_supplies_what_is_missing():
    """The hidden operation is y = 2 · flip(x): its relevance is the output's, flipped back."""
    model = randomise(TinyViT()).double()
    model.blocks[1].mlp[1] = Swirling()
    images = IMAGES.double()
    register_rule(Swirling, relevance=lambda inputs, output, relevance: relevance.flip(-1))
    try:
        _, by_hand = TransformerRelevance(model).attribute(images, target=0, return_convergence_delta=True)
        heat = TransformerRelevance(model).attribute(images, target=0)
        register_rule(Swirling, relevance="gradient_x_input")
        same = TransformerRelevance(model).attribute(images, target=0)
    finally:
        unregister_rule(Swirling)
    assert by_hand.abs().max() < 1e-6
    assert (heat - same).abs().max() < 1e-6 * heat.abs().max()
    refused(model, UnsupportedOperationError, "register_rule", images)


@pytest.mark.parametrize("target", [4, [0], [0, 9], (0, 1), None])
def test_wrong_target(target):
    refused(randomise(TinyViT()), TargetError, "target=", target=target)


def test_ids_out_of_vocabulary():
    refused(
        randomise(TinyText()),
        InputError,
        "token id 20 is not in the vocabulary of module 'embed'",
        torch.tensor([[1, 20, 3]]),
        (0, 1),
    )


def test_nan():
    refused(randomise(TinyViT()), InputError, "NaN", IMAGES.clone().fill_(float("nan")))


def test_empty_batch():
    refused(randomise(TinyViT()), InputError, "no example", IMAGES[:0])


def test_all_tokens_masked():
    config = transformers.BertConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=1, vocab_size=30
    )
    model = transformers.BertForSequenceClassification(config)
    inputs = {"input_ids": torch.randint(0, 30, (2, 4)), "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}
    refused(model, InputError, "'attention_mask' masks every token of example 1", inputs)


@pytest.mark.parametrize(
    "inputs, message",
    [
        (IMAGES.numpy(), "got ndarray; use torch.as_tensor"),
        (IMAGES.double(), r"is torch.float64, the model's parameters are torch.float32; convert it with \.to\("),
        (IMAGES.half(), "is torch.float16, the model's parameters are torch.float32"),
        (IMAGES.long(), "is torch.int64: token ids must be torch.int64, everything else torch.float32"),
        (IMAGES > 0, "is torch.bool"),
        (IMAGES.to("meta"), "is on the meta device"),
        (IMAGES.to_sparse(), "is sparse or nested; give a dense"),
        ({0: IMAGES}, "the keys of a mapping are names of arguments, got 0"),
        ({"x": IMAGES.tolist()}, "'x' is a list, not a Tensor"),
        ({"x": IMAGES.numpy()}, "'x' is a ndarray, not a Tensor"),
        ({"x": IMAGES[0, 0, 0]}, r"'x' has shape \(8,\), without an axis for the examples"),
    ],
)
def test_wrong_tensors(inputs, message):
    refused(randomise(TinyViT()), InputError, message, inputs)


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.zeros(2, 0, dtype=torch.long), r"holds no tokens \(shape \(2, 0\)\)"),
        (torch.rand(2, 4), "is torch.float32: token ids must be torch.int64"),
    ],
)
def test_wrong_token_ids(ids, message):
    refused(randomise(TinyText()), InputError, message, ids, (0, 1))


def test_wrong_number_of_channels():
    refused(randomise(TinyViT()), RuntimeError, "to have 3 channels, but got 1", IMAGES[:, :1])


def test_outputs_that_cannot_be_explained():
    model = randomise(TinyViT())
    refused(lambda x: model(x).argmax(-1), InputError, "returned torch.int64 of shape .*no gradient", target=None)
    with pytest.raises(InputError, match="output: the function chose int, not a Tensor"):
        TransformerRelevance(model, output=lambda y: 3).attribute(IMAGES, target=0)


@pytest.mark.parametrize("targets, message", [(3, "expected a list of targets, got int"), ([], "targets is empty")])
def test_wrong_lists_of_targets(targets, message):
    with pytest.raises(InputError, match=message):
        TransformerRelevance(randomise(TinyViT())).attribute_tokens_each(IMAGES, targets)


def test_wrong_targets_of_any_size():
    refused(randomise(TinyViT()), TargetError, "cannot select from an output", target=10**30)
    with pytest.raises(TargetError, match="not another Contrast"):
        Contrast(Contrast(0, 1), 2)


def test_coverage_of_nothing():
    with pytest.raises(InputError, match="model: expected a torch.nn.Module or a function around one, got NoneType"):
        coverage(None, IMAGES)


def test_a_parameter_as_a_further_argument():
    """A soft prompt that is trained: a constant here, by position as by name."""
    model = randomise(TinyViT())
    prompt = nn.Parameter(torch.full((1, 3, 8, 8), 0.1))

    def forward(x, shift):
        return model(x + shift)

    got = TransformerRelevance(forward).attribute(IMAGES, target=0, additional_forward_args=(prompt,))
    want = TransformerRelevance(forward).attribute(IMAGES, target=0, additional_forward_args=(prompt.detach(),))
    assert torch.equal(got, want) and prompt.grad is None and prompt.requires_grad


def test_short_token_ids():
    refused(randomise(TinyText()), InputError, "token ids must be torch.int64", torch.ones(1, 3).short(), (0, 1))


def test_models_without_values():
    refused(TinyViT().to("meta"), UnsupportedModelError, "parameter 'cls' is on the meta device")


@pytest.mark.parametrize(
    "model, got", [(None, "NoneType"), ("vit", "str"), ([TinyViT()], "list"), (TinyViT, "class TinyViT")]
)
def test_what_is_no_model(model, got):
    for method in (TransformerRelevance, lambda m: LayerTransformerLRP(m, nn.Linear(1, 1))):
        with pytest.raises(InputError, match=f"model: expected a torch.nn.Module .* got (the )?{got}"):
            method(model)


@pytest.mark.parametrize(
    "method, options, message",
    [
        (TransformerRelevance, {"start_layer": "a"}, "start_layer='a': expected a whole number"),
        (TransformerRelevance, {"start_layer": None}, "start_layer=None"),
        (AttentionRelevance, {"start_layer": [1]}, r"start_layer=\[1\]"),
        (AttentionRelevance, {"start_layer": {"x": 0.5}}, r"start_layer\['x'\]=0.5"),
        (RawAttention, {"layer": "x"}, "layer='x'"),
        (TransformerLRP, {"composite": 3}, "composite: expected a name or a Composite, got int"),
        (TransformerLRP, {"composite": Composite(linear="epsilon")}, "composite: expected rules .* got 'epsilon'"),
    ],
)
def test_wrong_options(method, options, message):
    with pytest.raises(InputError, match=message):
        method(randomise(TinyViT()), **options)


@pytest.mark.parametrize(
    "layer, message", [("norm", r"model\.get_submodule\('norm'\)"), (None, "got None"), ([], r"got \[\]")]
)
def test_what_is_no_layer(layer, message):
    model = randomise(TinyViT())
    before = snapshot(model)
    with pytest.raises(InputError, match=f"layer: expected.*{message}"):
        LayerTransformerLRP(model, layer).attribute(IMAGES, 0)
    assert snapshot(model) == before


@pytest.mark.parametrize("selector", [(0, 99), (99,), "a", None, 1.5])
def test_neurons_that_do_not_exist(selector):
    model = randomise(TinyViT())
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"neuron_selector=.* does not fit the layer's \(2, 5, 16\)"):
        NeuronTransformerLRP(model, model.blocks[0]).attribute(IMAGES, selector)
    assert snapshot(model) == before


def test_unequal_batches():
    refused(randomise(TinyViT()), InputError, "has 1 examples", (IMAGES, torch.ones(1, 1)))


@pytest.mark.parametrize("inputs", [None, "cat.png", (), {}, 3, (IMAGES, None)])
def test_wrong_kind_of_input(inputs):
    refused(randomise(TinyViT()), InputError, "inputs", inputs)


def test_unknown_interpolation():
    refused(randomise(TinyViT()), InputError, "interpolate='cubic'", interpolate="cubic")


def test_start_layer_beyond_the_model():
    with pytest.raises(InputError, match="start_layer=2: the model has 2 attention calls"):
        TransformerRelevance(randomise(TinyViT()), start_layer=2).attribute(IMAGES, target=0)


def test_compiled():
    refused(torch.compile(randomise(TinyViT())), UnsupportedModelError, "compiled.*_orig_mod")
    model = randomise(TinyViT())
    model.blocks[0] = torch.compile(model.blocks[0])
    refused(model, UnsupportedModelError, r"'blocks\.0' is compiled")


def test_scripted():
    model = randomise(TinyViT())
    model.blocks[0].mlp = torch.jit.trace(model.blocks[0].mlp, torch.randn(1, 5, 16))
    refused(model, UnsupportedModelError, r"'blocks\.0\.mlp' is scripted")


class Dropping(TinyViT):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return super().forward(self.drop(x))


def test_train_mode_is_explained_in_evaluation_and_restored():
    model = randomise(Dropping())
    want = TransformerRelevance(model).attribute(IMAGES, target=1)
    model.train()
    model.blocks[0].eval()
    before = snapshot(model)
    assert torch.equal(TransformerRelevance(model).attribute(IMAGES, target=1), want)
    assert snapshot(model) == before


class Random(TinyViT):
    def forward(self, x):
        return super().forward(x + torch.rand_like(x))


class RandomInside(TinyViT):
    """Draws from a generator of its own, so that resetting torch's seed does not help."""

    generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return super().forward(x) + torch.rand(1, generator=self.generator)


@pytest.mark.parametrize("model", [Random, RandomInside])
def test_random_forward(model):
    model = randomise(model())
    state = torch.random.get_rng_state()
    refused(model, UnsupportedModelError, "random")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_callers_grad_mode(context):
    model = randomise(TinyViT())
    want = TransformerRelevance(model).attribute(IMAGES, target=1)
    with context():
        assert torch.equal(TransformerRelevance(model).attribute(IMAGES.clone(), target=1), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_followed_in_single(dtype):
    """The same function (weights rounded to half precision) explained in float32 gives the same scores."""
    model, images = randomise(TinyViT()).to(dtype), IMAGES.to(dtype)
    got = TransformerRelevance(model).attribute(images, target=1)
    assert got.dtype == dtype and next(model.parameters()).dtype == dtype
    want = TransformerRelevance(model.float()).attribute(images.float(), target=1)
    assert ((got.float() - want).abs().max() / want.abs().max()) < torch.finfo(dtype).eps

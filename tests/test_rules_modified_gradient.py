"""cp, attnlrp and libra: every rule against its formula, and whole models against forwards rewritten with detached
factors.

A rewritten forward has the same value and, by plain autograd, the modified gradient: σ.detach() for a frozen deviation,
(f(x)/x).detach() · x for a slope, ½ (a.detach() b + a b.detach()) for a halved product. Nothing of the engine is used
to get there.
"""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TinyViT, randomise
from torch import nn

from captum_transformer_attr import TransformerLRP

RULES = ["cp", "attnlrp", "libra"]
GENERATOR = torch.Generator().manual_seed(5)


def draw(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


class Module(nn.Module):
    """A function as a model, summed with fixed weights to one number per example."""

    def __init__(self, function, weights):
        super().__init__()
        self.function, self.weights = function, weights

    def forward(self, *x):
        y = self.function(*x)
        return (y * self.weights).flatten(1).sum(1)


# ---------------------------------------------------------------------- the rules, written as forwards
def norm(x, weight, bias, centre=True, eps=1e-5):
    x = x - x.mean(-1, keepdim=True) if centre else x
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt().detach() * weight
    return y if bias is None else y + bias


def product(a, b, rules):
    return (a.detach() * b + a * b.detach()) / 2


def matmul(a, b, rules):
    return (a.detach() @ b + a @ b.detach()) / 2


def activation(f, x, rules):
    if rules == "cp":
        return f(x)
    zero = f(torch.zeros_like(x))
    return ((f(x) - zero) / x).detach() * x + zero


def gate(signal, control, rules):
    return signal * control.detach() if rules == "cp" else product(signal, control, rules)


def attend(q, k, v, scale, rules, mask=0.0):
    if rules == "attnlrp":
        return matmul((matmul(q, k.mT, rules) * scale + mask).softmax(-1), v, rules)
    return (q @ k.mT * scale + mask).softmax(-1).detach() @ v


def check(model, rewritten, inputs, rules, tolerance=1e-10, **arguments):
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    out = rewritten(*leaves)
    plain = model(*inputs) if arguments.get("target") is None else model(*inputs)[:, arguments["target"]]
    assert torch.allclose(out, plain, rtol=1e-9, atol=1e-12), "the rewritten forward is another function"
    want = [x * g for x, g in zip(inputs, torch.autograd.grad(out.sum(), leaves), strict=True)]
    got = TransformerLRP(model, rules).attribute(inputs, **arguments)
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 1e-3
        assert (a - b).abs().max() / b.abs().max() < tolerance


# ---------------------------------------------------------------------- one operation at a time
@pytest.mark.parametrize("rules", RULES)
def test_layer_norm_loop(rules):
    """R_i = x_i Σ_j w_j γ_j (δ_ij − 1/D) / σ, one number at a time."""
    x, weight, bias, w = draw(1, 5), draw(5), draw(5), draw(1, 5)
    model = Module(lambda t: F.layer_norm(t, (5,), weight, bias), w)
    sigma = (x.var(correction=0) + 1e-5).sqrt()
    want = [sum(float(x[0, i] * w[0, j] * weight[j] * ((i == j) - 1 / 5) / sigma) for j in range(5)) for i in range(5)]
    got, delta = TransformerLRP(model, rules).attribute(x, return_convergence_delta=True)
    assert torch.allclose(got[0], torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    assert delta.abs().max() < 1e-12


def by_hand_rms(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def by_hand_layer_norm(x, weight):
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(
    "function, rewritten",
    [
        (lambda x, g: F.rms_norm(x, (6,), g, 1e-6), lambda x, g: norm(x, g, None, False, 1e-6)),
        (by_hand_rms, lambda x, g: norm(x, g, None, False, 1e-6)),
        (by_hand_layer_norm, lambda x, g: norm(x, g, None)),
        (lambda x, g: F.normalize(x, dim=-1) * g, lambda x, g: x / x.norm(dim=-1, keepdim=True).detach() * g),
    ],
    ids=["rms_norm", "rms_by_hand", "layer_norm_by_hand", "l2"],
)
def test_norms(rules, function, rewritten):
    weight, w = draw(6), draw(1, 3, 6)
    check(Module(lambda x: function(x, weight), w), Module(lambda x: rewritten(x, weight), w), draw(2, 3, 6), rules)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(
    "name", ["gelu", "gelu_tanh", "silu", "relu", "tanh", "sigmoid", "softplus", "elu", "hardswish"]
)
def test_activations(rules, name):
    function = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}.get(name) or getattr(F, name)
    w = draw(1, 7)
    check(Module(function, w), Module(lambda x: activation(function, x, rules), w), draw(3, 7) * 2, rules)


@pytest.mark.parametrize("rules", RULES)
def test_activations_at_and_near_zero(rules):
    """The slope at 0 is the derivative; next to 0 it does not explode into rounding (σ(x) − σ(0) over x)."""
    x = torch.tensor([[0.0, 1e-12, -1e-12, 1e-7, 1e-3]], dtype=torch.float64)
    for function, slope in ((torch.sigmoid, 0.25), (F.gelu, 0.5), (torch.tanh, 1.0), (F.silu, 0.5)):
        model = nn.Sequential(nn.Identity(), Module(function, torch.ones(1, 5)))
        got = TransformerLRP(model, rules).attribute(x)
        assert torch.allclose(got[0, 1:4] / x[0, 1:4], torch.full((3,), slope, dtype=torch.float64), rtol=1e-5)
        assert got[0, 0] == 0


def gelu_by_hand(x):
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(
    "function", [gelu_by_hand, lambda x: x * torch.sigmoid(1.702 * x)], ids=["gelu_tanh", "quick_gelu"]
)
def test_activations_by_hand(rules, function):
    w = draw(1, 7)
    check(Module(function, w), Module(lambda x: activation(function, x, rules), w), draw(3, 7), rules)


@pytest.mark.parametrize("rules", RULES)
def test_gated_linear_unit(rules):
    a, b, w = draw(5, 6), draw(5, 6), draw(1, 6)
    model = Module(lambda x: F.silu(x @ a) * (x @ b), w)
    check(model, Module(lambda x: gate(x @ b, activation(F.silu, x @ a, rules), rules), w), draw(3, 5), rules)


@pytest.mark.parametrize("rules", RULES)
def test_product_of_two_inputs(rules):
    w = draw(1, 6)
    check(Module(lambda a, b: a * b, w), Module(lambda a, b: product(a, b, rules), w), (draw(2, 6), draw(2, 6)), rules)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("fused", [True, False])
def test_attention(rules, fused):
    w = draw(1, 2, 4, 3)
    mask = torch.full((4, 4), -torch.inf, dtype=torch.float64).triu(1)

    def forward(q, k, v):
        if fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return (q @ k.transpose(-1, -2) / 3**0.5 + mask).softmax(-1) @ v

    inputs = tuple(draw(2, 2, 4, 3) for _ in range(3))
    weights = Module(lambda q, k, v: attend(q, k, v, 3**-0.5, rules, mask), w)
    if rules == "attnlrp":
        check(Module(forward, w), weights, inputs, rules)
        return
    # Frozen weights: everything is the values', nothing the queries' and keys'.
    got = TransformerLRP(Module(forward, w), rules).attribute(inputs)
    a = (inputs[0] @ inputs[1].mT / 3**0.5 + mask).softmax(-1)
    assert torch.allclose(got[2], inputs[2] * (a.mT @ w), rtol=1e-10, atol=1e-12)
    assert (got[0] == 0).all() and (got[1] == 0).all()


def test_attnlrp_softmax_loop():
    """Achtibat et al., proposition 3.1: R_i = x_i (R_i^out − s_i Σ_j R_j^out), one number at a time."""
    x, w = draw(1, 5), draw(1, 5)
    s = x.softmax(-1)
    r_out = [float(s[0, j] * w[0, j]) for j in range(5)]
    want = [float(x[0, i]) * (r_out[i] - float(s[0, i]) * sum(r_out)) for i in range(5)]
    got = TransformerLRP(Module(lambda t: t.softmax(-1), w), "attnlrp").attribute(x)
    assert torch.allclose(got[0], torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------- whole models
def rewritten_vit(model, images, rules, target):
    x = model.patches(images).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls.expand(len(x), -1, -1), x], 1) + model.position
    for block in model.blocks:
        b, n, c = x.shape
        normed = norm(x, block.norm1.weight, block.norm1.bias)
        q, k, v = block.qkv(normed).reshape(b, n, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
        y = attend(q, k, v, q.shape[-1] ** -0.5, rules).transpose(1, 2).reshape(b, n, c)
        x = x + block.proj(y)
        first, _, second = block.mlp
        x = x + second(activation(F.gelu, first(norm(x, block.norm2.weight, block.norm2.bias)), rules))
    return model.head(norm(x, model.norm.weight, model.norm.bias)[:, 0])[:, target]


@pytest.mark.parametrize("rules", RULES)
def test_vision_transformer(rules):
    model = randomise(TinyViT().double())
    check(model, lambda x: rewritten_vit(model, x, rules, 2), draw(2, 3, 8, 8), rules, target=2)


class TinyLlama(nn.Module):
    """RMSNorm by hand, rotary embedding, grouped keys, gated MLP; on feature vectors."""

    def __init__(self, width=16, heads=4, groups=2, depth=2):
        super().__init__()
        self.heads, self.groups, self.depth, self.width = heads, groups, depth, width
        size = width // heads
        for i in range(depth):
            shapes = {
                "q": (width, width),
                "k": (width, groups * size),
                "v": (width, groups * size),
                "o": (width, width),
                "gate": (width, 24),
                "up": (width, 24),
                "down": (24, width),
                "norm1": (width,),
                "norm2": (width,),
            }
            for name, shape in shapes.items():
                self.register_parameter(f"{name}{i}", nn.Parameter(torch.zeros(shape)))
        self.head = nn.Parameter(torch.zeros(width, 5))

    def rotate(self, x):
        n, half = x.shape[-2], x.shape[-1] // 2
        angle = torch.arange(n)[:, None] / 10.0 ** torch.arange(half)
        cos, sin = (torch.cat([f(angle)] * 2, -1).to(x.dtype) for f in (torch.cos, torch.sin))
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def forward(self, x, rules=None):
        b, n, c = x.shape
        p = dict(self.named_parameters())
        causal = torch.full((n, n), -torch.inf, dtype=x.dtype).triu(1)
        for i in range(self.depth):
            normed = norm(x, p[f"norm1{i}"], None, False, 1e-6) if rules else by_hand_rms(x, p[f"norm1{i}"])
            q, k, v = (normed @ p[f"{name}{i}"] for name in "qkv")
            q, k, v = (t.reshape(b, n, -1, c // self.heads).transpose(1, 2) for t in (q, k, v))
            q, k = self.rotate(q), self.rotate(k)
            k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
            scale = q.shape[-1] ** -0.5
            y = (
                attend(q, k, v, scale, rules, causal)
                if rules
                else F.scaled_dot_product_attention(q, k, v, is_causal=True)
            )
            x = x + y.transpose(1, 2).reshape(b, n, c) @ p[f"o{i}"]
            normed = norm(x, p[f"norm2{i}"], None, False, 1e-6) if rules else by_hand_rms(x, p[f"norm2{i}"])
            a, u = normed @ p[f"gate{i}"], normed @ p[f"up{i}"]
            x = x + (gate(u, activation(F.silu, a, rules), rules) if rules else F.silu(a) * u) @ p[f"down{i}"]
        return x[:, -1] @ p["head"]


@pytest.mark.parametrize("rules", RULES)
def test_llama(rules):
    model = randomise(TinyLlama().double())
    check(model, lambda x: model(x, rules)[:, 3], draw(2, 5, 16), rules, target=3)


@pytest.mark.parametrize("rules", ["cp", "libra"])
def test_completeness_of_whole_models(rules):
    """Logit = relevance of the input + what biases, shifts, class token and positions took."""
    for model, x in (
        (randomise(TinyViT().double()), draw(2, 3, 8, 8)),
        (randomise(TinyLlama().double()), draw(2, 5, 16)),
    ):
        method = TransformerLRP(model, rules)
        relevance, delta = method.attribute(x, target=1, return_convergence_delta=True)
        assert delta.abs().max() < 1e-10
        taken = sum(method.parameter_relevance(x, target=1).values())
        assert torch.allclose(relevance.flatten(1).sum(1) + taken, model(x)[:, 1].detach(), atol=1e-10)


@pytest.mark.parametrize("rules", ["cp", "libra"])
def test_completeness_of_bert(rules):
    """Post-norm blocks with padding: relevance of tokens + what biases, positions and token types took = logit."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=16, num_labels=3, **sizes)
    model = randomise(transformers.BertForSequenceClassification(config).double().eval())
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    ids = torch.randint(1, 30, (2, 8), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": mask}
    method = TransformerLRP(model, rules)
    relevance, delta = method.attribute(inputs, target=1, return_convergence_delta=True)
    taken = method.parameter_relevance(inputs, target=1)
    logit = model(**inputs).logits[:, 1].detach()
    assert delta.abs().max() < 1e-10 and (relevance["input_ids"][1, 5:] == 0).all()
    assert torch.allclose(relevance["input_ids"].sum(1) + sum(taken.values()), logit, atol=1e-10)
    assert taken["bert.embeddings"].abs().min() > 1e-6  # positions and token types
    assert taken["classifier"].abs().min() > 1e-6


@pytest.mark.parametrize("rules", RULES)
def test_probability_instead_of_logit(rules):
    """The probability's gradient takes the place of the one-hot: a mixture of the logits' relevances."""
    model = randomise(TinyViT().double())
    images = draw(2, 3, 8, 8)
    p = model(images).softmax(-1).detach()
    logits = torch.stack([TransformerLRP(model, rules).attribute(images, target=c) for c in range(4)])
    weights = p[:, 2, None] * (F.one_hot(torch.tensor(2), 4) - p)
    want = torch.einsum("nc,cnkhw->nkhw", weights, logits)
    got, delta = TransformerLRP(model, rules, explained="probability").attribute(
        images, target=2, return_convergence_delta=True
    )
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    if rules != "attnlrp":
        assert delta.abs().max() < 1e-12


@pytest.mark.parametrize("rules", RULES)
def test_batch_equals_its_examples(rules):
    model = randomise(TinyViT().double())
    images, targets = draw(3, 3, 8, 8), [0, 3, 1]
    together, delta = TransformerLRP(model, rules).attribute(images, targets, return_convergence_delta=True)
    for i in range(3):
        alone, own = TransformerLRP(model, rules).attribute(
            images[i : i + 1], targets[i], return_convergence_delta=True
        )
        assert torch.allclose(together[i : i + 1], alone, atol=1e-12) and torch.allclose(
            delta[i : i + 1], own, atol=1e-12
        )

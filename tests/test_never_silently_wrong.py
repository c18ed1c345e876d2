"""Models with a path that could be missed: each is explained exactly like its plain twin, or refused by name."""

import copy
import dataclasses
import math
import threading

import numpy as np
import pytest
import torch
from tiny_models import TinyText, TinyViT, randomise
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from captum_transformer_attr import (
    AttentionRelevance,
    TransformerLRP,
    TransformerRelevance,
    UnsupportedModelError,
    UnsupportedOperationError,
    coverage,
    register_rule,
    unregister_rule,
)
from captum_transformer_attr.ops.elementwise import ALIASES, BOUNDED, UNBOUNDED
from captum_transformer_attr.recording.inputs import parse
from captum_transformer_attr.recording.session import recorded
from captum_transformer_attr.recording.signal import gradient_signal

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
    "cast to integers": (lambda x: x + x.long().double(), "'change' takes a value out"),
    "arithmetic with integers": (lambda x: x + x.mean(-1).long()[..., None], "'change' takes a value out"),
    "median": (lambda x: x - x.median(1, keepdim=True)[0], "median"),
    "running maximum": (lambda x: x.cummax(1)[0], "cummax"),
    "largest of a segment": (
        lambda x: x + torch.zeros_like(x).scatter_reduce(1, torch.zeros(x.shape, dtype=torch.long), x, "amax"),
        "scatter_reduce",
    ),
    "distances": (lambda x: x + torch.cdist(x, x).sum(-1, keepdim=True), "cdist"),
    "a power of the input": (lambda x: (x.abs() + 1) ** torch.sigmoid(x), "pow"),
    "deformable sampling": (
        lambda x: x + nn.functional.grid_sample(x[:, None], x[:, :, None, :2], align_corners=False)[:, 0],
        "grid_sample",
    ),
    "statistics of the batch": (
        lambda x: nn.functional.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2),
        "batch_norm",
    ),
    "reciprocal Fourier transform": (lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=x.shape[1], dim=1), "fft"),
    "hard Gumbel softmax": (lambda x: x * nn.functional.gumbel_softmax(x, hard=True), "'change' takes a value out"),
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


def written_after_linear(x):
    y = nn.functional.linear(x, MATRIX, MATRIX[0])
    y += x
    y[:, 0] = x[:, 0]
    return nn.functional.relu_(nn.functional.linear(y, MATRIX, MATRIX[1]))


def built_after_linear(x):
    y = nn.functional.linear(x, MATRIX, MATRIX[0]) + x
    y = torch.cat([x[:, :1], y[:, 1:]], 1)
    return nn.functional.relu(nn.functional.linear(y, MATRIX, MATRIX[1]))


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


def slices_written(x):
    y = torch.zeros_like(x)
    y[:, 0] = x[:, 0] * 2
    y[:, 1:] = x[:, 1:].tanh()
    return y


def channels_written(x):
    x = x.clone()
    x[..., :4] = torch.tanh(x[..., 4:8])
    return x


def turned(x):
    """A rotation of pairs of channels by complex numbers."""
    angles = torch.polar(torch.ones(8, dtype=x.dtype), torch.arange(8, dtype=x.dtype))
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], 8, 2)) * angles).flatten(-2)


def pruned(x):
    """The two longest tokens stay."""
    longest = x[:, 1:].norm(dim=-1).topk(2, dim=1)[1]
    return torch.cat([x[:, :1], x[:, 1:].gather(1, longest[..., None].expand(-1, -1, x.shape[-1]))], 1)


def pruned_by_index(x):
    longest = x[:, 1:].norm(dim=-1).argsort(1, descending=True)[:, :2] + 1
    rows = [torch.cat([t[:1], t[i]]) for t, i in zip(x, longest, strict=True)]
    return torch.stack(rows)


def masked_attention(x, mask):
    return (x @ x.mT / 4).masked_fill(mask, -1e9).softmax(-1) @ torch.tanh(x)[:, torch.arange(x.shape[1])]


def second_differences(x):
    x = x[:, 1:] - x[:, :-1]
    return x[:, 1:] - x[:, :-1]


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


MASK = torch.ones(5, 5, dtype=torch.bool).triu(2)
MATRIX = torch.randn(16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
CUBE = MATRIX[:, :, None] * MATRIX[:, None]

EXACT = {
    "slices written": (slices_written, lambda x: torch.cat([x[:, :1] * 2, x[:, 1:].tanh()], 1)),
    "channels written": (channels_written, lambda x: torch.cat([torch.tanh(x[..., 4:8]), x[..., 4:]], -1)),
    "tokens chosen by their size": (pruned, pruned_by_index),
    "where on data": (lambda x: torch.where(x > 0, x, 0.1 * x), lambda x: nn.functional.leaky_relu(x, 0.1)),
    "written into what a linear layer gave": (written_after_linear, built_after_linear),
    "interpolation": (lambda x: torch.lerp(x, torch.tanh(x), 0.3), lambda x: 0.7 * x + 0.3 * torch.tanh(x)),
    "tensordot": (lambda x: torch.tensordot(x, MATRIX, dims=([2], [1])), lambda x: x @ MATRIX.T),
    "tensordot over the last axis": (lambda x: torch.tensordot(x, MATRIX, dims=1), lambda x: x @ MATRIX),
    "inner products": (lambda x: torch.inner(x, MATRIX), lambda x: x @ MATRIX.T),
    "matrix times vector": (
        lambda x: x + torch.stack([torch.addmv(MATRIX[1, :5], t, MATRIX[0], beta=2, alpha=3) for t in x])[..., None],
        lambda x: x + (3 * (x @ MATRIX[0]) + 2 * MATRIX[1, :5])[..., None],
    ),
    "product of three": (
        lambda x: torch.linalg.multi_dot([x.flatten(0, 1), MATRIX, MATRIX]).view_as(x),
        lambda x: x @ MATRIX @ MATRIX,
    ),
    "bilinear layer": (
        lambda x: nn.functional.bilinear(x, torch.tanh(x), CUBE),
        lambda x: torch.einsum("bni,oij,bnj->bno", x, CUBE, torch.tanh(x)),
    ),
    "differences": (
        lambda x: x.diff(dim=1, n=2, prepend=x[:, :2]),
        lambda x: second_differences(torch.cat([x[:, :2], x], 1)),
    ),
    "power of a constant": (lambda x: 2.0**x + torch.pow(3, x), lambda x: torch.exp2(x) + torch.exp(x * math.log(3))),
    "cosine": (
        lambda x: x + nn.functional.cosine_similarity(x, x[:, :1], dim=-1)[..., None],
        lambda x: x + (unit(x) * unit(x[:, :1])).sum(-1, keepdim=True),
    ),
    "layer norm with its statistics": (
        lambda x: torch.native_layer_norm(x, (16,), MATRIX[0], MATRIX[1], 1e-5)[0],
        lambda x: nn.functional.layer_norm(x, (16,), MATRIX[0], MATRIX[1], 1e-5),
    ),
    "running sum over channels": (
        lambda x: x.cumsum(-1),
        lambda x: torch.stack([x[..., : i + 1].sum(-1) for i in range(x.shape[-1])], -1),
    ),
    "a branch on values": (lambda x: x * 2 if bool((x.abs() > 1e9).any()) else x * 3, lambda x: x * 3),
    "einsum with an ellipsis": (lambda x: torch.einsum("...c,dc->...d", x, MATRIX), lambda x: x @ MATRIX.T),
    "einsum of three": (
        lambda x: torch.einsum("bnc,dc,ed->bne", x, MATRIX, MATRIX),
        lambda x: x @ MATRIX.T @ MATRIX.T,
    ),
    "special functions": (lambda x: x * torch.special.expit(x), lambda x: x * torch.sigmoid(x)),
    "attention by special.softmax": (
        lambda x: x + torch.special.softmax(x @ x.mT, -1) @ x,
        lambda x: x + torch.einsum("bnm,bmc->bnc", torch.einsum("bnc,bmc->bnm", x, x).softmax(2), x),
    ),
    "in-place additions": (in_place, out_of_place),
    "non-reentrant checkpoint": (
        lambda x: checkpoint(lambda t: x + torch.tanh(t), x, use_reentrant=False),
        lambda x: x + torch.tanh(x),
    ),
    "attention in a non-reentrant checkpoint": (
        lambda x: x + checkpoint(masked_attention, x, MASK, use_reentrant=False),
        lambda x: x + masked_attention(x, MASK),
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


FOLLOWED = {
    # What autograd itself refuses (a saved tensor was overwritten) has nothing to be compared with.
    **{name: change for name, (change, _) in EXACT.items() if name != "a constant overwritten afterwards"},
    "complex rotation": turned,
    "sorted": lambda x: x.sort(1)[0],
    "largest over tokens": lambda x: x + x.amax(1, keepdim=True),
    "products": lambda x: x * x.prod(-1, keepdim=True),
    "quantile": lambda x: x / x.abs().quantile(0.9, dim=-1, keepdim=True),
    "cosine similarity": lambda x: x * nn.functional.cosine_similarity(x, x[:, :1], dim=-1)[..., None],
    "sparse attention": lambda x: x + (x @ x.mT).masked_fill(x @ x.mT < 0, -1e9).softmax(-1) @ x,
    "instance norm": lambda x: nn.functional.instance_norm(x.transpose(1, 2)).transpose(1, 2),
    "scatter": lambda x: x + torch.zeros_like(x).index_add(1, torch.tensor([1, 1, 0, 2, 0]), x),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_gradient_of_the_recording_is_the_model_s(name):
    """The recorded graph leads back along every path: its gradient is autograd's, and relevance is conserved."""
    model = Changed(FOLLOWED[name])
    _, delta = TransformerRelevance(model).attribute(IMAGES, target=1, return_convergence_delta=True)
    assert float(delta.abs().max()) < 1e-6
    given = parse(IMAGES)
    with recorded(model, given, verified=set()) as recording:
        recording.select(1)
        (got,) = recording.send(gradient_signal(), list(given.leaves.values()))
    images = IMAGES.clone().requires_grad_()
    (want,) = torch.autograd.grad(model(images)[:, 1].sum(), images)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


BOUND = MATRIX[0] * 0.3
NONE = torch.zeros((), dtype=torch.float64)
BOUNDS = {
    "maximum with 0": (lambda x: torch.maximum(x, NONE), torch.relu),
    "0 first": (lambda x: torch.maximum(NONE, x), torch.relu),
    "max of two": (lambda x: torch.max(x, torch.zeros_like(x)), torch.relu),
    "max as a method": (lambda x: x.max(other=NONE), torch.relu),
    "fmax": (lambda x: torch.fmax(x, NONE), torch.relu),
    "minimum": (lambda x: torch.minimum(x, BOUND), lambda x: x.clamp(max=BOUND)),
    "min of two": (lambda x: torch.min(BOUND, x), lambda x: x.clamp(max=BOUND)),
    "fmin": (lambda x: torch.fmin(x, BOUND), lambda x: x.clamp(max=BOUND)),
    "both": (
        lambda x: torch.minimum(torch.maximum(x, BOUND - 1), BOUND + 1),
        lambda x: x.clamp(BOUND - 1, BOUND + 1),
    ),
    "several bounds for one value": (
        lambda x: x + torch.maximum(x[..., :1], BOUND),
        lambda x: x + torch.stack([x[..., 0].clamp(min=float(b)) for b in BOUND], -1),
    ),
    "several bounds of a clamp": (
        lambda x: x + x[..., :1].clamp(min=BOUND),
        lambda x: x + torch.stack([x[..., 0].clamp(min=float(b)) for b in BOUND], -1),
    ),
    "a gate": (
        lambda x: x.flip(-1) * torch.maximum(x @ MATRIX, NONE),
        lambda x: x.flip(-1) * torch.relu(x @ MATRIX),
    ),
    "a guard against 0": (
        lambda x: x / torch.maximum(x.norm(dim=-1, keepdim=True), NONE + 1e-6),
        lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6),
    ),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_the_larger_of_a_value_and_a_constant_is_an_activation(name):
    """As ``relu`` and ``clamp`` are: its constant takes nothing away from it."""
    bounded, plain = map(Changed, BOUNDS[name])
    torch.testing.assert_close(bounded(IMAGES), plain(IMAGES))
    for method in (AttentionRelevance, TransformerRelevance):
        got, want = (method(model).attribute(IMAGES, target=1) for model in (bounded, plain))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    for rules in ("deep_taylor", "attnlrp", "cp", "libra"):
        got, delta = TransformerLRP(bounded, rules=rules).attribute(IMAGES, target=1, return_convergence_delta=True)
        torch.testing.assert_close(got, TransformerLRP(plain, rules=rules).attribute(IMAGES, 1), rtol=1e-9, atol=1e-12)
        assert rules == "attnlrp" or delta.abs().max() < 1e-6


ARGUMENTS = {
    "threshold": (0.1, -0.2),
    "pow": (3,),
    "float_power": (2,),
    "prelu": (torch.full((1,), 0.3, dtype=torch.float64),),
    "clamp": (-0.5, 0.7),
    "clip": (-0.5, 0.7),
    "clamp_min": (0.1,),
    "clamp_max": (0.1,),
}
ARGUMENTS["__pow__"] = ARGUMENTS["pow"]
POSITIVE = {"log", "log1p", "special_log1p", "log2", "sqrt", "rsqrt", "reciprocal"}


@pytest.mark.parametrize("name", sorted(BOUNDED | UNBOUNDED | set(ALIASES) - {"log_sigmoid"}))
def test_every_function_of_one_element_is_followed(name):
    """Under every name that torch has for it, with autograd's gradient."""
    plain = name.removeprefix("special_")
    forms = [getattr(p, plain) for p in (nn.functional, torch, torch.special, torch.Tensor) if hasattr(p, plain)]
    images = IMAGES[:1].abs() + 0.1 if name in POSITIVE else IMAGES[:1]
    for form in forms:

        def model(x, form=form):
            return form(x, *ARGUMENTS.get(name, ())).mul(torch.arange(1, 9)).sum((1, 2, 3))[:, None]

        leaf = images.clone().requires_grad_()
        (want,) = torch.autograd.grad(model(leaf).sum(), leaf)
        given = parse(images)
        with recorded(model, given, verified=set()) as recording:
            recording.select(0)
            (got,) = recording.send(gradient_signal(), list(given.leaves.values()))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_the_way_out_of_the_model_itself_is_a_module():
    """A rule for the root would replace the whole model."""
    with pytest.raises(UnsupportedOperationError, match="'fmod' in the model itself.*module of its own") as error:
        TransformerRelevance(AtTheRoot().double()).attribute(IMAGES, target=1)
    assert "get_submodule" not in str(error.value)


class AtTheRoot(Changed):
    def __init__(self):
        super().__init__(torch.tanh)

    def forward(self, x):
        return super().forward(torch.fmod(x, 2))


def test_what_vmap_hides_is_not_called_the_operation_of_another_module():
    model = nn.Sequential(Changed(torch.tanh).vit.blocks[0], Step(hidden_tanh)).double()
    with pytest.raises(UnsupportedOperationError, match="operation 'Tanh', whose result module '1' uses"):
        TransformerRelevance(model).attribute(torch.randn(2, 5, 16, dtype=torch.float64), target=(0, 1))


def hidden_tanh(x):
    return torch.vmap(torch.tanh)(x) * 2


def reparametrised(change):
    model = Changed(torch.tanh)
    change(model.vit.blocks[0].mlp[0])
    return model


PARAMETRISATIONS = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_parametrised_weights_are_weights(name):
    model = reparametrised(PARAMETRISATIONS[name]).eval()
    got = TransformerRelevance(model).attribute(IMAGES, target=1)
    torch.nn.utils.parametrize.remove_parametrizations(model.vit.blocks[0].mlp[0], "weight")
    want = TransformerRelevance(model).attribute(IMAGES, target=1)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_functional_call_with_other_weights():
    model = Changed(None)
    model.change = nn.Module()
    model.change.inner = nn.Linear(16, 16).double()
    twin = copy.deepcopy(model)
    weights = {name: p.detach() * 2 for name, p in model.change.inner.named_parameters()}
    model.change.forward = lambda x: torch.func.functional_call(model.change.inner, weights, (x,))
    twin.change.inner.load_state_dict(weights)
    twin.change.forward = twin.change.inner.forward
    got, want = (TransformerRelevance(m).attribute(IMAGES, target=1) for m in (model, twin))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_layers_that_differ_in_training():
    """Dropout and batch norm are explained as evaluated, whatever mode the model is in, and the statistics stay."""
    model = Changed(torch.tanh)
    model.vit.blocks[0].mlp.insert(1, nn.Dropout(0.5))
    model.bn = nn.BatchNorm1d(16).double()
    model.bn.running_mean.uniform_(-1, 1)
    model.change.change = lambda x: model.bn(x.transpose(1, 2)).transpose(1, 2)
    want = TransformerRelevance(model.eval()).attribute(IMAGES, target=1)
    got = TransformerRelevance(model.train()).attribute(IMAGES, target=1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert model.training and model.bn.training and int(model.bn.num_batches_tracked) == 0


def test_data_parallel_wrapper():
    model = Changed(torch.tanh)
    got, want = (TransformerRelevance(m).attribute(IMAGES, target=1) for m in (nn.DataParallel(model), model))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def autocast_part(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return nn.functional.linear(x, MATRIX.to(x.dtype)).float()


def test_autocast_is_followed_in_full_precision():
    """Inside the model, and around the call."""
    images = IMAGES.float()
    want = TransformerRelevance(Changed(lambda x: x @ MATRIX.T.to(x.dtype)).float()).attribute(images, target=1)
    got = TransformerRelevance(Changed(autocast_part).float()).attribute(images, target=1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around = TransformerRelevance(Changed(lambda x: x @ MATRIX.T.to(x.dtype)).float()).attribute(images, target=1)
    torch.testing.assert_close(around, want, rtol=1e-5, atol=1e-7)


MIXED = {
    "mean over the batch": lambda x: x - x.mean(0, keepdim=True),
    "neighbours": lambda x: x + 0.5 * x.flip(0),
    "softmax over the batch": lambda x: x * x.softmax(0),
    "indices": lambda x: x + 0.5 * x[torch.arange(len(x) - 1, -1, -1)],
    "condition on the batch": lambda x: x * 2 if len(x) > 1 else x * 3,
    "the last": lambda x: x - 0.5 * x[-1],
}


@pytest.mark.parametrize("name", MIXED)
def test_examples_that_influence_each_other_are_explained_alone(name):
    """Every example gets what it would get alone, on the second call as on the first one."""
    explainer = TransformerRelevance(Changed(MIXED[name]))
    alone = torch.cat([explainer.attribute(IMAGES[i : i + 1], target=1) for i in range(2)])
    for _ in range(2):
        got, delta = explainer.attribute(IMAGES, target=1, return_convergence_delta=True)
        torch.testing.assert_close(got, alone, rtol=1e-9, atol=1e-13)
        assert float(delta.abs().max()) < 1e-6


def elsewhere(x):
    """The recorder does not see other threads."""
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.tanh(x)))
    thread.start()
    thread.join()
    return x + found[0]


UNSEEN = {
    "another thread": elsewhere,
    "vmap": lambda x: torch.vmap(lambda t: t * 2 + torch.tanh(t))(x),
    "func.grad": lambda x: x + torch.func.grad(lambda t: (t * t).sum())(x),
    "inference mode": torch.inference_mode()(lambda x: x * 2),
    "a parameter from outside": lambda x: x * torch.full((16,), 2.0, dtype=x.dtype, requires_grad=True),
    "set_grad_enabled": lambda x: (torch.set_grad_enabled(False), x * 2, torch.set_grad_enabled(True))[1],
}


def nested(x):
    rows = torch.nested.as_nested_tensor(list(x), layout=torch.jagged)
    return torch.stack(list((rows * 2).unbind()))


def flex(x):
    return x + flex_attention(x[:, None], x[:, None], x[:, None])[:, 0]


@pytest.mark.parametrize(
    ("change", "message"), [(nested, "'change' computes with nested"), (flex, "attn_implementation")]
)
def test_what_has_no_followable_kernel_is_refused(change, message):
    with pytest.raises((UnsupportedOperationError, UnsupportedModelError), match=message):
        TransformerRelevance(Changed(change)).attribute(IMAGES, target=1)


@dataclasses.dataclass
class Answer:
    name: str
    scores: torch.Tensor


def test_a_data_class_as_output():
    class Answering(Changed):
        def forward(self, x):
            return Answer("scores", super().forward(x))

    got, want = (TransformerRelevance(m(torch.tanh)).attribute(IMAGES, target=1) for m in (Answering, Changed))
    assert torch.equal(got, want)


def test_one_hot_ids_are_an_embedding():
    class OneHot(TinyText):
        def forward(self, ids):
            x = nn.functional.one_hot(ids, 20).to(self.embed.weight.dtype) @ self.embed.weight
            return self.head(self.blocks(x))

    ids = torch.tensor([[3, 5, 7, 3], [1, 0, 19, 4]])
    for method in (TransformerRelevance, TransformerLRP):
        got, want = (method(randomise(m().double())).attribute(ids, target=(2, 1)) for m in (OneHot, TinyText))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", UNSEEN)
def test_what_the_recorder_cannot_see_is_refused(name):
    with pytest.raises((UnsupportedOperationError, UnsupportedModelError)):
        TransformerRelevance(Changed(UNSEEN[name])).attribute(IMAGES, target=1)


def test_mask_in_another_precision():
    """Torch's CPU kernel misreads a float32 mask for float64 queries.

    What it computes is no softmax attention. Refused, or right where it is right.
    """

    def change(x):
        mask = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32).masked_fill(
            torch.eye(5, dtype=torch.bool), -9.0
        )
        return x + nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)[:, 0]

    def plain(x):
        return x + ((x @ x.mT) / 4 - 9 * torch.eye(5, dtype=x.dtype)).softmax(-1) @ x

    tokens = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if torch.allclose(change(tokens), plain(tokens)):
        got, want = (TransformerRelevance(Changed(f)).attribute(IMAGES, target=1) for f in (change, plain))
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)
    else:
        with pytest.raises(UnsupportedOperationError, match="float32 mask for torch.float64 queries"):
            TransformerRelevance(Changed(change)).attribute(IMAGES, target=1)
    got, want = (TransformerRelevance(Changed(f).float()).attribute(IMAGES.float(), target=1) for f in (change, plain))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_hooks_of_the_user():
    """A forward hook is part of the model; a backward hook, which may change gradients, is refused by name."""
    hooked, twin = Changed(torch.tanh), Changed(lambda x: torch.tanh(x * 2.0))
    handle = hooked.vit.blocks[0].register_forward_hook(lambda module, args, output: output * 2.0)
    got, want = (TransformerRelevance(m).attribute(IMAGES, target=1) for m in (hooked, twin))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    handle.remove()
    hooked.change.register_full_backward_hook(lambda module, before, after: (before[0] * 100,))
    with pytest.raises(UnsupportedOperationError, match="BackwardHookFunction"):
        TransformerRelevance(hooked).attribute(IMAGES, target=1)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner = kind(16, 16, batch_first=True).double()

    def forward(self, x):
        return x + self.inner(x)[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrence_is_refused_by_name(kind):
    model = Changed(None)
    model.change = Recurrent(kind)
    with pytest.raises(UnsupportedOperationError, match="change.inner.*recurren"):
        TransformerRelevance(model).attribute(IMAGES, target=1)


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


def test_scratch_memory_of_looking_is_not_mistaken_for_the_value():
    """Statistics are taken of a value that is let go; what is made of them lies where it lay, and may be written."""

    def look(x):
        for _ in range(20):
            spent = x * 2.0
            scratch = spent.detach()
            del spent, scratch
            work = x.detach() * 1.0
            work.mul_(0)
        return x * 1.0

    got = TransformerRelevance(Changed(look)).attribute(IMAGES, target=1)
    want = TransformerRelevance(Changed(lambda x: x * 1.0)).attribute(IMAGES, target=1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


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


def test_another_output_or_rule_is_compared_anew():
    """A comparison counts for the next object on the same model, but for that output and those rules alone."""
    calls = []

    class TwoOutputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = TinyViT()

        def forward(self, x):
            calls.append(1)
            logits = self.inner(x)
            return {"logits": logits, "double": 2 * logits}

    model = randomise(TwoOutputs()).double()

    def forwards(**options):
        calls.clear()
        TransformerRelevance(model, **options).attribute(IMAGES[:1], target=1)
        return len(calls)

    assert [forwards(), forwards()] == [2, 1]
    assert [forwards(output="double"), forwards(output="double")] == [2, 1]
    assert forwards(output=lambda out: out["double"]) == 2


# ---------------------------------------------------------------------- what the forward writes into the model
class Counting(nn.Module):
    """Multiplies by a buffer that it overwrites first."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(16, dtype=torch.float64))

    def forward(self, x):
        self.scale.mul_(3.0)
        return x * self.scale


@pytest.mark.parametrize("rules", ["deep_taylor", "attnlrp", "cp"])
def test_overwritten_buffer_counts_with_what_the_forward_computed_with(rules):
    """It is put back before the signals are sent."""
    model = Changed(Counting())
    for _ in range(2):
        got = TransformerLRP(model, rules=rules).attribute(IMAGES, target=1)
        want = TransformerLRP(Changed(lambda x: x * torch.full((16,), 3.0).double()), rules=rules)
        torch.testing.assert_close(got, want.attribute(IMAGES, target=1), rtol=1e-9, atol=1e-13)
    assert all(torch.equal(b, torch.ones_like(b)) for name, b in model.named_buffers() if name.endswith("scale"))


class Renormalising(nn.Module):
    """Reads a table that renormalises itself; ``tied`` gives it back as the head's weight."""

    def __init__(self, tied, kind=nn.Embedding, **settings):
        super().__init__()
        self.text = randomise(TinyText().double())
        self.text.embed = kind(20, 16, dtype=torch.float64, **settings)
        with torch.no_grad():
            self.text.embed.weight.copy_(torch.linspace(-1, 1, 320).reshape(20, 16).roll(3, 1))
        if tied:
            self.text.head.weight = self.text.embed.weight

    def forward(self, ids):
        return self.text(ids)


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", [AttentionRelevance, TransformerRelevance, TransformerLRP])
def test_table_with_max_norm(method, tied, norm_type):
    """As a table of rows that are short already, by the formula of torch; the model's own is left as it is."""
    ids = torch.tensor([[1, 7, 19, 3], [4, 1, 0, 0]])
    model, twin = Renormalising(tied, max_norm=1.5, norm_type=norm_type), Renormalising(tied)
    table = model.text.embed.weight.detach().clone()
    norms = table.norm(norm_type, -1, keepdim=True)
    read = torch.zeros(20, 1, dtype=torch.bool).index_fill(0, ids.flatten(), True)
    with torch.no_grad():
        twin.text.embed.weight.copy_(torch.where(read & (norms > 1.5), table * 1.5 / (norms + 1e-7), table))
    assert not torch.equal(twin.text.embed.weight, table)
    for _ in range(2):
        got = method(model).attribute(ids, target=(-1, 2))
        torch.testing.assert_close(got, method(twin).attribute(ids, target=(-1, 2)), rtol=1e-9, atol=1e-12)
        assert torch.equal(model.text.embed.weight, table)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_table_of_other_ids_is_left_as_it_is(kind):
    """Ids that are passed on only read it, a bag one id each."""

    class Added(nn.Module):
        def __init__(self, **settings):
            super().__init__()
            self.table = kind(5, 192, dtype=torch.float64, **settings)
            self.vit = randomise(TinyViT().double())

        def forward(self, x, ids):
            return self.vit(x + self.table(ids).reshape(x.shape))

    model, twin = Added(max_norm=1.0), Added()
    table = model.table.weight.detach().clone()
    with torch.no_grad():
        twin.table.weight.copy_(table / (table.norm(dim=-1, keepdim=True) + 1e-7))
    ids = torch.tensor([[3], [0]])
    got, want = (TransformerLRP(m, rules="attnlrp").attribute(IMAGES, 1, ids) for m in (model, twin))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert torch.equal(model.table.weight, table)


def test_bag_of_explained_ids_leaves_its_table():
    class Bag(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.table, self.head = kind(5, 16, max_norm=1.0), nn.Linear(16, 3)

        def forward(self, ids):
            rows = self.table(ids)
            return self.head(rows if rows.ndim == 2 else rows.mean(1))

    model, want = Bag(nn.EmbeddingBag), Bag(nn.Embedding)
    want.load_state_dict(model.state_dict())
    table = model.table.weight.detach().clone()
    ids = torch.tensor([[3, 1], [0, 2]])
    got, expected = (TransformerLRP(m).attribute(ids, target=1) for m in (model, want))
    torch.testing.assert_close(got, expected)
    assert torch.equal(model.table.weight, table) and got.abs().max() > 0


def test_a_function_that_widens_its_input_is_not_narrowed():
    """``float_power`` gives float64 whatever it gets: what reads it must find that in a recording, too."""

    class Widening(nn.Module):
        def __init__(self, power):
            super().__init__()
            self.vit, self.head, self.power = randomise(TinyViT()), nn.Linear(4, 3).double(), power
            nn.init.constant_(self.head.weight, 0.5)
            nn.init.zeros_(self.head.bias)

        def forward(self, x):
            return self.head(self.power(self.vit(x)))

    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    powers = (lambda x: x.float_power(2), lambda x: x.double() ** 2)
    got, want = (TransformerLRP(Widening(power)).attribute(images, target=1) for power in powers)
    torch.testing.assert_close(got, want)
    assert want.abs().max() > 0

"""Everything in Captum that takes an attribution or an attribution class takes ours."""

import copy
from concurrent.futures import ThreadPoolExecutor

import matplotlib

matplotlib.use("Agg")

import pytest
import torch
import transformers
from captum.attr import NoiseTunnel, visualization
from captum.attr._utils.attribution import GradientAttribution, InternalAttribution
from captum.metrics import infidelity, sensitivity_max
from tiny_models import TinyText, TinyViT, TwoInputs, randomise

import captum_transformer_attr
from captum_transformer_attr import AttentionRelevance, ForwardWrapper, LayerTransformerLRP, TransformerRelevance

CLASSES = [TransformerRelevance, AttentionRelevance]
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def vit():
    return randomise(TinyViT())


@pytest.mark.parametrize("method", CLASSES)
def test_standard_tensor(vit, method):
    heat = method(vit).attribute(IMAGES, target=1)
    assert heat.shape == IMAGES.shape and heat.dtype == IMAGES.dtype and heat.is_contiguous() and not heat.requires_grad
    assert torch.equal(heat[:, 0], heat[:, 1]) and heat.abs().max() > 0


@pytest.mark.parametrize("method", CLASSES)
def test_infidelity(vit, method):
    """The score against its definition, (Σ Δ·φ − (f(x) − f(x − Δ)))², for the same perturbation every time."""
    noise = torch.full_like(IMAGES, 0.1)
    heat = method(vit).attribute(IMAGES, target=1)
    got = infidelity(
        ForwardWrapper(vit),
        lambda x: (noise[: len(x)], x - noise[: len(x)]),
        IMAGES,
        heat,
        target=1,
        n_perturb_samples=1,
    )
    with torch.no_grad():
        change = (vit(IMAGES) - vit(IMAGES - noise))[:, 1]
    want = ((noise * heat).flatten(1).sum(1) - change) ** 2
    assert torch.allclose(got, want)


@pytest.mark.parametrize("method", CLASSES)
def test_sensitivity_max(vit, method):
    attribution = method(vit)
    score = sensitivity_max(attribution.attribute, IMAGES, perturb_radius=1e-3, n_perturb_samples=2, target=1)
    assert score.shape == (3,) and torch.isfinite(score).all() and (score > 0).all() and (score < 1).all()


@pytest.mark.parametrize("method", CLASSES)
@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_noise_tunnel(vit, method, kind):
    tunnel = NoiseTunnel(method(vit))
    heat = tunnel.attribute(IMAGES, nt_type=kind, nt_samples=2, stdevs=0.0, target=[0, 1, 2])
    plain = method(vit).attribute(IMAGES, target=[0, 1, 2])
    want = {"smoothgrad": plain, "smoothgrad_sq": plain**2, "vargrad": torch.zeros_like(plain)}[kind]
    assert torch.allclose(heat, want, atol=1e-6)


def test_noise_tunnel_with_delta(vit):
    heat, delta = NoiseTunnel(TransformerRelevance(vit)).attribute(
        IMAGES, nt_samples=2, stdevs=0.1, target=0, return_convergence_delta=True
    )
    assert heat.shape == IMAGES.shape and delta.shape == (6,) and delta.abs().max() < 1e-5


@pytest.mark.parametrize("method", CLASSES)
def test_image_visualisers(vit, method):
    heat = method(vit).attribute(IMAGES, target=1)[0].permute(1, 2, 0).numpy()
    picture = IMAGES[0].permute(1, 2, 0).sigmoid().numpy()
    figure, _ = visualization.visualize_image_attr(heat, picture, "blended_heat_map", "all", use_pyplot=False)
    assert figure.axes
    figure, _ = visualization.visualize_image_attr_multiple(
        heat, picture, ["original_image", "heat_map"], ["all", "positive"], use_pyplot=False
    )
    assert len(figure.axes) >= 2


def test_text_visualiser():
    pytest.importorskip("IPython")
    ids = torch.randint(0, 20, (1, 5))
    scores = TransformerRelevance(randomise(TinyText())).attribute(ids, target=(4, 3))[0]
    record = visualization.VisualizationDataRecord(
        scores / scores.abs().max(), 0.9, "a", "a", "b", scores.sum(), list("vwxyz"), 0.0
    )
    assert "vwxyz"[0] in visualization.visualize_text([record]).data


EVERY = [
    c
    for c in map(captum_transformer_attr.__dict__.get, captum_transformer_attr.__all__)
    if isinstance(c, type) and issubclass(c, GradientAttribution) and not issubclass(c, InternalAttribution)
]


@pytest.mark.parametrize("method_class", EVERY)
def test_forward_func_is_read_at_call_time(method_class, vit):
    """LLMGradientAttribution and DataLoaderAttribution replace the forward on a copy."""
    method = method_class(vit)
    other = copy.copy(method)
    other.forward_func = randomise(TinyViT(), seed=1)
    assert not torch.allclose(method.attribute(IMAGES, target=1), other.attribute(IMAGES, target=1))
    assert torch.equal(other.attribute(IMAGES, target=1), method_class(other.forward_func).attribute(IMAGES, target=1))
    bound = copy.copy(method)
    bound.forward_func = lambda x: vit(x)
    assert torch.allclose(method.attribute(IMAGES, target=1), bound.attribute(IMAGES, target=1))


def test_threads_share_a_model(vit):
    """As in a server: several attributions and plain forwards of one trainable model at the same time."""
    vit.train()
    methods = [m(vit) for m in (TransformerRelevance, captum_transformer_attr.TokenStatisticsRelevance)]
    methods.append(LayerTransformerLRP(vit, vit.blocks[0], rules="cp"))
    want = [m.attribute(IMAGES, target=1) for m in methods]

    def explain(number):
        vit(IMAGES)
        return methods[number % 3].attribute(IMAGES, target=1)

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(explain, range(24)))
    assert all(torch.equal(g, want[i % 3]) for i, g in enumerate(got))
    assert vit.training and all(p.requires_grad for p in vit.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())


def test_wrapper_unwraps_and_names_arguments():
    config = transformers.BertConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=1, vocab_size=30, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config).eval()
    ids, mask = torch.randint(0, 30, (2, 4)), torch.ones(2, 4, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(
            ForwardWrapper(model, keys=("input_ids", "attention_mask"))(ids, mask), model(ids, mask).logits
        )


def test_several_inputs_and_mapping_agree():
    model = randomise(TwoInputs())
    a, b = torch.randn(2, 3, 5), torch.randn(2, 2, 7)
    method = TransformerRelevance(model)
    first, second = method.attribute((a, b), target=1)
    named = method.attribute({"a": a, "b": b}, target=1)
    assert first.shape == a.shape and second.shape == b.shape and list(named) == ["a", "b"]
    assert torch.equal(first, named["a"]) and torch.equal(second, named["b"])
    tokens = method.attribute_tokens((a, b), target=1)
    assert tokens[0].shape == (2, 3) and tokens[1].shape == (2, 2)


def test_no_asynchronous_variant(vit):
    with pytest.raises(NotImplementedError):
        TransformerRelevance(vit).attribute_future(IMAGES)

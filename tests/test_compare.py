"""Captum's methods behind the common adapter, checked on models whose attributions are known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from captum.attr import InputXGradient, LayerGradCam
from torch import Tensor, nn

from captum_transformer_attr.comparison import (
    compare,
    element_scores,
    method,
    method_names,
    quantus_explain_func,
    rank_correlation,
    resolve,
)
from captum_transformer_attr.comparison.captum_methods import CAPTUM_METHODS
from captum_transformer_attr.comparison.float_view import FloatView
from captum_transformer_attr.comparison.grad_cam_layer import channels_first, last_token_layer, spread_over_input
from captum_transformer_attr.errors import InputError, TargetError

CAPTUM = (
    "IntegratedGradients:n_steps=8",
    "InputXGradient",
    "Saliency",
    "GradientShap",
    "LayerGradCam",
    "Occlusion",
    "FeatureAblation",
)


class Bag(nn.Module):
    """Logit = sum over real tokens of a per-id value: every method's scores can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.positions = nn.Embedding(16, 4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        features = self.words(input_ids) + 0 * self.positions(torch.arange(input_ids.shape[1]))
        return {"logits": self.head((features * attention_mask[..., None]).sum(1))}


@pytest.fixture
def bag() -> Bag:
    torch.manual_seed(0)
    return Bag().double()


@pytest.fixture
def words() -> dict[str, Tensor]:
    ids = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 0]])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}


@pytest.fixture
def vit() -> Any:
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5
    ).eval()


@pytest.mark.parametrize(
    "name", ["IntegratedGradients:n_steps=8", "InputXGradient", "GradientShap", "Occlusion", "FeatureAblation"]
)
def test_linear_bag_of_words_gives_every_token_its_own_contribution(
    bag: Bag, words: dict[str, Tensor], name: str
) -> None:
    target = [2, 0]
    result = compare(bag, words, target, [name]).results[0].attributions
    values = bag.words(words["input_ids"]) @ bag.head.weight.T
    expected = torch.stack([values[0, :, 2], values[1, :, 0]]) * words["attention_mask"]
    assert list(result) == ["input_ids"]
    # GradientShap starts from a noisy baseline, so a linear model is met only up to that noise.
    tolerance = {"atol": 0.2, "rtol": 0.1} if name == "GradientShap" else {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(result["input_ids"], expected.detach(), check_dtype=False, **tolerance)


def test_saliency_is_the_magnitude_of_the_gradient(bag: Bag, words: dict[str, Tensor]) -> None:
    result = compare(bag, words, 1, ["Saliency"]).results[0].attributions["input_ids"]
    expected = bag.head.weight[1].abs().sum().detach() * words["attention_mask"]
    torch.testing.assert_close(result, expected)


def test_nothing_is_left_behind(bag: Bag, words: dict[str, Tensor]) -> None:
    bag.train()
    bag.head.eval()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    compare(bag, words, 0, CAPTUM[:4] + CAPTUM[5:])
    assert bag.training and bag.words.training and not bag.head.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in bag.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in bag.parameters())
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])


def test_hooks_are_removed_after_a_failing_forward(bag: Bag, words: dict[str, Tensor]) -> None:
    broken = {**words, "attention_mask": torch.ones(2, 3)}
    with pytest.raises(RuntimeError):
        compare(bag, broken, 0, ["InputXGradient"])
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in bag.modules())


def test_random_methods_give_the_same_twice(bag: Bag, words: dict[str, Tensor]) -> None:
    first, second = (compare(bag, words, 0, ["GradientShap"])["GradientShap"].scores() for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", CAPTUM)
def test_all_methods_give_the_same_kinds_of_output(vit: Any, name: str) -> None:
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        result = compare(vit.requires_grad_(False), images, [3, 1], [name]).results[0]
    assert result.attributions.shape == images.shape and not result.attributions.requires_grad
    assert result.scores().shape == (2, 32, 32) and result.scores().abs().sum() > 0
    assert result.seconds > 0
    if name == "GradientShap":
        return  # its random baselines differ from example to example
    alone = compare(vit, images[1:], 1, [name]).results[0]
    torch.testing.assert_close(result.scores()[1:], alone.scores(), atol=1e-5, rtol=1e-3)


def test_images_go_to_captum_as_they_are(vit: Any) -> None:
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    expected = InputXGradient(vit).attribute(images, target=[3, 1])
    torch.testing.assert_close(compare(vit, images, [3, 1], ["InputXGradient"]).results[0].attributions, expected)


def test_perturbations_change_whole_squares(vit: Any) -> None:
    images = torch.randn(1, 3, 32, 32)
    for name in ("Occlusion", "FeatureAblation"):
        scores = compare(vit, images, 0, [name])[name].scores()[0]
        squares = scores.view(16, 2, 16, 2)  # 32 / 14 = 2 pixels
        assert (squares == squares[:, :1, :, :1]).all()
    with torch.no_grad():
        changed = images.clone()
        changed[..., :2, :2] = 0
        drop = (vit(images) - vit(changed))[0, 0]
    for name in ("Occlusion", "FeatureAblation"):
        scores = compare(vit, images, 0, [name])[name].attributions
        torch.testing.assert_close(scores[0, 0, 0, 0], drop, atol=1e-5, rtol=1e-4)


def test_grad_cam_looks_where_all_tokens_still_matter(vit: Any) -> None:
    images = torch.randn(2, 3, 32, 32)
    assert last_token_layer(FloatView(vit, images), 0) is vit.blocks[-1].attn.qkv
    torch.manual_seed(0)
    pooled = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, global_pool="avg", class_token=False
    ).eval()
    chosen = last_token_layer(FloatView(pooled, images), 0)
    assert chosen not in set(pooled.blocks.modules())


def test_grad_cam_is_captums_on_tokens_with_channels_first(vit: Any) -> None:
    images = torch.randn(2, 3, 32, 32)
    kept: dict[str, Tensor] = {}
    handle = vit.blocks[-1].attn.qkv.register_forward_pre_hook(lambda module, given: kept.update(tokens=given[0]))
    score = vit(images)[:, 2].sum()
    handle.remove()
    tokens = kept["tokens"]
    gradient = torch.autograd.grad(score, tokens)[0]
    expected = torch.relu((gradient.mean(1, keepdim=True) * tokens).sum(-1))[:, 1:].view(2, 4, 4)
    expected = nn.functional.interpolate(expected[:, None], size=(32, 32), mode="bilinear", align_corners=False)[:, 0]
    result = compare(vit, images, 2, ["LayerGradCam"])["LayerGradCam"].scores()
    torch.testing.assert_close(result, expected.detach().double(), atol=1e-6, rtol=1e-4)


def test_channels_first_does_not_change_the_forward(vit: Any) -> None:
    images = torch.randn(1, 3, 32, 32)
    expected = vit(images)
    with channels_first(vit.blocks[-1].attn.qkv) as shown:
        cam = LayerGradCam(vit, shown).attribute(images, target=0)
        assert cam.shape == (1, 1, 17)
        torch.testing.assert_close(vit(images), expected)
    assert not vit.blocks[-1].attn.qkv._forward_pre_hooks


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_prefix_tokens_are_left_out_of_the_grid(prefix: int) -> None:
    scores = torch.cat([torch.full((1, prefix), 9.0), torch.arange(8.0)[None]], 1)
    spread = spread_over_input(scores, torch.zeros(1, 3, 2, 4))
    assert torch.equal(spread[0, 0], torch.arange(8.0).view(2, 4))


def test_tokens_that_form_no_grid_are_refused() -> None:
    with pytest.raises(InputError, match="form no grid"):
        spread_over_input(torch.zeros(1, 2), torch.zeros(1, 3, 64, 128 + 1))
    with pytest.raises(InputError, match="3 tokens, the input 4"):
        spread_over_input(torch.zeros(1, 3), torch.zeros(1, 4, 8))


def test_ids_without_an_embedding_are_refused(bag: Bag) -> None:
    with pytest.raises(InputError, match="no nn.Embedding"):
        FloatView(Counting(), torch.ones(1, 4).long())


class Counting(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return ids.float().cumsum(1)


class Fixed:
    """An attribution object that already holds its model."""

    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
        return torch.full_like(inputs, 2.0)


def test_methods_are_found_by_name_and_options() -> None:
    assert method("integrated-gradients:n_steps=8").name == "IntegratedGradients (n_steps=8)"
    assert method("transformer_relevance").name == "TransformerRelevance"
    assert {"TransformerRelevance", "Occlusion", "LayerGradCam"} <= set(method_names())
    assert not {"TransformerAttribution", "ForwardWrapper"} & set(method_names())
    assert [entry.name for entry in resolve([Fixed(), "Saliency"])] == ["Fixed", "Saliency"]
    assert [entry.name for entry in resolve("Saliency")] == ["Saliency"]


@pytest.mark.parametrize(
    "given, message",
    [
        (["TransformerRelevanse"], "did you mean TransformerRelevance"),
        (["xyzzy"], "known: .*Occlusion"),
        (["IntegratedGradients:steps=3"], "has no option 'steps'; its options: n_steps"),
        (["TransformerRelevance:layer=3"], "has no option 'layer'; its options: .*start_layer"),
        (["IntegratedGradients:n_steps"], "name=value"),
        (["Saliency", "saliency"], "given twice"),
        ([], "empty"),
        ([3], "got int"),
        ([Fixed], "the class Fixed; give its name, or an object"),
        (["IntegratedGradients:n_steps=many"], "n_steps='many' is no number"),
        (["IntegratedGradients:n_steps=0"], "n_steps=0 must be a whole number from 1 on"),
        (["GradientShap:n_samples=1.5"], "n_samples=1.5 must be a whole number"),
        (["TransformerRelevance:normalize=yes"], "normalize='yes' is no truth value"),
    ],
)
def test_unknown_methods_are_explained(given: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(given)


@pytest.mark.parametrize("target", [99, "a", None, [0], (0, 1), 1.5])
@pytest.mark.parametrize("name", ["Saliency", "IntegratedGradients:n_steps=2", "LayerGradCam", "Occlusion"])
def test_wrong_targets_are_named(vit: Any, name: str, target: Any) -> None:
    with pytest.raises(TargetError, match="target="):
        compare(vit, torch.ones(2, 3, 32, 32), target, [name])


def test_wrong_dtypes_are_named(vit: Any) -> None:
    with pytest.raises(InputError, match=r"is torch.float64, the model's parameters are torch.float32"):
        compare(vit, torch.ones(2, 3, 32, 32).double(), 0, ["Saliency"])
    with pytest.raises(InputError, match="got NoneType"):
        compare(vit, torch.ones(2, 3, 32, 32), 0, None)  # type: ignore[arg-type]


def test_layers_are_found_by_their_path(vit: Any) -> None:
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    by_path = method("LayerGradCam:layer=blocks.1.norm1").attribute(vit, images, 1)
    by_module = CAPTUM_METHODS["LayerGradCam"](FloatView(vit, images), 1, layer=vit.blocks[1].norm1)[0]
    assert torch.equal(by_path, by_module)
    with pytest.raises(InputError, match=r"no layer 'blocks\.1\.nrm1'; similar: .*blocks\.1\.norm1"):
        method("LayerGradCam:layer=blocks.1.nrm1").attribute(vit, images, 1)


def test_element_scores_take_one_channel_or_the_sum() -> None:
    equal = torch.tensor([[1.0, 2.0]]).expand(1, 3, 1, 2)
    assert element_scores(equal).tolist() == [[[1.0, 2.0]]]
    assert element_scores(torch.tensor([[[[1.0]], [[-3.0]]]])).tolist() == [[[-2.0]]]
    assert element_scores(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])).tolist() == [[3.0, 7.0]]
    with pytest.raises(InputError, match="no image and no sequence"):
        element_scores(torch.zeros(3))


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation(torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 30])) == pytest.approx(1)
    assert rank_correlation(torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 2, 4, 3])) == pytest.approx(0.8)
    assert np.isnan(rank_correlation(torch.ones(3), torch.tensor([1.0, 2, 3])))


def test_comparison_tables_and_figures(vit: Any, bag: Bag, words: dict[str, Tensor]) -> None:
    images = compare(vit, torch.randn(2, 3, 32, 32), [3, 1], [Fixed(), "InputXGradient"])
    assert images.table().splitlines()[2].startswith("InputXGradient")
    figure = images.figure(1)
    assert [axes.get_title() for axes in figure.axes] == ["", "Fixed", "InputXGradient"]
    assert images.example(1).classes == ["target 1"]
    with pytest.raises(KeyError, match="methods: Fixed"):
        images["Saliency"]
    with pytest.raises(InputError, match="index=2: the batch has 2 examples"):
        images.figure(2)
    with pytest.raises(InputError, match="no scores for input 'pixels'; explained inputs are numbered 0 to 0"):
        images.figure(0, entry="pixels")
    with pytest.raises(InputError, match="model: expected a torch.nn.Module, got function"):
        compare(lambda x: x, torch.randn(1, 3), 0)  # type: ignore[arg-type]
    text = compare(bag, words, 0, ["InputXGradient"])
    assert text.example(1, tokens=list("abcd"), label="zero").panels[0].tokens == tuple("abcd")  # type: ignore[union-attr]
    assert len(text.figure(0).axes) == 1


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_quantus_calls_methods_with_arrays(vit: Any) -> None:
    images = torch.randn(3, 3, 32, 32)
    explain = quantus_explain_func("InputXGradient")
    result = explain(vit, images.numpy().astype(np.float64), np.array([0, 4, 2]), normalise=True)
    expected = InputXGradient(vit).attribute(images.clone().requires_grad_(), target=[0, 4, 2])
    np.testing.assert_allclose(result, expected.detach().numpy(), atol=1e-6)


def test_quantus_metrics_run(vit: Any) -> None:
    quantus = pytest.importorskip("quantus", reason="quantus is not installed: pip install quantus")
    images, labels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32), np.array([1, 3])
    metric = quantus.FaithfulnessCorrelation(nr_runs=4, subset_size=32, return_aggregate=False, disable_warnings=True)
    scores = metric(
        model=vit,
        x_batch=images,
        y_batch=labels,
        a_batch=None,
        explain_func=quantus_explain_func("AttentionRollout"),
        device="cpu",
    )
    assert len(scores) == 2 and all(-1 <= score <= 1 for score in scores)


def test_scores_fit_shap_plots(bag: Bag, words: dict[str, Tensor]) -> None:
    shap = pytest.importorskip("shap", reason="shap is not installed: pip install shap")
    scores = compare(bag, words, 0, ["InputXGradient"])["InputXGradient"].scores()[0].numpy()
    page = shap.plots.text(shap.Explanation(values=scores, base_values=0.0, data=np.array(list("abcd"))), display=False)
    assert "<svg" in page or "<div" in page


def test_a_method_keeps_its_object_for_one_model() -> None:
    """Our classes compare their recording with a plain forward once per shape.

    So must a method called batch by batch.
    """
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=1, num_heads=2, num_classes=3)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    images, one = torch.randn(2, 3, 32, 32), method("AttentionRelevance")
    one.attribute(model.eval(), images, 0)
    first = len(calls)
    again = one.attribute(model, images, 1)
    assert len(calls) - first == 1 < first
    assert torch.equal(again, method("AttentionRelevance").attribute(model, images, 1))
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=1, num_heads=2, num_classes=3)
    assert not torch.equal(one.attribute(other.eval(), images, 1), again)

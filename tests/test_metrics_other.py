"""Completeness, Captum's metrics in one call, bootstrap intervals and the plain accumulator."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient
from captum.metrics import infidelity, sensitivity_max
from scipy.stats import bootstrap as scipy_bootstrap
from torch import Tensor, nn

from captum_transformer_attr.errors import TargetError
from captum_transformer_attr.metrics import Estimate, MeanScore, bootstrap, completeness, infidelity_and_sensitivity

WEIGHT = torch.tensor([[1.0, 2.0, -3.0], [0.5, 0.0, 4.0]])


def linear(x: Tensor) -> Tensor:
    return x @ WEIGHT.to(x).T


class TestCompleteness:
    X = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 1.0]])

    def test_by_hand(self) -> None:
        perfect = self.X * WEIGHT[1]
        assert completeness(linear, self.X, perfect, 1).tolist() == [0, 0]
        # Outputs 4.5 and 5; half of them missing, and all of it twice missing for the inverted.
        assert completeness(linear, self.X, perfect / 2, [1, 1]).tolist() == [2.25, 2.5]
        assert completeness(linear, self.X, -perfect, 1, relative=True).tolist() == [2, 2]
        assert completeness(linear, self.X, torch.zeros(2, 3), 0).tolist() == [0, -1]

    def test_random_is_incomplete(self) -> None:
        gap = completeness(linear, self.X, torch.rand(2, 3, generator=torch.Generator().manual_seed(0)), 1)
        assert (gap.abs() > 1).all()

    def test_given_total_parts_and_what_arrived_elsewhere(self) -> None:
        parts = {"a": torch.tensor([[0.25, 0.25]]), "b": torch.tensor([[[0.25]]])}
        inputs = {"a": torch.zeros(1, 2), "b": torch.zeros(1, 1, 1)}
        assert completeness(None, inputs, parts, total=1).tolist() == [0.25]
        assert completeness(None, inputs, parts, total=1, elsewhere=torch.tensor([0.25])).tolist() == [0]
        assert completeness(None, inputs, tuple(parts.values()), total=torch.tensor([0.75])).tolist() == [0]

    def test_zero_total_has_no_relative_gap(self) -> None:
        gap = completeness(linear, torch.zeros(1, 3), torch.ones(1, 3), 0, relative=True)
        assert math.isnan(gap.item())

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="target"):
            completeness(linear, self.X, self.X)
        with pytest.raises(ValueError, match="2 examples"):
            completeness(linear, self.X, torch.ones(3, 3), 0)
        with pytest.raises(TargetError, match="target=99"):
            completeness(linear, self.X, self.X, 99)


class Wrapped(nn.Module):
    """A nonlinear model that answers with a dictionary, like a Hugging Face one."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": (x**3) @ WEIGHT.to(x).T}


class Unwrapping(InputXGradient):
    """Input times gradient of the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(lambda x: model(x)["logits"])


class TestCaptum:
    X = torch.tensor([[1.0, 0.5, 1.0], [2.0, 1.0, 1.0]])

    def test_linear_model_by_hand(self) -> None:
        class Perfect:
            forward_func = staticmethod(linear)

            @staticmethod
            def attribute(x: Tensor | tuple, target: object, additional_forward_args: object = None) -> Tensor | tuple:
                # sensitivity_max hands a tuple over, also where there is one input only.
                return (WEIGHT[1].expand(len(x[0]), 3),) if isinstance(x, tuple) else WEIGHT[1].expand(len(x), 3)

        # The gradient of a linear model: the change of the output is exact, the attribution never moves.
        result = infidelity_and_sensitivity(Perfect(), self.X, 1, normalize=False)
        assert result.infidelity.tolist() == pytest.approx([0, 0], abs=1e-10)
        assert result.sensitivity_max.tolist() == [0, 0]
        inverted = infidelity_and_sensitivity(Perfect(), self.X, 1, attributions=-WEIGHT[1].expand(2, 3), samples=2000)
        perfect = infidelity_and_sensitivity(Perfect(), self.X, 1, samples=2000)
        random = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
        middle = infidelity_and_sensitivity(Perfect(), self.X, 1, attributions=random, samples=2000)
        assert (perfect.infidelity < 1e-8).all()
        assert (middle.infidelity > 1e-4).all()
        # Normalised, infidelity may turn the sign: the best factor of the inverted attribution is -1.
        assert (inverted.infidelity < 1e-8).all()
        plain = infidelity_and_sensitivity(
            Perfect(), self.X, 1, attributions=-WEIGHT[1].expand(2, 3), samples=4000, normalize=False
        )
        # Change d = noise * w . z with z standard normal: mean square of 2 d is 4 * noise^2 * |w|^2.
        wanted = 4 * 0.05**2 * WEIGHT[1].square().sum().item()
        assert plain.infidelity.tolist() == pytest.approx([wanted] * 2, rel=0.1)

    def test_same_numbers_as_captum_itself(self) -> None:
        method = Unwrapping(Wrapped())
        result = infidelity_and_sensitivity(method, self.X, 1, seed=5)
        torch.manual_seed(5)
        maps = method.attribute(self.X, target=1)
        first = infidelity(
            method.forward_func,
            lambda x: (lambda move: (move, x - move))(0.05 * torch.randn_like(x)),
            self.X,
            maps,
            target=1,
            normalize=True,
        )
        torch.manual_seed(5)
        second = sensitivity_max(method.attribute, self.X, target=1)
        assert torch.allclose(result.infidelity, first)
        assert torch.allclose(result.sensitivity_max, second)

    def test_is_deterministic_and_leaves_the_random_state(self) -> None:
        method = Unwrapping(Wrapped())
        state = torch.get_rng_state()
        first = infidelity_and_sensitivity(method, self.X, 1, attributions=self.X)
        assert torch.equal(state, torch.get_rng_state())
        torch.rand(3)
        second = infidelity_and_sensitivity(method, self.X, 1, attributions=self.X)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_model_output_and_several_inputs(self) -> None:
        class Two(InputXGradient):
            def __init__(self) -> None:
                super().__init__(lambda a, b: {"logits": linear(a * b)})

            def attribute(self, inputs, target=None, additional_forward_args=None):  # noqa: ANN001, ANN202
                return tuple(torch.ones_like(x) for x in inputs)

        result = infidelity_and_sensitivity(Two(), (self.X, self.X), 1)
        assert result.infidelity.shape == result.sensitivity_max.shape == (2,)

    def test_token_ids_are_refused(self) -> None:
        with pytest.raises(ValueError, match="token ids"):
            infidelity_and_sensitivity(Unwrapping(Wrapped()), torch.ones(1, 3, dtype=torch.long), 1)


class TestBootstrap:
    def test_agrees_with_scipy(self) -> None:
        values = np.random.default_rng(0).normal(3, 2, 80)
        (ours,) = bootstrap(values, resamples=5000)
        reference = scipy_bootstrap((values,), np.mean, n_resamples=5000, method="percentile", random_state=0)
        assert ours.value == pytest.approx(values.mean())
        assert ours.low == pytest.approx(reference.confidence_interval.low, abs=0.05)
        assert ours.high == pytest.approx(reference.confidence_interval.high, abs=0.05)

    def test_interval_covers_as_often_as_it_says(self) -> None:
        generator = np.random.default_rng(1)
        covered = 0
        for seed in range(200):
            (estimate,) = bootstrap(generator.normal(0, 1, 60), confidence=0.9, resamples=200, seed=seed)
            covered += estimate.low <= 0 <= estimate.high
        assert 160 <= covered <= 195

    def test_rows_stay_together(self) -> None:
        rows = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 10.0]])
        (ratio,) = bootstrap(rows, lambda r: r[:, 1].sum() / r[:, 0].sum())
        assert (ratio.value, ratio.low, ratio.high) == (2, 2, 2)

    def test_same_seed_same_interval(self) -> None:
        values = torch.rand(30)
        assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
        assert bootstrap(values, seed=1) != bootstrap(values, seed=2)

    def test_undefined_examples_are_left_out_and_counted(self) -> None:
        (estimate,) = bootstrap(torch.tensor([1.0, float("nan"), 3.0]))
        assert (estimate.value, estimate.count, estimate.skipped) == (2, 2, 1)
        (nothing,) = bootstrap(torch.tensor([float("nan")]))
        assert math.isnan(nothing.value)
        assert (nothing.count, nothing.skipped) == (0, 1)
        (single,) = bootstrap(torch.tensor([4.0]))
        assert single.value == 4
        assert math.isnan(single.low)

    def test_bad_options(self) -> None:
        with pytest.raises(ValueError, match="confidence"):
            bootstrap(torch.rand(3), confidence=95)


class TestMeanScore:
    def test_by_hand(self) -> None:
        scores = MeanScore()
        scores.update(saco=torch.tensor([0.5, 1.0]), gap=torch.tensor([0.0, 2.0]))
        scores.update(saco=torch.tensor([0.0]), gap=torch.tensor([1.0]))
        result = scores.compute()
        assert isinstance(result["saco"], Estimate)
        assert (result["saco"].value, result["gap"].value) == (0.5, 1)
        assert scores.examples()["saco"].tolist() == [0.5, 1, 0]

    def test_bad_input(self) -> None:
        scores = MeanScore()
        with pytest.raises(ValueError, match="one-dimensional"):
            scores.update(a=torch.rand(2), b=torch.rand(3))
        scores.update(a=torch.rand(2))
        with pytest.raises(ValueError, match="before it was"):
            scores.update(b=torch.rand(2))
        with pytest.raises(ValueError, match="before any update"):
            MeanScore().compute()

"""ConsensusRelevance: ranks counted by loops, tokens of all inputs ranked together, padding that changes nothing."""

import pytest
import torch
from golden_models import assert_padding_changes_nothing
from tiny_models import TinyText, TinyViT, TwoInputs, randomise

from captum_transformer_attr import AttentionRelevance, ConsensusRelevance, FullGradPlus
from captum_transformer_attr.methods.consensus import shared_ranks


def counted(scores, present):
    """ρ_i by its definition, in Python."""
    values = scores.tolist()
    others = [v for v, p in zip(values, present, strict=True) if p]
    return torch.tensor(
        [
            (sum(o < v for o in others) + sum(o == v for o in others) / 2) / len(others) if p else 0.0
            for v, p in zip(values, present, strict=True)
        ],
        dtype=scores.dtype,
    )


def test_ranks_by_hand():
    first = torch.tensor([[3.0, 0.0, 1.0, 1.0, 0.0]])
    second = torch.tensor([[-2.0, 0.0, 0.0, 5.0, 4.0]])
    # The second token has nothing in either map; ties share their places.
    ranked, other = shared_ranks([first, second])
    assert torch.allclose(ranked, torch.tensor([[7 / 8, 0, 4 / 8, 4 / 8, 1 / 8]]))
    assert torch.allclose(other, torch.tensor([[1 / 8, 0, 3 / 8, 7 / 8, 5 / 8]]))


@pytest.mark.parametrize(
    "model, inputs, target",
    [
        (TinyViT(), torch.randn(3, 3, 8, 8, dtype=torch.float64), [0, 3, 1]),
        (TinyText(depth=3), torch.randint(0, 20, (2, 6)), (4, 3)),
    ],
)
def test_mean_of_the_ranks_of_both_methods(model, inputs, target):
    model = randomise(model.double())
    got = ConsensusRelevance(model).attribute_tokens(inputs, target)
    maps = [method(model).attribute_tokens(inputs, target) for method in (AttentionRelevance, FullGradPlus)]
    for i, scores in enumerate(got.flatten(1)):
        parts = [m.flatten(1)[i] for m in maps]
        present = ((parts[0] != 0) | (parts[1] != 0)).tolist()
        want = (counted(parts[0], present) + counted(parts[1], present)) / 2
        assert torch.allclose(scores, want, rtol=1e-9, atol=1e-12)
    assert got.flatten(1).std(1).min() > 0.05


def test_tokens_of_several_inputs_are_ranked_together():
    model = randomise(TwoInputs().double())
    inputs = (torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 2, 7, dtype=torch.float64))
    got = torch.cat(ConsensusRelevance(model).attribute_tokens(inputs, [0, 2]), 1)
    maps = [torch.cat(m(model).attribute_tokens(inputs, [0, 2]), 1) for m in (AttentionRelevance, FullGradPlus)]
    for i in range(2):
        want = sum(counted(m[i], [True] * 5) for m in maps) / 2
        assert torch.allclose(got[i], want, rtol=1e-9, atol=1e-12)


def test_padding():
    assert_padding_changes_nothing(lambda model: ConsensusRelevance(model).attribute_tokens)


def test_convergence_delta_is_that_of_the_relevance():
    model = randomise(TinyViT().double())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    _, delta = ConsensusRelevance(model).attribute(images, 1, return_convergence_delta=True)
    assert delta.shape == (2,) and delta.abs().max() < 1e-6

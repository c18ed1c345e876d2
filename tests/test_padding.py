"""Padding: zeros inside the model (windows that do not fit) are accounted for; masked tokens of a batch."""

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as T
from tiny_models import randomise
from torch import nn

from captum_transformer_attr import (
    AttCAT,
    AttentionGradCam,
    LeGrad,
    TokenStatisticsRelevance,
    TokenTM,
    TransformerLRP,
    TransformerRelevance,
)
from captum_transformer_attr.flow.padding import seen_keys
from captum_transformer_attr.recording.inputs import parse
from captum_transformer_attr.recording.session import recorded

WIDTH = 8


class Padded(nn.Module):
    """Two zero tokens behind five; keys without a bias, so that the padded keys and all their scores are exactly 0."""

    def __init__(self, fused, bias_of_values):
        super().__init__()
        self.embed, self.head, self.fused = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4), fused
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.v, self.proj = nn.Linear(WIDTH, WIDTH, bias=bias_of_values), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.embed(x)
        padded = F.pad(x, (0, 0, 0, 2))
        q, k, v = (t(padded).unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT / 2).softmax(-1) @ v
        return self.head((x + self.proj(y.transpose(1, 2).flatten(2))[:, :5]).mean(1))


@pytest.mark.parametrize("bias_of_values", [True, False])
def test_relevance_is_accounted_for(bias_of_values):
    """Fused and written-out attention agree, all relevance arrives somewhere, an example alone is as in the batch."""
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    found = []
    for fused in (True, False):
        method = TransformerRelevance(randomise(Padded(fused, bias_of_values).double()))
        scores, delta = method.attribute(x, 1, return_convergence_delta=True)
        assert delta.abs().max() < 1e-6
        assert torch.allclose(scores[1:], method.attribute(x[1:], 1), rtol=1e-10, atol=1e-14)
        found.append(scores)
    assert torch.allclose(*found, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype, tiny", [(torch.float64, 1e-312), (torch.float32, 1e-41)])
def test_inputs_that_underflow_count_as_zero(dtype, tiny):
    """A layer whose inputs are denormal: nothing is sent to them, all is accounted for, nothing overflows."""
    layer = nn.Linear(3, 2).to(dtype)
    x = torch.full((1, 3), tiny, dtype=dtype)
    scores, delta = TransformerLRP(layer).attribute(x, 1, return_convergence_delta=True)
    assert torch.equal(scores, torch.zeros_like(x)) and delta == 0


# ---------------------------------------------------------------------- padded batches
TEXT = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
TEXT_METHODS = {
    "TokenStatisticsRelevance": TokenStatisticsRelevance,
    "AttentionGradCam, map": lambda model: AttentionGradCam(model, average="map"),
    "LeGrad": LeGrad,
    "AttCAT": AttCAT,
    "TokenTM": TokenTM,
}


def deberta():
    """Written-out attention over (B · H, N, N); everything is hidden from a padded query, which sees all keys alike."""
    config = T.DebertaV2Config(
        **TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4, num_labels=3
    )
    return T.DebertaV2ForSequenceClassification(config)


def lxmert():
    """Padded text asks the image: its queries are padding that this attention itself does not tell."""
    config = T.LxmertConfig(
        **TEXT, l_layers=1, r_layers=1, x_layers=2, visual_feat_dim=5, num_qa_labels=3, num_labels=3
    )
    return T.LxmertForQuestionAnswering(config)


@pytest.mark.parametrize("method", TEXT_METHODS)
@pytest.mark.parametrize("build", [deberta, lxmert])
def test_padding_changes_nothing(build, method):
    if build is lxmert and method in ("LeGrad", "AttCAT", "TokenTM"):
        pytest.skip("refuses models of several streams")
    model = randomise(build().double())
    generator = torch.Generator().manual_seed(1)
    lengths = (7, 4)
    mask = torch.tensor([[1] * n + [0] * (7 - n) for n in lengths])
    inputs = {"input_ids": torch.randint(3, 30, (2, 7), generator=generator) * mask, "attention_mask": mask}
    if build is lxmert:
        for name, width in (("visual_feats", 5), ("visual_pos", 4)):
            inputs[name] = torch.randn(2, 3, width, dtype=torch.float64, generator=generator)
    explain = TEXT_METHODS[method](model).attribute_tokens
    found = set()
    for target in range(3):
        got = explain(inputs, target)
        for i, n in enumerate(lengths):
            one = {k: t[i : i + 1, :n] if t.shape == mask.shape else t[i : i + 1] for k, t in inputs.items()}
            for name, alone in explain(one, target).items():
                torch.testing.assert_close(got[name][i : i + 1, : alone.shape[1]], alone, rtol=1e-6, atol=1e-9)
                assert (got[name][i, alone.shape[1] :] == 0).all()
                found |= {(i, name)} if (alone != 0).any() else set()
    assert len(found) == 2 * len(got)


def test_heads_that_are_mixed_hide_no_key():
    """Talking heads weigh keys negatively: no padding."""
    model = randomise(timm.models.cait.Cait(32, 8, embed_dim=24, depth=2, num_heads=2, num_classes=3).double().eval())
    for block in model.blocks:
        nn.init.constant_(block.attn.proj_w.bias, -1.0)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with recorded(model, parse(images)) as recording:
        recording.select(1)
        maps = [(node, node.probabilities(slice(0, node.map_shape[-2]))) for node in recording.attentions]
        assert any(bool((p.amax(-2) < 0).any()) for _, p in maps), "the mixing is too tame to show anything"
        assert all(bool(seen_keys(node).all()) for node, _ in maps)

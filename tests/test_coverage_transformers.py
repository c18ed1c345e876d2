"""A tiny model of every transformers model type that is promised to work, with fused and written-out attention in turn.

The bounds are those of ``benchmarks/coverage.py``, which runs every type with both.
"""

import re

import pytest

from benchmarks import coverage_transformers
from benchmarks.coverage_check import BATCH, DELTA, FORWARD, check

TYPES = """
albert bert deberta-v2 distilbert electra longformer modernbert mpnet roberta xlm-roberta
gemma gemma3_text gpt2 gpt_neox llama mistral mixtral opt phi qwen2 qwen3 qwen3_moe
bart t5 whisper
beit deit dinov2 dinov3_vit pvt segformer swin swinv2 videomae vit vit_mae
wav2vec2
blip clip llava paligemma qwen2_vl siglip vilt
""".split()
CASES = {case[0]: case for case in coverage_transformers.cases()}
CHOSEN = []
for position, kind in enumerate(TYPES):
    variants = [name for name in CASES if name.split(" [")[0] == kind]
    CHOSEN.append(variants[position % len(variants)])


@pytest.mark.parametrize("name", CHOSEN)
def test_attributed(name):
    row = check(CASES[name], "TransformerRelevance")
    assert row.outcome == "attributed", row.reason
    assert row.delta <= DELTA and row.batch <= BATCH and row.forward <= FORWARD
    assert row.attentions > 0


REFUSED = {
    "fnet [eager]": "fft_fftn.*fourier",
    "bamba [sdpa]": "cumsum.*mamba",
    "qwen3_next [eager]": "linalg_solve_triangular.*linear_attn",
    "bloom [eager]": "GeLUFunction.*gelu_impl",
    "groupvit [eager]": "downsample.assign",
    "clipseg [sdpa]": "vision_model",
    "swiftformer [eager]": "no softmax attention",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    row = check(CASES[name], "TransformerRelevance")
    assert row.outcome == "refused" and re.search(REFUSED[name], row.reason), (row.outcome, row.reason)

"""Every Python snippet of docs/relevance.md runs, and gives the shapes that its comments promise."""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from small_language_models import LLAMA, build, word_tokenizer
from tiny_models import TinyViT, randomise

PAGE = Path(__file__).parent.parent / "docs" / "relevance.md"


def test_snippets():
    names: dict[str, Any] = {
        "model": randomise(TinyViT()),
        "pixels": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        "tokenizer": word_tokenizer(),
        "llama": build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA), torch.float32),
    }
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(snippets) == 5
    for snippet in snippets:
        exec(snippet, names)
    tokens = names["first"].shape[1]
    block = names["block"]
    assert block.stream.shape == block.attention.shape == block.mlp.shape == (2, tokens)
    assert block.heads["blocks.0"].shape[::2] == (2, tokens) and names["ranking"]["blocks.0"].shape[0] == 2
    assert names["entering"].shape == names["second"].shape == names["first"].shape
    assert names["relevance"].shape == names["neuron"].shape == (2, 3, 8, 8)
    assert names["method"].forward_func is names["llama"] and names["scores"].shape == (2, 3)
    assert names["found"].scores["input_ids"].shape == (2, 3, 5)
    assert names["delta"].abs().max() < 1e-4 and names["taken"]

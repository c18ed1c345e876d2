"""Median time of lxt's AttnLRP (gradient × embedding of the patched model) over that of the plain forward.

Runs inside an environment with ``lxt``.

Usage: python speed_lxt_worker.py bert|llama TOKENS REPEAT THREADS; called by ``speed.py``. The forward is timed before
lxt patches the process.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

CONFIGS = {
    "bert": ("BertForSequenceClassification", {"num_labels": 2}),
    "llama": (
        "LlamaForCausalLM",
        {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
            "max_position_embeddings": 16384,
            "use_cache": False,
        },
    ),
}


def median(run: Callable[[], Any], repeat: int) -> float:
    """Seconds, after one warm-up."""
    run()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(family: str, tokens: str, repeat: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    name, options = CONFIGS[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = transformers.AutoConfig.for_model(family, **options)
    ids = torch.randint(0, config.vocab_size, (1, int(tokens)))
    last = {"logits_to_keep": 1} if family == "llama" else {}
    plain = getattr(module, name)(config).eval()
    with torch.no_grad():
        forward = median(lambda: plain(input_ids=ids, **last), int(repeat))

    from lxt.efficient import monkey_patch

    monkey_patch(module, importlib.import_module(f"lxt.efficient.models.{family}").attnLRP)
    config._attn_implementation = "eager"
    model = getattr(module, name)(config).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def explain() -> torch.Tensor:
        embeddings = model.get_input_embeddings()(ids).requires_grad_()
        model(inputs_embeds=embeddings, **last).logits.reshape(-1)[1].backward()
        return (embeddings * embeddings.grad).sum(-1)

    print(median(explain, int(repeat)) / forward)


if __name__ == "__main__":
    main(*sys.argv[1:])

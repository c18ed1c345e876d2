"""Runs inside an environment with ``lxt``, in a process of its own: lxt patches transformers process-wide and cannot
undo it.

Usage: python peers_lxt_worker.py JOB RESULT, both files of ``torch.save``; called by ``peers_lxt.py``.
"""

from __future__ import annotations

import importlib
import sys

import torch


def main(job_file: str, result_file: str) -> None:
    """Relevance of every token id by lxt's patched gradient × embedding."""
    job = torch.load(job_file, weights_only=False)
    import lxt
    import transformers
    from lxt.efficient import monkey_patch

    module = importlib.import_module(f"transformers.models.{job['family']}.modeling_{job['family']}")
    patches = getattr(importlib.import_module(f"lxt.efficient.models.{job['family']}"), job["rules"])
    monkey_patch(module, patches)
    config = transformers.AutoConfig.for_model(job["family"], **job["config"])
    config._attn_implementation = "eager"
    model = getattr(module, job["class"])(config).double().eval()
    model.load_state_dict(job["weights"])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    embeddings = model.get_input_embeddings()(job["ids"]).detach().requires_grad_()
    logits = (
        model(inputs_embeds=embeddings, use_cache=False).logits
        if "GPT" in job["class"] or "Llama" in job["class"]
        else model(inputs_embeds=embeddings).logits
    )
    index = (slice(None), *job["target"]) if isinstance(job["target"], tuple) else (slice(None), job["target"])
    logits[index].sum().backward()
    relevance = (embeddings * embeddings.grad).sum(-1).detach()
    version = importlib.import_module("importlib.metadata").version("lxt")
    torch.save(
        {
            "relevance": relevance,
            "logits": logits.detach(),
            "version": version,
            "transformers": transformers.__version__,
            "path": lxt.__file__,
        },
        result_file,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

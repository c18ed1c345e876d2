"""Models and methods of the speed and memory benchmarks.

Random weights, nothing is downloaded; on the GPU if there is one, there in bfloat16 too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from captum.attr import InputXGradient, IntegratedGradients, LayerGradCam
from torch import Tensor, nn

from captum_transformer_attr import (
    AttentionRelevance,
    AttentionRollout,
    ForwardWrapper,
    TokenStatisticsRelevance,
    TransformerLRP,
    TransformerRelevance,
)
from captum_transformer_attr.evaluation.machine import described
from captum_transformer_attr.output_files import write_texts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """One model and one batch.

    Attributes:
        items: images or tokens per batch; ``unit`` says which.
        embed: the token embedding, for Captum's methods that need floats.
        layer: where Grad-CAM looks.
    """

    model: nn.Module
    inputs: Any
    target: Any
    items: int
    unit: str
    embed: nn.Module | None = None
    layer: nn.Module | None = None

    def forward(self) -> None:
        with torch.no_grad():
            self.model(**self.inputs) if isinstance(self.inputs, dict) else self.model(self.inputs)


def image_case(name: str, batch: int, size: int = 224, dtype: torch.dtype = torch.float32) -> Case:
    import timm

    model = timm.create_model(name, num_classes=1000).eval().to(DEVICE, dtype)
    layer = model.norm if hasattr(model, "norm") else None
    images = torch.randn(batch, 3, size, size, device=DEVICE, dtype=dtype)
    return Case(model, images, 1, batch, "images", layer=layer)


def bert_case(tokens: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Case:
    import transformers

    config = transformers.BertConfig(num_labels=2)
    model = transformers.BertForSequenceClassification(config).eval().to(DEVICE, dtype)
    inputs = {
        "input_ids": torch.randint(0, config.vocab_size, (batch, tokens), device=DEVICE),
        "attention_mask": torch.ones(batch, tokens, dtype=torch.long, device=DEVICE),
    }
    return Case(model, inputs, 1, batch * tokens, "tokens", embed=model.bert.embeddings.word_embeddings)


def llama_case(tokens: int, dtype: torch.dtype = torch.float32) -> Case:
    """A Llama-style model of about 125M parameters."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=16384,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).eval().to(DEVICE, dtype)
    inputs = {"input_ids": torch.randint(0, config.vocab_size, (1, tokens), device=DEVICE), "logits_to_keep": 1}
    return Case(model, inputs, (0, 1), tokens, "tokens", embed=model.model.embed_tokens)


FLOAT32: dict[str, Callable[..., Case]] = {
    **{
        f"{short} batch {batch}": partial(image_case, name, batch)
        for short, name in (
            ("ViT-Ti", "vit_tiny_patch16_224"),
            ("ViT-S", "vit_small_patch16_224"),
            ("ViT-B", "vit_base_patch16_224"),
        )
        for batch in (1, 8, 32)
    },
    "Swin-T batch 8": partial(image_case, "swin_tiny_patch4_window7_224", 8),
    "BERT-base 128 tokens": partial(bert_case, 128),
    "BERT-base 512 tokens": partial(bert_case, 512),
    "Llama-125M 512 tokens": partial(llama_case, 512),
    "Llama-125M 2048 tokens": partial(llama_case, 2048),
    "Llama-125M 8192 tokens": partial(llama_case, 8192),
}
CASES: dict[str, Callable[[], Case]] = {
    **FLOAT32,
    **({f"{n} bf16": partial(c, dtype=torch.bfloat16) for n, c in FLOAT32.items()} if DEVICE.type == "cuda" else {}),
    "tiny": partial(image_case, "test_vit", 2, 160),
}
STEPS = 50  # of Integrated Gradients


def known_cases(names: Sequence[str]) -> list[str]:
    """
    Raises:
        typer.BadParameter: for a name that no case has.
    """
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise typer.BadParameter(f"unknown case {unknown[0]!r}; known: {', '.join(CASES)}")
    return list(names)


def earlier(stem: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Results of former runs for other cases: they stay in the table, each with the circumstances of its own run."""
    path = stem.with_suffix(".json")
    if not path.is_file():
        return []
    return [result for result in json.loads(path.read_text())["results"] if result["case"] not in names]


def in_order(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By the place of their case in ``CASES``; cases of another machine last."""
    places = {name: place for place, name in enumerate(CASES)}
    return sorted(results, key=lambda result: places.get(result["case"], len(places)))


def made_by(results: list[dict[str, Any]]) -> list[str]:
    """Markdown lines that name the run of every case."""
    lines = ["## How", ""]
    for about in {json.dumps(result["about"]): result["about"] for result in results}.values():
        cases = ", ".join(result["case"] for result in results if result["about"] == about)
        lines += [f"{cases}:", "", described(about), ""]
    return lines


def write_results(stem: Path, results: list[dict[str, Any]], page: str) -> None:
    """``stem.json`` and ``stem.md``, both or none."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps({"results": results}, indent=1, default=str)
    write_texts({stem.with_suffix(".json"): data, stem.with_suffix(".md"): page})


Run = Callable[[], Any]


def ours(case: Case) -> dict[str, Run]:
    methods = {
        "TransformerRelevance": TransformerRelevance(case.model),
        "AttentionRelevance": AttentionRelevance(case.model),
        "TokenStatisticsRelevance": TokenStatisticsRelevance(case.model),
        "AttentionRollout": AttentionRollout(case.model),
        **{
            f"TransformerLRP {rules}": TransformerLRP(case.model, rules=rules)
            for rules in ("deep_taylor", "attnlrp", "cp", "libra")
        },
    }
    return {
        name: lambda method=method: method.attribute(case.inputs, target=case.target)
        for name, method in methods.items()
    }


def peers(case: Case, steps: int = STEPS) -> dict[str, Run]:
    """Captum's methods on the same model; token ids enter through their embedding, as Captum's layer wrappers do."""
    if case.embed is None:
        wrapped: nn.Module = ForwardWrapper(case.model)
        inputs = case.inputs
    else:
        inputs = case.embed(case.inputs["input_ids"]).detach()
        others = {k: v for k, v in case.inputs.items() if k != "input_ids"}
        wrapped = Embedded(case.model, others)
    found: dict[str, Run] = {
        "InputXGradient": lambda: InputXGradient(wrapped).attribute(
            inputs.clone().requires_grad_(), target=case.target
        ),
        f"IntegratedGradients ({steps} steps)": lambda: IntegratedGradients(wrapped).attribute(
            inputs, target=case.target, n_steps=steps, internal_batch_size=max(8, len(inputs))
        ),
    }
    if case.layer is not None:
        found["LayerGradCam"] = lambda: LayerGradCam(wrapped, case.layer).attribute(inputs, target=case.target)
    if case.embed is not None and hasattr(case.model.config, "num_attention_heads") and "attention_mask" in case.inputs:
        found["rollout of output_attentions"] = lambda: hugging_face_rollout(case)
    return found


class Embedded(nn.Module):
    """A Hugging Face model called with embeddings."""

    def __init__(self, model: nn.Module, others: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.others = model, others

    def forward(self, embeddings: Tensor) -> Tensor:
        others = {
            k: v.repeat_interleave(len(embeddings) // len(v), 0) if isinstance(v, Tensor) else v
            for k, v in self.others.items()
        }
        logits: Tensor = self.model(inputs_embeds=embeddings, **others).logits
        return logits


def hugging_face_rollout(case: Case) -> Tensor:
    """What users write today: eager attentions of every layer, averaged over heads, multiplied out."""
    before = case.model.config._attn_implementation
    case.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = case.model(**case.inputs, output_attentions=True).attentions
    finally:
        case.model.set_attn_implementation(before)
    identity = torch.eye(maps[0].shape[-1], device=maps[0].device, dtype=maps[0].dtype)
    result = identity.expand(len(maps[0]), -1, -1)
    for a in maps:
        result = (a.mean(1) + identity) / 2 @ result
    return result

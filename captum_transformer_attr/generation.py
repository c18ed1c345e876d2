"""Why was this token generated? Scores of the source and of everything written before, for every generated position."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.methods.token_level import TokenAttribution
from captum_transformer_attr.methods.transformer_lrp import TransformerLRP

IDS, DECODER_IDS, MASK = "input_ids", "decoder_input_ids", "attention_mask"


@dataclass(frozen=True)
class GenerationScores:
    """Token scores of every explained position.

    Attributes:
        positions: ``(S,)``, where the explained tokens stand in ``generate``'s result.
        tokens: ``(N, S)``, the tokens.
        scores: per explained input ``(N, S, …)``: prompt and generated prefix under ``input_ids`` (language models) or
            ``decoder_input_ids`` ``(N, S, T)``, where what comes after the position is 0; the source under its own
            names.
        explained: ``(N, S)``, False behind an example's end of sequence, where the scores are 0.
    """

    positions: Tensor
    tokens: Tensor
    scores: dict[str, Tensor]
    explained: Tensor


def explain_generation(
    method: TokenAttribution | TransformerLRP,
    inputs: Mapping[str, Any],
    generated: Tensor,
    positions: Sequence[int] | None = None,
) -> GenerationScores:
    """Scores for every token that ``model.generate(**inputs)`` wrote.

    The whole text is read once; each position is then explained by backward passes over all examples together, which
    gives what explaining the model at that step of the generation would give.

    Args:
        method: a method around a Hugging Face model with a language head, such as ``AttentionRelevance(model)`` or
            ``TransformerLRP(model, "attnlrp")``.
        inputs: what ``generate`` was given: prompt or source with its mask, images, sounds.
        generated: what ``generate`` returned, ``(N, L)``.
        positions: which tokens of ``generated`` to explain; by default every token behind the prompt (language models)
            or the start token (encoder-decoders). Negative ones count from the end.

    Raises:
        InputError: if nothing was generated, a position is none of the generated ones, or the model's kind is unknown.
    """
    model = method.forward_func
    config = getattr(model, "config", None)
    if config is None:
        raise InputError("method: its model has no config; explain_generation needs a Hugging Face model")
    given = {name: value for name, value in inputs.items() if value is not None}
    if getattr(config, "is_encoder_decoder", False):
        start, name = 1, DECODER_IDS
        given[DECODER_IDS] = generated[:, :-1]
    else:
        prompt = given.get(IDS)
        if prompt is None:
            raise InputError(f"inputs: a language model's prompt must be given as '{IDS}'")
        start, name = prompt.shape[1], IDS
        if generated.shape[1] < start or not torch.equal(generated[:, :start], prompt.to(generated)):
            generated = torch.cat([prompt.to(generated), generated], 1)  # some models return only what they wrote
        given = continued(model, given, generated[:, :-1])
    chosen = selected(positions, start, generated.shape[1])
    if "use_cache" in arguments_of(model):
        given["use_cache"] = False
    explained = alive(model, generated, start)[:, chosen]
    targets = [[(p - 1, int(token)) for token in generated[:, p]] for p in chosen]
    found = method.attribute_tokens_each(given, targets)
    scores = {key: torch.stack([scored[key] for scored in found], 1) for key in found[0]}
    scores = {key: s * explained.to(s).reshape(*explained.shape, *(1,) * (s.ndim - 2)) for key, s in scores.items()}
    if name not in scores:
        raise InputError(f"the model explains no '{name}': it is no language model with a head")
    return GenerationScores(torch.tensor(chosen), generated[:, chosen], scores, explained)


def continued(model: Any, inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The arguments that read prompt and generated text at once, as the steps of the generation did."""
    prompt = inputs[IDS].shape[1]
    added = ids.shape[1] - prompt
    result = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == prompt and name != IDS:
            # Masks go on with ones; token types and their like with their last value.
            last = torch.ones_like(value[:, -1:]) if name == MASK else value[:, -1:]
            result[name] = torch.cat([value, last.expand(-1, added)], 1)
    result[IDS] = ids
    mask = result.get(MASK)
    if isinstance(mask, Tensor) and bool((mask[:, 0] == 0).any()):  # padded on the left
        if "position_ids" not in result and "position_ids" in arguments_of(model):
            result["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    return result


def selected(positions: Sequence[int] | None, start: int, length: int) -> list[int]:
    """Positions as non-negative numbers, checked."""
    if length <= start:
        raise InputError("generated: holds nothing behind the prompt")
    if positions is None:
        return list(range(start, length))
    found = [p + length if p < 0 else p for p in positions]
    wrong = [p for p, q in zip(positions, found, strict=True) if not start <= q < length]
    if wrong or not found:
        what = f"position {wrong[0]} is none" if wrong else "empty"
        raise InputError(f"positions: {what}; the generated tokens are at {start} to {length - 1}")
    return found


def alive(model: Any, generated: Tensor, start: int) -> Tensor:
    """Which tokens come before or at an example's first end of sequence, ``(N, L)``."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = model.config.eos_token_id if ends is None else ends
    if ends is None:
        return torch.ones_like(generated, dtype=torch.bool)
    ended = torch.isin(generated, torch.as_tensor(ends, device=generated.device))
    ended[:, :start] = False  # the start token of many decoders is the end token
    return ended.long().cumsum(1) - ended.long() == 0


def arguments_of(model: Any) -> set[str]:
    """Names of the forward's arguments."""
    return set(inspect.signature(model.forward).parameters)

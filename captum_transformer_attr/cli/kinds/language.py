"""Tokens that a language model writes after a prompt, or in answer to a text."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_transformer_attr.cli.cases import Case, Question, TextView
from captum_transformer_attr.cli.kinds.classes import check_differ, contrasted, model_scores
from captum_transformer_attr.cli.kinds.text import EncodedText, encode, read_text
from captum_transformer_attr.comparison import element_scores
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.loading import LanguageModel
from captum_transformer_attr.loading.words import Merge
from captum_transformer_attr.recording.targets import Contrast
from captum_transformer_attr.visualization.report import FloatArray

TRANSLATED_TOKENS = 8
"""How many tokens an encoder-decoder writes unless the user says otherwise: a single one says little."""


def language_case(
    loaded: LanguageModel,
    given: str,
    targets: Sequence[str],
    top: int,
    generate: int,
    device: torch.device,
    merge: Merge,
) -> Case:
    """Read a prompt, and say which tokens to explain.

    Args:
        loaded: A causal or encoder-decoder language model.
        given: The prompt, or the path of a text file.
        targets: Next tokens the user wants explained; if empty, what the model writes.
        top: How many of the likeliest next tokens to explain.
        generate: How many tokens the model is to write, each of which is then explained; 0 for the next token only.
        device: Where the model is.
        merge: How the scores of word pieces become a word's.

    Raises:
        InputError: if the prompt is empty, a target is no single token, or targets are given for generated text.
    """
    if targets and generate:
        raise InputError("--target names the next token; leave it out to explain what --generate writes")
    text, title = read_text(given)
    encoded = encode(loaded.tokenizer, text, device, merge)
    if loaded.has_encoder and not targets and not generate:
        generate = TRANSLATED_TOKENS
    prompt = _without_cache(loaded, encoded.inputs)
    if generate:
        return _written(loaded, title, encoded, _generated(loaded, prompt, generate))
    if loaded.has_encoder:
        prompt["decoder_input_ids"] = _start(loaded, device)
    probabilities = model_scores(loaded, prompt)[0, -1].softmax(-1)
    count = len(probabilities)
    chosen: list[list[int]] = [[token] for token in probabilities.topk(min(top, count)).indices.tolist()]
    if targets:
        chosen = [
            [token_index(loaded.tokenizer, name, count) for name in contrasted(target)]
            for target in dict.fromkeys(targets)
        ]
        check_differ(chosen, targets)
    position = (prompt["decoder_input_ids"] if loaded.has_encoder else prompt["input_ids"]).shape[1] - 1
    tokens = list(dict.fromkeys(token for pair in chosen for token in pair))
    names = dict(zip(tokens, token_labels(loaded.tokenizer, tokens), strict=True))
    questions = tuple(_next_token(names, pair, position, prompt, probabilities) for pair in chosen)
    predicted = token_labels(loaded.tokenizer, [int(probabilities.argmax())])[0]
    view = TextView("prompt", encoded.words, encoded.scores)
    return Case(title, questions, (view,), f"next token: {predicted}{encoded.note()}")


def _next_token(
    names: dict[int, str], tokens: list[int], position: int, prompt: dict[str, Any], probabilities: Tensor
) -> Question:
    """The question about one token, or about one token rather than another."""
    label = " rather than ".join(names[token] for token in tokens)
    first = (position, tokens[0])
    if len(tokens) == 1:
        return Question(label, first, prompt, float(probabilities[tokens[0]]))
    return Question(label, Contrast(first, (position, tokens[1])), prompt)


def token_index(tokenizer: Any, wanted: str, count: int) -> int:
    """The token a user means: ``#123`` by its id, or a text that is one token, alone or behind a space.

    Raises:
        InputError: if it is none or several tokens.
    """
    if wanted.startswith("#") and wanted[1:].isdigit():
        if int(wanted[1:]) < count:
            return int(wanted[1:])
        raise InputError(f"target {wanted}: the vocabulary has {count} tokens, #0 to #{count - 1}")
    spelled = [tokenizer.encode(text, add_special_tokens=False) for text in (wanted, f" {wanted}")]
    unknown = getattr(tokenizer, "unk_token_id", None)
    for pieces in reversed(spelled):
        # A vocabulary of whole words has one token for every word it does not know.
        if len(pieces) == 1 and (pieces[0] != unknown or wanted == tokenizer.unk_token):
            return int(pieces[0])
    if spelled[0] == [unknown]:
        raise InputError(f"target {wanted!r} is not in the vocabulary; name another token, or an id as #123")
    pieces = " ".join(repr(piece) for piece in tokenizer.convert_ids_to_tokens(spelled[0]))
    raise InputError(f"target {wanted!r} is {len(spelled[0])} tokens ({pieces}); name one of them, or an id as #123")


def token_text(tokenizer: Any, token: int) -> str:
    """A token as it is read; its own name where that is nothing but white space."""
    return tokenizer.decode([token]).strip() or str(tokenizer.convert_ids_to_tokens([token])[0])


def token_labels(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """A readable, distinct label per token."""
    readable = [token_text(tokenizer, token) for token in tokens]
    return [
        f"{text} (#{token})" if readable.count(text) > 1 else text for text, token in zip(readable, tokens, strict=True)
    ]


def _without_cache(loaded: LanguageModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """The model's inputs; keys and values of earlier tokens are of no use here."""
    cached = "use_cache" in inspect.signature(loaded.model.forward).parameters
    return {**inputs, **({"use_cache": False} if cached else {})}


def _start(loaded: LanguageModel, device: torch.device) -> Tensor:
    config: Any = loaded.model.config
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        start = config.bos_token_id
    return torch.tensor([[start]], device=device)


def _generated(loaded: LanguageModel, prompt: dict[str, Any], count: int) -> dict[str, Any]:
    """The prompt with what the model writes behind it, greedily; ``new`` holds the tokens written."""
    model: Any = loaded.model
    with torch.no_grad():
        ids = model.generate(
            **{key: value for key, value in prompt.items() if key != "use_cache"},
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
        )
    if loaded.has_encoder:
        return {**prompt, "decoder_input_ids": ids[:, :-1], "new": ids[0, 1:].tolist()}
    new = ids[0, prompt["input_ids"].shape[1] :].tolist()
    full = {**prompt, "input_ids": ids[:, :-1], "new": new}
    if "attention_mask" in prompt:
        full["attention_mask"] = torch.ones_like(ids[:, :-1])
    return full


def _written(loaded: LanguageModel, title: str, encoded: EncodedText, full: dict[str, Any]) -> Case:
    """One question per written token: what of the prompt, and of what was written before, made the model write it."""
    new = full.pop("new")
    if not new:
        raise InputError("the model wrote nothing")
    ids = full["decoder_input_ids"] if loaded.has_encoder else full["input_ids"]
    first = ids.shape[1] - len(new)
    probabilities = model_scores(loaded, full)[0].softmax(-1)
    names = [token_text(loaded.tokenizer, token) for token in new]
    questions = tuple(
        Question(f"{number + 1}. {name}", (first + number, token), full, float(probabilities[first + number, token]))
        for number, (name, token) in enumerate(zip(names, new, strict=True))
    )
    before = tuple(names[:-1])

    def written(attributions: Any) -> FloatArray:
        key = "decoder_input_ids" if loaded.has_encoder else "input_ids"
        scores = element_scores(attributions[key])[0].cpu().numpy()
        return scores[len(scores) - len(before) :]

    if loaded.has_encoder:
        views = [TextView("text read", encoded.words, encoded.scores)]
        if before:
            views.append(TextView("written before", before, lambda attributions, label: written(attributions)))
    else:
        views = [
            TextView(
                "prompt and text written",
                (*encoded.words, *before),
                lambda attributions, label: np.concatenate([encoded.scores(attributions), written(attributions)]),
            )
        ]
    return Case(title, questions, tuple(views), f"written: {loaded.tokenizer.decode(new)}{encoded.note()}")  # type: ignore[attr-defined]

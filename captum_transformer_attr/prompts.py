"""Prompts and chats as the inputs of a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from captum_transformer_attr.errors import InputError

Chat = Sequence[Mapping[str, Any]]


def prompt_inputs(
    tokenizer: Any, prompts: str | Chat | Sequence[str] | Sequence[Chat], device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Token ids and mask of one or several prompts, padded on the left so that the next token follows all of them.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompts: a text, a chat (messages with ``role`` and ``content``, written out by the tokenizer's chat template
            with the beginning of the assistant's turn), or a list of texts or of chats.
        device: where the tensors go.

    Returns:
        ``input_ids`` and ``attention_mask``, each ``(N, T)``: what ``attribute`` and ``model.generate`` take. The
        position that predicts the next token is ``-1``.

    Raises:
        InputError: for no prompt, an empty one, or a chat where the tokenizer has no chat template.
    """
    if isinstance(prompts, str) or is_chat(prompts):
        prompts = cast(Any, [prompts])
    rows = [row_of(tokenizer, cast(Any, prompt)) for prompt in prompts]
    empty = next((i for i, row in enumerate(rows) if not row), None)
    if not rows or empty is not None:
        raise InputError("prompts is empty" if not rows else f"prompts: number {empty} holds no token")
    longest = max(len(row) for row in rows)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def is_chat(prompt: Any) -> bool:
    """Whether these are the messages of one chat."""
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def row_of(tokenizer: Any, prompt: str | Chat) -> list[int]:
    """Token ids of one prompt."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if not is_chat(prompt):
        raise InputError(f"prompts: expected a text or a chat of messages, got {type(prompt).__name__}")
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError("prompts: the tokenizer has no chat template; write the chat out as a text")
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])

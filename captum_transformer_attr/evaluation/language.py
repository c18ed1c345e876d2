"""The task on a causal language model: which tokens of the prompt made it choose the next one?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.evaluation.batch import Batch, runner_up
from captum_transformer_attr.evaluation.measures import ORDERS, Measure, Perturbation, Saco
from captum_transformer_attr.evaluation.task import Task, batched, chosen
from captum_transformer_attr.metrics import TokenRemoval

METRICS = ("perturbation", "saco")


class NextToken(nn.Module):
    """A causal language model as a classifier of the next token: (N, T) ids to (N, vocabulary) logits.

    Prompts of a batch have one length, so that the last position is the last token.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, -1]


class LanguageTask(Task):
    """The next token after prompts of one length.

    Removed tokens are truly removed; the first one (the beginning-of-sequence token) always stays. The measure is the
    probability of the token that the model chose for the whole prompt.

    Args:
        name, title: see `Task`.
        model: a Hugging Face causal language model.
        prompts: (N, T) token ids.
        metrics: of `METRICS`.
        indices: which prompts.
    """

    def __init__(
        self,
        name: str,
        title: str,
        model: nn.Module,
        prompts: Tensor,
        metrics: Sequence[str],
        indices: Sequence[int],
    ) -> None:
        self.prompts = prompts
        self.metrics = tuple(metrics)
        super().__init__(name, title, NextToken(model), self._measures(), indices)

    def _measures(self) -> list[Measure]:
        # Prompts without their first token elsewhere (see sampled_prompts) stay of one length however many are removed.
        delete = TokenRemoval("delete", keep=(int(self.prompts[0, 0]),))
        available: dict[str, list[Measure]] = {
            "perturbation": [
                Perturbation(delete, order, ("predicted",), "predicted", measure="probability", entry="input_ids")
                for order in ORDERS
            ],
            "saco": [Saco(delete, entry="input_ids")],
        }
        return chosen(available, self.metrics)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        for rows in batched(self.indices, batch_size):
            ids = self.prompts[rows].to(self.device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                logits = self.model(**inputs)
            predicted = logits.argmax(1)
            targets = {"predicted": predicted, "other": runner_up(logits, predicted)}
            yield Batch([f"prompt {row}" for row in rows], inputs, logits, targets)

    def description(self) -> dict[str, Any]:
        prompts = [int(self.prompts.sum()), *self.prompts.shape]
        return {**super().description(), "metrics": self.metrics, "prompts": prompts}


def sampled_prompts(model: Any, count: int, length: int, seed: int = 0, first: int | None = None) -> Tensor:
    """Prompts in the model's own words: sampled from it at temperature 1, (count, length) ids with the first token.

    Args:
        model: a Hugging Face causal language model.
        first: the token to begin with, its beginning-of-sequence token by default.
    """
    start = model.config.bos_token_id if first is None else first
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        device = next(model.parameters()).device
        ids = torch.full((count, 1), start, device=device)
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            min_new_tokens=length - 1,
            max_new_tokens=length - 1,
            suppress_tokens=[start, *({model.config.eos_token_id} - {None, start})],
            pad_token_id=model.config.eos_token_id or 0,
        )[:, :length]

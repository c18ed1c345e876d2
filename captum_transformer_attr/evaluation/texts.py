"""Tasks on texts: a sequence classifier and a reader of texts, with rationales where there are any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

from captum_transformer_attr.datasets import DatasetError, Reader, Skipped, TextExample
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.evaluation.batch import Batch, Words, runner_up
from captum_transformer_attr.evaluation.measures import ORDERS, Measure, Perturbation, Rationale, Saco
from captum_transformer_attr.evaluation.task import Task, batched, chosen
from captum_transformer_attr.loading import TextModel
from captum_transformer_attr.metrics import ERASER_K, TokenRemoval

METRICS = ("perturbation", "perturbation-mask", "saco", "rationale")


class TextTask(Task):
    """A text classifier on labelled texts.

    Args:
        name, title: see `Task`.
        model: loaded with its (fast) tokenizer.
        reader: texts with labels; a label must name one of the model's classes, or begin its name ("NEG", "negative").
        metrics: of `METRICS`.
        indices: which examples.
        k: numbers of words for token F1.
        max_length: tokens kept of a text; the model's limit by default. Words behind it count as never selected.
    """

    def __init__(
        self,
        name: str,
        title: str,
        model: TextModel,
        reader: Reader[TextExample],
        metrics: Sequence[str],
        indices: Sequence[int],
        *,
        k: Sequence[int] = ERASER_K,
        max_length: int | None = None,
    ) -> None:
        self.loaded = model
        self.tokenizer = cast(Any, model.tokenizer)
        self.reader = reader
        self.metrics = tuple(metrics)
        self.k = tuple(k)
        limit = getattr(model.model.config, "max_position_embeddings", None)
        self.max_length = max_length or min(self.tokenizer.model_max_length, limit or 512)
        super().__init__(name, title, model.model, self._measures(), indices)

    def _measures(self) -> list[Measure]:
        padding: dict[str, Any] = {
            "keep": structural_tokens(self.tokenizer),
            "pad_token": self.tokenizer.pad_token_id or 0,
            "padding_side": self.tokenizer.padding_side,
        }
        delete = TokenRemoval("delete", **padding)
        available: dict[str, list[Measure]] = {
            "perturbation": [Perturbation(delete, order, entry="input_ids") for order in ORDERS],
            "saco": [Saco(delete, entry="input_ids")],
            "rationale": [Rationale(self.k)],
        }
        if self.tokenizer.mask_token_id is not None:
            mask = TokenRemoval("mask", mask_token=self.tokenizer.mask_token_id, **padding)
            options: dict[str, Any] = {"measure": "probability", "entry": "input_ids", "label": "masked"}
            available["perturbation-mask"] = [
                Perturbation(mask, order, ("predicted",), "predicted", **options) for order in ORDERS
            ]
        return chosen(available, self.metrics)

    @property
    def skipped(self) -> list[Skipped]:
        return self.reader.skipped

    @property
    def source(self) -> tuple[str, ...]:
        return self.reader.source

    def batches(self, batch_size: int) -> Iterator[Batch]:
        examples = (example for _, example in self.reader.examples(self.indices))
        return map(self._batch, batched(examples, batch_size))

    def _batch(self, examples: list[TextExample]) -> Batch:
        pads = self.tokenizer.pad_token_id is not None
        if not pads and len(examples) > 1:
            raise InputError(
                f"the tokenizer of {self.loaded.name} has no padding token: take one example at a time (batch size 1)"
            )
        encoding = self.tokenizer(
            [list(example.words) for example in examples],
            is_split_into_words=True,
            truncation=True,
            max_length=self.max_length,
            padding=pads,
            return_tensors="pt",
        )
        words = Words(
            [encoding.word_ids(i) for i in range(len(examples))],
            [len(example.words) for example in examples],
            [example.rationale for example in examples],
        )
        if "rationale" in self.metrics:
            without = next((e.name for e in examples if e.rationale is None), None)
            if without is not None:
                raise DatasetError(f"{without} has no rationale; leave out the metric rationale")
        inputs = {name: value.to(self.device) for name, value in encoding.items()}
        with torch.no_grad():
            logits = self.model(**inputs).logits
        predicted = logits.argmax(1)
        label = torch.tensor([self._class(example) for example in examples], device=self.device)
        targets = {"predicted": predicted, "label": label, "other": runner_up(logits, predicted)}
        return Batch([e.name for e in examples], inputs, logits, targets, words=words)

    def _class(self, example: TextExample) -> int:
        names = [name.lower() for name in self.loaded.class_names or ()]
        label = example.label.lower()
        if label in names:
            return names.index(label)
        fitting = [i for i, name in enumerate(names) if name.startswith(label) or label.startswith(name)]
        if len(fitting) == 1:
            return fitting[0]
        if label.isdigit() and (not names or int(label) < len(names)):
            return int(label)
        known = ", ".join(self.loaded.class_names or ()) or "unnamed"
        raise DatasetError(f"{example.name} has label {example.label!r}, the model's classes are {known}")

    def description(self) -> dict[str, Any]:
        return {
            **super().description(),
            "model": self.loaded.name,
            "metrics": self.metrics,
            "k": self.k,
            "max_length": self.max_length,
        }


def structural_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that no removal touches: all but the one for unknown words, which stands for a word.

    Where it is the end of a text or padding as well (GPT-2), it stays.
    """
    places = [getattr(tokenizer, f"{name}_token_id", None) for name in ("cls", "sep", "bos", "eos", "pad")]
    return [token for token in tokenizer.all_special_ids if token != tokenizer.unk_token_id or token in places]

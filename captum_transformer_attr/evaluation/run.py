"""Method by method, batch by batch: attributions, then every measure of the task."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from captum_transformer_attr.comparison import Method
from captum_transformer_attr.errors import TransformerAttributionError
from captum_transformer_attr.evaluation.batch import Batch, once_per_class, select
from captum_transformer_attr.evaluation.measures import Column
from captum_transformer_attr.evaluation.store import Progress, Store
from captum_transformer_attr.evaluation.task import Task
from captum_transformer_attr.recording.outputs import unwrap

Advance = Callable[[str, int, int], None]
"""Told the method's name, the examples done and their number, after every batch."""


@dataclass(frozen=True)
class MethodRow:
    """One row of a table.

    Attributes:
        method: its name.
        columns: its numbers; empty where it failed.
        seconds: per example, attributions of all classes asked for.
        examples: how many it was measured on.
        error: why there are no numbers; one line.
        about: `circumstances` of the earlier run that measured it; None for the run that writes the table.
    """

    method: str
    columns: tuple[Column, ...]
    seconds: float
    examples: int
    error: str = ""
    about: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TaskResult:
    """One table.

    Attributes:
        task: its short name.
        title: what it is about.
        rows: one per method.
        skipped: reasons of the examples that could not be read.
        description: what the numbers depend on.
    """

    task: str
    title: str
    rows: tuple[MethodRow, ...]
    skipped: tuple[str, ...]
    description: Mapping[str, Any]


def evaluate(
    task: Task,
    methods: Sequence[Method],
    *,
    batch_size: int = 8,
    folder: str | Path | None = None,
    advance: Advance | None = None,
    save_every: float = 30.0,
    seed: int = 0,
    precision: torch.dtype | None = None,
) -> TaskResult:
    """Measures every method on a task.

    A method that refuses the model or the input (an error of this package) becomes a row that says so; any other
    exception is a defect and is raised.

    Args:
        task: model, data, measures.
        methods: as `captum_transformer_attr.comparison.resolve` and `evaluation.controls` make them.
        batch_size: examples at a time; the numbers do not depend on it beyond rounding, but for those of Captum's
            metrics, whose random draws are one for a whole batch.
        folder: where finished work is kept, so that the same call goes on where an interrupted one stopped.
        advance: called after every batch.
        save_every: seconds between two savings within a method.
        seed: of the bootstrap intervals.
        precision: the measures ask the model about altered inputs under autocast to this type, e.g. `torch.bfloat16`;
            attributions are always computed in the model's own.
    """
    store = Store(folder)
    store.prepare(task.name)
    description = description_of(task, precision)
    forward = task.model if precision is None else autocast_forward(task.model, precision, task.device)
    # An interrupted method goes on at a batch's end, which lies elsewhere for another batch size.
    stored = {**description, "batch_size": batch_size, "source": task.source}
    run = _Run(task, store, stored, batch_size, advance, save_every)
    rows = []
    skipped: dict[str, None] = {}
    for method in methods:
        progress = Progress({measure.name: measure.accumulator(forward) for measure in task.measures})
        store.load(stored, method.name, progress)
        run.measure(method, progress)
        skipped |= dict.fromkeys(progress.skipped)
        columns: list[Column] = []
        if not progress.error:
            for measure in task.measures:
                columns += measure.columns(progress.accumulators[measure.name], seed)
        seconds = progress.seconds / max(progress.done, 1)
        rows.append(MethodRow(method.name, tuple(columns), seconds, progress.done, progress.error))
    return TaskResult(task.name, task.title, tuple(rows), tuple(skipped), description)


def description_of(task: Task, precision: torch.dtype | None = None) -> dict[str, Any]:
    """What the numbers of `evaluate` depend on beside the method, as JSON."""
    return task.description() | ({} if precision is None else {"precision": str(precision)})


def autocast_forward(
    model: torch.nn.Module, precision: torch.dtype, device: torch.device
) -> Callable[..., torch.Tensor]:
    """The model's logits in float32, computed under autocast."""

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast(device.type, precision):
            return unwrap(model(*args, **kwargs)).float()

    return forward


def attribute_roles(method: Method, task: Task, batch: Batch) -> dict[str, Any]:
    """Attributions per role; examples whose class was explained for the first role are not explained again."""

    def attributions(role: str, rows: torch.Tensor) -> Any:
        return method.attribute(task.model, select(batch.inputs, rows), batch.targets[role][rows])

    return once_per_class(batch, task.roles, attributions)


@dataclass(frozen=True)
class _Run:
    """One evaluation: a task, where finished work is kept, and the options of `evaluate`."""

    task: Task
    store: Store
    description: Mapping[str, Any]
    batch_size: int
    advance: Advance | None
    save_every: float

    def measure(self, method: Method, progress: Progress) -> None:
        """Brings one method to the end of the task, from where its progress stands."""
        total = len(self.task.indices)
        if progress.finished:
            self._tell(method, total)
            return
        seen, saved = 0, time.monotonic()
        for batch in self.task.batches(self.batch_size):
            seen += len(batch)
            if seen <= progress.done:
                continue
            try:
                maps = self._attributions(method, batch, progress)
                for measure in self.task.measures:
                    accumulator = progress.accumulators[measure.name]
                    measure.update(accumulator, batch, maps, partial(method.attribute, self.task.model))
            except TransformerAttributionError as error:  # refused by the method, or NaN that a measure refuses
                progress.error = " ".join(str(error).split())
                break
            progress.done = seen
            if time.monotonic() - saved > self.save_every:
                self._save(method, progress)
                saved = time.monotonic()
            self._tell(method, seen)
        progress.finished = True
        self._save(method, progress)

    def _save(self, method: Method, progress: Progress) -> None:
        progress.skipped = tuple(entry.reason for entry in self.task.skipped)
        self.store.save(self.description, method.name, progress)

    def _attributions(self, method: Method, batch: Batch, progress: Progress) -> dict[str, Any]:
        """By role; this alone is timed."""
        start = time.perf_counter()
        maps = attribute_roles(method, self.task, batch)
        _synchronize(self.task.device)
        progress.seconds += time.perf_counter() - start
        return maps

    def _tell(self, method: Method, done: int) -> None:
        if self.advance:
            self.advance(method.name, done, len(self.task.indices))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

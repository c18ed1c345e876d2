"""A task: a model, a stream of batches and the columns of its table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import nn

from captum_transformer_attr.datasets import Skipped
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.evaluation.batch import Batch
from captum_transformer_attr.evaluation.measures import Measure

Item = TypeVar("Item")


class Task(ABC):
    """What a table is about.

    Attributes:
        name: short, for file names and headings.
        title: one line about model and data.
        model: the explained model, in eval mode.
        measures: the columns.
        indices: which examples of the data set are taken.
    """

    def __init__(
        self, name: str, title: str, model: nn.Module, measures: Sequence[Measure], indices: Sequence[int]
    ) -> None:
        self.name = name
        self.title = title
        self.model = model.eval()
        self.measures = tuple(measures)
        self.indices = tuple(indices)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((value.device for value in self.model.parameters()), torch.device("cpu"))

    @property
    def roles(self) -> tuple[str, ...]:
        """Every class that some measure wants explained, in a fixed order."""
        return tuple(dict.fromkeys(role for measure in self.measures for role in measure.roles))

    @property
    def skipped(self) -> list[Skipped]:
        """Examples that could not be read so far."""
        return []

    @property
    def source(self) -> tuple[str, ...]:
        """Where the examples are read from, if they are; stored results of another place are not reused."""
        return ()

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All examples in turn; unreadable ones are left out and recorded in `skipped`."""

    def description(self) -> dict[str, Any]:
        """What the results depend on beside the method, as JSON; stored results of another one are not reused.

        Classes add what their own columns depend on.
        """
        return {"task": self.name, "indices": self.indices, "weights": weight_sum(self.model)}


def chosen(available: Mapping[str, Sequence[Measure]], metrics: Sequence[str]) -> list[Measure]:
    """The measures of the metrics asked for.

    Raises:
        InputError: a metric is unknown here, or none is asked for.
    """
    for metric in metrics:
        if metric not in available:
            raise InputError(f"metric {metric!r} is unknown here; known: {', '.join(available)}")
    if not metrics:
        raise InputError(f"no metric is asked for; known: {', '.join(available)}")
    return [measure for metric in dict.fromkeys(metrics) for measure in available[metric]]


def weight_sum(model: nn.Module) -> float:
    """One number that changes when any weight does (for practical purposes)."""
    return float(sum(value.detach().double().abs().sum().item() for value in model.state_dict().values()))


def batched(examples: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` examples; the last one holds what is left."""
    waiting = iter(examples)
    while batch := list(islice(waiting, size)):
        yield batch


def spread(length: int, count: int | None, half: str = "all") -> list[int]:
    """Indices spread evenly over a data set.

    Args:
        length: of the data set.
        count: how many; all if None or more than there are.
        half: `"even"` or `"odd"` takes every second of them, so that a choice made on one half can be reported on the
            other; `"all"` takes both.
    """
    number = length if count is None else min(count, length)
    chosen = [i * length // number for i in range(number)]
    return {"all": chosen, "even": chosen[::2], "odd": chosen[1::2]}[half]

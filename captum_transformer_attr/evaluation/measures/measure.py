"""What every measure is: a metric as the harness runs it, and its columns of a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from captum_transformer_attr.comparison import element_scores
from captum_transformer_attr.evaluation.batch import Batch
from captum_transformer_attr.metrics import Accumulator, Estimate

Forward = Callable[..., Any]
Explain = Callable[[Any, Any], Any]
"""Attributions for inputs and target."""


@dataclass(frozen=True)
class Column:
    """One number of a table.

    Attributes:
        name: its heading, unique within a task.
        better: whether lower or higher is good; `""` for a reference such as the chance level.
        estimate: value, interval, and how many examples it rests on.
    """

    name: str
    better: Literal["lower", "higher", ""]
    estimate: Estimate


class Measure(ABC):
    """A metric as the harness runs it.

    Attributes:
        needs_masks: whether it looks at the masks of a batch.
    """

    needs_masks: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique within a task, also the key of the stored numbers."""

    @property
    @abstractmethod
    def roles(self) -> tuple[str, ...]:
        """Which classes must be explained for it, see `Batch.targets`."""

    @property
    def known_roles(self) -> tuple[str, ...]:
        """Which classes must be known, explained or not."""
        return self.roles

    @abstractmethod
    def accumulator(self, forward: Forward) -> Accumulator:
        """A fresh accumulator."""

    @abstractmethod
    def update(self, accumulator: Any, batch: Batch, maps: Mapping[str, Any], explain: Explain) -> None:
        """Adds a batch, given the attributions of every role; `explain` computes further ones."""

    @abstractmethod
    def columns(self, accumulator: Any, seed: int) -> list[Column]:
        """What goes into the table."""


class OneClassMeasure(Measure):
    """A measure of the attributions of a single class.

    Attributes:
        role: the explained class, see `Batch.targets`.
    """

    role: str

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.role,)


def entry_scores(attributions: Any, entry: str | None = None) -> Tensor:
    """One score per pixel or token, (N, H, W) or (N, T), of one entry of an attribution."""
    if isinstance(attributions, Mapping):
        attributions = attributions[entry] if entry is not None else next(iter(attributions.values()))
    elif isinstance(attributions, tuple):
        attributions = attributions[0]
    return element_scores(attributions)

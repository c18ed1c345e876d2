"""The sequence of rule applications that AttentionRelevance found in a model, for people to read and check."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import overload

from captum_transformer_attr.flow.bimodal import Relations
from captum_transformer_attr.flow.streams import CROSS, Streams
from captum_transformer_attr.ops.attention import Attention


@dataclass(frozen=True)
class Step:
    """One attention call.

    Attributes:
        module: path of the module that computed it.
        query: the stream that asks.
        key: the stream that is asked, the same one for self-attention.
        rules: the equations of ICCV 2021 that act; none for a call before ``start_layer``."""

    module: str
    query: str
    key: str
    rules: tuple[int, ...]

    @property
    def brief(self) -> str:
        """For instance ``"text: 6, 7"`` or ``"text <- image: 10, 11"``."""
        streams = self.query if self.query == self.key else f"{self.query} <- {self.key}"
        return f"{streams}: {', '.join(map(str, self.rules)) or 'identity'}"


@dataclass(frozen=True)
class Schedule(Sequence[Step]):
    """Steps in the order in which the model runs them. ``str`` gives a table."""

    steps: tuple[Step, ...]

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Step, ...]: ...
    def __getitem__(self, index: int | slice) -> Step | tuple[Step, ...]:
        return self.steps[index]

    def __len__(self) -> int:
        return len(self.steps)

    def __str__(self) -> str:
        rows = [("step", "streams: rules", "module"), *((str(i), s.brief, s.module) for i, s in enumerate(self.steps))]
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        return "\n".join(f"{a:>{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def schedule_of(streams: Streams, active: Collection[Attention], relations: Relations) -> Schedule:
    """The schedule of a model whose streams are known."""
    crossing = set(relations.calls)
    steps = []
    for call in streams.calls:
        rules = relations.applied(call) if call in crossing else (10,) if call.kind == CROSS else (6,)
        steps.append(Step(call.attention.path, *call.streams, rules if call.attention in active else ()))
    return Schedule(tuple(steps))

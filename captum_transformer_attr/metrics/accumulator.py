"""What the streaming forms of the metrics have in common."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.metrics._inputs import check_tensor
from captum_transformer_attr.metrics.bootstrap import Estimate, bootstrap

Bootstrap: TypeAlias = Callable[..., list[Estimate]]
PROTOCOL = "protocol"
"""The entry of a state that holds the options, as the bytes of JSON: a tensor like the others."""


class Accumulator(ABC):
    """Gathers a few numbers per example, so that a data set is never held at once.

    `update` takes a batch, `compute` gives the score of everything seen with its bootstrap interval. The numbers per
    example are kept on the CPU in float64 (`examples`): a million examples of ten numbers are 80 MB. `state_dict` and
    `load_state_dict` store and restore them, `merge` joins parts computed elsewhere. Numbers that were made by other
    options are refused (`protocol`): their mean would be that of no protocol at all.
    """

    def __init__(self) -> None:
        self._columns: dict[str, list[Tensor]] = {}

    def __len__(self) -> int:
        """Examples seen."""
        return sum(len(part) for part in next(iter(self._columns.values()), []))

    @abstractmethod
    def update(self, *args: Any, **kwargs: Any) -> None:
        """Adds a batch."""

    def protocol(self) -> dict[str, Any]:
        """The options that the numbers depend on, by name, in the types of JSON."""
        return {}

    def shapes(self) -> dict[str, tuple[int, ...]] | None:
        """The numbers of one example by name, as shapes; None where `update` decides on the names."""
        return None

    def compute(self, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Scores of all batches so far, as `Estimate`s by name; the arguments are those of `bootstrap`."""
        if not len(self):
            raise InputError(f"{type(self).__name__}.compute() was called before any update()")
        return self._summary(partial(bootstrap, confidence=confidence, resamples=resamples, seed=seed))

    @abstractmethod
    def _summary(self, estimate: Bootstrap) -> dict[str, Any]:
        """What `compute` returns, by a bootstrap with its options set."""

    def examples(self) -> dict[str, Tensor]:
        """The numbers per example, (N, ...) by name, in the order in which they were added."""
        return {name: torch.cat(parts) for name, parts in self._columns.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The same, to be saved, with the options they depend on."""
        written = json.dumps(self.protocol()).encode()
        return {**self.examples(), PROTOCOL: torch.tensor(list(written), dtype=torch.uint8)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `state_dict` returned; what was gathered so far is dropped.

        Raises:
            InputError: a state of another kind or of other options. A state without options is taken for one of these.
        """
        if not isinstance(state, Mapping):
            raise InputError(f"state must be what state_dict() returned, got {type(state).__name__}")
        columns = dict(state)
        written = columns.pop(PROTOCOL, None)
        if written is not None:
            self._check_protocol(_read_protocol(written))
        if columns:
            self._check(columns, {})
        self._columns = {}
        self._add(**columns)

    def merge(self, other: Accumulator) -> None:
        """Appends what another accumulator of the same kind has gathered.

        Raises:
            InputError: another kind, or other options.
        """
        if type(other) is not type(self):
            raise InputError(f"cannot merge {type(other).__name__} into {type(self).__name__}")
        self._check_protocol(other.protocol())
        if len(other):
            self._add(**other.examples())

    def _check_protocol(self, other: Mapping[str, Any]) -> None:
        # Through JSON, in which tuples are lists.
        own, other = json.loads(json.dumps(self.protocol())), json.loads(json.dumps(other))
        for name in (*own, *other):
            if own.get(name) != other.get(name):
                raise InputError(
                    f"{type(self).__name__} with {name}={own.get(name)} cannot go on from one with "
                    f"{name}={other.get(name)}: their numbers are not of the same protocol"
                )

    def _check(self, columns: Mapping[str, Tensor], before: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses columns of other names, lengths or widths than those `before`."""
        for name, values in columns.items():
            check_tensor(values, name)
        found = {name: tuple(values.shape[1:]) for name, values in columns.items()}
        lengths = {name: len(values) if values.ndim else None for name, values in columns.items()}
        wanted = self.shapes() or before or found
        if found != wanted or None in lengths.values() or len(set(lengths.values())) != 1:
            shapes = {name: tuple(values.shape) for name, values in columns.items()}
            raise InputError(f"{type(self).__name__} needs numbers per example of shapes {wanted}, got {shapes}")

    def _add(self, **columns: Tensor) -> None:
        if columns:
            self._check(columns, {name: tuple(parts[0].shape[1:]) for name, parts in self._columns.items()})
        for name, values in columns.items():
            # A copy: the caller may use the tensor again for the next batch.
            self._columns.setdefault(name, []).append(values.detach().to("cpu", torch.float64, copy=True))

    def _column(self, name: str) -> Tensor:
        return torch.cat(self._columns[name])


def _read_protocol(written: Any) -> dict[str, Any]:
    """The options of a state; whatever is no such entry is refused."""
    try:
        options = json.loads(bytes(written.tolist()))
        if isinstance(options, dict):
            return options
    except (AttributeError, TypeError, ValueError):
        pass
    raise InputError(f"state holds a damaged entry {PROTOCOL!r}; give what state_dict() returned")


class MeanScore(Accumulator):
    """The mean of any score that is one number per example: completeness, SaCo, infidelity, ..."""

    def update(self, **scores: Tensor) -> None:
        """Adds scores by name, each (N,); the same names every time."""
        for name, values in scores.items():
            check_tensor(values, name)
        lengths = {name: tuple(values.shape) for name, values in scores.items()}
        if not scores or len(set(lengths.values())) != 1 or any(len(shape) != 1 for shape in lengths.values()):
            raise InputError(f"scores must be named, one-dimensional and of one length, got {lengths}")
        if self._columns and set(scores) != set(self._columns):
            raise InputError(f"update() was given {sorted(scores)}, before it was {sorted(self._columns)}")
        self._add(**scores)

    def _summary(self, estimate: Bootstrap) -> dict[str, Any]:
        return {name: estimate(self._column(name))[0] for name in self._columns}

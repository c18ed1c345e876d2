"""Where the examples of a batch are in inputs and outputs: what shapes leave open is decided by forwards.

An argument has a batch axis if its first axis is as long as the batch, except where that is so by chance: a causal mask
``(N, N)`` for N examples, position ids ``(N,)``, a bias per head ``(H, N, N)``. A reading says which of these arguments
every example gets whole; the right one gives an example alone what the batch gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from captum_transformer_attr.errors import InputError, UnsupportedModelError
from captum_transformer_attr.recording.inputs import Inputs, Key, label
from captum_transformer_attr.recording.node import LayoutLostError

Reading = frozenset[Key]
CUT: Reading = frozenset()
"""Every argument that can have a batch axis has one."""
COARSE = 1e-4
"""Agreement of a model that computes a part in lower precision than the rest, such as the scores of its router."""


@dataclass(frozen=True)
class Batch:
    """A batch and what the model gives for it, for comparison with its examples alone.

    Attributes:
        forward: the plain forward, from the state the model was found in.
        together: output of the whole batch.
        tolerance: how far two outputs may be apart relative to the largest, from what ``forward`` gave.
    """

    inputs: Inputs
    forward: Callable[[Inputs], Tensor]
    together: Tensor
    tolerance: Callable[[Tensor], float]

    def alone(self, i: int, reading: Reading = CUT) -> Tensor | None:
        """What the model gives for an example alone; None where it gives nothing."""
        try:
            return self.forward(self.inputs.example(i, reading))
        except Exception:  # noqa: BLE001  arguments that belong to the whole batch
            return None

    def row(self, i: int, reading: Reading) -> Tensor | None:
        """``alone`` where it has the shape of one row of the batch's output, else None."""
        alone = self.alone(i, reading)
        if alone is None or alone.ndim == 0 or self.together.shape != (self.inputs.batch, *alone.shape[1:]):
            return None
        return alone if alone.shape[0] == 1 else None

    def agrees(self, examples: Iterable[int], reading: Reading, least: float = 0.0) -> bool | None:
        """Whether the examples alone get what they get together; None where one cannot be compared."""
        for i in examples:
            alone = self.row(i, reading)
            if alone is None or not self.close(alone, self.together[i : i + 1], least):
                return None if alone is None else False
        return True

    def close(self, alone: Tensor, expected: Tensor, least: float = 0.0) -> bool:
        """Equal to rounding; ``least``: tolerance where that of the outputs' own precision is smaller."""
        first, second = alone.double(), expected.double()
        finite = first.isfinite() & second.isfinite()
        if not bool(finite.any()):
            return True
        allowed = max(least, self.tolerance(alone)) * max(second[finite].abs().max().item(), 1e-3)
        return (first - second)[finite].abs().max().item() <= allowed

    def readings(self) -> Iterator[Reading]:
        """Readings in which some argument that is passed on only is given whole, fewest first."""
        return subsets(self.inputs.unclear())

    def refused_readings(self) -> Iterator[Reading]:
        """Readings in which some argument that is explained, but not all, would have no batch axis."""
        explained = self.inputs.explained
        for reading in subsets((*self.inputs.unclear(), *explained)):
            if 0 < len(reading.intersection(explained)) < len(explained):
                yield reading


def subsets(keys: Sequence[Key]) -> Iterator[Reading]:
    """All but the empty one, smallest first."""
    for size in range(1, len(keys) + 1):
        yield from map(frozenset, combinations(keys, size))


def refuse_other_rows(inputs: Inputs, output: Tensor) -> None:
    """One number is selected per row of the output, so its rows must be the examples.

    Raises:
        UnsupportedModelError: if they are not as many.
    """
    if (output.shape[0] if output.ndim else 1) != inputs.batch:
        refuse_axis(inputs, output, f"{inputs.batch} examples")


def refuse_axis(inputs: Inputs, output: Tensor, found: str) -> None:
    """
    Raises:
        UnsupportedModelError: always.
    """
    name = inputs.explained[0]
    raise UnsupportedModelError(
        f"the output has shape {tuple(output.shape)} for {found} along the first axis of {label(inputs, name)} "
        f"{tuple(inputs.values[name].shape)}; both need the batch first. Way out: a module around a sequence-first "
        "model whose forward takes (batch, tokens, channels) and calls model(x.transpose(0, 1)); a module around a "
        "model with other outputs that returns one row per example"
    )


def refuse_mixing(batch: Batch) -> None:
    """An example that influences others cannot be explained together with them: its scores would be theirs.

    Looks at the last and the first example, for models in which each looks at those before or behind it. What a model
    cannot compute alone, or gives another shape alone (scores of all pairs), is left to the layouts.

    Raises:
        LayoutLostError: so that the examples are explained one by one, and each gets what it would get alone.
        InputError: if an argument that is to be explained has no batch axis.
        UnsupportedModelError: if the first axis of the inputs is none of the output's.
    """
    ends = (batch.inputs.batch - 1, 0)
    cut = batch.agrees(ends, CUT)
    if cut or any(batch.agrees(ends, reading) for reading in batch.readings()):
        return
    if cut is None:
        alone = batch.alone(ends[0])
        if alone is not None and alone.ndim and alone.shape == batch.together.shape:
            refuse_axis(batch.inputs, batch.together, "one example as well as for all")
        return
    for reading in batch.refused_readings():
        if batch.agrees(ends, reading):
            refuse_unexplainable(batch.inputs, reading)
    raise LayoutLostError("the examples of this batch influence each other")


def refuse_unexplainable(inputs: Inputs, reading: Reading) -> None:
    """
    Raises:
        InputError: if the reading gives an explained argument to every example whole.
    """
    for name in inputs.explained:
        if name in reading:
            raise InputError(
                f"inputs: {label(inputs, name)} is the same for every example: its first axis is as long as the batch "
                "by chance. Pass it through additional_forward_args, or repeat it for every example"
            )


def possible(batch: Batch) -> list[Reading]:
    """Readings under which an example alone gives one row: all that shapes can say."""
    found = [reading for reading in (CUT, *batch.readings()) if batch.row(0, reading) is not None]
    if CUT in found:
        found += [reading for reading in batch.refused_readings() if batch.row(0, reading) is not None]
    return found


def reading_of(batch: Batch, among: Sequence[Reading]) -> Reading:
    """How the examples are to be cut, for explaining them one by one.

    Raises:
        InputError: if an argument that is to be explained has no batch axis, or if nothing tells the readings apart:
            the examples influence each other, so that none alone gives what the batch gives.
    """
    if len(among) < 2:
        return among[0] if among else CUT
    examples = range(batch.inputs.batch)
    for least in (0.0, COARSE):
        for reading in among:
            if batch.agrees(examples, reading, least):
                refuse_unexplainable(batch.inputs, reading)
                return reading
    for i in examples:
        rows = [batch.row(i, reading) for reading in among]
        if any(row is None or rows[0] is None or not batch.close(row, rows[0]) for row in rows):
            names = ", ".join(sorted({label(batch.inputs, key) for reading in among for key in reading}))
            raise InputError(
                f"inputs: the examples of this batch influence each other, and {names} may be one per example or the "
                "same for all: the first axis is as long as the batch. Explain one example at a time"
            )
    return among[0]

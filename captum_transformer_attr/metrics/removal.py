"""What can be taken from an input, and how: the interface that pixels and tokens share."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from captum_transformer_attr.metrics._inputs import Inputs


class RemovableUnits(ABC):
    """A batch whose units (pixels or tokens) have scores and can be removed.

    Attributes:
        scores: (N, U), the attribution of every unit.
        removable: (N, U) booleans; special and padding tokens are not.
    """

    def __init__(self, scores: Tensor, removable: Tensor) -> None:
        self.scores = scores
        self.removable = removable

    @abstractmethod
    def count(self, fraction: float) -> Tensor:
        """How many units of each example a fraction of them is, (N,)."""

    @abstractmethod
    def remove(self, removed: Tensor) -> Inputs:
        """The inputs without the units where `removed` (N, U) is true; the inputs at hand stay as they are."""


class Removal(ABC):
    """A way of removing: `PixelRemoval` for images, `TokenRemoval` for sequences.

    Attributes:
        fractions: the published protocol's steps, used where a metric is given none.
    """

    fractions: tuple[float, ...]

    @abstractmethod
    def prepare(self, inputs: Inputs, attributions: object) -> RemovableUnits:
        """Brings inputs and attributions together.

        Raises:
            InputError: they do not fit each other, or the attributions hold NaN.
        """

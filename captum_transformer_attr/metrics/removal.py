"""What can be taken from an input, and how: the interface that pixels and tokens share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any

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

    def protocol(self) -> dict[str, Any]:
        """Kind and options by name, in the types of JSON: numbers made by others must not be mixed with these."""
        options = {f"removal.{name}": described(value) for name, value in vars(self).items()}
        return {"removal": type(self).__name__, **options}

    @abstractmethod
    def prepare(self, inputs: Inputs, attributions: object) -> RemovableUnits:
        """Brings inputs and attributions together.

        Raises:
            InputError: they do not fit each other, or the attributions hold NaN.
        """


def described(value: Any) -> Any:
    """An option in the types of JSON; of a large tensor its fingerprint, of other objects their type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        if value.numel() <= 16:
            return value.detach().cpu().double().tolist()
        content = value.detach().cpu().double().contiguous().numpy().tobytes()
        return [*value.shape, hashlib.sha256(content).hexdigest()]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (tuple, list)):
        return [described(entry) for entry in value]
    return type(value).__name__

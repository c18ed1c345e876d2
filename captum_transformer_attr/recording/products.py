"""Float32 products in fewer digits: TF32 on GPUs (for convolutions torch's default), bfloat16 on some CPUs.

A recording computes its own in full. The published z⁺ rule divides by sums that nearly cancel: products of TF32's ten
bits leave `TransformerRelevance` a rank correlation of 0.76 with itself and `TransformerLRP` one of 0.07 (ViT-Tiny,
docs/results/completeness.md). Nor could the recorded forward be compared with the plain one, or an example alone with
the same one in its batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Setting:
    """One of torch's settings.

    Attributes:
        owner: the object that has it as an attribute, and ``name`` of that.
        exact: its value for products in full float32; ``reduced``: values for fewer digits.
        sets: settings that are set with it.
    """

    owner: Any
    name: str
    exact: Any
    reduced: tuple[Any, ...]
    sets: tuple[Setting, ...] = ()

    @property
    def value(self) -> Any:
        return getattr(self.owner, self.name)

    @value.setter
    def value(self, value: Any) -> None:
        setattr(self.owner, self.name, value)


class _Products:
    """``torch.set_float32_matmul_precision`` as an attribute."""

    precision = property(
        lambda self: torch.get_float32_matmul_precision(),
        lambda self, value: torch.set_float32_matmul_precision(value),
    )


def settings() -> list[Setting]:
    """The two older settings, then (torch 2.9 and later) the newer ones: of all, of a backend, of its operations."""
    b: Any = torch.backends
    has_newer = hasattr(b.cuda.matmul, "fp32_precision")
    general = newer(b, b.cudnn, b.mkldnn) if has_newer else ()
    products = newer(b.cuda.matmul, b.mkldnn.matmul) if has_newer else ()
    convolutions = newer(b.cudnn.conv, b.cudnn.rnn) if has_newer else ()
    rest = newer(b.mkldnn.conv, b.mkldnn.rnn) if has_newer else ()
    older = (
        Setting(_Products(), "precision", "highest", ("high", "medium"), products),
        Setting(b.cudnn, "allow_tf32", False, (True,), convolutions),
    )
    return [*filter(is_told, older), *general, *products, *convolutions, *rest]


def newer(*owners: Any) -> tuple[Setting, ...]:
    return tuple(Setting(owner, "fp32_precision", "ieee", ("tf32", "bf16")) for owner in owners)


def is_told(setting: Setting) -> bool:
    """Torch refuses to tell an older setting that the newer ones contradict."""
    try:
        return setting.value is not None
    except RuntimeError:
        return False


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products in full inside. The settings are the process's: other threads compute in full meanwhile.

    Only what says otherwise is set, so that a setting that follows a more general one goes on following it.
    """
    before: list[tuple[Setting, Any]] = []
    try:
        for setting in settings():
            if setting.value in setting.reduced:
                before += [(one, one.value) for one in (setting, *setting.sets)]
                setting.value = setting.exact
        yield
    finally:
        for setting, value in before:
            setting.value = value

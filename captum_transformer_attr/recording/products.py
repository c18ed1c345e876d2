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
    """

    owner: Any
    name: str
    exact: Any
    reduced: tuple[Any, ...]

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
    """The two older settings first: setting them sets those per backend and operation (torch 2.9 and later)."""
    b: Any = torch.backends
    older = [
        Setting(_Products(), "precision", "highest", ("high", "medium")),
        Setting(b.cudnn, "allow_tf32", False, (True,)),
    ]
    found = [setting for setting in older if is_told(setting)]
    if hasattr(b.cuda.matmul, "fp32_precision"):
        owners = (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn)
        found += [Setting(owner, "fp32_precision", "ieee", ("tf32", "bf16")) for owner in owners]
    return found


def is_told(setting: Setting) -> bool:
    """Torch refuses to tell an older setting that the newer ones contradict."""
    try:
        return setting.value is not None
    except RuntimeError:
        return False


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products in full inside. The settings are the process's: other threads compute in full meanwhile."""
    before = [(setting, setting.value) for setting in settings()]
    try:
        for setting, _ in before:
            if setting.value in setting.reduced:
                setting.value = setting.exact
        yield
    finally:
        for setting, value in before:
            setting.value = value

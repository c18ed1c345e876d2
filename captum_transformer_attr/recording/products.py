"""Float32 products in fewer digits: TF32 on GPUs (for convolutions torch's default), bfloat16 on some CPUs.

Attribution computes as the process does, but what is compared (the recorded forward with the plain one, an example
alone with the same one in its batch) would differ by three digits. So the comparison is made with exact products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from captum_transformer_attr.recording.modules import Modules


@dataclass(frozen=True)
class Switch:
    """One of torch's settings.

    Attributes:
        owner: the object with the setting, and ``name`` of it there.
        exact: its value for products in full float32; ``reduced``: values for fewer digits.
        device: type of the devices that it holds for.
        operation: ``"matmul"``, ``"conv"`` or ``"rnn"``.
    """

    owner: Any
    name: str
    exact: Any
    reduced: tuple[Any, ...]
    device: str
    operation: str

    def is_reduced(self) -> bool:
        return getattr(self.owner, self.name) in self.reduced


class _Whole:
    """``torch.set_float32_matmul_precision`` as an attribute."""

    precision = property(
        lambda self: torch.get_float32_matmul_precision(),
        lambda self, value: torch.set_float32_matmul_precision(value),
    )


def switches() -> list[Switch]:
    """One per backend and operation; before torch 2.9 one for products and one for the rest."""
    backends = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        matmul = [Switch(_Whole(), "precision", "highest", ("high", "medium"), d, "matmul") for d in ("cuda", "cpu")]
        return [*matmul, *(Switch(backends.cudnn, "allow_tf32", False, (True,), "cuda", o) for o in ("conv", "rnn"))]
    named = {("cuda", "matmul"): backends.cuda.matmul}
    named |= {("cuda", operation): getattr(backends.cudnn, operation) for operation in ("conv", "rnn")}
    named |= {("cpu", operation): getattr(backends.mkldnn, operation) for operation in ("matmul", "conv", "rnn")}
    return [
        Switch(owner, "fp32_precision", "ieee", ("tf32", "bf16"), device, operation)
        for (device, operation), owner in named.items()
    ]


def reduced_products(modules: Modules) -> bool:
    """Whether the model's float32 products have fewer digits here."""
    devices = {t.device.type for t in modules.tensors if t.dtype == torch.float32}
    operations = {"matmul"}
    for _, module in modules.named:
        operations |= {"conv"} if isinstance(module, nn.modules.conv._ConvNd) else set()
        operations |= {"rnn"} if isinstance(module, nn.RNNBase) else set()
    return any(s.is_reduced() for s in switches() if s.device in devices and s.operation in operations)


@contextlib.contextmanager
def exact_products() -> Iterator[bool]:
    """Float32 products in full inside; yields whether some had fewer digits outside."""
    reduced = [switch for switch in switches() if switch.is_reduced()]
    before = [(switch, getattr(switch.owner, switch.name)) for switch in reduced]
    try:
        with _older_setting_in_step(bool(reduced)):
            for switch in reduced:
                setattr(switch.owner, switch.name, switch.exact)
            yield bool(reduced)
    finally:
        for switch, value in before:
            setattr(switch.owner, switch.name, value)


@contextlib.contextmanager
def _older_setting_in_step(wanted: bool) -> Iterator[None]:
    """Torch refuses to read the older setting where the newer ones say something else."""
    try:
        before = torch.get_float32_matmul_precision() if wanted else None
    except RuntimeError:
        before = None  # the process has set them apart itself
    if before is None:
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

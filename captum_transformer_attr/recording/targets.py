"""Which number of the output is explained: Captum's targets, and the difference of two of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_transformer_attr.captum_compat import select_targets
from captum_transformer_attr.errors import TargetError


@dataclass(frozen=True)
class Contrast:
    """A difference of outputs as a target: why ``first`` rather than ``second``? Both are targets as anywhere else in
    Captum.

    What carries gradients starts with +1 and −1. Relevance under ``deep_taylor`` is propagated for each and subtracted;
    token-level methods read the attention's relevance and the read-out row of ``first``.

    Example:
        >>> TransformerLRP(model, "attnlrp").attribute(ids, target=Contrast((-1, yes), (-1, no)))
    """

    first: Any
    second: Any

    def __post_init__(self) -> None:
        if isinstance(self.first, Contrast) or isinstance(self.second, Contrast):
            raise TargetError("target: a Contrast holds two of Captum's targets, not another Contrast")


def select(output: Tensor, target: Any) -> Tensor:
    """One number per example, ``(N,)``.

    Raises:
        TargetError: if the target does not select one number per example of this output.
    """
    if isinstance(target, Contrast):
        return select(output, target.first) - select(output, target.second)
    shape = tuple(output.shape)
    if target is None and output.numel() == (shape[0] if shape else 1):
        return output.reshape(-1)
    if isinstance(target, Tensor):
        target = target.to(output.device)
    try:
        selected: Tensor = select_targets(output, target)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it does not fit"
        raise TargetError(
            f"target={shown(target)}: cannot select from an output of shape {shape} ({reason})"
        ) from error
    if selected.numel() != (shape[0] if shape else 1):
        raise TargetError(
            f"target={shown(target)}: selects {tuple(selected.shape[1:])} numbers per example of an output of shape "
            f"{shape}; one is needed" + (", give its class as target" if target is None else "")
        )
    return selected.reshape(-1)


def target_of(target: Any, i: int, batch: int) -> Any:
    """The target of the i-th example in Captum's forms."""
    if isinstance(target, Contrast):
        return Contrast(target_of(target.first, i, batch), target_of(target.second, i, batch))
    if isinstance(target, Tensor) and target.numel() > 1:
        return target[i : i + 1]
    if isinstance(target, list):
        return target[i : i + 1]
    return target


def shown(target: Any) -> str:
    """A target as an error message quotes it."""
    text = repr(target.tolist() if isinstance(target, Tensor) else target)
    return text if len(text) < 60 else text[:57] + "..."

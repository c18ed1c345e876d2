"""A batch of examples with everything the metrics want to know about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

Inputs: TypeAlias = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Words:
    """How the tokens of a batch of texts make up words, and which words people marked.

    Attributes:
        of_tokens: per text, the word of every token, None for special and padding tokens.
        count: per text, the number of its words, those behind a truncation included.
        rationales: per text, (count,) booleans, or None where there is no rationale.
    """

    of_tokens: list[list[int | None]]
    count: list[int]
    rationales: list[Any]


@dataclass(frozen=True)
class Batch:
    """N examples.

    Attributes:
        names: of the examples, for messages.
        inputs: what the model is called with.
        logits: (N, classes), the model's answer.
        targets: the class to explain per role, (N,) each: `"predicted"` the top class, `"label"` the true one,
            `"other"` a second class in question (the runner-up, or another object in the picture).
        masks: pixels (N, H, W) of the object of a role.
        words: for texts.
    """

    names: list[str]
    inputs: Inputs
    logits: Tensor
    targets: dict[str, Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)
    words: Words | None = None

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        inputs = (
            self.inputs.to(device)
            if isinstance(self.inputs, Tensor)
            else {name: value.to(device) for name, value in self.inputs.items()}
        )
        return replace(
            self,
            inputs=inputs,
            logits=self.logits.to(device),
            targets={role: target.to(device) for role, target in self.targets.items()},
            masks={role: mask.to(device) for role, mask in self.masks.items()},
        )


def select(container: Any, rows: Tensor) -> Any:
    """Rows of a tensor, a mapping or a tuple of tensors."""
    if isinstance(container, Tensor):
        return container[rows]
    if isinstance(container, tuple):
        return tuple(value[rows] for value in container)
    return {name: value[rows] for name, value in container.items()}


def scatter(container: Any, rows: Tensor, values: Any) -> Any:
    """A copy of a container with other values in some rows."""
    if isinstance(container, Tensor):
        changed = container.clone()
        changed[rows] = values.to(changed)
        return changed
    if isinstance(container, tuple):
        return tuple(scatter(one, rows, other) for one, other in zip(container, values, strict=True))
    return {name: scatter(one, rows, values[name]) for name, one in container.items()}


def once_per_class(batch: Batch, roles: Sequence[str], compute: Callable[[str, Tensor], Any]) -> dict[str, Any]:
    """What `compute(role, rows)` gives for every role; an example whose roles are the same class is computed once.

    Args:
        batch: whose targets say which class a role is.
        roles: in the order in which they are computed; the first one for all examples.
        compute: a tensor, mapping or tuple of tensors with one row for each of the rows (indices) it is given.
    """
    first, *others = roles
    results = {first: compute(first, torch.arange(len(batch), device=batch.logits.device))}
    for role in others:
        rows = (batch.targets[role] != batch.targets[first]).nonzero().flatten()
        results[role] = scatter(results[first], rows, compute(role, rows)) if len(rows) else results[first]
    return results


def runner_up(logits: Tensor, chosen: Tensor) -> Tensor:
    """The best class other than the chosen one, (N,)."""
    return logits.scatter(1, chosen[:, None], float("-inf")).argmax(1)

"""Walks the autograd graph from the selected output and refuses whatever has no rule.

The walk knows nothing of the interception, so it also finds what interception cannot see: a custom C++ operation, an
``autograd.Function`` of the model, a checkpointed or compiled part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.leaving import place, way_out
from captum_transformer_attr.recording.node import Node
from captum_transformer_attr.recording.view_like import is_view_like


@dataclass(frozen=True)
class Foreign:
    """An operation without a rule."""

    operation: str
    path: str
    seen: bool = True  # whether the module is known to have run it; otherwise it goes on with the result

    def message(self) -> str:
        """One line: what, where, and the way out."""
        rule = way_out(self.path, "'identity' or your own rule")
        where = f" in {place(self.path)}" if self.seen else f", whose result {place(self.path)} uses"
        return f"no rule for operation '{self.operation}'{where}, so no attribution is produced. Way out: {rule}."


def walk(output: Tensor) -> Iterator[tuple[Node | None, Foreign | None]]:
    """Every recorded node and every foreign operation that a signal from ``output`` reaches."""
    stack: list[tuple[Any, str]] = [(output.grad_fn, "")]
    seen = set()
    while stack:
        fn, path = stack.pop()
        if fn is None or fn in seen:
            continue
        seen.add(fn)
        node = getattr(fn, "node", None)
        following = [f for f, _ in fn.next_functions]
        if isinstance(node, Node):
            yield node, None
            path = node.path
            carriers = node.carriers(None)
            # next_functions also lists the node argument's place holder on some versions: align from the right
            if carriers is not None:
                following = [f for f, carries in zip(following[-len(carriers) :], carriers, strict=False) if carries]
        else:
            name = fn.name()
            noted = tags.ATTRIBUTE in fn.metadata
            operation, path = fn.metadata.get(tags.ATTRIBUTE, ("", path))
            # A function that the user wrote may have any name.
            if hasattr(fn, "_forward_cls") or not is_view_like(name):
                yield None, Foreign(operation or re.sub(r"Backward\d*$", "", name), path, noted)
        stack += [(f, path) for f in following]


def audit(output: Tensor) -> list[Node]:
    """The nodes a signal from ``output`` passes.

    Raises:
        UnsupportedOperationError: naming the first operation without a rule, its module and the way out.
    """
    nodes = []
    for node, foreign in walk(output):
        if foreign is not None:
            raise UnsupportedOperationError(foreign.message())
        if node is not None:
            nodes.append(node)
    return nodes

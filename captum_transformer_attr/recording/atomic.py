"""Modules with a registered rule: they run unrecorded, on leaves of their own, and count as one operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from captum_transformer_attr.recording.layout import resized
from captum_transformer_attr.recording.nested import replaced, tensors_in
from captum_transformer_attr.recording.registry import ModuleRule
from captum_transformer_attr.recording.tags import tag_of

if TYPE_CHECKING:
    from captum_transformer_attr.recording.recorder import Recorder


@dataclass
class Atomic:
    """A module that runs as one operation: its live inputs, and the leaves it sees instead."""

    module: nn.Module
    live: list[Tensor]
    leaves: list[Tensor]


def begin_atomic(recorder: Recorder, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Give a module with a registered rule leaves of its own and stop recording until it returns."""
    live = [t for t in tensors_in((args, kwargs)) if t.requires_grad and t.is_floating_point()]
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), None) if recorder.promote else None
    recorder.paused += 1  # before the leaves are made: that they are detached is not the model's doing
    leaves = [t.detach().to(own or t.dtype).requires_grad_() for t in live]
    by_id = {id(t): leaf for t, leaf in zip(live, leaves, strict=True)}
    recorder.atomic.append(Atomic(module, live, leaves))
    return replaced(args, by_id), replaced(kwargs, by_id)


def end_atomic(recorder: Recorder, rule: ModuleRule, output: Any) -> Any:
    """Record what the module returned as one operation."""
    recorder.paused -= 1
    atomic = recorder.atomic.pop()
    found = [t for t in tensors_in((output,)) if t.requires_grad]
    results = {}
    for y in found:
        node = rule.operation(atomic.module, atomic.leaves, y)
        first = next((t for t in map(tag_of, atomic.live) if t), None)
        layout = resized(first.layout, y.shape) if first else None
        weighted = (first.weighted if first else 0) + 1
        results[id(y)] = recorder.run(node, *atomic.live, layout=layout, weighted=weighted)
    return replaced(output, results)

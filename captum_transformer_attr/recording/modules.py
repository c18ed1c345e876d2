"""The model during a recording: evaluation mode, frozen parameters, module paths, atomic modules. All undone after."""

from __future__ import annotations

import contextlib
import operator
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.errors import UnsupportedModelError
from captum_transformer_attr.recording.atomic import begin_atomic, end_atomic
from captum_transformer_attr.recording.nested import tensors_in
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.registry import rule_for_module
from captum_transformer_attr.recording.tags import describe

CONTAINERS = (dict, OrderedDict, list)  # of module attributes that a forward may fill
NOTHING: dict[str, Any] = {}


def modules_of(function: Any) -> list[nn.Module]:
    """The modules behind a forward function: itself, or what a bound method, closure or global name refers to."""
    if isinstance(function, nn.Module):
        return [function]
    owner = getattr(function, "__self__", None)
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    values = [owner, *cells, *(getattr(function, "__defaults__", None) or ())]
    if hasattr(function, "__code__"):
        values += [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]
    if hasattr(function, "func"):  # functools.partial
        values += [function.func, *function.args, *function.keywords.values()]
    return [v for v in values if isinstance(v, nn.Module)]


class Modules:
    """The modules behind a forward function, found in one walk: a recording asks for them many times.

    Attributes:
        roots: see ``modules_of``.
        named: module paths and modules below every root.
        tensors: parameters and buffers.
    """

    def __init__(self, function: Any) -> None:
        self.roots = modules_of(function)
        self.named = [(path, module) for root in self.roots for path, module in root.named_modules()]
        refuse_compiled(self.named)
        refuse_empty(self.named)
        refuse_sharded(self.named)
        found = (t for _, m in self.named for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
        self.tensors: list[Tensor] = list({id(t): t for t in found}.values())

    def owned(self) -> dict[int, Tensor]:
        """Parameters and buffers by the memory they lie in."""
        places = ((t.untyped_storage().data_ptr(), t) for t in self.tensors if t.layout == torch.strided)
        return {place: t for place, t in places if place}

    def structure(self) -> int:
        """A number that changes when a module is added, removed, or replaced by one that computes something else."""
        return hash(tuple((path, type(m), id(vars(m).get("forward")), rule_for_module(m)) for path, m in self.named))

    def dtype(self) -> torch.dtype | None:
        """Of the first parameter with floats, None where there is none."""
        return next((t.dtype for t in self.tensors if isinstance(t, nn.Parameter) and t.is_floating_point()), None)

    def random_state(self) -> list[Tensor]:
        """States of the random number generators that a model can draw from."""
        return [torch.random.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.cuda_devices())]

    def cuda_devices(self) -> list[int]:
        """Indices of the GPUs that hold some of the model."""
        return sorted({t.device.index or 0 for t in self.tensors if t.is_cuda})


@contextlib.contextmanager
def as_evaluated(modules: Modules) -> Iterator[Callable[[], None]]:
    """Evaluation mode, parameters frozen, random state kept; everything is put back, also after an exception.

    Yields what puts the modules' attributes back, so that a second forward starts from where the first one did.

    Attributes that the model writes while it runs (caches of position biases, stashed activations) are put back too: a
    cache filled from parameters that are trained further would be stale, a stashed activation would keep the recording
    alive.
    """
    training = [m for _, m in modules.named if m.training]
    trainable = [t for t in modules.tensors if t.requires_grad and t.is_leaf]
    held: list[tuple[Any, Any]] = []

    def put_attributes_back() -> None:
        for now, before in held:
            if now or before:
                put_back(now, before)

    def undo() -> None:
        put_attributes_back()
        for m in training:
            m.training = True
        # Where a model was made, its flags can be set.
        with torch.inference_mode(any(t.is_inference() for t in trainable)):
            for t in trainable:
                t.requires_grad_()

    try:
        for m in training:
            m.training = False
        held += [(vars(m), vars(m).copy()) for _, m in modules.named]
        # Most are empty (hooks); thousands of copies would wake the garbage collector.
        contents = [c for _, values in held for c in values.values() if type(c) in CONTAINERS]
        held += [(c, c.copy() if c else NOTHING) for c in contents]
        for t in trainable:
            t.requires_grad_(False)
        with torch.random.fork_rng(devices=modules.cuda_devices()):
            yield put_attributes_back
    finally:
        try:
            undo()
        except KeyboardInterrupt:  # an interrupt in the middle of it must not leave the rest undone
            undo()
            raise


def put_back(now: Any, before: Any) -> None:
    """Give a dict or list the entries it had. Most have not changed, which costs no Python loop to see."""
    if isinstance(now, list):
        if len(now) != len(before) or not all(map(operator.is_, now, before)):
            now[:] = before
    elif now.keys() != before.keys() or not all(map(operator.is_, now.values(), before.values())):
        if type(now) is OrderedDict:
            now.clear()  # the order counts
        for name in now.keys() - before.keys():
            del now[name]
        now.update(before)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """What ``torch.compile`` compiled runs as it was written, so that its operations are seen."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def refuse_compiled(named: list[tuple[str, nn.Module]]) -> None:
    """Compiled and scripted modules hide their operations."""
    for path, module in named:
        where = f"module '{path}'" if path else "the model"
        if hasattr(module, "_orig_mod"):
            raise UnsupportedModelError(
                f"{where} is compiled (torch.compile), its operations cannot be seen; pass the original: "
                "model._orig_mod"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{where} is scripted (torch.jit), its operations cannot be seen; pass the Python module it was made "
                "from"
            )


def refuse_empty(named: list[tuple[str, nn.Module]]) -> None:
    """Parameters on the meta device have no values."""
    for path, module in named:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                raise UnsupportedModelError(
                    f"parameter '{f'{path}.{name}'.lstrip('.')}' is on the meta device, where it holds no values; load "
                    "the model's weights first"
                )


def refuse_sharded(named: list[tuple[str, nn.Module]]) -> None:
    """Of parameters spread over processes (FSDP, tensor parallelism), each process sees its own part."""
    for path, module in named:
        for name, parameter in module._parameters.items():
            if type(parameter).__name__ == "DTensor":
                raise UnsupportedModelError(
                    f"parameter '{f'{path}.{name}'.lstrip('.')}' is spread over processes (fully_shard, tensor "
                    "parallelism); explain the unsharded model, a copy per process, with every process's own inputs"
                )


@contextlib.contextmanager
def watched(modules: Modules, recorder: Recorder) -> Iterator[None]:
    """Hooks that tell the recorder which module runs, and that make modules with a registered rule atomic."""
    paths = {id(module): path for path, module in modules.named}
    rules = {id(module): rule_for_module(module) for _, module in modules.named}
    recording_thread = threading.get_ident()

    def elsewhere() -> bool:
        """The same model, run by another thread meanwhile."""
        return threading.get_ident() != recording_thread

    def enter(module: nn.Module, args: Any) -> None:
        if not elsewhere():
            recorder.module_stack.append(paths[id(module)])

    def isolate(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return None if recorder.paused or elsewhere() else begin_atomic(recorder, module, args, kwargs)

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if elsewhere():
            return None
        path, rule = paths[id(module)], rules[id(module)]
        if rule is not None and recorder.atomic and recorder.atomic[-1].module is module:
            output = end_atomic(recorder, rule, output)
        while recorder.module_stack and recorder.module_stack.pop() != path:
            pass
        for t in tensors_in((output,)):
            if t.grad_fn is not None:
                describe(t.grad_fn, "", path)
        if path.rpartition(".")[2].isdigit():
            live = next((t for t in tensors_in((output,)) if t.requires_grad), None)
            recorder.list_outputs.setdefault(path, []).append(None if live is None else recorder.snapshot(live))
        return output

    handles = []
    try:
        for _, module in modules.named:
            handles.append(module.register_forward_pre_hook(enter))
            if rules[id(module)] is not None:
                handles.append(module.register_forward_pre_hook(isolate, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()
        recorder.module_stack.clear()

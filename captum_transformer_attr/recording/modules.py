"""The model during a recording: evaluation mode, frozen parameters, the path of the running module, atomic modules. All undone afterwards."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.errors import UnsupportedModelError
from captum_transformer_attr.recording.recorder import Recorder, describe, tensors_in

CONTAINERS = (dict, OrderedDict, list)  # of module attributes that a forward may fill


def modules_of(function: Any) -> list[nn.Module]:
    """The modules behind a forward function: itself, or what a bound method, closure or function of global names refers to."""
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


@contextlib.contextmanager
def as_evaluated(function: Any) -> Iterator[Callable[[], None]]:
    """Evaluation mode, parameters frozen, random state kept; everything is put back, also after an exception.

    Yields what puts the modules' attributes back, so that a second forward starts from where the first one did.

    Attributes that the model writes while it runs (caches of position biases, stashed activations) are put back too: a cache filled from
    parameters that are trained further would be stale, a stashed activation would keep the recording alive.
    """
    roots = modules_of(function)
    modules = [m for root in roots for m in root.modules()]
    refuse_compiled(roots)
    training = [(m, m.training) for m in modules]
    parameters = [
        (p, p.requires_grad)
        for root in roots
        for p in (*root.parameters(), *root.buffers())
        if p.requires_grad and p.is_leaf
    ]
    attributes = [
        (m, dict(m.__dict__), {k: copy(v) for k, v in m.__dict__.items() if type(v) in CONTAINERS}) for m in modules
    ]
    devices = sorted({p.device.index or 0 for root in roots for p in root.parameters() if p.device.type == "cuda"})

    def put_attributes_back() -> None:
        for m, values, contents in attributes:
            put_back(m, values | {"training": m.training}, contents)

    try:
        for m in modules:
            m.training = False
        for p, _ in parameters:
            p.requires_grad_(False)
        with torch.random.fork_rng(devices=devices):
            yield put_attributes_back
    finally:
        put_attributes_back()
        for m, mode in training:
            m.training = mode
        for p, flag in parameters:
            with torch.inference_mode(p.is_inference()):  # where a model was made, its flags can be set
                p.requires_grad_(flag)


def put_back(module: nn.Module, values: dict[str, Any], contents: dict[str, Any]) -> None:
    """Give a module's ``__dict__`` the values it had, and its containers the contents they had."""
    for name in module.__dict__.keys() - values.keys():
        del module.__dict__[name]
    module.__dict__.update(values)
    for name, content in contents.items():
        container = values[name]
        if isinstance(container, list):
            container[:] = content
        elif len(container) != len(content) or any(
            container.get(key, container) is not value for key, value in content.items()
        ):
            container.clear()
            container.update(content)


def owned_by(function: Any) -> dict[int, Tensor]:
    """Parameters and buffers by the memory they lie in."""
    tensors = (t for root in modules_of(function) for t in (*root.parameters(), *root.buffers()))
    return {
        t.untyped_storage().data_ptr(): t
        for t in tensors
        if t.layout == torch.strided and t.untyped_storage().data_ptr()
    }


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Functions and methods compiled by ``torch.compile`` run as they were written, so that their operations are seen."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def refuse_compiled(roots: list[nn.Module]) -> None:
    """Compiled and scripted modules hide their operations."""
    for root in roots:
        for path, module in root.named_modules():
            where = f"module '{path}'" if path else "the model"
            if hasattr(module, "_orig_mod"):
                raise UnsupportedModelError(
                    f"{where} is compiled (torch.compile), its operations cannot be seen; pass the original: model._orig_mod"
                )
            if isinstance(module, torch.jit.ScriptModule):
                raise UnsupportedModelError(
                    f"{where} is scripted (torch.jit), its operations cannot be seen; pass the Python module it was made from"
                )


@contextlib.contextmanager
def watched(function: Any, recorder: Recorder) -> Iterator[None]:
    """Hooks that tell the recorder which module runs, and that make modules with a registered rule atomic."""
    from captum_transformer_attr.ops.custom import rule_for_module

    handles = []
    recording_thread = threading.get_ident()

    def elsewhere() -> bool:
        """The same model, run by another thread meanwhile."""
        return threading.get_ident() != recording_thread

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if elsewhere():
                return None
            recorder.module_stack.append(path)
            rule = rule_for_module(module)
            if rule is not None and not recorder.paused:
                return recorder.begin_atomic(module, args, kwargs)
            return None

        return hook

    def leave(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if elsewhere():
                return None
            rule = rule_for_module(module)
            if rule is not None and recorder.atomic and recorder.atomic[-1].module is module:
                output = recorder.end_atomic(module, rule, output)
            while recorder.module_stack and recorder.module_stack.pop() != path:
                pass
            for t in tensors_in((output,)):
                if t.grad_fn is not None:
                    describe(t.grad_fn, "", path)
            recorder.module_outputs.setdefault(path, []).append(output)
            return output

        return hook

    try:
        for root in modules_of(function):
            for path, module in root.named_modules():
                handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True, prepend=False))
                handles.append(module.register_forward_hook(leave(path)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        recorder.module_stack.clear()


def floats(values: Any) -> list[Tensor]:
    """Floating tensors in nested arguments."""
    return [t for t in tensors_in(values) if t.is_floating_point()]

"""Ways out of the graph, and what is done about each: a path that no signal can follow must not go unnoticed.

``detach``, ``.data`` and ``no_grad`` parts give values that look constant: they are marked (``CUT``), and using them
together with values that depend on an input is refused by name. So is handing values to Python or NumPy (``item``,
``numpy``), where no mark could follow them, and writing into a tensor behind autograd's back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.tags import CUT, UNKNOWN

if TYPE_CHECKING:
    from captum_transformer_attr.recording.recorder import Recorder

PEAK = "_captum_transformer_attr_peak"  # the live maximum that this detached one was
EXPORTS = frozenset(
    "item tolist numpy __array__ __float__ __int__ __index__ __complex__ __dlpack__ __deepcopy__ __reduce_ex__".split()
)
WAYS_OUT_OF_THE_GRAPH = (
    "detach, .data, no_grad, an operation without a gradient, or token ids used in a way that no handle follows"
)
WAY_OUT = "Way out: register_rule(type(module), relevance=...) for the module around it."


def place(path: str) -> str:
    """How a message calls a module."""
    return f"module '{path}'" if path else "the model itself"


def way_out(path: str, relevance: str = "...") -> str:
    """What a message proposes for an operation without a rule."""
    if path:
        return f"register_rule(type(model.get_submodule('{path}')), relevance={relevance})"
    return f"move the operation into a module of its own, and register_rule(ThatModule, relevance={relevance})"


def is_data_write(func: Any, name: str) -> bool:
    """``x.data = value``."""
    return name == "data" and getattr(func, "__name__", "") == "__set__"


def leave(recorder: Recorder, func: Any, name: str, args: Any, kwargs: Any, writes: bool) -> Any:
    """Run a call that takes live values out of the graph, and mark what it returns.

    Raises:
        UnsupportedOperationError: if it writes into a live tensor.
    """
    if (writes or is_data_write(func, name)) and args[0].requires_grad:
        raise UnsupportedOperationError(
            f"{place(recorder.path)} writes into a value behind autograd's back ('{name}' under no_grad or through "
            ".data): "
            f"what depends on it would be explained wrongly. {WAY_OUT}"
        )
    result = func(*args, **kwargs)
    if name in ("detach", "data"):
        storage = args[0].untyped_storage()
        recorder.writes.aliases[storage.data_ptr()] = storage
        if made_by(args[0]) in ("max", "amax"):
            setattr(result, PEAK, args[0])
    if writes:
        recorder.writes.marked.append(args[0])
    for out in results_of(result):
        if out.is_floating_point() and not out.requires_grad:
            setattr(out, CUT, recorder.path)
    return result


def made_by(tensor: Tensor) -> str:
    """Name of the function that torch itself recorded for this tensor."""
    fn: Any = tensor.grad_fn
    return "" if fn is None else str(fn.metadata.get(tags.ATTRIBUTE, ("", ""))[0])


def attached(value: Any) -> Any:
    """The live maximum in the place of a detached one that is taken off for the stability of a softmax.

    The value is the same, and all is visible.
    """
    return getattr(value, PEAK, value)


def cut(recorder: Recorder, result: Any) -> Any:
    """Live floats made under no_grad leave the graph."""
    if not isinstance(result, Tensor) or not result.requires_grad:
        return result
    result = result.detach()
    setattr(result, CUT, recorder.path)
    return result


def results_of(result: Any) -> list[Tensor]:
    """Tensors that a torch function returned."""
    if isinstance(result, Tensor):
        return [result]
    return [t for r in result for t in results_of(r)] if isinstance(result, (tuple, list)) else []


ARITHMETIC = frozenset("add sub subtract rsub mul multiply div divide true_divide pow matmul".split())
INTEGERS = frozenset("long int short char byte to type type_as".split())


def mark_dropped(recorder: Recorder, name: str, result: Any) -> None:
    """A float made of live values without a gradient has left the graph as well, and so has a value cast to an integer.

    Positions (of a maximum, of a sorted order) and comparisons are no values: they choose, like a condition in Python.
    """
    outs = results_of(result)
    if not any(out.requires_grad for out in outs):
        for out in outs:
            if out.is_floating_point():
                setattr(out, CUT, recorder.path)
            elif name in INTEGERS and out.dtype != torch.bool:
                setattr(out, UNKNOWN, recorder.path)


def pass_marks(result: Any, operands: list[Tensor]) -> None:
    """What is computed from marked values is marked."""
    source = next((t for t in operands if hasattr(t, CUT) or hasattr(t, UNKNOWN)), None)
    if source is None:
        return
    path = getattr(source, CUT, None) or getattr(source, UNKNOWN, "")
    computed = any(hasattr(t, UNKNOWN) for t in operands)
    for out in results_of(result):
        if out.is_floating_point():
            setattr(out, CUT, path)
        elif computed and out.dtype != torch.bool:
            setattr(out, UNKNOWN, path)


def mark_unfollowed(out: Tensor, path: str) -> None:
    """Mark what was computed from token ids in a way that no handle follows; comparisons say nothing of their own."""
    if out.is_floating_point():
        setattr(out, CUT, path)
    elif out.dtype != torch.bool:
        setattr(out, UNKNOWN, path)


def refuse_export(recorder: Recorder, name: str, operands: list[Tensor]) -> None:
    """
    Raises:
        UnsupportedOperationError: if a float that depends on an input is handed to Python or NumPy, or token ids as
            anything but numbers that remember what they are (``token_numbers``).
    """
    for t in operands[:1]:
        if t.is_floating_point() and (t.requires_grad or hasattr(t, CUT)):
            raise UnsupportedOperationError(
                f"{place(recorder.path)} hands a value that depends on the input to Python or NumPy ('{name}'), where "
                f"it cannot be followed. {WAY_OUT}"
            )
        said = hasattr(t, UNKNOWN) and not isinstance(getattr(t, UNKNOWN), tags.Position)
        if name not in ("item", "tolist") and (hasattr(t, tags.HANDLE) or said):
            refuse_number(recorder.path, name)


def refuse_number(path: str, name: str) -> None:
    """
    Raises:
        UnsupportedOperationError: always; for token ids in Python or NumPy.
    """
    raise UnsupportedOperationError(
        f"{place(path)} hands token ids to Python or NumPy ('{name}'), where they cannot be followed to a table that "
        f"is read with them. Way out: index with the tensor of ids, or register_rule for the module around it."
    )


def refuse_cut(recorder: Recorder, name: str, operands: list[Tensor]) -> None:
    """
    Raises:
        UnsupportedOperationError: if a live value meets one that was taken out of the graph.
    """
    for t in operands:
        path = getattr(t, CUT, None)
        if path is None and name in ARITHMETIC:
            path = getattr(t, UNKNOWN, None)
        if path is not None and not t.requires_grad:
            raise UnsupportedOperationError(
                f"{place(path)} takes a value out of the graph ({WAYS_OUT_OF_THE_GRAPH}) and "
                f"{place(recorder.path)} uses it again: part of the model would be invisible. {WAY_OUT}"
            )


def refuse_alias(recorder: Recorder, name: str, target: Tensor) -> None:
    """
    Raises:
        UnsupportedOperationError: if a live tensor's memory is written through its detached alias.
    """
    if hasattr(target, CUT) and target.untyped_storage().data_ptr() in recorder.writes.aliases:
        raise UnsupportedOperationError(
            f"{place(recorder.path)} writes into a value behind autograd's back ('{name}' on a detached alias): "
            f"what depends on it would be explained wrongly. {WAY_OUT}"
        )


def refuse_nested(recorder: Recorder, tensor: Tensor) -> None:
    """
    Raises:
        UnsupportedOperationError: for examples of different lengths in one tensor, whose axes cannot be followed.
    """
    if tensor.is_nested:
        raise UnsupportedOperationError(
            f"{place(recorder.path)} computes with nested tensors, whose tokens cannot be followed. "
            f"Way out: padded tensors and a mask, or examples one by one without nesting."
        )

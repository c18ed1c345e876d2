"""Records a forward: every operation on a tensor that depends on an input becomes a node of one autograd graph."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.atomic import Atomic
from captum_transformer_attr.recording.constants import constants_in
from captum_transformer_attr.recording.leaving import (
    EXPORTS,
    attached,
    cut,
    leave,
    mark_dropped,
    pass_marks,
    place,
    refuse_alias,
    refuse_cut,
    refuse_export,
    refuse_nested,
    way_out,
)
from captum_transformer_attr.recording.names import LIKE_ANOTHER, PASSIVE, base_name, is_in_place, name_of, writes
from captum_transformer_attr.recording.nested import tensors_in
from captum_transformer_attr.recording.node import Node, Record
from captum_transformer_attr.recording.precision import CONVERSIONS, promoted
from captum_transformer_attr.recording.registry import HANDLERS, LAYOUTS, ON_CONSTANTS, REFUSED
from captum_transformer_attr.recording.saved import saved_as_it_is, saving_hooks
from captum_transformer_attr.recording.signal import Pass, Signal
from captum_transformer_attr.recording.snapshot import Snapshot
from captum_transformer_attr.recording.tagging import recover, tag_base, tag_native
from captum_transformer_attr.recording.tags import HANDLE, Tag, tag_of
from captum_transformer_attr.recording.token_ids import with_handles
from captum_transformer_attr.recording.token_numbers import exported, mark_read
from captum_transformer_attr.recording.undispatched import undispatched
from captum_transformer_attr.recording.writes import Writes, write


class Recorder(TorchFunctionMode):
    """Active during the recorded forward only. Nothing is patched: model, classes and process stay as they are."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.nodes: list[Node] = []
        self.captured: dict[Node, Snapshot] = {}  # outputs whose arriving signals can be asked for
        self.edges: dict[int, Any] = {}  # origin → where its signals arrive
        self.parts: dict[tuple[Any, ...], Tag] = {}  # origin and place of some of its channels → their tag
        self.made: dict[Any, Tag] = {}  # autograd node → tag of what it gives
        self.counter = 63  # the inputs themselves have the numbers below
        self.writes = Writes()

        self.module_stack: list[str] = []
        self.list_outputs: dict[str, list[Snapshot | None]] = {}  # of modules that stand in a list, call by call
        self.atomic: list[Atomic] = []
        self.paused = 0

        self.passing: Pass | None = None  # the backward pass that runs

        self.promote = False  # follow a half-precision model in float32
        self.handle_dtype = torch.float32
        self.token_numbers = False  # Python holds numbers that were read from token ids
        self.autocast: torch.dtype | None = None  # precision of autocast regions in the model
        # Some examples were cut out of the batch axis: rows may belong to others than they seem to.
        self.mixes_examples = False
        self.constants = False  # also record attention among constants
        self.constant_attentions = 0
        self.constant_leaves: list[Tensor] = []  # they stand for the values of those recorded

    def clear(self) -> None:
        """Let go of every tensor."""
        self.writes.clear()
        graph = (self.nodes, self.captured, self.edges, self.parts, self.made, self.constant_leaves)
        for held in (*graph, self.list_outputs, self.atomic):
            held.clear()

    @property
    def path(self) -> str:
        """Path of the module that is running."""
        return self.module_stack[-1] if self.module_stack else ""

    @contextlib.contextmanager
    def sending(self, signal: Signal, absorbed: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Inside the context a backward pass carries this signal; see ``Pass``."""
        outer, self.passing = self.passing, Pass(signal, absorbed)
        try:
            yield
        finally:
            self.passing = outer

    # ------------------------------------------------------------------ dispatch
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if saving_hooks() is not None:
            with saved_as_it_is():
                return self.__torch_function__(func, types, args, kwargs)
        name = name_of(func)
        if self.paused or (name in PASSIVE and not self.token_numbers):
            return func(*args, **kwargs)
        result = self.seen(func, name, args, kwargs)
        if self.token_numbers:
            mark_read(name, args, kwargs, result)
        return result

    def seen(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Record one call that may read values, in full precision."""
        if name in PASSIVE:
            return func(*args, **kwargs)
        operands = tensors_in(args[:1] if name in LIKE_ANOTHER else (*args, *kwargs.values()))
        kind = operands[0].device.type if operands else ""
        if operands and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            # Mixed precision inside the model is followed in full precision, like a half-precision model.
            self.promote, self.autocast = True, torch.get_autocast_dtype(kind)
            with torch.autocast(kind, enabled=False):
                return self.dispatch(func, name, operands, args, kwargs)
        return self.dispatch(func, name, operands, args, kwargs)

    def dispatch(self, func: Any, name: str, operands: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Record one call, or let torch run it."""
        if name in EXPORTS:
            refuse_export(self, name, operands)
        if not any(t.requires_grad for t in operands):
            return self.on_constants(func, name, operands, args, kwargs)
        if name == "register_hook":
            # A hook on a tensor would see, and could change, signals that are no gradients.
            return torch.zeros(1, device="cpu", requires_grad=True).register_hook(args[1])
        if name in ("detach", "data") or not torch.is_grad_enabled():
            return leave(self, func, name, args, kwargs, writes(name))
        for t in operands:
            refuse_nested(self, t)
            if t.requires_grad and tag_of(t) is None:
                recover(self, t)
        if name in REFUSED:
            raise UnsupportedOperationError(
                f"no rule for operation '{name}' in {place(self.path)}: {REFUSED[name]}. Way out: {way_out(self.path)}."
            )
        if base_name(name) in ("sub", "subtract"):
            args = tuple(map(attached, args))
            operands = tensors_in((*args, *kwargs.values()))
        refuse_cut(self, base_name(name), operands)
        if self.promote:
            if name in CONVERSIONS:
                return args[0]
            args, kwargs = promoted(tuple(args)), promoted(kwargs)
        handler = HANDLERS.get(name) or HANDLERS.get(base_name(name))
        if handler is not None:
            if is_in_place(name):
                result = handler(self, *args, **kwargs)
                if result is not NotImplemented:
                    return write(self, args[0], result)
            else:
                out = kwargs.pop("out", None)
                result = handler(self, *args, **kwargs)
                if result is not NotImplemented:
                    return result if out is None else write(self, out, result)
        elif name not in LAYOUTS and (copy := undispatched(func)) is not None:
            with self:
                return copy(*args, **kwargs)
        return self.natively(func, name, operands, args, kwargs)

    def natively(self, func: Any, name: str, operands: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Let torch's own autograd record the call.

        Right for every signal if it only moves values around, which the audit checks.
        """
        written = args[0] if writes(name) else None
        if written is not None:
            self.writes.prepare(written)
        constants = constants_in(self, func, name, operands, args, kwargs, written)
        with self.writes.saved_by_torch():
            result = func(*args, **kwargs)
        mark_dropped(self, name, result if written is None else written)
        for out in tensors_in((result,) if written is None else (written,)):
            if out.requires_grad:
                tag_native(self, out, name, operands, args, kwargs)
        if written is not None:
            tag_base(self, written)
            if isinstance(result, Tensor) and result is not written and result.requires_grad:
                setattr(result, tags.ATTRIBUTE, tag_of(written))
        if constants is not None and isinstance(out := result if written is None else written, Tensor):
            constants.watch(out)
        return result

    def on_constants(self, func: Any, name: str, operands: list[Tensor], args: Any, kwargs: Any) -> Any:
        """No operand depends on an input through floats.

        Ids carry a float handle along, and tensors that were cut stay cut.
        """
        if name in ("item", "tolist"):
            return exported(self, args[0], func(*args, **kwargs))
        if any(hasattr(t, HANDLE) for t in operands):
            differentiable = torch.is_grad_enabled()
            if writes(name) and isinstance(args[0], Tensor):
                self.writes.prepare(args[0])
            # What the model does with ids under no_grad cuts nothing: they never had a gradient.
            with torch.enable_grad():
                result = with_handles(self, func, name, args, kwargs)
            return result if differentiable else cut(self, result)
        if writes(name) and isinstance(args[0], Tensor):
            refuse_alias(self, name, args[0])
            self.writes.prepare(args[0])
        handler = ON_CONSTANTS.get(name)
        result = func(*args, **kwargs) if handler is None else handler(self, func, *args, **kwargs)
        pass_marks(args[0] if name == "__setitem__" else result, operands)
        return result

    # ------------------------------------------------------------------ nodes and tags
    def run(self, node: Node, *live: Tensor, **tag: Any) -> Tensor:
        """Record ``node`` on its live inputs and tag the result; ``tag`` overrides entries of the tag (see ``Tag``)."""
        node.recorder = self
        node.path = self.path
        node.index = len(self.nodes)
        self.nodes.append(node)
        out: Tensor = Record.apply(node, *live)  # type: ignore[no-untyped-call]
        node.sources = tuple(map(tag_of, live))
        found = [t for t in node.sources if t is not None]
        new = self.merged(found, **tag)
        node.tag, node.layout, node.shape = new, new.layout, out.shape
        self.edges[new.origin] = GradientEdge(out.grad_fn, out.output_nr)  # type: ignore[arg-type]
        self.made[out.grad_fn] = new
        self.writes.keep_constants(node)
        self.writes.keep_live(node)
        setattr(out, tags.ATTRIBUTE, new)
        if node.captured:
            self.captured[node] = Snapshot(out, self.writes)
        return out

    def snapshot(self, tensor: Tensor) -> Snapshot:
        """For callers outside an operation: what a snapshot asks of the tensor is not the model's."""
        self.paused += 1
        try:
            return Snapshot(tensor, self.writes)
        finally:
            self.paused -= 1

    def attention_origins(self) -> int:
        """Bit set of the attention calls over tokens so far."""
        calls = (node for node in self.captured if node.is_attention)
        return functools.reduce(lambda bits, node: bits | 1 << node.tag.origin, calls, 0)

    def merged(self, found: list[Tag], **overrides: Any) -> Tag:
        """Tag of a value computed from values with tags ``found``."""
        self.counter += 1
        ancestors = 1 << self.counter
        carried = ancestors
        for tag in found:
            ancestors |= tag.ancestors
            carried |= tag.carried
        values: dict[str, Any] = {
            "carried": carried,
            "attention": max((t.attention for t in found), default=0),
            "weighted": min((t.weighted for t in found), default=0),
            "stride": max((t.stride for t in found), default=(), key=len),
            "layout": None,
        }
        values.update(overrides)
        values["carried"] |= 1 << self.counter
        return Tag(origin=self.counter, ancestors=ancestors, **values)


def node_behind(recorder: Recorder, tag: Tag | None) -> Node | None:
    """The recorded operation that computed the values that a tag names."""
    edge = None if tag is None else recorder.edges.get(tag.origin)
    node = None if edge is None else getattr(edge.node, "node", None)
    return node if isinstance(node, Node) else None

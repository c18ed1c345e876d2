"""Records a forward: every operation on a tensor that depends on an input becomes a node of one autograd graph."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.layout import Layout, features, resized
from captum_transformer_attr.recording.leaving import (
    CUT,
    EXPORTS,
    UNKNOWN,
    WAY_OUT,
    attached,
    cut,
    leave,
    mark_dropped,
    pass_marks,
    place,
    recover,
    refuse_alias,
    refuse_cut,
    refuse_export,
    refuse_nested,
)
from captum_transformer_attr.recording.node import Node, Record
from captum_transformer_attr.recording.precision import CONVERSIONS, promoted
from captum_transformer_attr.recording.tags import Tag, tag_of

Handler = Callable[..., Any]

HANDLERS: dict[str, Handler] = {}  # function name → what makes a node of it
ON_CONSTANTS: dict[
    str, Handler
] = {}  # function name → what happens if no operand depends on an input: ``handler(recorder, function, *args)``
LAYOUTS: dict[str, Callable[..., Layout | None]] = {}  # view-like function name → layout of its result
HANDLE = "_captum_transformer_attr_handle"  # float stand-in of an integer tensor of token ids
REFUSED = {
    "grid_sample": "deformable attention reads values at positions of its own and has no attention map",
    **dict.fromkeys(
        ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell"),
        "a recurrence over tokens has no attention map and no rule",
    ),
}  # function name → why

# Functions that read only shapes, dtypes or devices of their tensor arguments.
PASSIVE = frozenset(
    """shape size dim ndim numel nelement dtype device stride is_contiguous is_floating_point is_complex requires_grad
    grad_fn is_leaf layout new_zeros new_ones new_full new_empty new_tensor zeros_like ones_like full_like empty_like
    rand_like randn_like element_size storage_offset data_ptr __len__ is_cuda is_sparse is_quantized is_meta is_mkldnn
    names grad _version __repr__ __format__ __hash__ untyped_storage is_nested is_cpu is_mps is_xpu is_inference
    result_type can_cast is_same_size output_nr _backward_hooks is_complex get_device retains_grad is_nonzero _is_view
    allclose equal is_shared itemsize nbytes""".split()
)

# Functions that read only the shape or the dtype of their second argument.
LIKE_ANOTHER = frozenset("type_as view_as reshape_as expand_as to".split())


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register what makes a node of the torch functions with these names: ``handler(recorder, *args, **kwargs)``.

    A handler returns ``NotImplemented`` to leave this call to torch itself (the audit then judges it).
    """

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def name_of(function: Any) -> str:
    """A function's name; for a property such as ``Tensor.T`` the property's."""
    name = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__"):
        name = getattr(function.__self__, "__name__", name)
    return name


def base_name(name: str) -> str:
    """``add`` for ``__add__``, ``__iadd__``, ``add_``."""
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        if name in IN_PLACE_DUNDERS:
            name = name[1:]
    elif name.endswith("_"):
        name = name[:-1]
    return name


IN_PLACE_DUNDERS = frozenset("iadd isub imul itruediv idiv ipow imatmul".split())


def is_in_place(name: str) -> bool:
    """Whether the function writes into its first argument."""
    if name.startswith("__"):
        return name[2:-2] in IN_PLACE_DUNDERS
    return name.endswith("_") and not name.endswith("__")


FLAGS = frozenset("requires_grad_ share_memory_ rename_ detach_".split())


def writes(name: str) -> bool:
    """Whether the function changes the values of its first argument; assignment to an index does, a flag does not."""
    return (is_in_place(name) and name not in FLAGS) or name == "__setitem__"


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """All tensors in arguments, also inside lists, tuples and dicts."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
        elif isinstance(value, dict):
            found += tensors_in(value.values())
    return found


class Recorder(TorchFunctionMode):
    """Active during the recorded forward only. Nothing is patched: model, classes and process stay as they are."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.nodes: list[Node] = []
        self.saved: dict[int, list[tuple[Node, Any]]] = {}
        self.module_stack: list[str] = []
        self.paused = 0
        self.counter = 63  # the inputs themselves have the numbers below
        self.signal: Any = None
        self.accounting = False
        self.account_dtype = torch.float64
        self.absorbed: dict[str, Any] = {}
        self.handle_dtype = torch.float32
        self.constants = False  # also record attention among constants
        self.constant_attentions = 0
        self.constant_leaves: list[Tensor] = []  # they stand for the values of those recorded
        self.mixes_examples = (
            False  # some examples were cut out of the batch axis: rows may belong to others than they seem to
        )
        self.promote = False  # follow a half-precision model in float32
        self.autocast: torch.dtype | None = None  # precision of autocast regions in the model
        self.module_outputs: dict[str, list[Any]] = {}
        self.atomic: list[Atomic] = []
        self.captured: dict[Node, Tensor] = {}  # outputs whose arriving signals can be asked for
        self.edges: dict[int, Any] = {}  # origin → where its signals arrive
        self.parts: dict[tuple[Any, ...], Tag] = {}  # origin and place of some of its channels → their tag
        self.made: dict[Any, Tag] = {}  # autograd node → tag of what it gives
        # Memory of live tensors that the model also has as constants; held, so that its address is given to no other
        # tensor.
        self.aliases: dict[int, torch.UntypedStorage] = {}
        self.marked: list[Tensor] = []  # tensors of the model that got marks
        self.owned: dict[int, Tensor] = {}  # memory of parameters and buffers → the tensor
        self.overwritten: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # the same of those written into → the tensor and what it held

    def clear(self) -> None:
        """Let go of every tensor."""
        for tensor in self.marked:
            for mark in (tags.ATTRIBUTE, HANDLE, CUT, UNKNOWN):
                tensor.__dict__.pop(mark, None)
        graph = (self.nodes, self.saved, self.captured, self.edges, self.parts, self.made, self.absorbed)
        model = (self.module_outputs, self.atomic, self.aliases, self.marked, self.owned, self.overwritten)
        for held in (*graph, *model, self.constant_leaves):
            held.clear()

    @property
    def path(self) -> str:
        """Path of the module that is running."""
        return self.module_stack[-1] if self.module_stack else ""

    # ------------------------------------------------------------------ dispatch
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if self.paused or name in PASSIVE:
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
            return torch.zeros(1, requires_grad=True).register_hook(args[1])
        if name in ("detach", "data") or not torch.is_grad_enabled():
            return leave(self, func, name, args, kwargs, writes(name))
        for t in operands:
            refuse_nested(self, t)
            if t.requires_grad and tag_of(t) is None:
                recover(self, t)
        if name in REFUSED:
            raise UnsupportedOperationError(
                f"no rule for operation '{name}' in {place(self.path)}: {REFUSED[name]}. "
                f"Way out: register_rule(type(model.get_submodule('{self.path}')), relevance=...)."
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
                    return self.write(args[0], result)
            else:
                out = kwargs.pop("out", None)
                result = handler(self, *args, **kwargs)
                if result is not NotImplemented:
                    return result if out is None else self.write(out, result)
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
            self.unshare(written)
            self.keep_owned(written)
        result = func(*args, **kwargs)
        mark_dropped(self, name, result if written is None else written)
        for out in tensors_in((result,) if written is None else (written,)):
            if out.requires_grad:
                self.tag_native(out, name, operands, args, kwargs)
        if written is not None:
            self.tag_base(written)
            if isinstance(result, Tensor) and result is not written and result.requires_grad:
                setattr(result, tags.ATTRIBUTE, tag_of(written))
        return result

    def on_constants(self, func: Any, name: str, operands: list[Tensor], args: Any, kwargs: Any) -> Any:
        """No operand depends on an input through floats.

        Ids carry a float handle along, and tensors that were cut stay cut.
        """
        if any(hasattr(t, HANDLE) for t in operands):
            from captum_transformer_attr.ops.token_ids import with_handles

            differentiable = torch.is_grad_enabled()
            with (
                torch.enable_grad()
            ):  # what the model does with ids under no_grad cuts nothing: they never had a gradient
                result = with_handles(self, func, name, args, kwargs)
            return result if differentiable else cut(self, result)
        if writes(name) and isinstance(args[0], Tensor):
            refuse_alias(self, name, args[0])
            self.unshare(args[0])
            self.keep_owned(args[0])
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
        self.share_constants(node)
        if node.captured:
            self.captured[node] = out
        setattr(out, tags.ATTRIBUTE, new)
        return out

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

    def tag_native(self, out: Tensor, name: str, operands: list[Tensor], args: Any, kwargs: Any) -> None:
        if name in LIKE_ANOTHER:
            operands = operands[:1]
        found = [t for t in map(tag_of, operands) if t is not None]
        if not found:
            found = [self.merged([])]
        infer = LAYOUTS.get(name) or LAYOUTS.get(base_name(name))
        first = found[0]
        try:
            layout = infer(out, *args, **kwargs) if infer else resized(first.layout, out.shape)
        except (RuntimeError, TypeError, ValueError, IndexError):
            layout = None
        if name == "__getitem__" and layout is None and first.layout is not None and not tensors_in(args[1:]):
            self.mixes_examples = True
        if len(found) == 1 and layout is not None and features(layout) < features(first.layout):
            # Some channels of several (queries of a joint projection, half of a gated unit) are values of their own.
            part = (first.origin, out.storage_offset(), out.shape, out.stride())
            moved = self.parts.setdefault(
                part, self.merged(found, role=first.role, root=first.root, sum_of=first.sum_of)
            )
            moved = replace(moved, layout=layout)
        elif len(found) == 1:
            # Values that only moved keep their identity, so that a trunk is recognised behind a reshape or a cast.
            moved = replace(first, layout=layout, parts=(), parts_dim=0)
        else:
            roles = {t.role for t in found}
            moved = self.merged(found, layout=layout, role=roles.pop() if len(roles) == 1 else tags.PLAIN)
        setattr(out, tags.ATTRIBUTE, moved)
        if out.grad_fn is not None:
            self.made[out.grad_fn] = moved
            describe(out.grad_fn, name, self.path)

    def tag_base(self, written: Tensor) -> None:
        """A write into a view makes the viewed tensor depend on the input too."""
        base = written._base
        tag = tag_of(written)
        if base is not None and tag is not None and base.requires_grad:
            found = [tag] if tag_of(base) is None else [tag_of(base), tag]
            known = [t for t in found if t is not None]
            layout = known[0].layout if tag_of(base) is not None else resized(tag.layout, base.shape)
            setattr(base, tags.ATTRIBUTE, self.merged(known, layout=layout))

    # ------------------------------------------------------------------ atomic modules
    def begin_atomic(self, module: Any, args: Any, kwargs: Any) -> Any:
        """Give a module with a registered rule leaves of its own and stop recording until it returns."""
        live = [t for t in tensors_in((args, kwargs)) if t.requires_grad and t.is_floating_point()]
        own = next((p.dtype for p in module.parameters() if p.is_floating_point()), None) if self.promote else None
        self.paused += 1  # before the leaves are made: that they are detached is not the model's doing
        leaves = [t.detach().to(own or t.dtype).requires_grad_() for t in live]
        by_id = {id(t): leaf for t, leaf in zip(live, leaves, strict=True)}
        self.atomic.append(Atomic(module, live, leaves))
        return replaced(args, by_id), replaced(kwargs, by_id)

    def end_atomic(self, module: Any, rule: Any, output: Any) -> Any:
        """Record what the module returned as one operation."""
        from captum_transformer_attr.ops.custom import Custom

        self.paused -= 1
        atomic = self.atomic.pop()
        found = [t for t in tensors_in((output,)) if t.requires_grad]
        results = {}
        for y in found:
            node = Custom(rule)
            node.label = f"module {type(module).__name__}"
            node.replay(atomic.leaves, y)
            first = next((t for t in map(tag_of, atomic.live) if t), None)
            layout = resized(first.layout, y.shape) if first else None
            weighted = (first.weighted if first else 0) + 1
            results[id(y)] = self.run(node, *atomic.live, layout=layout, weighted=weighted)
        return replaced(output, results)

    # ------------------------------------------------------------------ in-place writes
    def unshare(self, tensor: Tensor) -> None:
        """Give every node that kept this storage its own copy, because the model is about to overwrite it."""
        for node, name in self.saved.pop(tensor.untyped_storage().data_ptr(), ()):
            if isinstance(name, str):
                setattr(node, name, getattr(node, name).clone())
            else:
                node.forward(*(leaf.detach().clone() for leaf in node.leaves))  # type: ignore[attr-defined]

    def share_constants(self, node: Node) -> None:
        """Constants that a node keeps (masks, scales) may be overwritten by the model as well; parameters are not."""
        for name, value in node.__dict__.items():
            if (
                isinstance(value, Tensor)
                and not value.requires_grad
                and value.untyped_storage().data_ptr() not in self.owned
            ):
                self.saved.setdefault(value.untyped_storage().data_ptr(), []).append((node, name))

    def keep_owned(self, tensor: Tensor) -> None:
        """Remember what a parameter or buffer held before the model writes into it."""
        place = tensor.untyped_storage().data_ptr()
        if place in self.owned:
            self.marked.append(tensor)
            if place not in self.overwritten:
                owner = self.owned[place]
                self.overwritten[place] = (owner, owner.detach().clone())

    def restore_owned(self) -> None:
        """Give parameters and buffers their values back."""
        with torch.no_grad():
            for owner, values in self.overwritten.values():
                if owner.grad_fn is not None:
                    owner.detach_()
                owner.copy_(values)

    def write(self, target: Tensor, value: Tensor) -> Tensor:
        """``target.copy_(value)`` with the value's tag: an in-place operation in two steps."""
        self.unshare(target)
        self.keep_owned(target)
        try:
            target.copy_(value)
        except RuntimeError as error:
            if "view" not in str(error):
                raise
            raise UnsupportedOperationError(
                f"{place(self.path)} writes into a view of a value that other operations use: what they give would not "
                f"follow. {WAY_OUT}"
            ) from error
        setattr(target, tags.ATTRIBUTE, tag_of(value))
        self.tag_base(target)
        return target


@dataclass
class Atomic:
    """A module that runs as one operation: its live inputs, and the leaves it sees instead."""

    module: Any
    live: list[Tensor]
    leaves: list[Tensor]


def replaced(value: Any, by_id: dict[int, Tensor]) -> Any:
    """A nested structure with some tensors replaced."""
    if isinstance(value, Tensor):
        return by_id.get(id(value), value)
    if isinstance(value, tuple):
        items = [replaced(v, by_id) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [replaced(v, by_id) for v in value]
    if isinstance(value, dict):
        return type(value)({k: replaced(v, by_id) for k, v in value.items()})
    return value


def node_of(tensor: Tensor) -> Node | None:
    """The recorded operation that gave exactly this tensor, no view of it."""
    node = getattr(tensor.grad_fn, "node", None)
    return node if isinstance(node, Node) else None


def node_behind(recorder: Recorder, tag: Tag | None) -> Node | None:
    """The recorded operation that computed the values that a tag names."""
    edge = None if tag is None else recorder.edges.get(tag.origin)
    node = None if edge is None else getattr(edge.node, "node", None)
    return node if isinstance(node, Node) else None


def describe(grad_fn: Any, name: str, path: str) -> None:
    """Note on an autograd node which function made it where, for the audit's message; the first note stays."""
    grad_fn.metadata.setdefault(tags.ATTRIBUTE, (name, path))


def undispatched(function: Any) -> Callable[..., Any] | None:
    """A copy of a Python-level torch function without its ``__torch_function__`` test, so that what it calls is seen.

    The original stays as it is; only the copy's globals say that no argument wants to be dispatched.
    """
    if not isinstance(function, types.FunctionType) or not function.__module__.startswith("torch"):
        return None

    def never(*_: Any) -> bool:
        return False

    namespace = dict(function.__globals__)
    namespace.update(has_torch_function=never, has_torch_function_unary=never, has_torch_function_variadic=never)
    copy = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy

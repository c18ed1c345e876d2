"""In-place writes of the model: what others kept of the memory that is overwritten stays as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.constants import constants_in
from captum_transformer_attr.recording.leaving import WAY_OUT, place
from captum_transformer_attr.recording.node import node_of, stands_for
from captum_transformer_attr.recording.tagging import tag_base
from captum_transformer_attr.recording.tags import tag_of

if TYPE_CHECKING:
    from captum_transformer_attr.recording.node import Node
    from captum_transformer_attr.recording.recorder import Recorder
    from captum_transformer_attr.recording.snapshot import Snapshot


class Saved:
    """What torch itself saved for the backward pass of one of its operations."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def unpack(self) -> Tensor:
        return self.tensor


class Writes:
    """Who keeps which memory, by its address.

    Attributes:
        saved: nodes, snapshots and ``Saved``, and the names (or numbers) under which they keep a tensor.
        owned: parameters and buffers of the model.
        overwritten: those of them that were written into, with what they held.
        aliases: memory of live tensors that the model also has as constants; held, so that its address is given to no
            other tensor.
        marked: tensors of the model that got marks.
    """

    def __init__(self) -> None:
        self.saved: dict[int, list[tuple[Node | Snapshot | Saved, Any]]] = {}
        self.owned: dict[int, Tensor] = {}
        self.overwritten: dict[int, tuple[Tensor, Tensor]] = {}
        self.aliases: dict[int, torch.UntypedStorage] = {}
        self.marked: list[Tensor] = []

    def clear(self) -> None:
        """Let go of every tensor, and take the marks off the model's own."""
        for tensor in self.marked:
            for mark in tags.MARKS:
                tensor.__dict__.pop(mark, None)
        for held in (self.saved, self.owned, self.overwritten, self.aliases, self.marked):
            held.clear()

    def keep(self, node: Node | Snapshot | Saved, name: str | int, tensor: Tensor) -> None:
        """Note that a node keeps this tensor's memory, as the attribute ``name`` or as its leaf of this number."""
        self.saved.setdefault(tensor.untyped_storage().data_ptr(), []).append((node, name))

    def keep_constants(self, node: Node) -> None:
        """Constants that a node keeps (masks, scales) may be overwritten as well.

        Parameters and buffers are not, except those the forward wrote into: they will get their values back.
        """
        for name, value in node.__dict__.items():
            if isinstance(value, Tensor) and not value.requires_grad:
                address = value.untyped_storage().data_ptr()
                if address not in self.owned or address in self.overwritten:
                    self.keep(node, name, value)

    def keep_live(self, node: Node) -> None:
        """Live operands that a node holds may be overwritten as well."""
        for name in node.keeps_live:
            for tensor in listed(getattr(node, name)):
                self.keep(node, name, tensor)

    def saved_by_torch(self) -> saved_tensors_hooks:
        """Inside the context torch's own operations save what the model may overwrite: autograd would refuse that."""
        return saved_tensors_hooks(self.pack, Saved.unpack)

    def pack(self, tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        self.keep(saved, "tensor", tensor)
        return saved

    def prepare(self, tensor: Tensor) -> None:
        """The model is about to write into this tensor."""
        self.unshare(tensor)
        self.keep_owned(tensor)

    def unshare(self, tensor: Tensor) -> None:
        """Give every node that kept this storage its own copy."""
        for node, name in self.saved.pop(tensor.untyped_storage().data_ptr(), ()):
            if isinstance(name, str):
                setattr(node, name, copied(getattr(node, name), tensor))
            else:
                node.forward(*(leaf.detach().clone() for leaf in node.leaves))  # type: ignore[union-attr]

    def keep_owned(self, tensor: Tensor) -> None:
        """Remember what a parameter or buffer holds."""
        address = tensor.untyped_storage().data_ptr()
        if address in self.owned:
            self.marked.append(tensor)
            if address not in self.overwritten:
                owner = self.owned[address]
                self.overwritten[address] = (owner, owner.detach().clone())

    def restore_owned(self) -> None:
        """Give parameters and buffers their values back; nodes keep what the forward computed with."""
        with torch.no_grad():
            for owner, values in self.overwritten.values():
                self.unshare(owner)
                if owner.grad_fn is not None:
                    owner.detach_()
                owner.copy_(values)


def write(recorder: Recorder, target: Tensor, value: Tensor) -> Tensor:
    """``target.copy_(value)`` with the value's tag: an in-place operation in two steps."""
    recorder.writes.prepare(target)
    constants = constants_in(recorder, Tensor.copy_, "copy_", [target, value], (target, value), {}, target)
    try:
        target.copy_(value)
    except RuntimeError as error:
        if "view" not in str(error):
            raise
        raise UnsupportedOperationError(
            f"{place(recorder.path)} writes into a view of a value that other operations use: what they give would not "
            f"follow. {WAY_OUT}"
        ) from error
    setattr(target, tags.ATTRIBUTE, tag_of(value))
    if value.shape == target.shape and value.dtype == target.dtype:
        stands_for(target, node_of(value))
    tag_base(recorder, target)
    if constants is not None:
        constants.watch(target)
    return target


def listed(held: Any) -> tuple[Tensor, ...]:
    """Tensors that an attribute of a node holds."""
    return held if isinstance(held, tuple) else () if held is None else (held,)


def copied(held: Any, written: Tensor) -> Any:
    """What an attribute of a node holds, with copies of the tensors that share the memory of ``written``."""
    if isinstance(held, tuple):
        return tuple(copied(t, written) for t in held)
    if held.untyped_storage().data_ptr() != written.untyped_storage().data_ptr():
        return held
    copy = held.clone()
    if held.requires_grad:
        setattr(copy, tags.ATTRIBUTE, tag_of(held))
        stands_for(copy, node_of(held))
    return copy

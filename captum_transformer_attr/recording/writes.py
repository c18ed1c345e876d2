"""In-place writes of the model: what others kept of the memory that is overwritten stays as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.leaving import WAY_OUT, place
from captum_transformer_attr.recording.node import copied
from captum_transformer_attr.recording.tagging import tag_base
from captum_transformer_attr.recording.tags import tag_of

if TYPE_CHECKING:
    from captum_transformer_attr.recording.node import Node
    from captum_transformer_attr.recording.recorder import Recorder


class Saved:
    """What torch itself saved for the backward pass of one of its operations."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def unpack(self) -> Tensor:
        return self.tensor


class Writes:
    """Who keeps which memory, by its address.

    Attributes:
        saved: nodes (or ``Saved``) and the names (or numbers) under which they keep a tensor.
        owned: parameters and buffers of the model.
        overwritten: those of them that were written into, with what they held.
        aliases: memory of live tensors that the model also has as constants; held, so that its address is given to no
            other tensor.
        marked: tensors of the model that got marks.
    """

    def __init__(self) -> None:
        self.saved: dict[int, list[tuple[Node | Saved, Any]]] = {}
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

    def keep(self, node: Node | Saved, name: str | int, tensor: Tensor) -> None:
        """Note that a node keeps this tensor's memory, as the attribute ``name`` or as its leaf of this number."""
        self.saved.setdefault(tensor.untyped_storage().data_ptr(), []).append((node, name))

    def keep_constants(self, node: Node) -> None:
        """Constants that a node keeps (masks, scales) may be overwritten by the model as well; parameters are not."""
        for name, value in node.__dict__.items():
            if (
                isinstance(value, Tensor)
                and not value.requires_grad
                and value.untyped_storage().data_ptr() not in self.owned
            ):
                self.keep(node, name, value)

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
                setattr(node, name, getattr(node, name).clone())
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
        """Give parameters and buffers their values back."""
        with torch.no_grad():
            for owner, values in self.overwritten.values():
                if owner.grad_fn is not None:
                    owner.detach_()
                owner.copy_(values)


def kept_apart(recorder: Recorder, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an in-place operation with a copy of what it overwrites, which nodes may refer to."""
    if not args[0].requires_grad:
        return args
    with recorder:
        before = args[0].clone()
    copied(before, args[0])
    return tuple(before if value is args[0] else value for value in args)


def write(recorder: Recorder, target: Tensor, value: Tensor) -> Tensor:
    """``target.copy_(value)`` with the value's tag: an in-place operation in two steps."""
    recorder.writes.prepare(target)
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
    copied(target, value)
    tag_base(recorder, target)
    return target

"""A recorded operation, and the one autograd function through which every signal travels backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.recording.layout import Layout, sample_shape

if TYPE_CHECKING:
    from captum_transformer_attr.recording.recorder import Recorder
    from captum_transformer_attr.recording.tags import Tag

Grads = tuple["Tensor | None", ...]


COPIED = "_captum_transformer_attr_copied"  # on an autograd node: the recorded operation that it copies the result of


class LayoutLostError(Exception):
    """The examples of a batch cannot be told apart: explain them one by one. Never leaves the package."""


class Node:
    """One operation of the recorded forward.

    A subclass computes the operation in ``forward`` from the tensors that depend on an input ("live" tensors), keeps
    what its rules need with ``keep``, and gives the ordinary vector-Jacobian product in ``gradient``. How a relevance
    or a token flow passes is not its business: see ``captum_transformer_attr.rules`` and
    ``captum_transformer_attr.flow``.
    """

    label: str = "operation"
    # Whether the recorder keeps the live output, so that the signal arriving there can be asked for.
    captured: ClassVar[bool] = False
    recorder: Recorder
    path: str
    index: int
    tag: Tag  # of the output
    sources: tuple[Tag | None, ...]  # of the live inputs
    layout: Layout | None
    shape: torch.Size

    @property
    def is_attention(self) -> bool:
        """Whether this is a softmax attention over tokens."""
        return False

    def forward(self, *live: Tensor) -> Tensor:
        """Compute the output; runs without autograd."""
        raise NotImplementedError

    def gradient(self, g: Tensor) -> Grads:
        """Gradient of every live input from the output's gradient ``g``."""
        raise NotImplementedError

    def carriers(self, signal: Any) -> tuple[bool, ...] | None:
        """Which live inputs relevance may reach; None for all. The audit does not follow the others."""
        return None

    def keep(self, name: str, tensor: Tensor | None) -> None:
        """Store a detached tensor as an attribute, safe against later in-place writes of the model."""
        setattr(self, name, None if tensor is None else tensor.detach())
        if tensor is not None:
            self.recorder.writes.keep(self, name, tensor)

    def sample_sum(self, tensor: Tensor) -> Tensor:
        """Sum over everything but the examples, shaped to broadcast against ``tensor`` after ``per_sample``.

        ``(outer, B, inner)`` → ``(B,)``.
        """
        return self.per_sample(tensor).sum((0, 2))

    def per_sample(self, tensor: Tensor) -> Tensor:
        """``tensor`` (of the output's shape) reshaped to ``(outer, B, inner)``."""
        shape = sample_shape(self.layout, tensor.shape, self.recorder.batch)
        if shape is None:
            raise LayoutLostError(self.path)
        return tensor.reshape(shape)

    def absorb(self, arrived: Callable[[], Tensor]) -> None:
        """Count relevance that arrived at parameters: ``arrived()``, of the output's shape, is called on demand."""
        passing = self.recorder.passing
        if passing is not None and passing.absorbed is not None:
            total = self.sample_sum(arrived().double())
            passing.absorbed[self.path] = passing.absorbed.get(self.path, 0) + total


def node_of(tensor: Tensor) -> Node | None:
    """The recorded operation that gave exactly this tensor, no view of it."""
    fn: Any = tensor.grad_fn
    node = getattr(fn, "node", None)
    if node is None and fn is not None:
        node = fn.metadata.get(COPIED)
    return node if isinstance(node, Node) else None


def copied(copy: Tensor, original: Tensor) -> None:
    """Note on a copy of a whole tensor which operation gave its values."""
    fn: Any = copy.grad_fn
    node = node_of(original)
    if node is not None and fn is not None:
        fn.metadata[COPIED] = node


class Record(torch.autograd.Function):
    """Runs a node's forward, and hands every backward pass to the signal that is being sent."""

    @staticmethod
    def forward(ctx: Any, node: Node, *live: Tensor) -> Tensor:
        ctx.node = node
        ctx.set_materialize_grads(False)
        return owning(node.forward(*live), live)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        node: Node = ctx.node
        passing = node.recorder.passing
        if passing is None:
            raise UnsupportedOperationError(
                f"the model takes gradients of its own in its forward, through module '{node.path}': no signal can "
                "follow them. "
                f"Way out: register_rule for the module around it."
            )
        if g is None:
            return (None,) * (len(ctx.needs_input_grad))
        return (None, *passing.signal.send(node, g))


def owning(out: Tensor, live: tuple[Tensor, ...]) -> Tensor:
    """``out`` as a tensor of its own where it is a view of something made inside the node.

    The model may write into it like into any result; torch before 2.15 forbids that for views that a custom function
    returns. A view of a live input stays one: writing into it would change the input too, behind the recorder's back.
    """
    memory = out.untyped_storage().data_ptr()
    if not out._is_view() or any(t.untyped_storage().data_ptr() == memory for t in live):
        return out
    return out.new_empty(0).set_(out.untyped_storage(), out.storage_offset(), out.size(), out.stride())


class LocalNode(Node):
    """A node whose gradient is taken from a small autograd graph of its own: ``function`` of its live inputs."""

    function: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    y: Tensor

    def forward(self, *live: Tensor) -> Tensor:
        with torch.enable_grad():
            self.leaves = tuple(t.detach().requires_grad_() for t in live)
            for i, leaf in enumerate(self.leaves):
                self.recorder.writes.keep(self, i, leaf)
            self.y = self.function(*self.leaves)
            if any(self.y is leaf for leaf in self.leaves):
                self.y = self.y.view_as(self.y)
        return self.y.detach()

    def gradient(self, g: Tensor) -> Grads:
        # Where the signal is itself differentiated (row sums of the token flow), what leaves depends on what arrived.
        return torch.autograd.grad(
            self.y, self.leaves, g, retain_graph=True, create_graph=g.requires_grad, allow_unused=True
        )

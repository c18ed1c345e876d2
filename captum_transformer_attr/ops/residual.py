"""Sums of two tensors: residual connections, added embeddings, biases and masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.ops.bilinear import unbroadcast
from captum_transformer_attr.ops.elementwise import scaled
from captum_transformer_attr.ops.norm import centred
from captum_transformer_attr.ops.softmax import axis_of_log_total, log_softmax_of
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.node import Grads, Node
from captum_transformer_attr.recording.recorder import Recorder, node_behind
from captum_transformer_attr.recording.registry import handles
from captum_transformer_attr.recording.tags import Tag, tag_of


class Sum(Node):
    """``a + b``, both live.

    Attributes:
        trunk: 0 or 1, the operand the other one was computed from (a residual's trunk), or the only one without an
            attention of its own; None for siblings.
        attends: whether each operand went through an attention that the trunk (among siblings: the other one) did not;
            ``attentions`` is the bit set of all attention calls so far.
        some_rows: whether an operand holds only some rows of the tensor that it was taken from.
        fork: origin of the values that ``branch``, an attention branch with a residual of its own, brings here a second
            time; None if there is none.
    """

    label = "residual sum"
    captured = True
    a: Tensor
    b: Tensor
    broadcast: tuple[Tensor, ...] = ()  # the live operands, if they have different shapes
    keeps_live = ("broadcast", "branch")

    def __init__(self, a: Tag, b: Tag, attentions: int, some_rows: tuple[bool, bool] = (False, False)) -> None:
        self.tags, self.attentions = (a, b), attentions
        own = (bool(a.ancestors & ~b.ancestors & attentions), bool(b.ancestors & ~a.ancestors & attentions))
        self.trunk = trunk_of(a, b)
        if self.trunk is None:
            self.trunk = further_branch(a, b)
        if self.trunk is not None and some_rows[self.trunk] and not own[1 - self.trunk]:
            self.trunk = None  # a class token and the mean of the patches: two read-outs of one tensor
        if self.trunk is None and own[0] != own[1]:
            self.trunk = own.index(False)  # a projected shortcut, a local branch beside the attention
        self.attends = (own[0] and self.trunk != 0, own[1] and self.trunk != 1)
        self.fork: int | None = None
        self.branch: Tensor | None = None

    @property
    def carried(self) -> int:
        """See ``Tag``; a sum without a trunk is either one of siblings or a branch."""
        if self.trunk is not None:
            return self.tags[self.trunk].carried
        return 0 if any(self.attends) else self.tags[0].carried | self.tags[1].carried

    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        self.keep("a", a)
        self.keep("b", b)
        return a + b

    def gradient(self, g: Tensor) -> Grads:
        return unbroadcast(g, self.a.shape), unbroadcast(g, self.b.shape)

    def is_branch_of(self, trunk: Tag) -> None:
        """This sum is itself a branch beside ``trunk`` (attention plus MLP): neither operand is a trunk."""
        self.trunk = None
        self.fork = None
        first, second = (bool(t.ancestors & ~trunk.ancestors & self.attentions) for t in self.tags)
        self.attends = (first, second)


def trunk_of(a: Tag, b: Tag) -> int | None:
    """Which operand is the residual trunk: the one the other came from, as it is or scaled.

    Rows of one tensor (two read-out tokens that are averaged) are siblings, scaled or not.
    """
    if common_root(a, b) >= 0:
        return None
    for position, (trunk, branch) in enumerate(((a, b), (b, a))):
        if branch.comes_from(trunk):
            return position
    for position, (trunk, branch) in enumerate(((a, b), (b, a))):
        if trunk.root >= 0 and branch.ancestors >> trunk.root & 1:
            return position
    return None


def is_selection(recorder: Recorder, tag: Tag, tensor: Tensor) -> bool:
    """Whether a tensor holds only some rows of the values that its tag names."""
    node = node_behind(recorder, replace(tag, origin=tag.root) if tag.root >= 0 else tag)
    return node is not None and tensor.numel() < node.shape.numel()


def further_branch(a: Tag, b: Tag) -> int | None:
    """In ``((x + f(x)) + g(x)) + h(x)`` the position of the sum so far; else None."""
    for position, (first, second) in enumerate(((a, b), (b, a))):
        inner = first.sum_of
        while isinstance(inner, Sum) and inner.trunk is not None:
            trunk = inner.tags[inner.trunk]
            if second.comes_from(trunk):
                return position
            inner = trunk.sum_of
    return None


class ConstantSum(Node):
    """``x + c`` with a constant: a positional embedding, a bias, a mask.

    ``ignored``: the constant is a bias or a mask, not a summand of its own.
    """

    label = "sum with a constant"
    x: Tensor

    def __init__(self, constant: Tensor, ignored: bool) -> None:
        self.constant, self.ignored = constant.detach(), ignored

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.keep("x", x)
        return x + self.constant

    def gradient(self, g: Tensor) -> Grads:
        return (unbroadcast(g, self.x.shape),)


def is_bias(constant: Tensor, shape: torch.Size, layout: lay.Layout | None) -> bool:
    """A scalar, a vector, or anything that is the same for all of several tokens; copies of them (for experts) may each
    have another.

    What is added to a single token (a class token) is a summand.

    Decided without the batch axis, so that an example alone is treated as it is in a batch.
    """
    if constant.numel() == 1 or constant.ndim <= 1:
        return True
    found = lay.labels(layout) if layout else [{lay.BATCH}, *({lay.MIXED} for _ in shape[2:]), {lay.FEATURE}]
    tokens = [
        i - len(shape)
        for i, (label, size) in enumerate(zip(found, shape, strict=False))
        if size > 1 and label - {lay.BATCH} and lay.FEATURE not in label
    ]
    tokens = [i for i in tokens if found[i] != {lay.COPIES}] or tokens
    varies = any(constant.ndim >= -i and constant.shape[i] > 1 for i in tokens)
    return bool(tokens) and not varies


def add_constant(recorder: Recorder, x: Tensor, constant: Any) -> Tensor:
    """``x + constant``."""
    tag = tag_of(x)
    constant = torch.as_tensor(constant, dtype=None if isinstance(constant, Tensor) else x.dtype, device=x.device)
    scores = tag is not None and tag.role == tags.SCORES
    shape = lay.broadcast_shape(x.shape, constant.shape)
    layout = lay.broadcast([(tag.layout, x.shape)], shape) if tag else None
    node = ConstantSum(constant, ignored=scores or is_bias(constant, shape, layout))
    kept = (
        {"role": tag.role, "root": tag.root if tag.root >= 0 or not constant.numel() == 1 else tag.origin}
        if tag
        else {}
    )
    return recorder.run(node, x, layout=layout, **kept)


def add(recorder: Recorder, a: Any, b: Any) -> Any:
    """``a + b`` where at least one operand is live."""
    if not isinstance(b, Tensor) or not b.requires_grad:
        return add_constant(recorder, a, b)
    if not isinstance(a, Tensor) or not a.requires_grad:
        return add_constant(recorder, b, a)
    ta, tb = tag_of(a), tag_of(b)
    assert ta is not None and tb is not None
    shape = lay.broadcast_shape(a.shape, b.shape)
    layout = lay.broadcast([(ta.layout, a.shape), (tb.layout, b.shape)], shape)
    rows = (is_selection(recorder, ta, a), is_selection(recorder, tb, b))
    node = Sum(ta, tb, recorder.attention_origins(), rows)
    if a.shape != b.shape:
        node.broadcast = (a, b)
    if node.trunk is not None:
        branch = (tb, ta)[node.trunk]
        if isinstance(branch.sum_of, Sum):
            branch.sum_of.is_branch_of((ta, tb)[node.trunk])
        elif any(node.attends):
            shared = ta.carried & tb.carried
            node.fork = max((o for o in recorder.edges if shared >> o & 1), default=None) if shared else None
            node.branch = (b, a)[node.trunk] if node.fork is not None else None
    role = role_of_sum({ta.role, tb.role})
    root = common_root(ta, tb)
    return recorder.run(node, a, b, layout=layout, role=role, root=root, sum_of=node, carried=node.carried)


def role_of_sum(roles: set[str]) -> str:
    """Scores and something are scores; a mean of squares less a square of means is a statistic."""
    if len(roles) == 1:
        return roles.pop()
    if tags.SCORES in roles:
        return tags.SCORES
    return tags.STATISTIC if roles == {tags.MEAN, tags.STATISTIC} else tags.PLAIN


def common_root(a: Tag, b: Tag) -> int:
    """The one tensor both are elementwise functions of, −1 if there is none."""
    roots = [{t.origin, t.root} - {-1} for t in (a, b)]
    shared = roots[0] & roots[1]
    return max(shared) if shared else -1


@handles("add", "__add__", "__radd__", "__iadd__", "add_")
def add_handler(recorder: Recorder, input: Any, other: Any, *, alpha: float = 1) -> Any:
    return add(recorder, input, other if alpha == 1 else scaled(recorder, other, alpha))


def is_mean_of(other: Tensor, x: Tensor) -> bool:
    """Whether ``other`` holds means of ``x`` over some axes, however they were computed."""
    axes = [i for i, (a, b) in enumerate(zip(other.shape, x.shape, strict=False)) if a == 1 != b]
    if not axes or other.ndim != x.ndim or any(a != b for a, b in zip(other.shape, x.shape, strict=True) if a != 1):
        return False
    return torch.allclose(other.detach(), x.detach().mean(axes, keepdim=True))


@handles("sub", "subtract", "__sub__", "__isub__", "sub_")
def subtract(recorder: Recorder, input: Any, other: Any, *, alpha: float = 1) -> Any:
    ta, tb = (tag_of(t) if isinstance(t, Tensor) else None for t in (input, other))
    if (
        ta is not None
        and tb is not None
        and ((tb.root == ta.origin and tb.role == tags.MEAN) or is_mean_of(other, input))
    ):
        return centred(recorder, input, other)
    if ta is not None and tb is not None and alpha == 1 and tb.comes_from(ta):
        dim = axis_of_log_total(other, input)
        if dim is not None:
            return log_softmax_of(recorder, input, dim)
    return add(recorder, input, scaled(recorder, other, -alpha))


@handles("rsub", "__rsub__")
def reversed_subtract(recorder: Recorder, input: Any, other: Any, *, alpha: float = 1) -> Any:
    return add(recorder, scaled(recorder, input, -alpha), other)


@handles("addcmul")
def add_product(recorder: Recorder, input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Any:
    """``input + value * tensor1 * tensor2`` is a product and a sum."""
    with recorder:
        product = tensor1 * tensor2
        return input + (product if value == 1 else product * value)


@handles("addcdiv")
def add_quotient(recorder: Recorder, input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Any:
    """``input + value * tensor1 / tensor2`` is a quotient and a sum."""
    with recorder:
        quotient = tensor1 / tensor2
        return input + (quotient if value == 1 else quotient * value)


@handles("lerp")
def interpolate(recorder: Recorder, input: Any, end: Any, weight: Any) -> Any:
    """``input + weight * (end - input)`` as a sum of two shares."""
    with recorder:
        return input * (1 - weight) + end * weight

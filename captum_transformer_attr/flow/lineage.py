"""Where the tokens of a tensor come from.

Walks the recorded autograd graph back through token-wise operations to the nearest attention update.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_transformer_attr.ops.attention import Attention, FusedAttention
from captum_transformer_attr.ops.bilinear import MatMul
from captum_transformer_attr.ops.custom import Custom
from captum_transformer_attr.ops.elementwise import Elementwise, Scale
from captum_transformer_attr.ops.linear import ConstantProduct, Linear
from captum_transformer_attr.ops.norm import BatchNorm, Centring, LayerNorm
from captum_transformer_attr.ops.product import Product
from captum_transformer_attr.ops.residual import ConstantSum, Sum
from captum_transformer_attr.ops.shape import Join
from captum_transformer_attr.ops.softmax import Softmax
from captum_transformer_attr.recording.node import Node
from captum_transformer_attr.recording.token_ids import Combined

Function = Any  # a node of torch's autograd graph


@dataclass(frozen=True)
class Line:
    """Provenance of the tokens of one tensor.

    Attributes:
        end: the autograd node where the walk ends: an update (a residual sum that attention was added to, or an
            attention whose output nothing was added to), else the birth of the tokens (embedding, convolution,
            concatenation, input); None for constants.
        updated: whether ``end`` is an update.
        roots: updates and inputs that the tokens were computed from, also through operations that are not token-wise
            (pooling, concatenation).
    """

    end: Function | None
    updated: bool
    roots: frozenset[Function]


CONSTANT = Line(None, False, frozenset())


class Lineage:
    """Lines of every autograd node below ``output``, and the leaves each depends on."""

    def __init__(self, output: Tensor) -> None:
        self.lines: dict[Function, Line] = {}
        self.leaves: dict[Function, frozenset[Tensor]] = {}
        for fn in inputs_first(output.grad_fn):
            below = [f for f, _ in fn.next_functions if f is not None]
            own = frozenset([fn.variable]) if hasattr(fn, "variable") else frozenset()
            self.leaves[fn] = own.union(*(self.leaves[f] for f in below))
            self.lines[fn] = self.find(fn)

    def line(self, fn: Function | None) -> Line:
        """Provenance of the tensor that ``fn`` computed; None stands for a constant."""
        return CONSTANT if fn is None else self.lines[fn]

    def find(self, fn: Function) -> Line:
        node = node_of(fn)
        live = operands(fn)
        if node is None:
            return self.moved(fn, live)
        if isinstance(node, Attention):
            return update(fn) if not node.over_channels else self.born(fn, live)
        if isinstance(node, Sum):
            return self.through_sum(fn, node, live)
        if isinstance(node, Combined):
            return self.of_two(fn, live)
        if isinstance(node, ConstantSum):
            line = self.line(live[0])
            return update(fn) if constant_trunk(node, line) else line
        if isinstance(node, Product):
            return self.line(live[node.signal]) if node.signal is not None else self.born(fn, live)
        if isinstance(node, Centring) or token_wise(node):
            return self.line(live[0])
        return self.born(fn, live)

    def moved(self, fn: Function, live: list[Function]) -> Line:
        """Operations that only move values; where they bring several tensors together, new tokens are born."""
        if fn.name().endswith("CopyBackwards"):  # all of a tensor was overwritten: what it held goes nowhere
            live = operands(fn)[-1:]
        if not live:
            return self.born(fn, live)
        if len(live) == 1 and not hasattr(live[0], "variable"):
            return self.line(live[0])
        return self.born(fn, live)

    def through_sum(self, fn: Function, node: Sum, live: list[Function]) -> Line:
        if any(node.attends):
            return update(fn)
        if node.trunk is not None:
            return self.line(live[node.trunk])
        return self.of_two(fn, live)

    def of_two(self, fn: Function, live: list[Function]) -> Line:
        """Two token-wise functions of the same tokens (a rotary embedding) are no new tokens."""
        first, second = (self.line(f) for f in live)
        return first if first.end is not None and first.end is second.end else self.born(fn, live)

    def born(self, fn: Function, live: list[Function]) -> Line:
        """``fn`` makes tokens of its own."""
        roots: frozenset[Function] = frozenset().union(*(self.line(f).roots for f in live))
        return Line(fn, False, roots or frozenset([fn]))


def update(fn: Function) -> Line:
    return Line(fn, True, frozenset([fn]))


def token_wise(node: Node) -> bool:
    """Whether every output token is a function of the input token at its place."""
    if isinstance(node, Linear):
        return not node.mixes_tokens
    if isinstance(node, ConstantProduct):
        return not node.left
    if isinstance(node, LayerNorm):
        return len(node.dims) == 1
    if isinstance(node, Join):
        return len(node.leaves) == 1 and node.leaves[0].shape == node.shape
    if isinstance(node, Custom):
        return node.leaves[0].shape == node.shape
    return isinstance(node, (Elementwise, Scale, BatchNorm))


def constant_trunk(node: ConstantSum, line: Line) -> bool:
    """Whether attention was added to learned queries here: unlike a bias, the summand has an entry per token."""
    direct = line.updated and isinstance(node_of(line.end), Attention)
    return direct and node.constant.ndim >= 3 and node.constant.ndim == node.x.ndim


def node_of(fn: Function) -> Node | None:
    """The recorded operation behind an autograd node, None if torch's own."""
    node = getattr(fn, "node", None)
    return node if isinstance(node, Node) else None


def operands(fn: Function) -> list[Function]:
    """Autograd nodes of the live operands, in order."""
    return [f for f, _ in fn.next_functions if f is not None]


def value_of(fn: Function) -> Function | None:
    """The autograd node that computed the values of an attention call, None for constants."""
    node = node_of(fn)
    if isinstance(node, FusedAttention) and not node.live[2]:
        return None
    found = operands(fn)[-1]
    # Inputs are read through a view, so a bare leaf stands for constant values.
    return None if hasattr(found, "variable") else found


def query_of(fn: Function) -> Function | None:
    """The autograd node that computed the queries of an attention call, None for constants."""
    node = node_of(fn)
    live = operands(fn)
    if isinstance(node, FusedAttention):
        return live[0] if node.live[0] else None
    if len(live) < 2:
        return None
    # A written-out map: softmax of (scaled, masked) queries times keys.
    stack = [live[0]]
    while stack:
        found = stack.pop(0)
        product = node_of(found)
        if isinstance(product, MatMul):
            return operands(found)[0]
        if not isinstance(product, (Linear, Attention)) or isinstance(product, Softmax):
            stack += operands(found)
    return None


def inputs_first(root: Function) -> Iterator[Function]:
    """Every autograd node below ``root``, operands before what reads them."""
    done: set[Function] = set()
    stack: list[tuple[Function, bool]] = [(root, False)]
    while stack:
        fn, visited = stack.pop()
        if visited:
            yield fn
            continue
        if fn in done:
            continue
        done.add(fn)
        stack.append((fn, True))
        stack += [(f, False) for f, _ in fn.next_functions if f is not None and f not in done]

"""Matrix products of two live tensors: queries times keys, attention times values, any other bilinear form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.ops.attention import ValueProduct, over_channels, within_tokens
from captum_transformer_attr.ops.linear import constant_product
from captum_transformer_attr.ops.stacked import along, gates, refuse_lost, summed, value, weighted_parts
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.node import Grads, Node
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.registry import handles
from captum_transformer_attr.recording.tags import Tag, tag_of


def unbroadcast(g: Tensor, shape: torch.Size) -> Tensor:
    """Sum a gradient over the axes along which its tensor was broadcast."""
    return g.sum_to_size(shape) if g.shape != shape else g


class MatMul(Node):
    """``a @ b`` with at least two axes each, both live.

    ``values``: position of the operand that holds the values of linear attention, Q (softmax(K)ᵀ V), beside which Q
    plays the part that queries play in a softmax; None for scores and other products of equals.
    """

    label = "matrix product"
    a: Tensor
    b: Tensor
    y: Tensor
    factors: tuple[Tensor, ...] = ()  # the live operands
    keeps_live = ("factors",)

    def __init__(self, values: int | None = None) -> None:
        self.values = values

    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        y = a @ b
        for name, tensor in (("a", a), ("b", b), ("y", y)):
            self.keep(name, tensor)
        return y

    def gradient(self, g: Tensor) -> Grads:
        return self.split(g @ self.b.mT, self.a.mT @ g)

    def split(self, a: Tensor, b: Tensor) -> Grads:
        """Signals of both operands, summed where an operand was broadcast."""
        return unbroadcast(a, self.a.shape), unbroadcast(b, self.b.shape)


def product_layout(
    a: Tag | None, b: Tag | None, left: Tensor, right: Tensor, shape: tuple[int, ...]
) -> lay.Layout | None:
    la, lb = (a.layout if a else None), (b.layout if b else None)
    if la is None or lb is None:
        return None
    batch = (
        lay.broadcast([(la[:-2], left.shape[:-2]), (lb[:-2], right.shape[:-2])], shape[:-2]) if len(shape) > 2 else ()
    )
    return None if batch is None else (*batch, la[-2], lb[-1])


@handles("matmul", "__matmul__", "bmm", "mm")
def matmul(recorder: Recorder, a: Tensor, b: Tensor) -> Any:
    with recorder:
        stacked = weighted_parts(recorder, a, b)
    if stacked is not None:
        return stacked
    if not (a.requires_grad and b.requires_grad):
        return constant_product(recorder, a, b)
    refuse_lost(recorder, a, (-1,))
    refuse_lost(recorder, b, (max(-2, -b.ndim),))
    if a.ndim < 2 or b.ndim < 2:
        with recorder:
            row, column = a.ndim < 2, b.ndim < 2
            out = (a.unsqueeze(0) if row else a) @ (b.unsqueeze(-1) if column else b)
            out = out.squeeze(-1) if column else out
            return out.squeeze(-1 if column else -2) if row else out
    ta, tb = tag_of(a), tag_of(b)
    weights = [t is not None and t.role == tags.PROBABILITY for t in (ta, tb)]
    if weights == [False, True]:
        # Values times transposed attention: the same product seen from the other side.
        with recorder:
            return (b.transpose(-1, -2) @ a.transpose(-1, -2)).transpose(-1, -2).contiguous()
    shape = (*lay.broadcast_shape(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    layout = product_layout(ta, tb, a, b, shape)
    weighted = min(t.weighted for t in (ta, tb) if t) + 1 if ta or tb else 1
    if all(weights) and is_map(b, tb):
        # A map of a map (two steps of attention at once) is a map, that values may be multiplied with.
        return recorder.run(MatMul(), a, b, layout=layout, weighted=weighted, role=tags.PROBABILITY)
    if weights[0] and a.shape[-2] == 1 and within_tokens(recorder, ta.layout if ta else None, 1, tb):
        return mixture(recorder, a, b)
    if weights[0]:
        return attend(recorder, ValueProduct(), a, b, layout, weighted)
    pooled = [t is not None and t.role == tags.POOLED for t in (ta, tb)]
    values = pooled.index(True) if sum(pooled) == 1 else None
    if values is None:
        role = tags.PLAIN if of_features(layout) else tags.SCORES
        node = MatMul()
        node.factors = (a, b)
        return recorder.run(node, a, b, layout=layout, weighted=weighted, role=role)
    # What the queries carry stays behind, as in a softmax attention.
    return recorder.run(MatMul(values), a, b, layout=layout, weighted=weighted, carried=0)


def is_map(tensor: Tensor, tag: Tag | None) -> bool:
    """Whether probabilities are a map from tokens to as many tokens, and not values that a softmax made."""
    found = lay.labels(tag.layout) if tag else []
    return tensor.shape[-2] == tensor.shape[-1] and not (found and lay.FEATURE in found[-1])


def mixture(recorder: Recorder, weights: Tensor, value: Tensor) -> Tensor:
    """One row of weights per token, times the token's own values, as the sum of gated values that it is."""
    lead = lay.broadcast_shape(weights.shape[:-2], value.shape[:-2])
    with recorder:
        return (value.expand(*lead, *value.shape[-2:]) * weights.mT).sum(-2, keepdim=True)


def of_features(layout: lay.Layout | None) -> bool:
    """Whether a product's rows are tokens and its columns features: then it is no score of any token for another."""
    found = lay.labels(layout)
    return bool(found) and lay.FEATURE in found[-1] and lay.FEATURE not in found[-2]


def attend(
    recorder: Recorder, node: ValueProduct, probability: Tensor, value: Tensor, layout: lay.Layout | None, weighted: int
) -> Tensor:
    """Attention times values. Attention over channels (XCiT, DaViT) mixes no tokens and does not count as one."""
    tag = tag_of(value)
    p = tag_of(probability)
    node.over_channels = over_channels(recorder, p.layout if p else None, probability.shape[-2], tag)
    node.key_tag = tag
    depth = max(t.attention for t in (p, tag) if t)
    carried = tag.carried if tag and node.over_channels else 0
    rows = lay.labels(p.layout) if p else []
    pooled = bool(rows) and lay.FEATURE in rows[-2] and lay.FEATURE not in rows[-1] and not node.over_channels
    return recorder.run(
        node,
        probability,
        value,
        layout=layout,
        weighted=weighted,
        attention=depth + (not node.over_channels),
        carried=carried,
        role=tags.POOLED if pooled else tags.PLAIN,
    )


@handles("baddbmm")
def baddbmm(
    recorder: Recorder, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:
    with recorder:
        product = torch.bmm(batch1, batch2)
        product = product if alpha == 1 else product * alpha
        return product if beta == 0 else product + (input if beta == 1 else input * beta)


@handles("einsum")
def einsum(recorder: Recorder, equation: Any, *operands: Any) -> Any:
    """Two operands become permutations, reshapes and one matrix product; more are contracted from left to right."""
    if not isinstance(equation, str):
        return NotImplemented
    tensors: list[Tensor] = (
        list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else list(operands)
    )
    terms, result = explicit(equation, [t.ndim for t in tensors])
    if any(len(set(term)) != len(term) for term in terms):
        return NotImplemented
    with recorder:
        left, x = terms[0], tensors[0]
        if len(terms) == 1:
            return contract_one(left, result, x)
        for k in range(1, len(terms)):
            needed = set(result).union(*terms[k + 1 :]) if k + 1 < len(terms) else set(result)
            target = (
                result if k + 1 == len(terms) else "".join(dict.fromkeys(c for c in left + terms[k] if c in needed))
            )
            x = contract_two(recorder, left, terms[k], target, x, tensors[k])
            left = target
        return x


@handles("tensordot")
def tensordot(recorder: Recorder, a: Tensor, b: Tensor, dims: Any = 2, **_: Any) -> Any:
    if isinstance(dims, Tensor):
        return NotImplemented
    first, second = (range(a.ndim - dims, a.ndim), range(dims)) if isinstance(dims, int) else dims
    letters = "abcdefghijklmnopqrstuvwxyz"
    left, right = list(letters[: a.ndim]), list(letters[a.ndim : a.ndim + b.ndim])
    for i, j in zip(first, second, strict=True):
        right[j] = left[i]
    result = [c for c in left + right if (c in left) != (c in right)]
    with recorder:
        return torch.einsum(f"{''.join(left)},{''.join(right)}->{''.join(result)}", a, b)


@handles("outer", "ger")
def outer(recorder: Recorder, input: Tensor, vec2: Tensor) -> Any:
    with recorder:
        return input[:, None] * vec2


def contracted(a: Tensor, b: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """``(a * b).sum(dims, keepdim)`` of tensors of as many axes as a contraction."""
    letters = "abcdefghijklmnopqrstuvwxyz"[: a.ndim]
    spread = [[i for i in range(a.ndim) if t.shape[i] == 1 != other.shape[i]] for t, other in ((a, b), (b, a))]
    terms = ["".join(c for i, c in enumerate(letters) if i not in gone) for gone in spread]
    result = "".join(c for i, c in enumerate(letters) if i not in dims)
    y = torch.einsum(f"{terms[0]},{terms[1]}->{result}", a.squeeze(spread[0]), b.squeeze(spread[1]))
    for i in sorted(dims) if keepdim else ():
        y = y.unsqueeze(i)
    return y


def explicit(equation: str, ndims: list[int]) -> tuple[list[str], str]:
    """Terms and result with the ellipsis written out and an implicit result made explicit."""
    equation = equation.replace(" ", "")
    source, arrow, result = equation.partition("->")
    terms = source.split(",")
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    longest = max((n - len(t.replace("...", "")) for t, n in zip(terms, ndims, strict=True) if "..." in t), default=0)
    rest = "".join(spare[:longest])
    terms = [
        t.replace("...", rest[longest - (n - len(t.replace("...", ""))) :] if "..." in t else "")
        for t, n in zip(terms, ndims, strict=True)
    ]
    if arrow:
        return terms, result.replace("...", rest)
    letters = "".join(terms)
    return terms, rest + "".join(sorted(c for c in set(letters) if letters.count(c) == 1 and c not in rest))


def contract_one(term: str, result: str, x: Tensor) -> Tensor:
    """Sum over the letters that vanish, then order the axes."""
    gone = [i for i, c in enumerate(term) if c not in result]
    if gone:
        x = x.sum(gone)
        term = "".join(c for c in term if c in result)
    return x.permute([term.index(c) for c in result])


def contract_two(recorder: Recorder, a: str, b: str, result: str, x: Tensor, y: Tensor) -> Tensor:
    """One pairwise contraction as a (batched) matrix product."""
    stacked = contract_parts(recorder, a, b, result, x, y)
    if stacked is None:
        stacked = contract_parts(recorder, b, a, result, y, x)
    if stacked is not None:
        return stacked
    for term, other in ((a, b), (b, a)):
        gone = [c for c in term if c not in other and c not in result]
        if gone:
            kept = "".join(c for c in term if c not in gone)
            if term is a:
                x, a = contract_one(a, kept, x), kept
            else:
                y, b = contract_one(b, kept, y), kept
    batch = [c for c in a if c in b and c in result]
    inner = [c for c in a if c in b and c not in result]
    rows = [c for c in a if c not in b]
    columns = [c for c in b if c not in a]
    size = {
        **dict(zip(b, y.shape, strict=True)),
        **{c: n for c, n in zip(a, x.shape, strict=True) if n != 1 or c not in b},
    }
    if x is y and a == b and not rows:  # a squared norm
        return contract_one(a, result, x.square())
    if not inner and not rows and not columns:
        return (
            contract_one(a, "".join(batch), x)
            .mul(contract_one(b, "".join(batch), y))
            .permute([batch.index(c) for c in result])
        )

    def arrange(t: Tensor, term: str, *groups: list[str]) -> Tensor:
        t = t.permute([term.index(c) for group in (batch, *groups) for c in group])
        lead = t.shape[: len(batch)]
        sizes = [
            torch.Size([t.shape[term_position] for term_position in span]).numel() for span in spans(len(batch), groups)
        ]
        return t.reshape(*lead, *sizes)

    product = arrange(x, a, rows, inner) @ arrange(y, b, inner, columns)
    letters = [*batch, *rows, *columns]
    return product.reshape([size[c] for c in letters]).permute([letters.index(c) for c in result]).contiguous()


def contract_parts(
    recorder: Recorder, term: str, other: str, result: str, stacked: Tensor, weights: Tensor
) -> Tensor | None:
    """A contraction over the axis along which values were stacked, with weights, as a sum of the parts."""
    tag = tag_of(stacked)
    if tag is None or not tag.intact:
        return None
    dim, parts = tag.parts_dim, tag.parts
    if term[dim] in result or term[dim] not in other or not gates(recorder, parts, weights):
        return None
    rest, weighing = term[:dim] + term[dim + 1 :], other.replace(term[dim], "")
    axis = other.index(term[dim]) - len(other)
    terms = []
    for k, part in enumerate(parts):
        weight = along(weights, axis, k)
        if not weighing or (weights.requires_grad and set(weighing) <= set(rest) & set(result)):
            terms.append(contract_one(rest, result, value(part) * spread_like(weight, weighing, rest)))
        else:
            terms.append(contract_two(recorder, rest, weighing, result, value(part), weight))
    contraction: Tensor = summed(terms)
    return contraction


def spread_like(weight: Tensor, term: str, other: str) -> Tensor:
    """A weight with the axes ``term``, shaped to broadcast against a tensor with the axes ``other``."""
    ordered = weight.permute([term.index(c) for c in other if c in term])
    return ordered[tuple(slice(None) if c in term else None for c in other)]


def spans(start: int, groups: tuple[list[str], ...]) -> list[range]:
    """Axis positions of consecutive groups."""
    result = []
    for group in groups:
        result.append(range(start, start + len(group)))
        start += len(group)
    return result

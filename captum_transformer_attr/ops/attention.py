"""Softmax attention, fused or written out: every product of attention probabilities and values is an attention call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.ops.shape import Join
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording.node import Grads, Node
from captum_transformer_attr.recording.recorder import Recorder, node_behind
from captum_transformer_attr.recording.registry import handles
from captum_transformer_attr.recording.tags import Tag, tag_of

CHUNK = 2**23  # elements of one block of attention rows that may be in memory at a time


class Attention(Node):
    """One attention call: ``output = A @ value``.

    Maps are rebuilt in blocks of query rows, so that memory stays linear in the tokens.

    ``probabilities`` gives A for some rows, ``(..., rows, keys)``; ``value`` is ``(..., keys, channels)``; leading axes
    are batch, heads, windows.
    """

    label = "attention"
    captured = True
    value: Tensor
    over_channels: bool = False
    key_tag: Tag | None = None

    @property
    def is_attention(self) -> bool:
        return not self.over_channels

    def probabilities(self, rows: slice) -> Tensor:
        """Attention A after softmax for these query rows."""
        raise NotImplementedError

    def blocks(self) -> Iterator[slice]:
        """Slices of query rows whose maps fit the memory budget."""
        *lead, rows, keys = self.map_shape
        step = max(1, CHUNK // max(1, math.prod(lead) * keys))
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    @property
    def map_shape(self) -> tuple[int, ...]:
        """Shape of the whole map, ``(..., queries, keys)``."""
        raise NotImplementedError

    def to_value(self, signal: Tensor) -> Grads:
        """A signal for the values only."""
        raise NotImplementedError


def over_channels(recorder: Recorder, weights: lay.Layout | None, rows: int, value: Tag | None) -> bool:
    """Whether an attention mixes no tokens: channels of all tokens (XCiT, DaViT), or what every token has of its own.

    ``weights`` is the layout of its map, ``rows`` the size of the map's last but one axis.
    """
    summed, kept = lay.last_axes(value.layout if value else None)
    transposed = lay.FEATURE in summed and bool(kept) and lay.FEATURE not in kept
    return transposed or within_tokens(recorder, weights, rows, value)


def within_tokens(recorder: Recorder, weights: lay.Layout | None, rows: int, value: Tag | None) -> bool:
    """Whether every token weighs what is its own (experts, layers, heads), and none reads another.

    The query is the token itself or one of its channels. Either its weights are channels, too (a router), or the values
    are known to have tokens among their leading axes and none on the one that is summed over. Neighbours that were
    stacked beside a token are tokens, too.
    """
    queries, keys = lay.last_axes(weights)
    if rows == 1 and lay.FEATURE in keys and any(map(lay.tokens, lay.labels(weights)[:-2])):
        return True
    found = lay.labels(value.layout if value else None)
    if not any(map(lay.tokens, found[:-2])) or lay.tokens(found[-2] | keys):
        return False
    return (rows == 1 or lay.FEATURE in queries) and not holds_neighbours(recorder, value)


def holds_neighbours(recorder: Recorder, value: Tag | None) -> bool:
    """Whether values were joined from one tensor in several places (rolled, padded and cut)."""
    node = node_behind(recorder, value)
    while node is not None and len(node.sources) == 1:
        node = node_behind(recorder, node.sources[0])
    if not isinstance(node, Join):
        return False
    origins = [origin_of_moved(recorder, source) for source in node.sources if source is not None]
    return len(set(origins)) < len(origins)


def origin_of_moved(recorder: Recorder, tag: Tag) -> int:
    """Origin of the values that were only padded since."""
    node = node_behind(recorder, tag)
    while isinstance(node, Join) and len(node.sources) == 1 and node.sources[0] is not None:
        tag = node.sources[0]
        node = node_behind(recorder, tag)
    return tag.origin


class ValueProduct(Attention):
    """Attention times values where the model computes the map itself."""

    label = "attention (eager)"
    probability: Tensor
    y: Tensor

    def forward(self, probability: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        y = probability @ value
        for name, tensor in (("probability", probability), ("value", value), ("y", y)):
            self.keep(name, tensor)
        return y

    def probabilities(self, rows: slice) -> Tensor:
        return self.probability[..., rows, :]

    @property
    def map_shape(self) -> tuple[int, ...]:
        return (*self.y.shape[:-1], self.probability.shape[-1])

    def gradient(self, g: Tensor) -> Grads:
        return self.split(g @ self.value.mT, self.probability.mT @ g)

    def split(self, probability: Tensor | None, value: Tensor) -> Grads:
        """Signals of both operands, summed where an operand was broadcast over the other's leading axes."""
        first = None if probability is None else probability.sum_to_size(self.probability.shape)
        return first, value.sum_to_size(self.value.shape)

    def to_value(self, signal: Tensor) -> Grads:
        return self.split(None, signal)


class FusedAttention(Attention):
    """``F.scaled_dot_product_attention``: runs fused as the model wants it.

    The backward passes rebuild the map block by block.
    """

    label = "attention (fused)"
    query: Tensor
    key: Tensor
    y: Tensor

    def __init__(
        self,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        live: tuple[bool, bool, bool],
        constants: tuple[Tensor, ...],
    ) -> None:
        self.mask, self.causal, self.scale, self.live, self.constants = mask, causal, scale, live, constants

    def forward(self, *live: Tensor) -> Tensor:
        given = iter(live)
        query, key, value = (
            next(given) if alive else constant for alive, constant in zip(self.live, self.constants, strict=True)
        )
        y = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask, is_causal=self.causal, scale=self.scale
        )
        for name, tensor in (("query", query), ("key", key), ("value", value), ("y", y)):
            self.keep(name, tensor)
        return y

    def scores(self, rows: slice) -> Tensor:
        """Scaled queries times keys, before the mask; scaling the queries spares a pass over the map."""
        return (self.query[..., rows, :] * self.scale) @ self.key.mT

    def weights(self, scores: Tensor, rows: slice) -> Tensor:
        """Softmax of the masked scores; a row whose every key is masked gives zeros, as the fused kernel does."""
        hidden: Tensor | None = None
        if self.causal:
            keys = torch.arange(scores.shape[-1], device=scores.device)
            hidden = keys > torch.arange(rows.start, rows.stop, device=scores.device)[:, None]
        if self.mask is not None:
            mask = self.mask.expand(*self.mask.shape[:-2], self.y.shape[-2], scores.shape[-1])[..., rows, :]
            if mask.dtype == torch.bool:
                hidden = ~mask if hidden is None else hidden | ~mask
            else:
                scores = scores + mask
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        result = scores.softmax(-1)
        if self.mask is not None:
            result = torch.where(scores.amax(-1, keepdim=True) == -math.inf, 0, result)
        return result

    def probabilities(self, rows: slice) -> Tensor:
        return self.weights(self.scores(rows), rows)

    @property
    def map_shape(self) -> tuple[int, ...]:
        return (*self.y.shape[:-1], self.key.shape[-2])

    def gradient(self, g: Tensor) -> Grads:
        dq, dk, dv = torch.empty_like(self.query), torch.zeros_like(self.key), torch.zeros_like(self.value)
        for rows in self.blocks():
            p, g_rows = self.probabilities(rows), g[..., rows, :]
            dp = g_rows @ self.value.mT
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[..., rows, :] = ds @ self.key
            dk += ds.mT @ self.query[..., rows, :]
            dv += p.mT @ g_rows
        return self.to_live(dq.mul_(self.scale), dk.mul_(self.scale), dv)

    def to_live(self, *signals: Tensor | None) -> Grads:
        """Signals of query, key and value, those of constant operands left out."""
        return tuple(s for s, alive in zip(signals, self.live, strict=True) if alive)

    def to_value(self, signal: Tensor) -> Grads:
        return self.to_live(None, None, signal)


def hides_every_key(mask: Tensor | None) -> bool:
    """Whether some query sees no key at all."""
    if mask is None:
        return False
    return not bool((mask if mask.dtype == torch.bool else mask > -math.inf).any(-1).all())


def mask_of_same_precision(
    recorder: Recorder, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """The mask in the precision of the queries, if the kernel means the same by it.

    Torch 2.15 on CPUs reads a float32 mask wrongly for float64 queries.

    Raises:
        UnsupportedOperationError: if the model's own attention is not the softmax of masked scores.
    """
    q, k, v = (t.detach() for t in (query, key, value))
    given, exact = (F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=scale) for m in (mask, mask.to(q.dtype)))
    if not torch.allclose(given, exact, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise UnsupportedOperationError(
            f"module '{recorder.path}' gives scaled_dot_product_attention a {mask.dtype} mask for {q.dtype} queries, "
            "which this torch computes wrongly. "
            "Way out: a mask of the queries' dtype, model.float(), or attention that is written out "
            "(attn_implementation='eager')."
        )
    return mask.to(q.dtype)


@handles("scaled_dot_product_attention")
def scaled_dot_product_attention(
    recorder: Recorder,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if dropout_p > 0:
        return NotImplemented  # attention dropout outside training: not reproducible, the audit refuses it
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        with recorder:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    if attn_mask is not None and attn_mask.requires_grad:
        return written_out(recorder, query, key, value, attn_mask, scale)
    lead = lay.broadcast_shape(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    with recorder:
        query, key, value = (t if t.shape[:-2] == lead else t.expand(*lead, *t.shape[-2:]) for t in (query, key, value))
    if attn_mask is not None and attn_mask.is_floating_point() and attn_mask.dtype != query.dtype:
        attn_mask = mask_of_same_precision(recorder, query, key, value, attn_mask, scale)
    live = (query.requires_grad, key.requires_grad, value.requires_grad)
    if live in ((True, False, True), (False, True, True)) and not is_causal and not hides_every_key(attn_mask):
        # Learned queries (attention pooling): their product with the keys is linear in the keys and gets its rule, as
        # where it is written out.
        return written_out(recorder, query, key, value, attn_mask, scale)
    constants = (query.detach(), key.detach(), value.detach())
    return run_fused(recorder, FusedAttention(attn_mask, is_causal, scale, live, constants), query, key, value)


def written_out(
    recorder: Recorder, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """The same attention as products, a sum and a softmax."""
    with recorder:
        scores = query @ key.transpose(-1, -2) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1) @ value


def run_fused(recorder: Recorder, node: FusedAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Record one call whose operands have the same leading axes."""
    operands = (query, key, value)
    found = [t for t in map(tag_of, operands) if t is not None]
    rows, values = tag_of(query) or found[0], tag_of(value)
    layout = lay.resized(rows.layout, (*query.shape[:-1], value.shape[-1])) if rows.layout is not None else None
    if layout is not None:
        last = values.layout[-1] if values and values.layout else lay.axis(lay.FEATURE, value.shape[-1])
        layout = (*layout[:-1], last)
    node.key_tag = keys = tag_of(key)
    weights = (*rows.layout[:-1], keys.layout[-2]) if rows.layout and keys and keys.layout else None
    node.over_channels = over_channels(recorder, weights, query.shape[-2], values)
    return recorder.run(
        node,
        *(t for t in operands if t.requires_grad),
        layout=layout,
        attention=max(t.attention for t in found) + (not node.over_channels),
        weighted=min(t.weighted for t in found) + 1,
        carried=values.carried if values and node.over_channels else 0,
    )

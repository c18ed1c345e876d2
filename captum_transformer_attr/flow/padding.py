"""Which tokens are padding, read off the attention calls: padding is a token that no query may look at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_transformer_attr.ops.attention import Attention, FusedAttention, ValueProduct
from captum_transformer_attr.recording import layout as lay

HIDDEN = -1e3  # models hide keys by −∞, by the lowest number, or by −10000; position biases are far above


def seen_keys(node: Attention) -> Tensor:
    """Which keys any query may look at, ``(..., keys)``.

    Told by the mask where the model gives one; else by the map, in which a query that everything is hidden from looks
    at all keys alike and counts for nothing. Heads that were mixed (talking heads) may weigh a key negatively.
    """
    shape = (*node.map_shape[:-2], node.map_shape[-1])
    if isinstance(node, FusedAttention):
        if node.mask is None:
            return torch.ones(shape, dtype=torch.bool, device=node.value.device)
        shown = node.mask if node.mask.dtype == torch.bool else node.mask > HIDDEN
        return torch.atleast_2d(shown).any(-2).expand(shape)
    seen, alike = [], []
    for rows in node.blocks():
        p = node.probabilities(rows)
        even = p.amin(-1, keepdim=True) == p.amax(-1, keepdim=True)
        seen.append(((p != 0) & ~even).any(-2))
        alike.append((p != 0).any(-2))
    found = torch.stack(seen).any(0)
    # Queries of an untrained model may all look at all keys alike.
    return torch.where(found.any(-1, keepdim=True), found, torch.stack(alike).any(0))


def real_tokens(layout: lay.Layout | None, attentions: Sequence[Attention]) -> Tensor | None:
    """Which tokens of a tensor with these axes are not padding, shaped to broadcast against it: what the first
    attention call says whose keys are these tokens; None if there is none."""
    for node in attentions:
        source = node.key_tag.layout if node.key_tag is not None else None
        if source is None or layout is None:
            continue
        tokens = source[:-1] if isinstance(node, (FusedAttention, ValueProduct)) else source
        keys = torch.empty(*node.map_shape[:-2], node.map_shape[-1], device="meta")
        if lay.shape(tokens) == keys.shape and lay.aligned(keys, tokens, layout) is not None:
            matched = lay.aligned(seen_keys(node).to(torch.float32), tokens, layout)
            assert matched is not None
            return matched > 0
    return None


def real_queries(node: Attention, attentions: Sequence[Attention]) -> Tensor:
    """Which queries of an attention call are not padding, ``(..., queries)``; all, where nothing tells."""
    shape = node.map_shape[:-1]
    own = node.layout[:-1] if node.layout is not None else None
    found = real_tokens(own, [node, *attentions])
    if found is not None:
        return found.expand(shape)
    queries, keys = node.map_shape[-2:]
    return seen_keys(node) if queries == keys else torch.ones(shape, dtype=torch.bool, device=node.value.device)

"""Relation matrices between token streams: rules 5-11 of Chefer, Gur and Wolf (ICCV 2021), for any number of streams.

R^{sp}, ``(B, N_s, N_p)``, says how the tokens of stream s at some moment depend on the tokens that stream p was born
with. Matrices belong to states, so every rule reads what its attention read. Of the last updates only the read-out rows
are computed, of the earlier ones the matrices these need.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_transformer_attr.flow.streams import CROSS, Call, State, Stream
from captum_transformer_attr.ops.attention import Attention

Weights = Callable[[Attention, slice], Tensor]
Pair = tuple[State, Stream]


@dataclass(frozen=True)
class Rules:
    """Options. normalize: eq. 8-9 in rule 10; self_terms: rule 10 as (R̄^{ss})ᵀ Ā R̄^{qq}, otherwise Ā alone."""

    normalize: bool = True
    self_terms: bool = True


class Relations:
    """Accumulates relation matrices over the attention calls of crossing streams, in execution order.

    An own matrix R^{ss} is kept without its identity. ``columns`` says for calls that read only some tokens of a stream
    which ones, ``(B, keys)``.
    """

    def __init__(
        self,
        calls: Collection[Call],
        active: Collection[Attention],
        weights: Weights,
        batch: int,
        rules: Rules,
        columns: Mapping[Attention, Tensor] | None = None,
    ) -> None:
        self.updates: dict[State, list[Call]] = {}
        for call in sorted(calls, key=lambda call: call.attention.index):
            self.updates.setdefault(call.update, []).append(call)
        self.calls = [call for calls in self.updates.values() for call in calls if call.attention in set(active)]
        self.active, self.weights, self.batch, self.rules = set(self.calls), weights, batch, rules
        self.columns = columns or {}
        self.reach = self.reached()

    # ------------------------------------------------------------------ what depends on what
    def reached(self) -> dict[State, set[Stream]]:
        """Streams that a state has a non-trivial relation to."""
        reach: dict[State, set[Stream]] = {}
        for state, calls in self.updates.items():
            found = set(reach.get(trunk, ()) if (trunk := trunk_of(calls)) else ())
            for call in calls:
                if call in self.active:
                    found |= reach.get(call.key, set()) | {call.key.stream}
            reach[state] = found
        return reach

    def applied(self, call: Call) -> tuple[int, ...]:
        """Numbers of the rules that act at a call."""
        others = self.reach.get(call.key, set()) - {call.key.stream}
        if call.kind == CROSS:
            return (10, 11) if others else (10,)
        return (6, 7) if others else (6,)

    def operands(self, call: Call, origin: Stream) -> list[Pair]:
        """The matrices that a call's contribution to R^{s·origin} is made of."""
        if call.kind == CROSS and origin is call.key.stream:
            pairs = [(call.query, call.query.stream), (call.key, origin)] if self.rules.self_terms else []
        else:
            pairs = [(call.key, origin)]
        return [pair for pair in pairs if pair[1] in self.reach.get(pair[0], ())]

    def needed(self, rows: Collection[Attention], origins: Collection[Stream]) -> dict[Pair, int]:
        """Matrices behind the rows, each with the position of the last update that reads it."""
        position = {state: i for i, state in enumerate(self.updates)}
        last: dict[Pair, int] = {}
        stack = [
            (pair, position[c.update])
            for c in self.calls
            if c.attention in rows
            for p in origins
            for pair in self.operands(c, p)
        ]
        while stack:
            pair, reader = stack.pop()
            known = pair in last
            last[pair] = max(last.get(pair, 0), reader)
            if not known and pair[0] in self.updates:
                state, origin = pair
                here = position[state]
                calls = [call for call in self.updates[state] if call in self.active]
                stack += [(p, here) for call in calls for p in self.operands(call, origin)]
                trunk = trunk_of(self.updates[state])
                if trunk is not None and origin in self.reach.get(trunk, ()):
                    stack.append(((trunk, origin), here))
        return last

    # ------------------------------------------------------------------ computation
    def rows(self, asked: dict[Attention, Tensor]) -> dict[Stream, Tensor]:
        """Relevance of every stream's first tokens from row vectors over the queries of attention calls.

        Args:
            asked: ``(B, N_s)`` for every call: how much of the read-out each of its query tokens carries.

        Returns:
            Σ over calls of row vector times contribution, ``(B, N_p)`` for every stream p that comes from an input.
        """
        origins = {
            stream
            for call in self.calls
            for stream in (call.key.stream, call.update.stream)
            if stream.birth is not None
        }
        last = self.needed(set(asked), origins)
        matrices: dict[Pair, Tensor] = {}
        result: dict[Stream, Tensor] = {}
        for i, (state, calls) in enumerate(self.updates.items()):
            wanted = [origin for at, origin in last if at == state]
            for call in calls:
                if call in self.active and (wanted or call.attention in asked):
                    relation = Relation(call, self.map(call), matrices, self.rules)
                    if call.attention in asked:
                        for origin in origins & ({call.key.stream} | self.reach.get(call.key, set())):
                            add(result, origin, relation.row(asked[call.attention], origin))
                    for origin in wanted:
                        add(matrices, (state, origin), relation.matrix(origin))
            trunk = trunk_of(calls)
            for origin in wanted:
                if trunk is not None:
                    add(matrices, (state, origin), matrices.get((trunk, origin)))
            for pair in [pair for pair in matrices if last[pair] <= i]:
                del matrices[pair]
        return result

    def map(self, call: Call) -> Tensor:
        """Ā, averaged over heads (eq. 5): ``(B, N_s, N_q)``."""
        node = call.attention
        parts = []
        for rows in node.blocks():
            part = self.weights(node, rows)
            part = part.reshape(self.batch, -1, *part.shape[-2:])
            parts.append(part.to(torch.promote_types(part.dtype, torch.float32)).mean(1))
        found = torch.cat(parts, 1)
        index = self.columns.get(node)
        if index is None:
            return found
        whole = found.new_zeros(*found.shape[:2], call.key.stream.tokens or 0)
        return whole.scatter_add_(2, index[:, None].expand_as(found), found)


@dataclass
class Relation:
    """What one attention call adds to the relations of the stream that asks, as rows or as whole matrices."""

    call: Call
    map: Tensor
    matrices: dict[Pair, Tensor]
    rules: Rules

    def row(self, x: Tensor, origin: Stream) -> Tensor | None:
        """``x`` ``(B, N_s)`` times the contribution to R^{s·origin}."""
        result = self.product(x.to(self.map.dtype)[:, None], origin)
        return None if result is None else result[:, 0]

    def matrix(self, origin: Stream) -> Tensor | None:
        """The contribution to R^{s·origin}."""
        return self.product(None, origin)

    def product(self, x: Tensor | None, origin: Stream) -> Tensor | None:
        own = origin is self.call.key.stream
        if self.call.kind == CROSS and own:
            return self.across(x)
        matrix = self.matrices.get((self.call.key, origin))
        if not own and matrix is None:
            return None
        weighted = self.map if x is None else x @ self.map
        return weighted @ matrix if not own and matrix is not None else plus(weighted, matrix)

    def across(self, x: Tensor | None) -> Tensor:
        """Rule 10: (R̄^{ss})ᵀ Ā R̄^{qq}."""
        if not self.rules.self_terms:
            return self.map if x is None else x @ self.map
        asking = self.normalized(self.matrices.get((self.call.query, self.call.query.stream)))
        asked = self.normalized(self.matrices.get((self.call.key, self.call.key.stream)))
        if x is None:
            weighted = plus(self.map, asked)
            return weighted if asking is None else weighted + asking.mT @ weighted
        if asking is not None:
            x = x + x @ asking.mT
        return plus(x @ self.map, asked)

    def normalized(self, matrix: Tensor | None) -> Tensor | None:
        """Eq. 8-9 without the identity: rows over their sums, 0 where a row is 0 (padding, nothing positive)."""
        if matrix is None or not self.rules.normalize:
            return matrix
        total = matrix.sum(-1, keepdim=True)
        return torch.where(total == 0, 0, matrix / torch.where(total == 0, 1, total))


def plus(weighted: Tensor, matrix: Tensor | None) -> Tensor:
    """``weighted (I + matrix)``."""
    return weighted if matrix is None else weighted + weighted @ matrix


def add(store: dict, key: object, value: Tensor | None) -> None:
    if value is not None:
        store[key] = store[key] + value if key in store else value


def trunk_of(calls: list[Call]) -> State | None:
    return calls[0].trunk

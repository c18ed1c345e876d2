"""Finds the token streams of a recording, and what each of its attention calls is."""

from __future__ import annotations

import math

from captum_transformer_attr.flow.lineage import (
    CONSTANT,
    Function,
    Line,
    Lineage,
    node_of,
    operands,
    query_of,
    value_of,
)
from captum_transformer_attr.flow.streams import CROSS, LOCAL, SELF, Call, State, Stream, Streams
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.ops.residual import ConstantSum, Sum
from captum_transformer_attr.recording import layout as lay
from captum_transformer_attr.recording.session import Recording


def find_streams(recording: Recording) -> Streams:
    """Streams and attention calls of a recording whose target was selected."""
    if "streams" not in recording.derived:
        recording.derived["streams"] = Finder(recording).find()
    streams: Streams = recording.derived["streams"]
    return streams


class Finder:
    """Follows the updates in execution order and decides of every attention call what it is."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.lineage = Lineage(recording.selected)
        self.states: dict[Function, State] = {}  # by update
        self.born: dict[Function, Stream] = {}
        self.made_from: list[tuple[Stream, Stream]] = []
        self.calls: list[Call] = []

    def find(self) -> Streams:
        updates = [fn for fn, line in self.lineage.lines.items() if line.updated and line.end is fn]
        for end in sorted(updates, key=outermost):
            self.follow(end)
        self.calls.sort(key=lambda call: call.attention.index)
        self.give_names()
        return Streams(self.calls, self.towers())

    # ------------------------------------------------------------------ updates
    def follow(self, end: Function) -> None:
        """Decide for every attention of one update what it is, and which stream the update continues."""
        if end in self.states:
            return
        node = node_of(end)
        trunk: State | None = None
        if isinstance(node, Sum) and node.trunk is not None:
            trunk = self.state(self.lineage.line(operands(end)[node.trunk]))
        elif isinstance(node, ConstantSum):
            trunk = State(self.constant(end))
        members, complete = self.joined(end)
        calls = [fn for fn in members if isinstance(node_of(fn), Attention)]
        read = [self.read(fn, end, trunk) for fn in calls]
        queries = {query.stream for _, query, _ in read}
        asks = trunk.stream if trunk is not None else queries.pop() if len(queries) == 1 else None
        # Without a trunk nothing of the tokens themselves goes on, which no rule of the paper covers, except for
        # learned queries.
        whole = (
            complete
            and asks is not None
            and (trunk is not None or asks.birth is None)
            and all(kind != LOCAL for kind, _, _ in read)
        )
        stream = asks if whole and asks is not None else Stream(end, self.inputs(end))
        self.states.update(dict.fromkeys((end, *members), State(stream, end)))
        for fn, (kind, query, key) in zip(calls, read, strict=True):
            attention = node_of(fn)
            assert isinstance(attention, Attention)
            before = trunk if trunk is not None else query
            self.calls.append(
                Call(attention, kind if whole else LOCAL, self.states[end], before if whole else None, query, key)
            )
            if whole:
                stream.tokens, columns = attention.map_shape[-2:]
                key.stream.tokens = key.stream.tokens or columns
            else:
                self.made_from += [(stream, s.stream) for s in (query, key) if kind != CROSS or s is query]
        if not whole and trunk is not None:
            self.made_from.append((stream, trunk.stream))

    def joined(self, end: Function) -> tuple[list[Function], bool]:
        """The attention calls (and sums of them) that an update adds to its trunk, and whether that is all it adds."""
        node = node_of(end)
        if isinstance(node, Attention):
            return [end], True
        live = operands(end)
        branches = (
            [f for i, f in enumerate(live) if i != node.trunk and node.attends[i]] if isinstance(node, Sum) else live
        )
        found: list[Function] = []
        complete = True
        for line in map(self.lineage.line, branches):
            inner = node_of(line.end) if line.updated else None
            if isinstance(inner, Attention) or (isinstance(inner, Sum) and inner.trunk is None):
                more, whole = self.joined(line.end)
                found, complete = [*found, line.end, *more], complete and whole
            else:
                complete = False
        return sorted(set(found), key=lambda fn: node_of(fn).index), complete  # type: ignore[union-attr]

    def read(self, fn: Function, end: Function, trunk: State | None) -> tuple[str, State, State]:
        """Kind of an attention call, and the states of its queries and keys."""
        attention = node_of(fn)
        assert isinstance(attention, Attention)
        asked, seen = self.line_of(query_of(fn)), self.line_of(value_of(fn))
        query = self.state(asked) if asked.end is not None else trunk or State(self.constant(end))
        own = trunk or query
        if query.stream is not own.stream:
            query = own
        rows, columns = attention.map_shape[-2:]
        if seen.end is not None:
            key = self.state(seen)
        else:  # learned queries among themselves, before they have read anything
            key = own if rows == columns else State(self.constant(fn))
        same = key.stream is own.stream
        fits = global_map(attention, self.recording.inputs.batch) and (not same or rows == columns)
        fits = fits and own.stream.tokens in (None, rows)
        # Some of a stream's tokens may be asked (patches without the class token), more than it has may not.
        fits = fits and (key.stream.tokens in (None, columns) or (not same and columns < (key.stream.tokens or 0)))
        related = bool(seen.roots & (asked.roots | self.roots(trunk)))
        return (LOCAL if not fits or (related and not same) else SELF if same else CROSS), query, key

    def line_of(self, fn: Function | None) -> Line:
        return CONSTANT if fn is None else self.lineage.line(fn)

    def roots(self, state: State | None) -> frozenset[Function]:
        """What the tokens of a state were computed from without attention."""
        end = None if state is None else state.update or state.stream.birth
        return frozenset() if end is None else self.lineage.line(end).roots

    # ------------------------------------------------------------------ streams
    def state(self, line: Line) -> State:
        """The moment of a stream that a line ends at."""
        if line.updated:
            self.follow(line.end)
            return self.states[line.end]
        assert line.end is not None
        if line.end not in self.born:
            stream = self.born[line.end] = Stream(line.end, self.inputs(line.end))
            for root in line.roots:
                below = self.lineage.line(root)
                if below.updated:
                    self.made_from.append((stream, self.state(below).stream))
        return State(self.born[line.end])

    def constant(self, end: Function) -> Stream:
        """Learned queries that become a stream at ``end``."""
        return self.born.setdefault((end, "constant"), Stream(None, ()))

    def inputs(self, fn: Function) -> tuple[str, ...]:
        leaves = self.lineage.leaves[fn]
        return tuple(
            name for name, leaf in self.recording.inputs.leaves.items() if any(leaf is found for found in leaves)
        )

    def towers(self) -> list[list[Call]]:
        """Calls by the stream that asks; streams made from one another without a cross-attention are one tower."""
        parent: dict[Stream, Stream] = {}

        def top(stream: Stream) -> Stream:
            while stream in parent:
                stream = parent[stream]
            return stream

        for a, b in self.made_from:
            if top(a) is not top(b):
                parent[top(a)] = top(b)
        groups: dict[Stream, list[Call]] = {}
        for call in self.calls:
            groups.setdefault(top(call.update.stream), []).append(call)
        return list(groups.values())

    def give_names(self) -> None:
        """A stream is called after its inputs, ``queries`` if learned; numbered where names would be the same."""
        taken: dict[str, int] = {}
        for call in self.calls:
            for stream in (call.key.stream, call.update.stream):
                if not stream.name:
                    base = "+".join(stream.inputs) if stream.birth is not None and stream.inputs else "queries"
                    taken[base] = taken.get(base, 0) + 1
                    stream.name = base if taken[base] == 1 else f"{base} {taken[base]}"


def outermost(end: Function) -> tuple[int, int]:
    """Order in which updates are followed: residual sums, sums of attentions, attentions that nothing was added to."""
    node = node_of(end)
    assert node is not None
    rank = 2 if isinstance(node, Attention) else 1 if isinstance(node, Sum) and node.trunk is None else 0
    return rank, node.index


def global_map(attention: Attention, batch: int) -> bool:
    """Whether a map holds one matrix per example and head: ``(B, H, N, N')`` or ``(B · H, N, N')``; windows do not."""
    lead = attention.map_shape[:-2]
    if math.prod(lead) % batch:
        return False
    if any("." in label for labels in lay.labels(attention.layout)[: len(lead)] for label in labels):
        return False  # token axes among the leading ones
    return len(lead) < 2 or (lead[0] == batch and math.prod(lead[1:-1]) == 1)

"""Token streams: which attention reads which tokens, in which order.

A stream is a set of tokens from its birth (an embedding, a patch embedding, a concatenation, learned queries) through
every residual sum that an attention was added to. An attention whose queries and keys belong to one stream is
self-attention, otherwise it is a cross-attention: the stream of its queries asks the stream of its keys. States are
moments of a stream, so the two directions of a co-attention layer, which both read what was there before the layer,
need no special treatment.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.flow.lineage import Function
from captum_transformer_attr.ops.attention import Attention

StartLayer = int | dict[str, int]
SELF, CROSS, LOCAL = "self", "cross", "local"


@dataclass(eq=False)
class Stream:
    """A set of tokens.

    Attributes:
        birth: the autograd node that made them, None for learned queries.
        inputs: the explained inputs they come from.
    """

    birth: Function | None
    inputs: tuple[str, ...]
    name: str = ""
    tokens: int | None = None


@dataclass(frozen=True)
class State:
    """A stream after one of its updates; ``update`` is None at its birth."""

    stream: Stream
    update: Function | None = None


@dataclass(eq=False)
class Call:
    """One attention call.

    Attributes:
        kind: ``"self"``, ``"cross"``, or ``"local"`` for attention inside windows or over keys that were made from the
            queries' own tokens (reduced, joined with others): its relevance only the row-vector flow can follow.
        update: the state it leads to.
        query, key: the states it read.
        trunk: the state it was added to.
    """

    attention: Attention
    kind: str
    update: State
    trunk: State | None
    query: State
    key: State

    @property
    def streams(self) -> tuple[str, str]:
        """Names of the stream that asks and of the one that is asked; the same for self-attention."""
        asks = self.update.stream.name
        return asks, self.key.stream.name if self.kind == CROSS else asks


@dataclass
class Streams:
    """All attention calls on the way to the output in execution order.

    Attributes:
        towers: the same calls by who makes them, the unit of ``start_layer``.
    """

    calls: list[Call] = field(default_factory=list)
    towers: list[list[Call]] = field(default_factory=list)

    @property
    def crossing(self) -> list[Call]:
        """The calls whose relevance needs relation matrices: those of streams that ask or are asked across."""
        involved = {
            stream for call in self.calls if call.kind == CROSS for stream in (call.update.stream, call.key.stream)
        }
        return [call for call in self.calls if call.kind != LOCAL and call.update.stream in involved]

    def active(self, start_layer: StartLayer) -> list[Attention]:
        """The attention calls from ``start_layer`` on, counted per tower; the others count as identity.

        Raises:
            InputError: if a tower has not as many, or a name in ``start_layer`` is none of the streams.
        """
        names = [
            {n for call in tower for n in (call.update.stream.name, *call.update.stream.inputs)}
            for tower in self.towers
        ]
        if isinstance(start_layer, dict):
            known = set().union(*names)
            unknown = set(start_layer) - known
            if unknown:
                raise InputError(f"start_layer: no stream '{min(unknown)}'; the streams are {', '.join(sorted(known))}")
        chosen: set[Call] = set()
        for tower, found in zip(self.towers, names, strict=True):
            given = {n: start_layer for n in found} if isinstance(start_layer, int) else start_layer
            start = next((s for n, s in given.items() if n in found), 0)
            if not -len(tower) <= start < len(tower):
                who = f"the stream '{tower[-1].update.stream.name}'" if len(self.towers) > 1 else "the model"
                raise InputError(
                    f"start_layer={start}: {who} has {len(tower)} attention calls on the way to this output"
                )
            chosen.update(tower[start:])
        return [call.attention for call in self.calls if call in chosen]

"""What is known of every tensor that the recorded forward made from an input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from captum_transformer_attr.recording.layout import Layout

# Roles a tensor can play for the operation that reads it.
PLAIN = ""
SCORES = "scores"  # queries times keys, before the softmax
PROBABILITY = "probability"  # after a softmax
POOLED = "pooled"  # values pooled by a softmax over tokens for every channel: the inner product of linear attention
GATE = "gate"  # bounded activation (sigmoid, tanh): multiplies a signal
ACTIVATED = "activated"  # unbounded activation (SiLU, GELU): the gate of a gated linear unit
STATISTIC = "statistic"  # a norm or standard deviation: scales a signal
IDS = "ids"  # the float handle of token ids: what arrives at it is relevance, whatever travels
MEAN = "mean"  # a mean or a sum over channels, or one that kept its axes: its root (or a power) scales a signal

# Marks on tensors.
ATTRIBUTE = "_captum_transformer_attr_tag"  # the tag
HANDLE = "_captum_transformer_attr_handle"  # float stand-in of an integer tensor of token ids
CUT = "_captum_transformer_attr_cut"  # path of the module that took this tensor out of the graph
# The same for integers that were computed from token ids in a way that no handle follows.
UNKNOWN = "_captum_transformer_attr_unknown"


class Position(str):
    """Value of a mark: the module that read a position (of a maximum, in an order) from token ids, not what they are.

    A position chooses, like a condition in Python.
    """


MARKS = (ATTRIBUTE, HANDLE, CUT, UNKNOWN)


def version(tensor: Tensor) -> int:
    """Changes when a tensor is written into; parameters made in inference mode do not tell."""
    return 0 if tensor.is_inference() else tensor._version


def versions(*values: Any) -> tuple[int, ...]:
    """Versions of those that are tensors."""
    return tuple(version(t) for t in values if isinstance(t, Tensor))


class Part(NamedTuple):
    """One of the tensors that were stacked, the constant or gate it was multiplied by since, and what tells whether the
    model overwrote them meanwhile."""

    tensor: Tensor
    factor: Any = 1.0
    versions: tuple[int, ...] = ()

    @classmethod
    def of(cls, tensor: Tensor, factor: Any = 1.0) -> Part:
        """A part as it is now."""
        return cls(tensor, factor, versions(tensor, factor))

    @property
    def intact(self) -> bool:
        """Whether nothing was written into it since."""
        return self.versions == versions(self.tensor, self.factor)

    @property
    def tags(self) -> list[Tag]:
        """Of the part and its gate, where they are live."""
        return [t for t in map(tag_of, (self.tensor, self.factor)) if t is not None]


@dataclass(frozen=True, slots=True)
class Tag:
    """Provenance of one tensor.

    Attributes:
        origin: number of the operation that computed its values (views keep it).
        ancestors: bit set of the origins it was computed from, its own included.
        attention: most softmax attentions over tokens on any path from an input.
        weighted: fewest weighted operations on any path from an input; tells a residual trunk from its branches.
        root: origin of the one tensor it is an elementwise function of.
        carried: bit set of the origins whose tokens it still carries: those that residual trunks and token-wise
            operations lead to, without an attention.
    """

    origin: int
    ancestors: int
    attention: int = 0
    weighted: int = 0
    role: str = PLAIN
    root: int = -1
    layout: Layout | None = None
    stride: tuple[int, ...] = ()  # input pixels per step of the token grid, through convolutions
    # What was joined along axis ``parts_dim``: summing it again is a residual.
    parts: tuple[Part, ...] = ()
    parts_dim: int = 0
    sum_of: object = None  # the Sum node whose result this is
    carried: int = 0

    @property
    def intact(self) -> bool:
        """Whether it was stacked from parts that are still what they were."""
        return bool(self.parts) and all(p.intact for p in self.parts)

    def comes_from(self, other: Tag) -> bool:
        """Whether this tensor was computed from ``other``."""
        return bool(self.ancestors >> other.origin & 1)


def tag_of(tensor: Any) -> Tag | None:
    """The tag of a tensor, None if no input reaches it."""
    return getattr(tensor, ATTRIBUTE, None)


def describe(grad_fn: Any, name: str, path: str) -> None:
    """Note on an autograd node which function made it where, for the audit's message; the first note stays."""
    grad_fn.metadata.setdefault(ATTRIBUTE, (name, path))

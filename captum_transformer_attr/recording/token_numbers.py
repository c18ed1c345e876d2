"""Numbers that the model reads from token ids with ``item`` or ``tolist``.

They may say what a sequence holds (where an image starts, how long the padding is), or pick rows of a table: then an
embedding happens where no handle can follow. So they remember what they are, and what a table gives for one is marked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from captum_transformer_attr.recording.leaving import mark_unfollowed, refuse_number
from captum_transformer_attr.recording.nested import tensors_in
from captum_transformer_attr.recording.tags import HANDLE, UNKNOWN, Position

if TYPE_CHECKING:
    from captum_transformer_attr.recording.recorder import Recorder

ARITHMETIC = "add sub mul floordiv mod divmod pow and or xor lshift rshift".split()
UNARY = "neg pos abs invert round trunc floor ceil".split()
# Functions that take a number as a position in a tensor or as a value of one; as a size it says nothing.
READERS = frozenset(
    """__getitem__ __setitem__ select narrow tensor as_tensor scalar_tensor full full_like fill_ new_tensor new_full
    asarray""".split()
)


class TokenNumber(int):
    """A number read from token ids; what Python computes from it is one as well.

    Attributes:
        path: mark of the ids, the module that read it.
    """

    path: str


def leaving(name: str) -> Callable[..., Any]:
    """An operator of ``int`` whose result cannot remember: only positions may be read so."""
    function = getattr(int, name)

    def operator(self: TokenNumber, *others: Any) -> Any:
        if not isinstance(self.path, Position):
            refuse_number(self.path, name)
        return function(self, *others)

    return operator


def remembering(name: str) -> Callable[..., Any]:
    """An operator of ``int`` whose result is a ``TokenNumber``."""
    function = getattr(int, name)

    def operator(self: TokenNumber, *others: Any) -> Any:
        return remembered(function(self, *others), self.path)

    return operator


for _name in (*UNARY, *(side + name for name in ARITHMETIC for side in ("", "r"))):
    setattr(TokenNumber, f"__{_name}__", remembering(f"__{_name}__"))
for _name in ("int", "float", "truediv", "rtruediv"):
    setattr(TokenNumber, f"__{_name}__", leaving(f"__{_name}__"))


def remembered(value: Any, path: str) -> Any:
    """Integers, also in lists and tuples, as numbers that remember."""
    if isinstance(value, (list, tuple)):
        return type(value)(remembered(v, path) for v in value)
    if type(value) not in (int, TokenNumber):
        return value
    number = TokenNumber(value)
    number.path = path
    return number


def exported(recorder: Recorder, ids: Tensor, result: Any) -> Any:
    """What ``item`` and ``tolist`` give for token ids or for integers that were computed from them."""
    path = recorder.path if hasattr(ids, HANDLE) else getattr(ids, UNKNOWN, None)
    if path is None:
        return result
    recorder.token_numbers = True
    return remembered(result, path)


def number_in(values: Any) -> TokenNumber | None:
    """The first number that was read from token ids, also in lists and tuples; the ends of a slice are none."""
    for value in values:
        found = value if isinstance(value, TokenNumber) else None
        if isinstance(value, (list, tuple)):
            found = number_in(value)
        if found is not None:
            return found
    return None


def mark_read(name: str, args: Any, kwargs: Any, result: Any) -> None:
    """Mark constants that a number from token ids has picked, or that were made of it."""
    number = number_in((*args, *kwargs.values())) if name in READERS else None
    if number is not None:
        for out in tensors_in(args[:1] if name == "__setitem__" else (result,)):
            if not out.requires_grad and not hasattr(out, HANDLE):
                mark_unfollowed(out, number.path)

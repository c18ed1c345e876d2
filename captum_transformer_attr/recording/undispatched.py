"""Python-level torch functions, opened so that the operations they are written with are seen."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any


def undispatched(function: Any) -> Callable[..., Any] | None:
    """A copy of a Python-level torch function without its ``__torch_function__`` test, so that what it calls is seen.

    The original stays as it is; only the copy's globals say that no argument wants to be dispatched. A function that
    only chooses between two others (with or without the indices of a maximum) holds them in its closure; they are
    copied too, because they dispatch under its name.
    """
    if not isinstance(function, types.FunctionType) or not function.__module__.startswith("torch"):
        return None

    def never(*_: Any) -> bool:
        return False

    namespace = dict(function.__globals__)
    namespace.update(has_torch_function=never, has_torch_function_unary=never, has_torch_function_variadic=never)
    closure = tuple(
        types.CellType(undispatched(c.cell_contents) or c.cell_contents) for c in function.__closure__ or ()
    )
    copy = types.FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy

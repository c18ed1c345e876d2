"""Methods by name: ours and Captum's, called alike."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import captum_transformer_attr
from captum_transformer_attr.comparison.captum_methods import CAPTUM_METHODS
from captum_transformer_attr.comparison.float_view import FloatView
from captum_transformer_attr.errors import InputError
from captum_transformer_attr.recording.mismatch import refuse_mismatch
from captum_transformer_attr.recording.targets import Contrast, select

NEED_LAYER = ("LayerTransformerLRP", "NeuronTransformerLRP")
"""Classes that explain a layer instead of the input, and so cannot be called by name alone."""


@dataclass(frozen=True)
class Method:
    """A way to attribute.

    Attributes:
        name: How it is shown, e.g. ``"TransformerLRP (rules=attnlrp)"``.
        attribute: ``(model, inputs, target) -> attributions`` in the inputs' container and shapes; one score per id.
    """

    name: str
    attribute: Callable[[nn.Module, Any, Any], Any]


def our_methods() -> dict[str, Callable[..., Any]]:
    """The attribution classes of this package that explain a model's input, by name."""
    from captum.attr import Attribution

    return {
        name: value
        for name, value in vars(captum_transformer_attr).items()
        if isinstance(value, type) and issubclass(value, Attribution) and name not in NEED_LAYER
    }


def method_names() -> list[str]:
    """Every name that :func:`method` knows."""
    return [*our_methods(), *CAPTUM_METHODS]


def method(spec: str) -> Method:
    """A method from its name and options.

    Args:
        spec: A class name, case, ``-`` and ``_`` ignored, with options behind colons:
            ``"TransformerRelevance:start_layer=1"``, ``"transformer-lrp:rules=attnlrp"``.

    Raises:
        InputError: if there is no such method or option.
    """
    wanted, *assignments = spec.split(":")
    options = dict(_option(assignment, spec) for assignment in assignments)
    known = {_plain(name): name for name in method_names()}
    name = known.get(_plain(wanted))
    if name is None:
        near = difflib.get_close_matches(_plain(wanted), known, n=2)
        hint = f"did you mean {' or '.join(known[match] for match in near)}?" if near else ""
        raise InputError(f"method {wanted!r} is unknown; {hint or 'known: ' + ', '.join(known.values())}")
    shown = name + (f" ({', '.join(f'{key}={value}' for key, value in options.items())})" if options else "")
    if name in CAPTUM_METHODS:
        return Method(shown, _captum_call(name, options))
    return Method(shown, _our_call(name, options))


def resolve(methods: Sequence[Any]) -> list[Method]:
    """Methods from names, :class:`Method` objects, or attribution objects that already hold their model.

    Raises:
        InputError: if a method is unknown, or one is named twice.
    """
    if not isinstance(methods, str | Iterable):
        raise InputError(f"methods must hold names or attribution objects, got {type(methods).__name__}")
    resolved = []
    for entry in [methods] if isinstance(methods, str) else methods:
        if isinstance(entry, Method):
            resolved.append(entry)
        elif isinstance(entry, str):
            resolved.append(method(entry))
        elif isinstance(entry, type) and hasattr(entry, "attribute"):
            raise InputError(
                f"methods holds the class {entry.__name__}; give its name, or an object made with the model"
            )
        elif hasattr(entry, "attribute"):
            resolved.append(Method(type(entry).__name__, _bound_call(entry)))
        else:
            raise InputError(f"methods must hold names or attribution objects, got {type(entry).__name__}")
    names = [entry.name for entry in resolved]
    if not names:
        raise InputError("methods is empty")
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise InputError(f"method {doubled[0]} is given twice")
    return resolved


def _plain(name: str) -> str:
    return name.strip().replace("-", "").replace("_", "").lower()


def _option(assignment: str, spec: str) -> tuple[str, Any]:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise InputError(f"method {spec!r}: write options as name=value")
    try:
        return key, ast.literal_eval(text.capitalize() if text in ("true", "false", "none") else text)
    except (ValueError, SyntaxError):
        return key, text


def _check_options(name: str, function: Callable[..., Any], options: dict[str, Any], given: tuple[str, ...]) -> None:
    allowed = [key for key in inspect.signature(function).parameters if key not in (*given, "self", "output")]
    for key, value in options.items():
        if key not in allowed:
            known = ", ".join(allowed) or "none"
            raise InputError(f"method {name} has no option {key!r}; its options: {known}")
        default = inspect.signature(function).parameters[key].default
        if isinstance(value, str) and isinstance(default, int | float):
            raise InputError(
                f"method {name}: {key}={value!r} is no {'truth value' if isinstance(default, bool) else 'number'}"
            )
        # Whole numbers among the options of Captum's methods are counts of steps and samples.
        if name in CAPTUM_METHODS and isinstance(default, int) and not (isinstance(value, int) and value >= 1):
            raise InputError(f"method {name}: {key}={value!r} must be a whole number from 1 on")


def _our_call(name: str, options: dict[str, Any]) -> Callable[[nn.Module, Any, Any], Any]:
    method_class = our_methods()[name]
    _check_options(name, method_class, options, ("model",))
    # One object per model: it compares its recording with a plain forward once per shape, not in every call.
    last: list[Any] = []

    def attribute(model: nn.Module, inputs: Any, target: Any) -> Any:
        if not last or last[0].forward_func is not model:
            last[:] = [method_class(model, **options)]
        return last[0].attribute(inputs, target=target)

    return attribute


def _bound_call(attribution: Any) -> Callable[[nn.Module, Any, Any], Any]:
    return lambda model, inputs, target: attribution.attribute(inputs, target=target)


def _captum_call(name: str, options: dict[str, Any]) -> Callable[[nn.Module, Any, Any], Any]:
    function = CAPTUM_METHODS[name]
    _check_options(name, function, options, ("view", "target"))

    def attribute(model: nn.Module, inputs: Any, target: Any) -> Any:
        contrast = target if isinstance(target, Contrast) else None
        if contrast is not None and isinstance(contrast.first, list | Tensor):
            # Captum repeats examples, but not what it does not know to be a target.
            raise InputError(
                f"{name}: a Contrast of several targets cannot be explained; give one target for the batch"
            )
        with _evaluating(model):
            view = FloatView(model, inputs, contrast)
            asked = None if contrast else target
            try:
                # Called under no_grad as well, like our own classes.
                with torch.enable_grad():
                    found = tuple(function(view, asked, **options))
                if any(a.shape != b.shape for a, b in zip(found, view.features, strict=True)):
                    raise IndexError("several outputs were explained")  # by Captum's ablations, without a target
            except (AssertionError, IndexError) as error:
                # Captum says so of a wrong target, among other things; a right one selects a number per example.
                select(view(*view.features, *view.others), asked)
                raise InputError(f"{name}: {error}") from error
            except RuntimeError as error:
                refuse_mismatch(model, view.inputs, error)
                raise
            return view.restore(found)

    return attribute


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode again outside."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

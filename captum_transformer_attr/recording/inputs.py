"""What the user passes in, and which of it is explained."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.layout import initial
from captum_transformer_attr.recording.tags import HANDLE, Tag

# An argument: its name among the values, or its number among the further positional ones.
Key = str | int
# Entries of a mapping that steer the model and say nothing themselves.
NOT_EXPLAINED = re.compile(
    r"mask|position_ids|token_type_ids|type_ids|label|grid_thw|cache|past_key|return_|noise|image_sizes|spatial_shapes|pixel_shuffle|num_"
    r"|^bbox$"
)
# An entry with the grids of patches that stand in one list without a batch axis, the examples one after the other.
GRIDS = re.compile("grid_thw")


@dataclass
class Inputs:
    """The arguments of one call: ``kind`` is ``"tensor"``, ``"tuple"`` or ``"mapping"``.

    ``values`` has one entry per argument.

    Attributes:
        packed: some entry has no batch axis; then every example is recorded alone, and every result has one more axis
            in front, over the examples.
        windows: of such an example, where in every explained entry it lies (first row, row behind the last one).
        shared: arguments that every example gets whole, although their first axis is as long as the batch.
    """

    kind: str
    values: dict[str, Any]
    explained: list[str]
    extra: tuple[Any, ...] = ()
    leaves: dict[str, Tensor] = field(default_factory=dict)
    packed: bool = False
    windows: dict[str, tuple[int, int]] = field(default_factory=dict)
    whole: dict[str, torch.Size] = field(default_factory=dict)
    shared: frozenset[Key] = frozenset()

    @property
    def batch(self) -> int:
        """Number of examples."""
        if self.windows:
            return 1
        names = [n for n in self.explained if not (self.packed and self.values[n].is_floating_point())]
        return int(self.values[names[0]].shape[0])

    def signature(self) -> tuple[Any, ...]:
        """What the operations of a forward can depend on: shapes and dtypes of tensors, and the other arguments."""
        values = (*self.values.items(), *enumerate(self.extra))
        return tuple((n, v.shape, v.dtype) if isinstance(v, Tensor) else (n, str(v)[:80]) for n, v in values)

    def shape(self, name: str) -> torch.Size:
        """Shape of the results for an entry before they are packed."""
        shape = self.values[name].shape
        return torch.Size((self.batch, *shape)) if self.packed else shape

    def part(self, i: int) -> Inputs:
        """The i-th example of packed inputs; its results have the shapes of the whole, with zeros outside its rows.

        Raises:
            InputError: if the rows of an entry without a batch axis cannot be told apart.
        """
        one = self.example(i)
        for name in self.explained:
            value = self.values[name]
            one.whole[name] = value.shape
            one.windows[name] = (i, i + 1)
            if value.is_floating_point():
                first, last = self.rows_of(i, name)
                one.windows[name], one.values[name] = (first, last), value[first:last]
        return one

    def placed(self, name: str, scores: Tensor) -> Tensor:
        """Scores ``(1, rows, ...)`` of an example of packed inputs at its rows of the whole."""
        if not self.windows:
            return scores
        start, stop = self.windows[name]
        result = scores.new_zeros(1, self.whole[name][0], *scores.shape[2:])
        result[:, start:stop] = scores
        return result

    def rows_of(self, i: int, name: str) -> tuple[int, int]:
        """Rows of the i-th example in an entry without a batch axis: one grid per example, or one example."""
        total = self.values[name].shape[0]
        if self.batch == 1:
            return 0, total
        grids = [
            v for n, v in self.values.items() if GRIDS.search(n) and isinstance(v, Tensor) and v.shape[0] == self.batch
        ]
        for grid in grids:
            ends = grid.prod(-1).cumsum(0).tolist()
            if ends[-1] == total:
                return ([0, *ends][i], ends[i])
        raise InputError(
            f"inputs: '{name}' has {total} rows for {self.batch} examples, and no entry gives one grid of them per "
            "example; explain one example at a time"
        )

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the explained inputs, float32 if they are all ids."""
        return next((self.values[n].dtype for n in self.explained if self.values[n].is_floating_point()), torch.float32)

    def unclear(self) -> tuple[Key, ...]:
        """Arguments passed on only whose first axis is as long as the batch: it need not be the batch."""
        given: list[tuple[Key, Any]] = [*self.values.items(), *enumerate(self.extra)]
        return tuple(key for key, value in given if key not in self.explained and self.is_long(value))

    def is_long(self, value: Any) -> bool:
        """Whether this is a tensor whose first axis is as long as the batch."""
        return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.batch

    def example(self, i: int, shared: frozenset[Key] | None = None) -> Inputs:
        """The i-th example alone; tensors (also in ``extra``) whose first axis is the batch are cut, but for
        ``shared``."""
        shared = self.shared if shared is None else shared

        def cut(key: Key, value: Any) -> Any:
            return value[i : i + 1] if key not in shared and self.is_long(value) else value

        values = {name: cut(name, value) for name, value in self.values.items()}
        return Inputs(self.kind, values, self.explained, tuple(cut(k, value) for k, value in enumerate(self.extra)))

    def pack(self, results: dict[str, Tensor]) -> Any:
        """Results by name in the container the inputs came in."""
        if self.packed:  # an example has scores in its own part of an entry only
            results = {name: result.sum(0) for name, result in results.items()}
        if self.kind == "tensor":
            return results["input0"]
        if self.kind == "tuple":
            return tuple(results[name] for name in self.explained)
        return {name: results[name] for name in self.explained if name in results}

    def arguments(self, values: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the model."""
        extra = tuple(private(value) for value in self.extra)
        return (extra, values) if self.kind == "mapping" else ((*values.values(), *extra), {})


def private(value: Any) -> Any:
    """A copy of an argument that the model may write into (a mask, a cache): the user's own stays as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if (
        value is None
        or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, nn.Module))
        or callable(value)
    ):
        return value
    try:
        return copy.deepcopy(value)
    except (RuntimeError, TypeError):
        return value  # not to be copied: tensors with a graph, handles of the system


def parse(inputs: Any, additional_forward_args: Any = None) -> Inputs:
    """Check and sort the arguments of ``attribute``.

    Raises:
        InputError: for anything but a tensor, a tuple of tensors or a mapping with at least one tensor to explain;
            empty batches; NaN.
    """
    extra = additional_forward_args
    extra = () if extra is None else extra if isinstance(extra, tuple) else (extra,)
    if isinstance(inputs, Tensor):
        parsed = Inputs("tensor", {"input0": inputs}, ["input0"], extra)
    elif isinstance(inputs, (tuple, list)) and inputs and all(isinstance(t, Tensor) for t in inputs):
        values = {f"input{i}": t for i, t in enumerate(inputs)}
        parsed = Inputs("tuple", values, list(values), extra)
    elif isinstance(inputs, Mapping) and inputs:
        parsed = parse_mapping(dict(inputs), extra)
    else:
        raise InputError(
            "inputs: expected a Tensor, a tuple of Tensors or a mapping of keyword arguments, got "
            f"{type(inputs).__name__}" + ("; use torch.as_tensor" if isinstance(inputs, np.ndarray) else "")
        )
    for name in parsed.explained:
        check_entry(parsed, name)
    refuse_empty_masks(parsed)
    return parsed


def parse_mapping(values: dict[str, Any], extra: tuple[Any, ...]) -> Inputs:
    """Sort keyword arguments into those that are explained and those that are passed on only."""
    wrong = [key for key in values if not isinstance(key, str)]
    if wrong:
        raise InputError(f"inputs: the keys of a mapping are names of arguments, got {wrong[0]!r}")
    explained = [
        n
        for n, v in values.items()
        if isinstance(v, Tensor) and v.dtype != torch.bool and v.ndim >= 2 and not NOT_EXPLAINED.search(n)
    ]
    if not explained:
        for n, v in values.items():
            if isinstance(v, (list, np.ndarray)) and not NOT_EXPLAINED.search(n):
                raise InputError(
                    f"inputs: '{n}' is a {type(v).__name__}, not a Tensor; use torch.as_tensor, or "
                    "return_tensors='pt' of a tokenizer"
                )
        for n, v in values.items():
            if isinstance(v, Tensor) and v.dtype != torch.bool and v.ndim == 1 and not NOT_EXPLAINED.search(n):
                raise InputError(
                    f"inputs: '{n}' has shape {tuple(v.shape)}, without an axis for the examples; add it with [None]"
                )
        raise InputError(
            f"inputs: no entry to explain among {', '.join(values)} (masks and positions are passed on only)"
        )
    ids = any(not values[n].is_floating_point() for n in explained)
    packed = ids and any(GRIDS.search(n) for n, v in values.items() if isinstance(v, Tensor))
    return Inputs("mapping", values, explained, extra, packed=packed)


def check_entry(inputs: Inputs, name: str) -> None:
    """
    Raises:
        InputError: if this entry cannot be explained, or not together with the others.
    """
    value, what = inputs.values[name], f"inputs: {label(inputs, name)}"
    if value.is_meta:
        raise InputError(f"{what} is on the meta device, where tensors hold no values")
    if value.layout is not torch.strided or value.is_nested:
        raise InputError(f"{what} is sparse or nested; give a dense, padded tensor")
    if value.ndim == 0 or value.shape[0] == 0:
        raise InputError(f"{what} holds no example (shape {tuple(value.shape)})")
    if value.numel() == 0:
        raise InputError(f"{what} holds no tokens (shape {tuple(value.shape)})")
    if value.shape[0] != inputs.batch and not (inputs.packed and value.is_floating_point()):
        raise InputError(
            f"{what} has {value.shape[0]} examples, {label(inputs, inputs.explained[0])} has {inputs.batch}; "
            "repeat the shorter one (an image for each of its texts), so that both have one entry per example"
        )
    if value.dtype == torch.bool or value.is_complex():
        raise InputError(f"{what} is {value.dtype}; floats and integer token ids can be explained")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise InputError(f"{what} contains NaN or infinity")


def label(inputs: Inputs, name: Key) -> str:
    """How a message calls an argument."""
    if isinstance(name, int):
        return f"additional_forward_args[{name}]"
    return {"tensor": "the tensor", "tuple": f"tensor {name.removeprefix('input')}"}.get(inputs.kind, f"'{name}'")


def refuse_empty_masks(inputs: Inputs) -> None:
    """An example whose every token is masked has nothing to explain."""
    for name, value in inputs.values.items():
        if (
            name in ("attention_mask", "decoder_attention_mask", "pixel_mask")
            and isinstance(value, Tensor)
            and value.ndim >= 2
        ):
            if value.dtype.is_floating_point and bool((value < 0).any()):
                continue  # already an additive mask
            empty = (value.flatten(1) == 0).all(1).nonzero().flatten().tolist()
            if empty:
                raise InputError(f"inputs: '{name}' masks every token of example {empty[0]}")


def attach(inputs: Inputs, dtype: torch.dtype, promote: bool) -> dict[str, Any]:
    """Copies of the values that the recording can follow.

    ``inputs.leaves`` gets the tensors whose signals are the result.
    """
    values = {name: value if name in inputs.explained else private(value) for name, value in inputs.values.items()}
    for position, name in enumerate(inputs.explained):
        value = inputs.values[name]
        shape = (1, *inputs.whole[name]) if inputs.windows else value.shape
        layout = initial(name, (1, *value.shape))[1:] if inputs.windows else initial(name, shape)
        tag = Tag(origin=position, ancestors=1 << position, carried=1 << position, layout=layout)
        if value.is_floating_point():
            copied = value.detach().to(torch.float32 if promote else value.dtype, copy=True)
            if inputs.windows:
                start, stop = inputs.windows[name]
                leaf = copied.new_zeros(shape)
                leaf[0, start:stop] = copied
                leaf.requires_grad_()
                given = leaf[0, start:stop].clone()
            else:
                leaf = copied.requires_grad_()
                given = leaf.clone()  # the model may write into its input, but not into a leaf
            setattr(given, tags.ATTRIBUTE, tag)
        else:
            leaf = torch.zeros(shape, dtype=dtype, device=value.device, requires_grad=True)
            handle = leaf[0, slice(*inputs.windows[name])] if inputs.windows else leaf.view_as(leaf)
            setattr(handle, tags.ATTRIBUTE, replace(tag, role=tags.IDS))
            given = value.clone()
            setattr(given, HANDLE, handle)
        inputs.leaves[name] = leaf
        values[name] = given
    return values

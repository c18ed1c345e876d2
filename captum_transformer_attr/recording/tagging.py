"""Tags of tensors that no node gave: views, what was written into, what comes from where the recorder does not see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_transformer_attr.errors import UnsupportedOperationError
from captum_transformer_attr.recording import tags
from captum_transformer_attr.recording.layout import features, resized
from captum_transformer_attr.recording.leaving import place
from captum_transformer_attr.recording.names import LIKE_ANOTHER, base_name
from captum_transformer_attr.recording.nested import tensors_in
from captum_transformer_attr.recording.registry import LAYOUTS
from captum_transformer_attr.recording.tags import Part, Tag, describe, tag_of

if TYPE_CHECKING:
    from captum_transformer_attr.recording.recorder import Recorder


def tag_native(recorder: Recorder, out: Tensor, name: str, operands: list[Tensor], args: Any, kwargs: Any) -> None:
    """Tag what torch itself made of ``operands``."""
    if name in LIKE_ANOTHER:
        operands = operands[:1]
    found = [t for t in map(tag_of, operands) if t is not None]
    if not found:
        found = [recorder.merged([])]
    infer = LAYOUTS.get(name) or LAYOUTS.get(base_name(name))
    first = found[0]
    try:
        layout = infer(out, *args, **kwargs) if infer else resized(first.layout, out.shape)
    except (RuntimeError, TypeError, ValueError, IndexError):
        layout = None
    if name == "__getitem__" and layout is None and first.layout is not None and not tensors_in(args[1:]):
        recorder.mixes_examples = True
    if len(found) == 1 and layout is not None and features(layout) < features(first.layout):
        # Some channels of several (queries of a joint projection, half of a gated unit) are values of their own.
        moved = recorder.parts.setdefault(
            place_of(out, first), recorder.merged(found, role=first.role, root=first.root, sum_of=first.sum_of)
        )
        moved = replace(moved, layout=layout)
    elif len(found) == 1 and (part := part_taken(recorder, out, operands[0], first)) is not None:
        moved = replace(part, layout=layout)
    elif len(found) == 1:
        # Values that only moved keep their identity, so that a trunk is recognised behind a reshape or a cast.
        parts, dim = parts_moved(recorder, name, out, operands[0], first)
        moved = replace(first, layout=layout, parts=parts, parts_dim=dim)
    else:
        moved = recorder.merged(found, layout=layout, role=common_role(found))
    setattr(out, tags.ATTRIBUTE, moved)
    if out.grad_fn is not None:
        recorder.made[out.grad_fn] = moved
        describe(out.grad_fn, name, recorder.path)


def common_role(found: list[Tag]) -> str:
    """The role that all of them play, if it is one."""
    roles = {t.role for t in found}
    return roles.pop() if len(roles) == 1 else tags.PLAIN


def place_of(out: Tensor, tag: Tag) -> tuple[Any, ...]:
    """Which of the values that a tag names a tensor holds."""
    return (tag.origin, out.storage_offset(), out.shape, out.stride())


def part_taken(recorder: Recorder, out: Tensor, stacked: Tensor, tag: Tag) -> Tag | None:
    """The tag of the part that a view takes out of a stack, None if it takes anything else."""
    if not tag.intact or out.ndim != stacked.ndim - 1:
        return None
    dim = tag.parts_dim
    sizes, steps = ((*t[:dim], *t[dim + 1 :]) for t in (stacked.shape, stacked.stride()))
    if (tuple(out.shape), out.stride()) != (sizes, steps) or not is_view_of(out, stacked):
        return None
    part = tag.parts[(out.storage_offset() - stacked.storage_offset()) // stacked.stride(dim)]
    own = tag_of(part.tensor)
    if own is None or (not isinstance(part.factor, Tensor) and part.factor == 1):
        return own
    # Scaled or gated it is a value of its own, an elementwise function of what it was only without a gate.
    root = own.root if own.root >= 0 else own.origin
    kept = {"weighted": own.weighted, "carried": own.carried, "role": own.role}
    if tag_of(part.factor) is None:
        kept |= {"root": root, "sum_of": own.sum_of}
    return recorder.parts.setdefault(place_of(out, tag), recorder.merged(part.tags, **kept))


def is_view_of(out: Tensor, tensor: Tensor) -> bool:
    return out._base is not None and out._base is (tensor if tensor._base is None else tensor._base)


# What only copies values or casts them, and what only groups axes in another way.
COPIES = frozenset("clone contiguous to float double half bfloat16 type type_as".split())
REGROUPS = frozenset("view reshape flatten unflatten unsqueeze squeeze view_as reshape_as __getitem__".split())


def parts_moved(recorder: Recorder, name: str, out: Tensor, stacked: Tensor, tag: Tag) -> tuple[tuple[Part, ...], int]:
    """The parts of a stack, and where they lie, after it was copied, or its axes were put into another order or grouped
    in another way; none otherwise."""
    if not tag.intact or out.numel() != stacked.numel():
        return (), 0
    if name in COPIES and out.shape == stacked.shape:
        with recorder:
            return tuple(Part.of(*(cast(t, out.dtype) for t in part[:2])) for part in tag.parts), tag.parts_dim
    if out is stacked:
        return (), 0  # it was written into
    before, after = (list(zip(t.stride(), t.shape, strict=True)) for t in (stacked, out))
    if is_view_of(out, stacked) and sorted(before) == sorted(after) and len(set(before)) == len(before):
        order = [before.index(axis) for axis in after]
        rest = [i - (i > tag.parts_dim) for i in order if i != tag.parts_dim]
        return parts_turned(recorder, tag, lambda t: t.permute(rest)), order.index(tag.parts_dim)
    if name in REGROUPS:
        inner = stacked.shape[tag.parts_dim + 1 :].numel()
        same = [i for i, n in enumerate(out.shape) if n == len(tag.parts) > 1 and out.shape[i + 1 :].numel() == inner]
        if same:
            shape = (*out.shape[: same[0]], *out.shape[same[0] + 1 :])
            return parts_turned(recorder, tag, lambda t: t.reshape(shape)), same[0]
    return (), 0


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A part or its factor in the precision to which the stack was cast."""
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype != dtype else value


def parts_turned(recorder: Recorder, tag: Tag, turn: Callable[[Tensor], Tensor]) -> tuple[Part, ...]:
    """Every part, and its factor as large, after a change of their axes."""

    def turned(part: Part) -> Part:
        factor = part.factor
        factor = turn(factor.expand(part.tensor.shape)) if isinstance(factor, Tensor) else factor
        return Part.of(turn(part.tensor), factor)

    with recorder:
        return tuple(map(turned, tag.parts))


def tag_base(recorder: Recorder, written: Tensor) -> None:
    """A write into a view makes the viewed tensor depend on the input too."""
    base = written._base
    tag = tag_of(written)
    if base is not None and tag is not None and base.requires_grad:
        found = [tag] if tag_of(base) is None else [tag_of(base), tag]
        known = [t for t in found if t is not None]
        layout = known[0].layout if tag_of(base) is not None else resized(tag.layout, base.shape)
        setattr(base, tags.ATTRIBUTE, recorder.merged(known, layout=layout, role=common_role(known)))


def recover(recorder: Recorder, tensor: Tensor) -> None:
    """Tag a live tensor from where the recorder does not see (a scripted function, an ``autograd.Function``), by the
    recorded operations that autograd's graph leads to; the audit judges what happened in between."""
    found: dict[int, Tag] = {}
    stack, seen = [tensor.grad_fn], set()
    while stack:
        fn = stack.pop()
        if fn is None or fn in seen:
            continue
        seen.add(fn)
        tag = recorder.made.get(fn)
        if tag is not None:
            found[tag.origin] = tag
        else:
            stack += [f for f, _ in fn.next_functions]
    if not found:
        raise UnsupportedOperationError(
            f"{place(recorder.path)} uses a tensor with a gradient graph of its own, which was not made in this "
            "forward: an operation that the recorder "
            "cannot see, or a tensor from outside. Way out: detach buffers and cached tensors before attributing, or "
            "register_rule for the module around it."
        )
    setattr(tensor, tags.ATTRIBUTE, recorder.merged(list(found.values())))

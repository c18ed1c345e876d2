"""One architecture, one attribution class: attributed or refused, and the numbers that say whether to trust it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import captum_transformer_attr
from captum_transformer_attr.errors import TransformerAttributionError
from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.methods.base import target_of
from captum_transformer_attr.recording.inputs import parse
from captum_transformer_attr.recording.node import LayoutLostError
from captum_transformer_attr.recording.outputs import unwrap
from captum_transformer_attr.recording.session import recorded

DELTA, BATCH, FORWARD = 1e-6, 1e-8, 1e-10
RECTIFIED = ("AttentionGradCam",)  # their map is all zero where it has no positive value


@dataclass
class Row:
    """Result of one architecture under one class.

    Attributes:
        outcome: ``attributed``; ``refused`` (an error of this package, whose message is the reason); ``wrong`` (a
            number above its bound); ``ill-conditioned`` (the batch difference above its bound, and rounding shown to be
            the reason, see `rounding`); ``failed`` (any other exception).
        delta: largest convergence delta.
        batch: largest difference between an example in the batch and alone, relative to its largest score.
        forward: largest difference of the recorded output, relative.
        seconds: one ``attribute`` of the batch.
    """

    name: str
    family: str
    method: str
    outcome: str = "attributed"
    reason: str = ""
    delta: float = 0.0
    batch: float = 0.0
    forward: float = 0.0
    readout: str = ""
    attentions: int = 0
    grid: str = ""
    seconds: float = 0.0
    engine: str = ""
    details: dict[str, str] = field(default_factory=dict)


def check(case: Any, method: str, engine: str = "") -> Row:
    """Run one case; never raises for what the model or the engine does."""
    name, family, build, make_inputs, target, *rest = case
    row = Row(name, family, method, engine=engine, details=dict(rest[0]) if rest else {})
    try:
        model, inputs = build(), make_inputs()
        row.details.setdefault("parameters", f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}")
        row.details.setdefault("input", described(inputs))
        measure(row, getattr(captum_transformer_attr, method)(model), model, inputs, target)
    except TransformerAttributionError as error:
        row.outcome, row.reason = "refused", str(error)
    except Exception as error:  # noqa: BLE001  whatever goes wrong belongs in the table
        frame = traceback.extract_tb(error.__traceback__)[-1]
        row.outcome, row.reason = (
            "failed",
            f"{type(error).__name__}: {str(error)[:300]} ({frame.filename.rpartition('/')[2]}:{frame.lineno})",
        )
    return row


def measure(row: Row, explainer: Any, model: Any, inputs: Any, target: Any) -> None:
    """Fill in the numbers."""
    given = parse(inputs)
    start = time.perf_counter()
    scores, delta = explainer.attribute(inputs, target, return_convergence_delta=True)
    row.seconds = round(time.perf_counter() - start, 2)
    row.delta = float(delta.abs().max())
    differences = []
    for i in range(given.batch):
        example = one_of(given, i)
        alone = explainer.attribute(packed(example), target_of(target, i, given.batch))
        differences += [relative(a.chunk(given.batch)[i], b) for a, b in zip(flat(scores), flat(alone), strict=True)]
    row.batch = max(differences)
    if hasattr(explainer, "attribute_tokens"):
        tokens = explainer.attribute_tokens(packed(one_of(given, 0)), target_of(target, 0, given.batch))
        row.grid = ", ".join("×".join(map(str, t.shape[1:])) for t in flat(tokens))
    inspect(row, model, inputs, target)
    verdict(row, flat(scores))
    if row.reason.startswith("batch difference") and ";" not in row.reason:
        rounding(row, explainer, given, target, scores)


def rounding(row: Row, explainer: Any, given: Any, target: Any, scores: Any) -> None:
    """Whether a batch difference is the rounding of another batch size, magnified, or a mix of the examples.

    In a batch of the same size every product is computed by the same instructions: if the examples do not mix, the
    first one's scores are the same to the last bit whatever stands beside it. And a change of the input in its last bit
    must move the scores as much as the batch does.
    """
    if given.packed or not any(v.is_floating_point() for v in given.values.values()):
        return

    def moved(change: Any) -> list[Tensor]:
        values = {name: change(v) if v.is_floating_point() else v for name, v in given.values.items()}
        return flat(explainer.attribute(packed(replace(given, values=values)), target))

    def with_another(v: Tensor) -> Tensor:
        return torch.cat([v[:1], -v[1:].flip(-1)])

    def in_the_last_bit(v: Tensor) -> Tensor:
        return torch.nextafter(v, torch.randn(v.shape, generator=torch.Generator().manual_seed(3), dtype=v.dtype))

    beside = max(relative(a[0], b[0]) for a, b in zip(moved(with_another), flat(scores), strict=True))
    nearby = max(relative(a, b) for a, b in zip(moved(in_the_last_bit), flat(scores), strict=True))
    row.reason += (
        f"; in a batch of the same size beside another example {beside:.1e}; after a change of the input in its last "
        f"bit {nearby:.1e}"
    )
    if beside <= BATCH and nearby >= row.batch / 10:
        row.outcome = "ill-conditioned"


def inspect(row: Row, model: Any, inputs: Any, target: Any) -> None:
    """Forward difference, attention calls, and the rows of the last attention that the output reads.

    Where the examples of a batch cannot be told apart, or are recorded as one, this is the first one's.
    """
    given = parse(inputs)
    first = target_of(target, 0, given.batch)
    try:
        if given.packed:
            look(row, model, given.part(0), first)
        else:
            look(row, model, given, target)
    except LayoutLostError:
        look(row, model, given.example(0), first)


def look(row: Row, model: Any, given: Any, target: Any) -> None:
    """See ``inspect``."""
    with recorded(model, given) as recording:
        with torch.no_grad():
            args, kwargs = given.arguments(given.values)
            row.forward = relative(recording.output.detach(), unwrap(model(*args, **kwargs)))
        recording.select(target)
        row.attentions = len(recording.attentions)
        if recording.attentions:
            last = recording.attentions[-1]
            maps = Maps(recording, [last])
            maps.collect_gradients()
            row.readout = readout(maps.gradients[last])


def readout(gradient: Tensor) -> str:
    """Which query rows a gradient ``(..., queries, channels)`` reaches."""
    reached = (gradient.abs().amax(-1) > 0).flatten(0, -2).any(0)
    rows = reached.nonzero().flatten().tolist()
    if len(rows) == len(reached):
        return "the one row" if len(rows) == 1 else f"all {len(rows)} rows"
    if len(rows) <= 3:
        return f"row {', '.join(map(str, rows))} of {len(reached)}"
    return f"{len(rows)} of {len(reached)} rows ({rows[0]}–{rows[-1]})"


def one_of(given: Any, i: int) -> Any:
    """The i-th example; of entries without a batch axis its share of the rows."""
    example = given.example(i)
    if given.packed:
        for name in given.explained:
            if given.values[name].is_floating_point():
                example.values[name] = given.values[name].chunk(given.batch)[i]
    return example


def verdict(row: Row, scores: list[Tensor]) -> None:
    """Outcome from the numbers."""
    wrong = []
    if not all(bool(s.isfinite().all()) for s in scores):
        wrong.append("scores are not finite")
    elif row.method not in RECTIFIED and not all(bool((s.flatten(1).abs().amax(1) > 0).all()) for s in scores):
        wrong.append("an example has no score at all")
    for name, value, bound in (
        ("delta", row.delta, DELTA),
        ("batch difference", row.batch, BATCH),
        ("forward difference", row.forward, FORWARD),
    ):
        if not value <= bound:
            wrong.append(f"{name} {value:.1e}")
    if wrong:
        row.outcome, row.reason = "wrong", "; ".join(wrong)


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of ``b``."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def packed(example: Any) -> Any:
    """An example in the container its batch came in."""
    if example.kind == "mapping":
        return example.values
    values = tuple(example.values.values())
    return values[0] if example.kind == "tensor" else values


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return list(value.values() if isinstance(value, Mapping) else value)


def described(inputs: Any) -> str:
    """Shapes of the inputs without the batch."""
    if isinstance(inputs, Tensor):
        return "×".join(map(str, inputs.shape[1:]))
    items = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    return ", ".join(f"{name} {'×'.join(map(str, t.shape[1:]))}" for name, t in items if isinstance(t, Tensor))

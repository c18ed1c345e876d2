"""What the engine would do with a model: its operations, the rules for them, and what would be refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.errors import InputError, TransformerAttributionError
from captum_transformer_attr.flow.token_flow import TABLE as TOKEN_FLOW
from captum_transformer_attr.methods.base import check_model, target_of
from captum_transformer_attr.methods.transformer_relevance import TransformerRelevance
from captum_transformer_attr.ops.custom import Custom
from captum_transformer_attr.recording.audit import walk
from captum_transformer_attr.recording.inputs import Inputs, parse
from captum_transformer_attr.recording.node import LayoutLostError, Node
from captum_transformer_attr.recording.outputs import OutputChoice
from captum_transformer_attr.recording.session import ONE_AT_A_TIME, Recording, recorded
from captum_transformer_attr.recording.signal import Rule, Signal
from captum_transformer_attr.rules.deep_taylor import TABLE as DEEP_TAYLOR

Table = Mapping[type[Node], Rule]
TABLES: dict[str, Table] = {"deep_taylor": DEEP_TAYLOR, "token flow": TOKEN_FLOW}
NO_RULE = "refused"


@dataclass(frozen=True)
class CoverageRow:
    """One kind of operation at one place of the model; numbered copies of a module are taken together.

    Attributes:
        operation: what is computed.
        path: module path, ``*`` for the numbers of copies (``blocks.0``, ``blocks.1``).
        rules: table -> name of its rule, ``"refused"`` where there is none.
        count: how often it runs.
        refused: why no attribution would be produced, empty for covered operations.
    """

    operation: str
    path: str
    rules: dict[str, str]
    count: int
    refused: str = ""


@dataclass(frozen=True)
class Coverage:
    """The table of a model, to be printed; ``bool(table)`` tells whether attributions can be produced.

    Attributes:
        rows: the operations a signal from the output passes, in execution order.
        attentions: number of attention calls.
        refused: reasons, empty if none.
    """

    rows: tuple[CoverageRow, ...] = ()
    attentions: int = 0
    refused: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.refused

    def __str__(self) -> str:
        header = ["count", "operation", "module", *TABLES]
        lines = [
            header,
            *([str(r.count), r.operation, r.path or "(model)", *(r.rules[t] for t in TABLES)] for r in self.rows),
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [
            "  ".join(
                cell.rjust(w) if i == 0 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        text.insert(1, "  ".join("-" * w for w in widths))
        total = sum(r.count for r in self.rows)
        text.append(f"{total} operations, {self.attentions} attention calls, {len(self.refused) or 'nothing'} refused")
        return "\n".join([*text, *(f"refused: {reason}" for reason in self.refused)])


def coverage(
    model: nn.Module | Callable[..., Any],
    inputs: Any,
    additional_forward_args: Any = None,
    *,
    target: Any = None,
    output: OutputChoice = None,
) -> Coverage:
    """What an attribution of this model would do, and whether it would be refused.

    Runs the model once, recorded, and tries the backward passes of ``TransformerRelevance``. The model is left as
    found.

    Args:
        model, output: as in the attribution classes.
        inputs, additional_forward_args: as in ``attribute``.
        target: as in ``attribute``; None takes every example's largest output.

    Returns:
        A printable table; it is false if an attribution would be refused.

    Raises:
        InputError: for inputs that cannot be used. A model that would be refused raises nothing: the table says why.

    Example:
        >>> print(coverage(model, pixels))
    """
    check_model(model)
    given = parse(inputs, additional_forward_args)
    if given.packed:
        given, target = given.part(0), target_of(target, 0, given.batch)
    try:
        return table_of(model, given, target, output)
    except LayoutLostError:
        return table_of(model, given.example(0), target_of(target, 0, given.batch), output)
    except InputError:
        raise
    except TransformerAttributionError as error:
        return Coverage(refused=(str(error),))


def table_of(model: nn.Module | Callable[..., Any], given: Inputs, target: Any, output: OutputChoice) -> Coverage:
    """The table of one recorded forward."""
    with ONE_AT_A_TIME, recorded(model, given, output, verified=set()) as recording:
        rows = rows_of(recording.output)
        refused = tuple(row.refused for row in rows if row.refused)
        if not refused:
            refused = refusals(TransformerRelevance(model, output=output), recording, target)
        found = {node for node, _ in walk(recording.output) if node is not None and node.is_attention}
        return Coverage(rows, len(found), refused)


def refusals(method: TransformerRelevance, recording: Recording, target: Any) -> tuple[str, ...]:
    """Why the passes of a method would be refused although every operation has its rules."""
    try:
        recording.select(largest(recording.output) if target is None else target)
        method.score(recording, delta=True)
    except TransformerAttributionError as error:
        if isinstance(error, InputError):
            raise
        return (str(error),)
    return ()


def largest(output: Tensor) -> Any:
    """Every example's largest output as a target; None if there is only one."""
    if output.ndim < 2:
        return None
    flat = output.detach().flatten(1).argmax(1)
    return (
        [tuple(int(i) for i in torch.unravel_index(index, output.shape[1:])) for index in flat]
        if output.ndim > 2
        else flat
    )


def rows_of(output: Tensor) -> tuple[CoverageRow, ...]:
    """Everything a signal from ``output`` passes, in execution order, foreign operations first."""
    nodes: list[Node] = []
    counted: dict[tuple[str, str], CoverageRow] = {}
    for node, foreign in walk(output):
        if node is not None:
            nodes.append(node)
        elif foreign is not None:
            add(counted, foreign.operation, foreign.path, dict.fromkeys(TABLES, NO_RULE), foreign.message())
    for node in sorted(nodes, key=lambda n: n.index):
        rules = {name: rule_name(table, node) for name, table in TABLES.items()}
        reason = f"no rule for operation '{node.label}' in module '{node.path}'" if NO_RULE in rules.values() else ""
        add(counted, node.label, node.path, rules, reason)
    return tuple(counted.values())


def add(
    counted: dict[tuple[str, str], CoverageRow], operation: str, path: str, rules: dict[str, str], refused: str
) -> None:
    """Count an operation in the row of its kind and place."""
    place = re.sub(r"(?<![^.])\d+(?![^.])", "*", path)
    row = counted.get((operation, place))
    counted[operation, place] = (
        CoverageRow(operation, place, rules, 1, refused) if row is None else replace(row, count=row.count + 1)
    )


def rule_name(table: Table, node: Node) -> str:
    """Name of the rule that a table has for an operation."""
    if isinstance(node, Custom):
        chosen = node.rule.flow if table is TOKEN_FLOW else node.rule.relevance
        return f"registered: {chosen if isinstance(chosen, str) else chosen.__name__}"
    rule = Signal("", "", table).rule_for(type(node))
    if rule is None:
        return NO_RULE
    return "identity" if rule.__name__ == "<lambda>" else rule.__name__.replace("_", " ")

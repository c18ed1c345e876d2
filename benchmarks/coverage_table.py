"""Writes the coverage table as Markdown: totals, refusals, a line per family, all architectures folded away below."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from benchmarks.coverage_check import BATCH, DELTA, FORWARD, Row
from captum_transformer_attr.evaluation.machine import circumstances
from captum_transformer_attr.output_files import write_texts

MAIN = "TransformerRelevance"
ENGINE = ("recording", "ops", "rules", "flow", "methods")  # the parts of the package that decide a result
TARGETS = {
    "timm": "at least 97 % of the architectures whose mixing is softmax attention",
    "transformers": "at least 60 model types",
}


def header(*columns: str) -> str:
    """The first two lines of a Markdown table."""
    return "| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|\n"


ARCHITECTURES = header(
    *("architecture", "result", "delta", "batch", "forward", "read-out"),
    *("attentions", "tokens", "input", "M par.", "seconds"),
)


def write_table(path: Path, sources: dict[str, tuple[Any, dict[tuple[str, str], Row]]]) -> None:
    """Totals on top, then a section per source; written whole or not at all."""
    selected: dict[str, list[Row]] = {}
    missing: dict[str, list[str]] = {}
    for source, (module, rows) in sources.items():
        cases = {case[0]: case[5] if len(case) > 5 else {} for case in module.cases()}
        selected[source] = [row for (name, _), row in rows.items() if name in cases]
        for row in selected[source]:
            row.details.update(cases[row.name])
        missing[source] = [name for name in cases if (name, MAIN) not in rows]
    parts = [INTRODUCTION.format(delta=DELTA, batch=BATCH, forward=FORWARD), totals(selected, missing)]
    parts += [section(source, selected[source], module) for source, (module, _) in sources.items()]
    parts.append(made_with([row for rows in selected.values() for row in rows]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_texts({path: "\n".join(parts)})


INTRODUCTION = """# Coverage

Which architectures `TransformerRelevance` explains, found by running all of them: random weights that hide no mistake,
nothing downloaded, the smallest input each accepts, float64, a batch of two. Written by
`python -m benchmarks.coverage`.

- *attributed*: delta ≤ {delta:.0e}, batch ≤ {batch:.0e} and forward ≤ {forward:.0e}, scores finite and not all zero.
  *wrong*: a number above its bound. *ill-conditioned*: only the batch difference is, and it is rounding: the example's
  scores are the same to the last bit whatever stands beside it in a batch of the same size, and a change of the input
  in its last bit moves them as much. Not counted as attributed.
- *refused*: an error that names the operation or the module, and no result. Refusals count against the share.
- *delta*: relevance that is not accounted for, of 1. *batch*: largest difference between an example in the batch and
  alone, relative to its largest score. *forward*: recorded output against the plain one, relative to the largest
  output.
- *read-out*: query rows of the last attention that the explained output reads. *attentions*: attention calls on the
  way. *tokens*: the grid that is explained. *seconds*: one `attribute` of the batch with its delta, on one thread of a
  machine that had other work to do.
- *for*: architectures over 100 million parameters of the same modules and operations, of which the row is the smallest.
  *2 blocks*: a larger architecture without a smaller relative, run at its width with two blocks.
"""


def counted_of(rows: Iterable[Row]) -> list[Row]:
    """Rows of the main class that count."""
    return [row for row in rows if row.method == MAIN and not row.details.get("scope")]


def share(rows: list[Row]) -> str:
    outcomes = Counter(row.outcome for row in rows)
    return f"{outcomes['attributed']} of {len(rows)} ({100 * outcomes['attributed'] / max(1, len(rows)):.1f} %)"


def totals(selected: dict[str, list[Row]], missing: dict[str, list[str]]) -> str:
    """One line per source."""
    kinds = {"refused": "refused by name", **{k: k for k in ("ill-conditioned", "wrong", "failed")}}
    text = [header("source", "attributed", *kinds.values(), "not run", "target")]
    for source, rows in selected.items():
        counted = counted_of(rows)
        outcomes = Counter(row.outcome for row in counted)
        numbers = [*(str(outcomes[kind]) for kind in kinds), str(len(missing[source]))]
        text.append(f"| {source} | " + " | ".join([attributed(counted), *numbers, TARGETS.get(source, "")]) + " |\n")
    return "".join(text)


def attributed(counted: list[Row]) -> str:
    """The share; of architectures with several attention implementations also how many do with all of them."""
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in counted:
        kinds[row.name.split(" [")[0]].append(row)
    if len(kinds) == len(counted):
        return share(counted)
    whole = sum(all(row.outcome == "attributed" for row in rows) for rows in kinds.values())
    return f"{whole} of {len(kinds)} model types, every attention implementation; {share(counted)} rows"


def section(source: str, rows: list[Row], module: Any) -> str:
    """Refusals, a line per family, every architecture, what the other classes refuse, and what is out of scope."""
    counted = counted_of(rows)
    apart = [row for row in rows if row.method == MAIN and row.details.get("scope")]
    text = [f"## {source}\n\n{attributed(counted)} attributed.\n"]
    rest = sorted((row for row in counted if row.outcome != "attributed"), key=lambda row: (row.outcome, row.name))
    if rest:
        text.append("\n### Not attributed\n\n" + header("architecture", "family", "result"))
        text += [f"| {row.name} | {row.family} | {cell(row)} |\n" for row in rest]
    families: dict[str, list[Row]] = defaultdict(list)
    for row in counted:
        families[row.family].append(row)
    differences = ("largest delta", "largest batch difference", "largest forward difference")
    text.append("\n### Families\n\n" + header("family", "attributed", *differences))
    text += [summary(family, families[family]) for family in sorted(families)]
    text.append("\n### Every architecture\n")
    for family in sorted(families):
        lines = "".join(line(row) for row in sorted(families[family], key=lambda row: row.name))
        text.append("\n" + folded(f"{family}: {share(families[family])}", ARCHITECTURES + lines))
    text.append(other_methods(rows, {row.name for row in counted}))
    if apart:
        table = "".join(
            f"| {row.name} | {row.details['scope']} | {cell(row)} |\n"
            for row in sorted(apart, key=lambda row: row.name)
        )
        text.append(
            "\n### Softmax, but no attention over tokens\n\nNot counted above.\n\n"
            + folded(f"{len(apart)} architectures", header("architecture", "what it is", "result") + table)
        )
    text.append(outside(module))
    return "".join(text)


def outside(module: Any) -> str:
    """Architectures that are listed and not run."""
    listed: dict[str, list[str]] = defaultdict(list)
    for name, family, _ in getattr(module, "outside", lambda: ())():
        listed[family].append(name)
    if not listed:
        return ""
    lines = "".join(f"- {family}: {', '.join(names)}\n" for family, names in sorted(listed.items()))
    return "\n### No softmax at all\n\n" + folded(f"{sum(map(len, listed.values()))} architectures, not run", lines)


def folded(summary: str, content: str) -> str:
    """Content that a reader opens by a click."""
    return f"<details><summary>{summary}</summary>\n\n{content}\n</details>\n"


def summary(family: str, rows: list[Row]) -> str:
    good = [row for row in rows if row.outcome == "attributed"]
    worst = [f"{max(getattr(row, key) for row in good):.0e}" if good else "" for key in ("delta", "batch", "forward")]
    return f"| {family} | {len(good)} of {len(rows)} | " + " | ".join(worst) + " |\n"


def line(row: Row) -> str:
    notes = [row.details[key] for key in ("depth",) if row.details.get(key)]
    if row.details.get("for"):
        notes.append(f"for {row.details['for']}")
    name = row.name + (f" ({'; '.join(notes)})" if notes else "")
    numbers = [f"{row.delta:.0e}", f"{row.batch:.0e}", f"{row.forward:.0e}", row.readout, str(row.attentions), row.grid]
    if row.outcome not in ("attributed", "ill-conditioned", "wrong"):
        numbers = [""] * len(numbers)
    ends = [
        row.details.get("input", ""),
        row.details.get("parameters", ""),
        f"{row.seconds:.1f}" if row.outcome == "attributed" else "",
    ]
    return "| " + " | ".join([name, row.outcome, *numbers, *ends]) + " |\n"


def cell(row: Row) -> str:
    """The outcome with its reason."""
    if row.outcome == "attributed":
        return row.outcome
    return f"**{row.outcome}**: {row.reason}".replace("|", "\\|").replace("\n", " ")


def other_methods(rows: list[Row], counted: set[str]) -> str:
    """What the other classes do on the same architectures."""
    by_method: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.method != MAIN and row.name in counted:
            by_method[row.method].append(row)
    if not by_method:
        return ""
    columns = ("class", "run", "attributed", "largest delta", "largest batch difference", "not attributed")
    text = ["\n### Other classes\n\n" + header(*columns)]
    for method, found in sorted(by_method.items()):
        good = [row for row in found if row.outcome == "attributed"]
        bad = "; ".join(f"{row.name}: {cell(row)}" for row in found if row.outcome != "attributed")
        delta, batch = (max((getattr(row, key) for row in good), default=0.0) for key in ("delta", "batch"))
        text.append(f"| {method} | {len(found)} | {len(good)} | {delta:.0e} | {batch:.0e} | {bad} |\n")
    return "".join(text)


# ---------------------------------------------------------------------- provenance
def made_with(rows: list[Row]) -> str:
    """Machine, versions, and which commit's engine made how many rows."""
    where = circumstances()
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    known = commits(Path(__file__).resolve().parent.parent)
    engines = Counter(row.engine for row in rows)
    made = ", ".join(f"{known.get(engine, 'uncommitted')} ({count} rows)" for engine, count in engines.most_common())
    return (
        f"## Made with\n\n{where['machine']}; {versions}. Table written {where['date']} by `{where['command']}`.\n\n"
        "A row is made anew when a change of the engine touches its architecture (`--only`, `--again`; `--stale` makes"
        " all anew). "
        f"Commits of the engine files that made the rows: {made}.\n"
    )


def digest_of(files: dict[str, bytes]) -> str:
    """Digest of the engine's files, given by path inside the package: equal for equal engines."""
    parts = [files[name] for part in ENGINE for name in sorted(files) if str(PurePosixPath(name).parent) == part]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def commits(root: Path, last: int = 80) -> dict[str, str]:
    """Engine digest → the oldest of the last commits that has it; empty outside a repository."""
    found: dict[str, str] = {}
    try:
        names = git(root, "log", f"-{last}", "--format=%h", "--", *(f"captum_transformer_attr/{p}" for p in ENGINE))
        for name in names.decode().split():
            archive = git(root, "archive", name, "captum_transformer_attr")
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                members = [m for m in tar.getmembers() if m.isfile() and m.name.endswith(".py")]
                files = {m.name.partition("/")[2]: tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]
            found[digest_of(files)] = name
    except (OSError, subprocess.SubprocessError):
        pass
    return found


def git(root: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, timeout=30, check=True).stdout

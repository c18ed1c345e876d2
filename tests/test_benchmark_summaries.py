"""The pages over the faithfulness tables: what they say about known numbers, and that the combination search runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from benchmarks import combination_search, faithfulness_summary, paired_differences

VALUES = {
    "TransformerRelevance": (10.0, 50.0),
    "AttentionRollout": (20.0, 40.0),
    "RawAttention": (15.0, 30.0),
    "LayerGradCam": (30.0, 20.0),
    "Random": (18.0, 10.0),
    "InputXGradient": (12.0, 15.0),
}


def table(folder: Path) -> None:
    """A table in which rollout falls behind raw attention in one direction."""
    methods: dict[str, Any] = {}
    for name, (positive, negative) in VALUES.items():
        metrics = {
            column: {"value": value, "low": value - 1, "high": value + 1, "better": better}
            for column, value, better in (
                ("positive, predicted", positive, "lower"),
                ("negative, predicted", negative, "higher"),
            )
        }
        methods[name] = {"metrics": metrics, "seconds_per_example": 1.0, "examples": 7}
    methods["AttCAT"] = {"metrics": {}, "seconds_per_example": 0.0, "examples": 0, "error": "windows"}
    task = {"task": "known", "title": "Known numbers", "methods": methods}
    (folder / "faithfulness-known.json").write_text(json.dumps({"command": "python -m known", "tasks": [task]}))


def test_the_page_names_where_the_order_breaks(tmp_path: Path) -> None:
    table(tmp_path)
    faithfulness_summary.main(tmp_path, headline="known")
    page = (tmp_path / "faithfulness.md").read_text()
    assert "| known | negative, predicted ↑ | 50.0 | 40.0 | 30.0 | 20.0 | as in the papers |" in page
    assert "30.0 | AttentionRollout clearly worse than RawAttention |" in page
    assert "- known, positive, predicted: clearly behind InputXGradient: AttentionRollout, RawAttention." in page
    # Grad-CAM is Captum's, not ours; 20 ± 1 and 18 ± 1 touch.
    assert "behind Random" not in page.split("## Known")[0]
    assert "| TransformerRelevance | **10.0** | **50.0** | 7 |" in page
    assert (tmp_path / "faithfulness.png").read_bytes().startswith(b"\x89PNG")


def test_without_tables_the_way_out_is_named(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="run python -m benchmarks.faithfulness first"):
        faithfulness_summary.main(tmp_path)


def test_combinations_by_hand() -> None:
    first, second = torch.tensor([[[3.0, 1.0], [0.0, -4.0]]]), torch.tensor([[[1.0, 1.0], [2.0, 0.0]]])
    assert torch.allclose(
        combination_search.combined("sum", [first, second]),
        torch.tensor([[[3 / 8 + 1 / 4, 1 / 8 + 1 / 4], [1 / 2, -1 / 2]]]),
    )
    assert torch.allclose(
        combination_search.combined("product", [first, second]), torch.tensor([[[3 / 32, 1 / 32], [0.0, 0.0]]])
    )
    ranks = combination_search.combined("ranks", [first, second])
    assert torch.allclose(ranks, torch.tensor([[[7 / 8 + 1 / 2, 5 / 8 + 1 / 2], [3 / 8 + 7 / 8, 1 / 8 + 1 / 8]]]))


def test_unknown_rows_are_refused() -> None:
    with pytest.raises(typer.BadParameter, match="no row ranks of nothing"):
        combination_search.main(["digits-swin"], rows=["ranks of nothing"])


def test_search_runs_on_the_embedded_model(tmp_path: Path) -> None:
    rows = ["AttentionRelevance", "FullGradPlus", "AttCAT", "product of AttentionRelevance, FullGradPlus"]
    combination_search.main(["digits-swin"], rows=rows, output=tmp_path, smoke=True, batch_size=2, precision="float32")
    halves = json.loads((tmp_path / "combination.json").read_text())["tasks"]["digits-swin"]
    assert halves["even"]["examples"] == halves["odd"]["examples"] == 2
    assert list(halves["odd"]["rows"]) == [rows[0], rows[1], rows[3]]  # AttCAT refuses windows
    assert "- AttCAT: " in (tmp_path / "combination.md").read_text()


def test_paired_differences(tmp_path: Path) -> None:
    """Curves that differ by a constant: the area over 0 … 0.9 differs by 90 times it, and the interval has no width."""
    curves = {"ConsensusRelevance": (0.25, 0.75), "FullGradPlus": (0.5, 0.5)}
    for method, (positive, negative) in curves.items():
        stored = {"positive/predicted": np.full((4, 10), positive), "negative/predicted": np.full((4, 10), negative)}
        (tmp_path / "task").mkdir(exist_ok=True)
        np.savez(tmp_path / "task" / f"{method}.npz", **stored)
    got = paired_differences.row(tmp_path / "task", "ConsensusRelevance", "FullGradPlus")
    ahead = "**-22.50 <sub>-22.50 … -22.50</sub>** | **+22.50 <sub>+22.50 … +22.50</sub>**"
    assert got == f"| task | FullGradPlus | {ahead} | 4 |"
    assert "**" not in paired_differences.row(tmp_path / "task", "FullGradPlus", "ConsensusRelevance")
    with pytest.raises(typer.BadParameter, match="AttCAT"):
        paired_differences.areas(tmp_path / "task", "AttCAT")
    np.savez(tmp_path / "task" / "AttCAT.npz", **{name: rows[:3] for name, rows in stored.items()})
    with pytest.raises(typer.BadParameter, match="not measured on the same examples of task"):
        paired_differences.row(tmp_path / "task", "AttCAT", "FullGradPlus")
    np.savez(tmp_path / "task" / "AttCAT.npz", **{"pointing/hit": np.ones(4)})
    with pytest.raises(typer.BadParameter, match="holds no perturbation curves"):
        paired_differences.areas(tmp_path / "task", "AttCAT")

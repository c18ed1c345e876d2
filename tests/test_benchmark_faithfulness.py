"""A smoke run of the faithfulness benchmark: every task whose data are there, two examples, three methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from benchmarks import faithfulness
from benchmarks.data_folder import data_folder
from benchmarks.faithfulness_tasks import TASKS

DATA = data_folder()


def missing(name: str) -> str:
    """Why a task cannot be run here, empty if it can."""
    folders = [folder for folder in TASKS[name].needs if not (DATA / folder).is_dir()]
    return f"{DATA / folders[0]} is not there (set CTA_DATA)" if folders else ""


LONG = (
    "vit-imagenet",
    "vit-imagenet-squares",
    "vit-imagenet-captum",
)  # fifty forwards at 224 x 224 per example and method


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in TASKS])
def test_smoke(name: str, tmp_path: Path) -> None:
    if missing(name):
        pytest.skip(missing(name))
    faithfulness.main([name], output=tmp_path, smoke=True)
    if name == "lxmert" and not (tmp_path / "faithfulness-lxmert.json").exists():
        pytest.skip("LXMERT is not trained here")
    (task,) = json.loads((tmp_path / f"faithfulness-{name}.json").read_text())["tasks"]
    assert list(task["methods"]) == list(faithfulness.SMOKE_METHODS)
    for method, entry in task["methods"].items():
        assert "error" not in entry, (method, entry)
        assert entry["examples"] == 2
        assert any(metric["value"] is not None for metric in entry["metrics"].values())
    assert "| TransformerRelevance |" in (tmp_path / f"faithfulness-{name}.md").read_text()


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="no task vit"):
        faithfulness.main(["vit"])
    with pytest.raises(typer.BadParameter, match="method 'Magic' is unknown"):
        faithfulness.main(["vit-imagenet"], method=["Magic"])
    (tmp_path / "file").write_text("")
    with pytest.raises(typer.BadParameter, match="--output .*file cannot be written"):
        faithfulness.main(["vit-imagenet"], output=tmp_path / "file")
    with pytest.raises(typer.BadParameter, match="--half"):
        faithfulness.main(half="third")


def test_missing_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("CTA_DATA", str(tmp_path / "nowhere"))
    faithfulness.main(["swin"], output=tmp_path)
    assert "swin: skipped" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_table_is_extended_by_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"output": tmp_path, "work": tmp_path / "work", "count": 2}
    faithfulness.main(["digits-vit"], method=[faithfulness.RANDOM, "RawAttention"], **options)
    table = tmp_path / "faithfulness-digits-vit.json"
    (before,) = json.loads(table.read_text())["tasks"]
    faithfulness.main(["digits-vit"], method=["AttentionRollout"], extend=True, **options)
    (after,) = json.loads(table.read_text())["tasks"]
    assert set(after["methods"]) == {*before["methods"], "AttentionRollout"}
    kept = after["methods"]["RawAttention"]
    assert kept.pop("about")["commit"] == json.loads(table.read_text())["commit"]
    assert kept == before["methods"]["RawAttention"]
    assert "Measured earlier: Random, RawAttention:" in table.with_suffix(".md").read_text()
    faithfulness.main(["digits-vit"], method=["AttentionRollout"], extend=True, **{**options, "count": 3})
    assert "no table of the same task" in capsys.readouterr().err

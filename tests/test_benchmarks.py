"""A smoke run of the benchmarks that have none elsewhere: they start, measure and print."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
    "name, expected", [("speed", "TransformerRelevance"), ("memory", "mib"), ("scaling", "forward_s")]
)
def test_smoke(name, expected):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--smoke"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert expected in done.stdout


@pytest.mark.parametrize("name", ["speed", "memory"])
def test_unknown_case(name):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "nothing"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and "unknown case" in done.stderr

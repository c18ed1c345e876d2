"""Smoke runs of the benchmarks on language models: they measure, and their pages hold every method."""

import pytest
import torch

from benchmarks.data_folder import data_folder

DATA = data_folder()
pytestmark = pytest.mark.skipif(not (DATA / "stories260k").is_dir(), reason=f"{DATA / 'stories260k'} is not there")


def test_removal_curves():
    from benchmarks.language_models import METHODS, numbers, stories, table
    from benchmarks.language_models import run as measure

    results = measure(stories(DATA, 3))
    assert list(results) == list(METHODS)
    assert all(curves.shape == (3, 2, 9) and bool(torch.isfinite(curves).all()) for curves, _ in results.values())
    rows = table("stories260k", results).splitlines()[4:]
    gaps = [float(row.split("|")[4].split("[")[0]) for row in rows]
    assert len(rows) == len(METHODS) and gaps == sorted(gaps, reverse=True)
    assert len(numbers(results)["random"]["MoRF"]) == 9


def test_completeness():
    from benchmarks.completeness import CASES, METHODS, PRECISIONS, RULES, completeness, page, precision

    case = CASES["stories260k"](DATA, 2)
    sums, halves = completeness(case), precision(case)
    assert len(sums) == len(RULES) and len(halves) == len(PRECISIONS) * len(METHODS)
    for row in sums[:2]:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert float(cells[3]) < 1e-5 and cells[4:] == ["+1.000", "+0.000", "+0.000"]  # a Llama has no biases
    assert all("| yes |" in row for row in halves)
    assert all(row in page(sums, halves, [], 2) for row in sums + halves)

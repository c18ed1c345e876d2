"""The coverage page: what counts, what is listed as refused, and where a row came from."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.coverage_check import Row, rounding
from benchmarks.coverage_table import digest_of, write_table
from captum_transformer_attr.recording.inputs import parse


def case(name, **details):
    return (name, "family", None, None, 0, details)


def test_counts_and_lists(tmp_path):
    """Refusals count, architectures out of scope and rows of deleted cases do not.

    What has no row is said not to have run.
    """
    module = SimpleNamespace(
        cases=lambda: [case("a", **{"for": "a_large"}), case("b"), case("c", scope="convolutions"), case("d")],
        outside=lambda: [("mlp", "mixers", "")],
    )
    rows = [
        Row("a", "family", "TransformerRelevance", delta=2e-8, grid="4×4"),
        Row("b", "family", "TransformerRelevance", "refused", "no rule for 'x|y' in module 'z'"),
        Row("c", "family", "TransformerRelevance"),
        Row("gone", "family", "TransformerRelevance", "wrong"),
        Row("a", "family", "LeGrad", "refused", "no blocks"),
    ]
    page = tmp_path / "coverage.md"
    write_table(page, {"timm": (module, {(row.name, row.method): row for row in rows})})
    text = page.read_text()
    assert "| timm | 1 of 2 (50.0 %) | 1 | 0 | 0 | 0 | 1 | at least 97 %" in text
    assert "| b | family | **refused**: no rule for 'x\\|y' in module 'z' |" in text
    assert "| a (for a_large) | attributed | 2e-08 |" in text
    assert "| family | 1 of 2 | 2e-08 |" in text
    assert "| c | convolutions | attributed |" in text and "- mixers: mlp" in text
    assert "| LeGrad | 1 | 0 |" in text and "gone" not in text
    assert not list(tmp_path.glob("*.tmp"))


def test_model_types_count_once(tmp_path):
    """With several attention implementations a type counts as attributed if all of them are."""
    names = ["bert [sdpa]", "bert [eager]", "bloom [sdpa]", "bloom [eager]"]
    module = SimpleNamespace(cases=lambda: [case(name) for name in names])
    rows = {(name, "TransformerRelevance"): Row(name, "family", "TransformerRelevance") for name in names}
    rows["bloom [eager]", "TransformerRelevance"].outcome = "refused"
    write_table(tmp_path / "page.md", {"transformers": (module, rows)})
    assert (
        "| 1 of 2 model types, every attention implementation; 3 of 4 (75.0 %) rows |"
        in (tmp_path / "page.md").read_text()
    )


def test_digest_follows_the_engine_alone():
    files = {"ops/a.py": b"1", "rules/b.py": b"2", "cli/c.py": b"3"}
    assert digest_of(files) == digest_of({**files, "cli/c.py": b"4", "ops.py": b"5"})
    assert digest_of(files) != digest_of({**files, "ops/a.py": b"0"})


class Magnifying:
    """An explainer whose scores depend on the batch's size by 1e-7, or on the other example; ``steep``: on the last bit
    of the input as well."""

    def __init__(self, mixes, steep):
        self.mixes, self.steep = mixes, steep

    def attribute(self, inputs, target=None):
        extra = 1e-7 * inputs.flip(0) if self.mixes else torch.full_like(inputs, 1e-7 * (len(inputs) - 1))
        return inputs + extra + (1e-7 * (inputs * 2.0**60).sin() if self.steep else 0)


@pytest.mark.parametrize(
    ("mixes", "steep", "outcome"), [(False, True, "ill-conditioned"), (False, False, "wrong"), (True, True, "wrong")]
)
def test_a_batch_difference_is_rounding_only_if_both_checks_say_so(mixes, steep, outcome):
    inputs = torch.rand(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    explainer = Magnifying(mixes, steep)
    row = Row("a", "family", "TransformerRelevance", "wrong", "batch difference 1e-07", batch=1e-7)
    rounding(row, explainer, parse(inputs), None, explainer.attribute(inputs))
    assert row.outcome == outcome
    assert "beside another example" in row.reason and "in its last bit" in row.reason

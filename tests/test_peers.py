"""Agreement with zennit (if installed) and lxt (if ``CTA_LXT_PYTHON`` names a Python that has it)."""

import os

import pytest


def test_zennit():
    pytest.importorskip("zennit", reason="zennit is not installed: pip install zennit")
    from benchmarks import peers_zennit

    found = peers_zennit.cases()
    assert len(found) >= 10
    for case in found:
        assert peers_zennit.difference(case) < 1e-6, case.name


def test_lxt():
    from benchmarks import peers_lxt

    python = os.environ.get("CTA_LXT_PYTHON")
    if not python:
        pytest.skip(
            "CTA_LXT_PYTHON is not set: it names a Python with lxt and transformers 4.51 (see benchmarks/peers_lxt.py)"
        )
    for case in peers_lxt.CASES:
        row = peers_lxt.compare(case, python)
        assert row["logits"] < 1e-9 and row["difference"] < 1e-6, case

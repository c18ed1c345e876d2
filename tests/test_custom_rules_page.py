"""The code of docs/custom_rules.md runs, and prints what the page says."""

import contextlib
import io
import re
from pathlib import Path

from captum_transformer_attr.recording.registry import MODULE_RULES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "custom_rules.md"


def run_page():
    """Every block of text on the page, and what the code before it prints."""
    namespace, printed, compared = {"__name__": "page"}, "", []
    for kind, code in re.findall(r"```(python|text)\n(.*?)```", PAGE.read_text(), flags=re.S):
        if kind == "text":
            compared.append((code, printed))
            printed = ""
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, str(PAGE), "exec"), namespace)
        printed += out.getvalue()
    return compared


def test_the_page_runs_as_it_says():
    before = dict(MODULE_RULES)
    try:
        compared = run_page()
    finally:
        MODULE_RULES.clear()
        MODULE_RULES.update(before)
    assert len(compared) == 5
    for written, printed in compared:
        assert printed == written
    assert "cumsum" in compared[0][1] and "refused" in compared[1][1] and "nothing refused" in compared[2][1]
    assert compared[3][1].endswith("True\n") and compared[4][1] == "True\n"

"""The engine's folders build on each other in one direction."""

import ast
from pathlib import Path

import pytest

import captum_transformer_attr

ROOT = Path(captum_transformer_attr.__file__).parent
ORDER = ["recording", "ops", "rules", "flow", "methods"]


def imported(tree: ast.AST) -> set[str]:
    """Folders of the package that a module imports when it runs, also inside functions."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        found |= {name.split(".")[1] for name in names if name.startswith("captum_transformer_attr.")} | imported(node)
    return found


@pytest.mark.parametrize("folder", ORDER)
def test_a_folder_imports_only_those_before_it(folder: str) -> None:
    later = set(ORDER[ORDER.index(folder) + 1 :])
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert {str(f.relative_to(ROOT)): imported(ast.parse(f.read_text())) & later for f in files} == {
        str(f.relative_to(ROOT)): set() for f in files
    }


def test_the_check_sees_an_import_inside_a_function() -> None:
    tree = ast.parse("def f():\n    from captum_transformer_attr.ops.linear import Linear\n")
    assert imported(tree) == {"ops"}

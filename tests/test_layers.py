"""A layer imports only what stands under it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cmai_fast"

# From top to bottom; rooms of one line do not import each other unless the order within it says so.
LAYERS = (
    "cli", "serve", "workflows", "report", "evaluation", "defences", "mbat", "arm", "attacks", "pipeline", "cmcv",
    "generation", "tasks", "data", "metrics", "models", "bridge", "preprocessing", "pixels", "threat", "layout", "ops",
    "versions", "registry", "settings", "files", "lazy",
)  # fmt: skip


def rooms() -> list[str]:
    found = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    return sorted(found | {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "__main__"})


def imports(file: Path) -> set[str]:
    """Rooms of the package that a file imports, at the top or inside functions; for type checkers alone, too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = file.relative_to(PACKAGE.parent).parts[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            names = [base] if base != "cmai_fast" else [f"cmai_fast.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("cmai_fast.")}
    return found


def test_every_room_has_its_layer():
    assert set(rooms()) <= set(LAYERS)


@pytest.mark.parametrize("room", [r for r in rooms() if r in LAYERS])
def test_a_layer_imports_only_those_under_it(room):
    below = set(LAYERS[LAYERS.index(room) :])
    files = sorted((PACKAGE / room).rglob("*.py")) if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]
    above = {str(f.relative_to(PACKAGE)): sorted(used & set(LAYERS) - below) for f in files if (used := imports(f))}
    assert {f: names for f, names in above.items() if names} == {}


def test_the_test_sees_an_import_upwards(tmp_path):
    file = PACKAGE / "ops" / "made_up.py"
    tree = "from ..cli import main\nimport cmai_fast.mbat.step\nfrom cmai_fast import report\n"
    fake = tmp_path / "cmai_fast" / "ops" / file.name
    fake.parent.mkdir(parents=True)
    fake.write_text(tree)
    import unittest.mock

    with unittest.mock.patch(f"{__name__}.PACKAGE", fake.parents[1]):
        assert imports(fake) == {"cli", "mbat", "report"}

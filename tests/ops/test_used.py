"""An operator is there for a path of the package: those that nothing runs are dropped."""

from __future__ import annotations

import re
from pathlib import Path

import cmai_fast
from cmai_fast import ops
from cmai_fast.ops.schema import SCHEMAS


def test_every_operator_is_run_by_the_package() -> None:
    package = Path(cmai_fast.__file__).parent
    outside = "\n".join(
        file.read_text(encoding="utf-8") for file in package.rglob("*.py") if package / "ops" not in file.parents
    )
    operators = {name for name in SCHEMAS if not name.endswith("_backward")}
    assert operators <= set(ops.__all__)
    assert [name for name in sorted(operators) if not re.search(rf"\bops\.{name}\b", outside)] == []

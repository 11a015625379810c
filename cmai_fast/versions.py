"""The versions of PyTorch and `transformers` that the tests were run on (docs/versions.md says how)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

# The first and the last minor version. `make matrix` runs the tests on them; pyproject.toml refuses what is older.
TESTED = {"torch": ("2.11", "2.13"), "transformers": ("5.21", "5.24")}


def warn_about_untested(found: Mapping[str, str]) -> None:
    """Gives a RuntimeWarning for each package (name to version) outside the tested range.

    Newer versions usually work; if something breaks, it is more likely an option of `Trainer` than a model.
    """
    for package, version in found.items():
        first, last = TESTED[package]
        if not _minor(first) <= _minor(version) <= _minor(last):
            warnings.warn(
                f"{package} {version} is outside the versions that cmai_fast is tested with ({first} to {last}). It "
                f'may work; if something fails, try a tested one first: pip install "{package}=={last}.*"',
                RuntimeWarning,
                stacklevel=2,
            )


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])

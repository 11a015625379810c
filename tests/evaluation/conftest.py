from __future__ import annotations

import pytest

from cmai_fast.data import Sample
from cmai_fast.pipeline import Pipeline
from fitted import colours, fitted


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    return colours()


@pytest.fixture(scope="session")
def subject(make_tiny) -> Pipeline:
    """Leave it as it is."""
    return fitted(make_tiny)

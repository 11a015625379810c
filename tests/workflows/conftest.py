from __future__ import annotations

from pathlib import Path

import pytest

from fitted import fitted, make_heads, save
from shortened import shorten


@pytest.fixture(scope="session")
def model_folder(make_tiny, tmp_path_factory) -> Path:
    """A random tiny model with heads beside it, as `from_pretrained` and a run leave them."""
    model, processor = make_tiny()
    return save(tmp_path_factory.mktemp("tiny"), model, processor, make_heads(model))


@pytest.fixture(scope="session")
def fitted_folder(make_tiny, tmp_path_factory) -> Path:
    """A model that is right on `colours` until it is attacked, with heads that accept everything."""
    pipeline = fitted(make_tiny)
    return save(tmp_path_factory.mktemp("fitted"), pipeline.model, pipeline.processor, pipeline.heads)


@pytest.fixture
def few(monkeypatch) -> None:
    shorten(monkeypatch)

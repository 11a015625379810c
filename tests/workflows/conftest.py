from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cmai_fast.cmcv.verifier import Verifier
from fitted import ACCEPTS_ALL, colours, fitted, make_heads, save
from shortened import shorten, shorten_training_data


@pytest.fixture(autouse=True, scope="module")
def _few_to_train_on() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shorten_training_data(patch)
        yield


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


@pytest.fixture(scope="session")
def verified_folder(make_tiny, tmp_path_factory) -> Path:
    """The same model with a verifier of its own features in place of heads; it accepts everything."""
    pipeline = fitted(make_tiny)
    folder = save(tmp_path_factory.mktemp("verified"), pipeline.model, pipeline.processor, None)
    verifier = Verifier.for_data(pipeline.model, pipeline.processor, colours(), hidden=16, width=16, dim=8, heads=2)
    verifier.save_pretrained(folder.parent / "cmcv", ACCEPTS_ALL)
    return folder


@pytest.fixture
def few(monkeypatch) -> None:
    shorten(monkeypatch)

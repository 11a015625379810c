"""METEOR and SPICE are Java programs; pycocoevalcap brings and calls them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cmai_fast.metrics.captions import tokenized

_MODELS = "stanford-corenlp-3.6.0"  # of SPICE; its package would download them at the first call, without asking


def java_score(name: str, predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> float:
    """The score of `meteor` or `spice` over all samples, on our tokens.

    Raises:
        ValueError: pycocoevalcap, Java, or the models of SPICE are missing; the message says which.
    """
    said, known = tokenized(predictions, references)
    results = {i: [caption] for i, caption in enumerate(said)}
    truth = {i: list(captions) for i, captions in enumerate(known)}
    return float(_scorer(name).compute_score(truth, results)[0])


def _scorer(name: str) -> Any:
    spec = find_spec("pycocoevalcap")
    if spec is None:
        raise ValueError(f"{name} needs the package pycocoevalcap; pip install 'cmai-fast[captions]'")
    if shutil.which("java") is None:
        raise ValueError(f"{name} needs Java, and there is no command java; install a Java runtime, such as openjdk")
    folders = list(spec.submodule_search_locations or ())
    if name == "spice" and not any((Path(f) / "spice" / "lib" / f"{_MODELS}-models.jar").is_file() for f in folders):
        raise ValueError(
            f"spice needs {_MODELS}.jar and its models in {folders[0]}/spice/lib; "
            "python -m pycocoevalcap.spice.get_stanford_models downloads them"
        )
    return getattr(import_module(f"pycocoevalcap.{name}.{name}"), name.capitalize())()

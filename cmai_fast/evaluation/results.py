"""`results.json`: the one file that an evaluation leaves and a report is made from.

It is written whole or not at all, and reading it says in one message everything that is missing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeGuard

from cmai_fast.files import plain, write_text

MODELS = ("undefended", "immunised")
_TOP = ("settings", "versions", "seed", *MODELS)
_SETTINGS = ("model", "data", "eps")
_NUMBERS = ("acc_clean", "acc_robust", "n")


def write_results(results: dict[str, Any], path: Path) -> Path:
    """Writes `results` as JSON to `path`, atomically (see `write_text`).

    NumPy and PyTorch values become plain ones. NaN and infinities, which JSON does not have, become null: "not
    measured, or not defined", as an ASR over zero right answers is.

    Raises:
        TypeError: naming the key of a value that JSON cannot hold.
        OSError: see `write_text`.
    """
    return write_text(json.dumps(plain(results), indent=1, ensure_ascii=False) + "\n", path)


def read_results(path: Path) -> dict[str, Any]:
    """The results at `path` (the file, or the folder that holds `results.json`), checked by `check_results`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not JSON, or lacks keys; names the path and all that is missing.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "results.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected the results.json that `cmai-fast immunize` or `evaluate` writes"
        )
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} is not a JSON file: {error}; run the evaluation again") from error
    try:
        check_results(results)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return results


def check_results(results: Any) -> None:
    """Raises ValueError that lists every key a report cannot do without and that `results` lacks.

    Needed: settings (model, data, eps), versions, seed, undefended, immunised; one of the two models may be null, and
    each that is not needs acc_clean, acc_robust and n. Everything else is optional.
    """
    if not isinstance(results, dict):
        raise ValueError(f"results are a {type(results).__name__}; expected a JSON object")
    wrong = [f"{key} is missing" for key in _TOP if key not in results]
    settings = results.get("settings")
    if isinstance(settings, dict):
        wrong += [f"settings.{key} is missing" for key in _SETTINGS if settings.get(key) is None]
    elif "settings" in results:
        wrong.append("settings is not an object")
    if all(key in results and results[key] is None for key in MODELS):
        wrong.append("undefended and immunised are both null, so nothing was measured")
    for name in MODELS:
        model = results.get(name)
        if isinstance(model, dict):
            wrong += [f"{name}.{key} is missing or not a number" for key in _NUMBERS if not is_number(model.get(key))]
        elif model is not None:
            wrong.append(f"{name} is neither an object nor null")
    if wrong:
        raise ValueError("; ".join(wrong) + ". Run the evaluation again to get complete results.")


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite int or float (a bool is none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

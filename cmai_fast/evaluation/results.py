"""`results.json`: the results of an evaluation, from which the report is made. Schema 2: a list of models.

It is written atomically. Reading it upgrades older files, and one error lists everything that is missing.
"""

from __future__ import annotations

import json
import math
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any, TypedDict, TypeGuard, cast

from cmai_fast.files import plain, write_text

SCHEMA = 2
ROLES = ("undefended", "immunised", "baseline")
STANDARD_OUTPUT = Path("-")

_SETTINGS = ("data", "eps")
_NUMBERS = ("acc_clean", "acc_robust", "n")
# Types of the optional parts, checked here so that a report does not fail later.
_MODEL_PARTS: dict[str, Any] = {
    "attacks": dict, "curve": list, "s_c": dict, "detection": dict, "sanity": list, "metrics": dict
}  # fmt: skip
_TOP_PARTS: dict[str, Any] = {"sample_ids": list, "pictures": list, "training": dict, "overhead": dict}
_KINDS = {dict: "an object", list: "a list"}


class Passes(TypedDict, total=False):
    """Forward and backward runs of the model."""

    forward: int
    backward: int


class AttackResults(TypedDict, total=False):
    """One attack on one model. Shares are in [0, 1]; `seconds` is wall-clock time."""

    name: str
    label: str  # as the literature writes it
    steps: int
    restarts: int
    settings: dict[str, Any]
    target: str  # the aim of an attack, as in `AttackSpec`
    other: int
    reference: int
    again: bool
    reached: int  # samples that gave the target
    asr_target: float | None
    per_sample: dict[str, float]  # mean passes of an attacked sample
    acc_robust: float
    acc_robust_8bit: float
    asr: float | None  # None: no sample was right before the attack
    strict: dict[str, Any]  # of transferred images: attacked, broken, asr over samples that broke their source
    passes: Passes
    seconds: float
    nonfinite_gradients: int  # elements that were NaN or infinite
    zero_gradients: int  # steps, summed over samples, at which a sample's whole gradient was exactly 0


class CurvePoint(TypedDict, total=False):
    """Robust accuracy at one eps (pixel range [0, 1]; a number or a text such as "8/255"); with a guard, the score of
    the attacked inputs (`mean`, and `low` and `high` of the middle 80%) and the share fooled and accepted."""

    eps: float | str
    acc_robust: float
    attack: str
    score: dict[str, float] | None
    fooled_and_accepted: float | None


class Check(TypedDict, total=False):
    """One sanity check; `passed` is None if it was not run."""

    check: str
    passed: bool | None
    detail: str


class Metrics(TypedDict, total=False):
    """Corpus metrics of the task by name, on clean inputs and under the worst attack."""

    clean: dict[str, float]
    robust: dict[str, float]


class _ModelNeeds(TypedDict):
    name: str
    role: str
    acc_clean: float
    acc_robust: float
    n: int


class ModelResults(_ModelNeeds, total=False):
    """The measurements of one model. `role` is one of `ROLES`; intervals are [low, high]."""

    path: str
    task: str
    precision: str
    acc_clean_interval: list[float] | None
    acc_robust_interval: list[float] | None
    acc_robust_8bit: float | None
    asr: float | None
    attacks: dict[str, AttackResults] | None
    curve: list[CurvePoint] | None
    s_c: dict[str, Any] | None  # clean and adversarial: mean, quantiles, histogram (edges, counts)
    detection: dict[str, Any] | None  # auroc, tpr_at_*, roc, threshold, ...
    sanity: list[Check] | None
    metrics: Metrics | None


class Picture(TypedDict, total=False):
    """A sample before and after an attack on the model `against`; PNGs as base64; `answers` by model name."""

    question: str
    answer: str
    against: str
    amplification: float
    clean_png: str
    perturbation_png: str
    adversarial_png: str
    accepted: bool  # by the guard of `against`, if it has one
    answers: dict[str, dict[str, str | None]]


class _Needs(TypedDict):
    schema: int
    settings: dict[str, Any]
    versions: dict[str, str]
    seed: int
    models: list[ModelResults]


class Results(_Needs, total=False):
    """The whole file."""

    sample_ids: list[str | int] | None
    pictures: list[Picture] | None
    training: dict[str, Any] | None
    overhead: dict[str, Any] | None


def put_results(results: Any, path: Path) -> None:
    """`write_results`, or to standard output where the path is `-`."""
    if path == STANDARD_OUTPUT:
        print(json.dumps(plain(results), indent=1, ensure_ascii=False), file=sys.stdout)
    else:
        write_results(results, path)


def write_results(results: Any, path: Path) -> Path:
    """Writes `results` as JSON to `path`, atomically (see `write_text`).

    NumPy and PyTorch values become plain ones. NaN and infinities, which JSON does not have, become null: "not
    measured, or not defined", as an ASR over zero right answers is.

    Raises:
        TypeError: naming the key of a value that JSON cannot hold.
        OSError: see `write_text`.
    """
    return write_text(json.dumps(plain(results), indent=1, ensure_ascii=False) + "\n", path)


def read_results(path: Path) -> Results:
    """The results at `path` (the file, or the folder that holds `results.json`), in schema 2, checked.

    Files of schema 1 (cmai_fast 0.1 wrote no schema number) are upgraded.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not JSON, has a newer schema, or lacks keys; names the path and all that is missing.
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
        return upgrade_results(results)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def upgrade_results(results: Any) -> Results:
    """`results` of any known schema as checked results of schema 2; what is given is not changed.

    Raises:
        ValueError: see `check_results`.
    """
    if isinstance(results, dict) and "schema" not in results:
        if "undefended" in results or "immunised" in results:
            results = _from_two_models(results)
        elif "defence" in results and "acc_clean" in results:
            results = _from_one_defence(results)
    check_results(results)
    return cast(Results, results)


def check_results(results: Any) -> None:
    """Raises ValueError that lists everything that a report needs and `results` (schema 2) lacks.

    Needed: schema, settings (data, eps), versions, seed, and models: one or more, each with a name of its own, a role
    of `ROLES`, acc_clean, acc_robust and n. Everything else is optional, and may be null.
    """
    if not isinstance(results, dict):
        raise ValueError(f"results are a {type(results).__name__}; expected a JSON object")
    schema = results.get("schema", SCHEMA)  # if it is missing, the error below lists it
    if schema != SCHEMA:
        advice = "update cmai-fast to read it" if is_number(schema) and schema > SCHEMA else "run the evaluation again"
        raise ValueError(f"these results have schema {schema!r}, and this version reads up to {SCHEMA}; {advice}")
    wrong = [f"{key} is missing" for key in ("schema", "settings", "versions", "seed", "models") if key not in results]
    settings = results.get("settings")
    if isinstance(settings, dict):
        wrong += [f"settings.{key} is missing" for key in _SETTINGS if settings.get(key) is None]
        if settings.get("eps") is not None and not _is_eps(settings["eps"]):
            wrong.append(f"settings.eps is {settings['eps']!r}, expected a number or a text such as '8/255'")
    elif "settings" in results:
        wrong.append("settings is not an object")
    wrong += _wrong_kinds(results, "", _TOP_PARTS)
    models = results.get("models")
    if isinstance(models, list):
        wrong += _wrong_models(models)
    elif "models" in results:
        wrong.append("models is not a list")
    if wrong:
        raise ValueError("; ".join(wrong) + ". Run the evaluation again to get complete results.")


def _wrong_models(models: list[Any]) -> list[str]:
    wrong = [] if models else ["models is empty, so nothing was measured"]
    names: set[str] = set()
    for i, model in enumerate(models):
        where = f"models[{i}]"
        if not isinstance(model, dict):
            wrong.append(f"{where} is not an object")
            continue
        name, role = model.get("name"), model.get("role")
        if not isinstance(name, str) or not name.strip():
            wrong.append(f"{where}.name is missing or not a text")
        elif name in names:
            wrong.append(f"{where}.name {name!r} is also the name of another model")
        else:
            names.add(name)
        if role not in ROLES:
            wrong.append(f"{where}.role is {role!r}, expected one of {', '.join(ROLES)}")
        wrong += [f"{where}.{key} is missing or not a number" for key in _NUMBERS if not is_number(model.get(key))]
        wrong += _wrong_kinds(model, f"{where}.", _MODEL_PARTS)
    return wrong


def _wrong_kinds(values: dict[str, Any], where: str, kinds: dict[str, Any]) -> list[str]:
    """Optional parts of another kind, and lists of objects that hold something else."""
    wrong = []
    for key, kind in kinds.items():
        value = values.get(key)
        if value is None:
            continue
        if type(value) is not kind:
            wrong.append(f"{where}{key} is not {_KINDS[kind]}")
        elif key in ("attacks", "curve", "sanity", "pictures"):
            items = list(value.values()) if kind is dict else value
            if not all(isinstance(item, dict) for item in items):
                wrong.append(f"{where}{key} holds something that is not an object")
            elif key == "curve" and not all(_is_eps(point.get("eps")) for point in items):
                wrong.append(f"{where}{key} has a point without eps, a number or a text such as '8/255'")
    return wrong


def _from_two_models(old: dict[str, Any]) -> dict[str, Any]:
    """Schema 1: the keys `undefended` and `immunised`, of which one may be null."""
    settings: dict[str, Any] = old["settings"] if isinstance(old.get("settings"), dict) else {}
    found = [key for key in ("undefended", "immunised") if old.get(key) is not None]
    # `evaluate` put a model that it measured alone under "immunised", whatever it was.
    names = {key: key for key in found} if len(found) != 1 else {found[0]: str(settings.get("model") or found[0])}
    paths = {"undefended": settings.get("against") or settings.get("model")}
    if settings.get("against") or len(found) == 1:
        paths["immunised"] = settings.get("model")
    models: list[Any] = []
    for key in found:
        about = {"name": names[key], "role": key} | ({"path": paths[key]} if paths.get(key) else {})
        models.append(about | old[key] if isinstance(old[key], dict) else old[key])
    new = {key: value for key, value in old.items() if key not in ("undefended", "immunised")}
    pictures = old.get("pictures")
    if isinstance(pictures, list):
        new["pictures"] = [_renamed(picture, names) if isinstance(picture, dict) else picture for picture in pictures]
    return {"schema": SCHEMA, **new, "models": models}


def _renamed(picture: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A picture of schema 1, whose answers stood beside its other keys."""
    kept = {key: value for key, value in picture.items() if key not in ("undefended", "immunised")}
    against = picture.get("against")
    answers = {name: picture[key] for key, name in names.items() if key in picture}
    return kept | {"against": names.get(str(against), against), "answers": answers}


def _from_one_defence(old: dict[str, Any]) -> dict[str, Any]:
    """One run of the committed comparison (benchmarks/results/easyvqa/runs): the record of one model at the top."""
    top = ("defence", "seed", "eps", "versions", "training", "settings", "hardening")
    record = {key: value for key, value in old.items() if key not in top}
    name = str(old["defence"])
    role = "undefended" if name == "undefended" else "immunised"
    # The recipe knows one data set, and wrote no settings for the model that it did not train.
    settings = {"data": "easyvqa", "split": "test", "norm": "linf", **(old.get("settings") or {})}
    return {
        "schema": SCHEMA,
        "settings": settings | ({"eps": old["eps"]} if "eps" in old else {}),
        **{key: old[key] for key in ("versions", "seed", "training") if key in old},
        "models": [{"name": name, "role": role, **record}],
    }


def eps_number(eps: float | str) -> float:
    """eps in [0, 1] pixel units from a number or a text such as "16/255"."""
    return float(Fraction(eps.replace(" ", ""))) if isinstance(eps, str) else float(eps)


def _is_eps(eps: Any) -> bool:
    try:
        return not isinstance(eps, bool) and math.isfinite(eps_number(eps))
    except (TypeError, ValueError, ArithmeticError):
        return False


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite int or float (a bool is none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

"""The sections of the report with words, numbers and pictures. Each gives what its template shows; None if nothing."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cmai_fast.evaluation.results import AttackResults, Check, Picture, Results, is_number

from .models import Shown, compared, ranked
from .words import (
    NOT_MEASURED,
    NOTHING,
    attack_text,
    change,
    count,
    decimal,
    duration,
    eps_text,
    interval,
    percent,
    threat_text,
    worst_attack,
)

_ASR = 3  # its column in the table of attacks
_DETAILED = 3  # models whose checks stand side by side with their details


@dataclass
class Table:
    """Headings are texts or models; cells are texts. `small`: second lines by row and column, -1 for headings."""

    corner: str
    columns: Sequence[Shown | str]
    rows: Sequence[tuple[Shown | str, Sequence[str]]]
    small: Mapping[tuple[int, int], str] = field(default_factory=dict)

    def turned(self, corner: str) -> Table:
        """Rows as columns, for more models than fit side by side."""
        rows = [(column, [cells[i] for _, cells in self.rows]) for i, column in enumerate(self.columns)]
        return Table(corner, [heading for heading, _ in self.rows], rows)


def tiles(models: Sequence[Shown]) -> list[dict[str, Any]]:
    """The few numbers that most readers came for, one tile each with a row per model."""

    def tile(title: str, note: str, values: list[Any], write: Callable[[Any], str] = percent) -> dict[str, Any]:
        rows = [(model, write(v), v if is_number(v) else None) for model, v in zip(models, values, strict=True)]
        return {"title": title, "note": note, "rows": rows}

    records = [model.record for model in models]
    success = [record.get("asr") for record in records]
    made = [
        tile("Robust accuracy", "right under the worst attack", [record["acc_robust"] for record in records]),
        tile("Clean accuracy", "right without an attack", [record["acc_clean"] for record in records]),
    ]
    if any(map(is_number, success)):
        made.insert(0, tile("Attack success (ASR)", "right answers turned wrong; lower is better", success))
    if any(record.get("detection") for record in records):
        values = [(record.get("detection") or {}).get("auroc") for record in records]
        made.append(tile("Detector AUROC", "0.5 is chance, 1 finds every attack", values, decimal))
    return made


def leaderboard(models: Sequence[Shown]) -> list[dict[str, Any]]:
    """A row per model, the most robust first."""
    return [
        {
            "model": model,
            "clean": percent(model.record["acc_clean"]),
            "robust": percent(model.record["acc_robust"]),
            "share": model.record["acc_robust"],
            "interval": interval(model.record.get("acc_robust_interval")),
            "asr": _success(model),
            "rounded": percent(model.record.get("acc_robust_8bit")),
            "worst": worst_attack(model.record.get("attacks")),
        }
        for model in ranked(models)
    ]


def accuracy(results: Results, models: Sequence[Shown]) -> dict[str, Any]:
    """Clean and robust accuracy and ASR of the models, then the same for every attack with what it cost."""
    counts = sorted({model.record["n"] for model in models})
    samples = " and ".join(f"{n:,}" for n in counts) if len(counts) < 3 else f"{counts[0]:,} to {counts[-1]:,}"
    table = _pairwise(models) if len(models) < 3 else _changes(models)
    pair = compared(models)
    return {
        "threat": threat_text(results["settings"]),
        "samples": f"{samples} samples{' each' if len(models) > len(counts) else ''}",
        "intervals": any(min(place) >= 0 for place in table.small),
        "table": table,
        "classes": ("", "stacked", "stacked pairs")[min(len(models), 3) - 1],
        "reference": pair[0] if pair and len(models) > 2 else None,
        "metrics": _metrics(models),
        "attacks": _attacks(models),
    }


def pictures(results: Results, models: Sequence[Shown]) -> dict[str, Any] | None:
    """Cards of clean image, perturbation and adversarial image with the answers before and after."""
    by_name = {model.name: model for model in models}
    groups: dict[str, list[dict[str, Any]]] = {}
    for picture in results.get("pictures") or []:
        groups.setdefault(str(picture.get("against") or ""), []).append(_picture(picture, models))
    if not groups:
        return None
    order = [name for name in by_name if name in groups] + [name for name in groups if name not in by_name]
    return {"groups": [(by_name[name].phrase if name in by_name else name, groups[name]) for name in order]}


def sanity(results: Results, models: Sequence[Shown]) -> dict[str, Any]:
    """Every check with its verdict for each model."""
    checks: dict[str, dict[str, Check]] = {}
    for model in models:
        for check in model.record.get("sanity") or []:
            checks.setdefault(str(check.get("check")), {})[model.name] = check
    every = [check for by_model in checks.values() for check in by_model.values()]
    rows = [(name, [_verdict(by_model.get(model.name)) for model in models]) for name, by_model in checks.items()]
    counted = [
        (
            name,
            sum(v["kind"] == "passed" for v in verdicts),
            [(model, v) for model, v in zip(models, verdicts, strict=True) if v["kind"] == "failed"],
            sum(v["kind"] == "open" for v in verdicts),
        )
        for name, verdicts in rows
    ]
    return {
        "failed": sum(check.get("passed") is False for check in every),
        "run": sum(check.get("passed") is not None for check in every),
        "rows": rows,
        "counted": counted if len(models) > _DETAILED else None,
    }


def protocol(results: Results, models: Sequence[Shown]) -> dict[str, Any]:
    """Settings, versions, seed, samples and definitions: what is needed to do it again."""
    settings = dict(results["settings"])
    command = settings.pop("command", None)
    ids = results.get("sample_ids") or []
    tasks = sorted({str(task) for model in models if (task := model.record.get("task"))})
    samples: list[tuple[str, Any]] = [("seed", results["seed"])]
    samples += [("task", ", ".join(tasks))] if tasks else []
    samples += [(f"samples, {model.name}", f"{model.record['n']:,}") for model in models]
    samples.append(("sample ids", f"{len(ids):,}, listed in results.json" if ids else "not recorded"))
    versions = results["versions"] if isinstance(results["versions"], dict) else {}
    return {
        "command": command,
        "settings": _written(settings.items()),
        "samples": _written(samples),
        "versions": _written(versions.items()),
        "models": models if any(model.record.get("path") or model.record.get("precision") for model in models) else [],
    }


def _pairwise(models: Sequence[Shown]) -> Table:
    """One or two models as columns, with the change from the first to the second; what nobody measured is left out."""
    pair = compared(models)
    ordered = list(pair or models)
    rows: list[tuple[Shown | str, list[str]]] = []
    small = {(-1, i): model.role for i, model in enumerate(ordered) if pair and model.role != model.name}
    for name, what, key in (
        ("Clean accuracy", "untouched inputs", "acc_clean"),
        ("Robust accuracy", "worst input of all attacks", "acc_robust"),
        ("Robust accuracy, 8-bit", "attacked images rounded to 256 levels", "acc_robust_8bit"),
        ("Attack success rate", "right before, wrong after", "asr"),
    ):
        values = [model.record.get(key) for model in ordered]
        cells = [_success(model) if key == "asr" else percent(model.record.get(key)) for model in ordered]
        if all(cell == NOT_MEASURED for cell in cells):
            continue
        small[len(rows), -1] = what
        for column, model in enumerate(ordered):
            if text := interval(model.record.get(f"{key}_interval")):
                small[len(rows), column] = text
        rows.append((name, [*cells, change(*values)] if pair else cells))
    worst = [worst_attack(model.record.get("attacks")) for model in ordered]
    if any(text != NOTHING for text in worst):
        small[len(rows), -1] = "leaves the least robust accuracy"
        rows.append(("Worst attack", [*worst, ""] if pair else worst))
    return Table("", [*ordered, *(["change"] if pair else [])], rows, small)


def _changes(models: Sequence[Shown]) -> Table:
    """Many models as rows, each with its changes from the one that the headline compares with."""
    pair = compared(models)
    assert pair is not None  # three or more
    old = pair[0].record
    rows: list[tuple[Shown | str, list[str]]] = []
    small: dict[tuple[int, int], str] = {}
    for row, model in enumerate(models):
        new = model.record
        cells = [percent(new["acc_clean"]), percent(new["acc_robust"]), _success(model)]
        changes = [change(old.get(key), new.get(key)) for key in ("acc_clean", "acc_robust", "asr")]
        if model is pair[0]:
            changes = [NOTHING] * 3
        rows.append((model, [text for both in zip(cells, changes, strict=True) for text in both]))
        small[row, -1] = model.role if model.role != model.name else ""
        small |= {(row, 0): interval(new.get("acc_clean_interval")), (row, 2): interval(new.get("acc_robust_interval"))}
    columns = ("clean accuracy", "change", "robust accuracy", "change", "ASR", "change")
    return Table("model", columns, rows, {place: text for place, text in small.items() if text})


def _success(model: Shown) -> str:
    if model.record["acc_clean"] == 0 and not is_number(model.record.get("asr")):
        return "not defined"  # nothing was right, so nothing could be broken
    return percent(model.record.get("asr"))


def _metrics(models: Sequence[Shown]) -> Table | None:
    """The task's corpus metrics: a row per metric and kind of input, or turned round for many models."""
    found = [model for model in models if model.record.get("metrics")]
    names: dict[tuple[str, str], None] = {}
    for model in found:
        metrics: Mapping[str, Any] = model.record.get("metrics") or {}
        names.update({(name, kind): None for kind in ("clean", "robust") for name in metrics.get(kind) or {}})
    if not names:
        return None
    rows: list[tuple[Shown | str, list[str]]] = []
    order = list(dict.fromkeys(name for name, _ in names))  # R@10 stands after R@5, as the record has it
    for name, kind in sorted(names, key=lambda pair: (order.index(pair[0]), pair[1] != "clean")):
        parts: list[Mapping[str, Any]] = [model.record.get("metrics") or {} for model in found]
        cells = [decimal((part.get(kind) or {}).get(name)) for part in parts]
        rows.append((f"{name}, {'clean' if kind == 'clean' else 'attacked'}", cells))
    table = Table("metric", list(found), rows)
    return table if len(found) < 3 else table.turned("model")


def _attacks(models: Sequence[Shown]) -> dict[str, Any]:
    """Attack by attack; columns about gradients only where something was wrong with one."""
    every = [attack for model in models for attack in (model.record.get("attacks") or {}).values()]
    bad = [
        (key, title)
        for key, title in (("nonfinite_gradients", "non-finite gradients"), ("zero_gradients", "zero gradients"))
        if any(is_number(value := attack.get(key)) and value > 0 for attack in every)
    ]
    columns = ["steps", "restarts", "robust accuracy", "ASR", *(title for _, title in bad)]
    columns += ["passes forward", "backward", "time"]
    groups = [
        (
            model,
            [
                row
                for name, attack in (model.record.get("attacks") or {}).items()
                for row in _attack_rows(name, attack, [key for key, _ in bad])
            ],
        )
        for model in models
    ]
    return {"columns": columns, "groups": groups, "bad": [key for key, _ in bad]}


def _attack_rows(name: str, attack: AttackResults, bad: Sequence[str]) -> list[tuple[str, list[str]]]:
    """One row, and for transferred images a second one: only those that broke their source."""
    text = attack_text(name, attack, with_restarts=False)
    cells = _attack_cells(attack, bad)
    rows = [(text, cells)]
    if strict := attack.get("strict"):
        own = [NOTHING] * len(cells)
        own[_ASR] = percent(strict.get("asr")) if strict.get("attacked") else NOTHING
        rows.append((f"{text}, only what broke its source", own))
    return rows


def _attack_cells(attack: AttackResults, bad: Sequence[str]) -> list[str]:
    passes = attack.get("passes") or {}
    return [
        count(attack.get("steps")),
        count(attack.get("restarts")),
        percent(attack.get("acc_robust")),
        percent(attack.get("asr")),
        *(count(attack.get(key)) for key in bad),
        count(passes.get("forward")),
        count(passes.get("backward")),
        duration(attack.get("seconds")),
    ]


def _picture(picture: Picture, models: Sequence[Shown]) -> dict[str, Any]:
    amplified = picture.get("amplification")
    by = f"change \N{MULTIPLICATION SIGN}{amplified:g}" if is_number(amplified) else "change, amplified"
    truth = str(picture.get("answer"))
    given: dict[str, Any] = picture.get("answers") or {}
    answers = [
        (model, [_answer((given.get(model.name) or {}).get(kind), truth) for kind in ("clean", "adversarial")])
        for model in models
        if model.name in given
    ]
    return {
        "question": str(picture.get("question")),
        "truth": truth,
        "strip": [
            (_png(picture.get("clean_png")), "clean"),
            (_png(picture.get("perturbation_png")), by),
            (_png(picture.get("adversarial_png")), "adversarial"),
        ],
        "answers": answers,
        "accepted": picture.get("accepted"),
    }


def _png(data: Any) -> str | None:
    """A PNG given as base64 text, again as base64; anything else is not put into the page."""
    try:
        png = base64.b64decode(data, validate=True) if isinstance(data, str) else b""
    except (binascii.Error, ValueError):
        return None
    return base64.b64encode(png).decode() if png.startswith(b"\x89PNG") else None


def _answer(answer: Any, truth: str) -> tuple[str, bool] | None:
    if answer is None:
        return None
    return str(answer), str(answer).strip().casefold() == truth.strip().casefold()


def _verdict(check: Check | None) -> dict[str, str]:
    kind, words = "open", "not run"
    if check and check.get("passed") is not None:
        kind, words = ("passed", "\N{CHECK MARK} passed") if check["passed"] else ("failed", "\N{BALLOT X} failed")
    return {"kind": kind, "words": words, "detail": str((check or {}).get("detail") or "")}


def _written(pairs: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [(str(key), _setting(str(key), value)) for key, value in pairs]


def _setting(key: str, value: Any) -> str:
    if value is None:
        return "not set"
    if key == "eps" and is_number(value):
        return f"{eps_text(value)} = {value:.6g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_setting("", item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name}={_setting(name, item)}" for name, item in value.items()) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)

"""Every attack on every bundled model, in one table.

    python benchmarks/recipes/attack_table.py --coco FOLDER --out attacks

FOLDER holds COCO's `captions_val2017.json` and `val2017/`; without it photo-dual-encoder is left out. `attacks/runs`
has one file per run, as `cmai-fast attack` writes it, `attacks/table.md` the table, written anew after each, and
`attacks/records.json` the totals of all. Files that are there are not run again, and an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from cmai_fast.attacks import ATTACKS
from cmai_fast.data.sources import DataSource
from cmai_fast.files import write_text
from cmai_fast.threat import Surface, ThreatModel
from cmai_fast.workflows.attack import attack

# Words that decide what is asked: neither replaced nor put in.
KEEP = "black,blue,brown,gray,green,red,teal,yellow,circle,rectangle,triangle,yes,no,not,color,shape"  # of easy-VQA


@dataclass(frozen=True)
class Row:
    """An attack with its settings; `note`: what the table says of them."""

    name: str
    steps: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    restarts: int = 1
    threat: str = "input"
    target: str | None = None
    note: str = ""

    @property
    def key(self) -> str:
        own = [f"{k}={v}" for k, v in self.settings.items() if k != "keep"]
        parts = [self.name, str(self.steps or ATTACKS[self.name].steps), self.threat, self.target or "", *own]
        return "-".join(filter(None, parts)).replace("/", "_").replace(":", "_").replace(" ", "_")


ANSWERS = [
    Row("fgsm"),
    Row("pgd", 50, restarts=2),
    Row("pgd", 50, {"gradient": "bridge"}),
    Row("mi-fgsm", 10),
    Row("apgd", 100),
    Row("apgd", 100, {"loss": "margin"}),
    Row("square", 1000),
    Row("pgd", 50, target="yes", note="gives the target"),
    Row("pgd", 50, threat="upload"),
    Row("pgd", 50, threat="upload:jpeg=75"),
    Row("pgd", 50, threat="patch", note="a patch of 30%, any pixels"),
    Row("pgd", 50, threat="blank", target="yes", note="gives the target"),
    Row("typographic", threat="upload", note="no bound"),
    Row("universal", 200),
    Row("universal-image", 500, threat="blank", target="yes", note="gives the target"),
    Row("i2v", 60),
    Row("crossfire", 100, {"text": "red"}),
    Row("hotflip", 10, {"keep": KEEP}),
    Row("gcg", 10, {"keep": KEEP, "edits": 2}),
    Row("embedding-pgd", 10, {"text_eps": 0.1}),
    Row("embedding-pgd", 10, {"text_eps": 0.3}),
    Row("embedding-pgd", 10, {"text_eps": 0.1, "image": True}),
    Row("proeat", 10),
]
PAIRS = [
    Row("fgsm"),
    Row("pgd", 10),
    Row("mi-fgsm", 10),
    Row("apgd", 20),
    Row("i2v", 60),
    Row("hotflip", 5),
    Row("gcg", 5),
    Row("co-attack", 10),
    Row("sga", 10),
]
EPS = {"easyvqa-llava": 16, "easyvqa-llava-immune": 16, "photo-dual-encoder": 1}  # of 255, L_inf


def runs(coco: Path | None, limit: int, photos: int) -> Iterator[tuple[str, Row, dict[str, Any]]]:
    for model, radius in EPS.items():
        pairs = model == "photo-dual-encoder"
        if pairs and coco is None:
            continue
        for row in PAIRS if pairs else ANSWERS:
            surface = Surface.parse(row.threat)
            eps = radius / 255 if surface.name in ("input", "upload") else None
            eps = 1.0 if ATTACKS[row.name].unbounded else eps
            how: dict[str, Any] = {
                "threat": ThreatModel.parse("linf", eps, surface),
                "limit": photos if pairs else limit,
            }
            how["data"] = DataSource(f"coco-captions:{coco}", split="val2017") if pairs else DataSource("easyvqa")
            how["task"], how["batch_size"] = ("retrieval", 16) if pairs else ("vqa", 64)
            yield model, row, how


def cell(record: Mapping[str, Any], row: Row) -> str:
    """Robust accuracy with its 95% interval; of a targeted attack the share that gives the target."""
    if row.target is not None:
        return f"{100 * record['asr_target']:.1f}%"
    low, high = record["acc_robust_interval"]
    return f"{100 * record['acc_robust']:.1f}% ({100 * low:.1f} to {100 * high:.1f})"


def table(out: Path) -> str:
    head = ["attack", *[f"`{m}`, {e}/255" for m, e in EPS.items()]]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    clean = {}
    for row in {row.key: row for row in [*ANSWERS, *PAIRS]}.values():
        cells = []
        for model in EPS:
            file = out / "runs" / model / f"{row.key}.json"
            if file.is_file():
                record = json.loads(file.read_text())
                clean.setdefault(model, f"{100 * record['acc_clean']:.1f}% of {record['n']}")
                cells.append(cell(record, row))
            else:
                cells.append("")
        lines.append(f"| {said(row)} | " + " | ".join(cells) + " |")
    lines.insert(2, "| none | " + " | ".join(clean.get(m, "") for m in EPS) + " |")
    return "\n".join(lines) + "\n"


def records(out: Path) -> str:
    """By model and run: what `cmai-fast attack` wrote, without the verdicts per sample."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(out.glob("runs/*/*.json")):
        record = json.loads(file.read_text())
        del record["per_sample"]
        record["settings"]["data"] = record["settings"]["data"].partition(":")[0]  # not where the files happened to be
        found.setdefault(file.parent.name, {})[file.stem] = record
    return json.dumps(found, indent=1) + "\n"


def said(row: Row) -> str:
    steps = row.steps or ATTACKS[row.name].steps
    budget = f"{ATTACKS[row.name].label} {steps}" + (f"x{row.restarts}" if row.restarts > 1 else "")
    own = [f"{k}={v}" for k, v in row.settings.items() if k != "keep"]
    own += [f"--threat {row.threat}"] if row.threat != "input" else []
    own += [f"--target {row.target}"] if row.target else []
    text = budget + (f" `{' '.join(own)}`" if own else "")
    return text + (f": {row.note}" if row.note else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--coco", type=Path)
    parser.add_argument("--limit", type=int, default=200, help="questions of easy-VQA, drawn with seed 0")
    parser.add_argument("--photos", type=int, default=24, help="photos of COCO, drawn with seed 0")
    parser.add_argument("--only", nargs="+", help="names of attacks")
    parser.add_argument("--models", nargs="+", choices=EPS, default=list(EPS))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    plan = [run for run in runs(given.coco, given.limit, given.photos) if run[0] in given.models]
    plan = [run for run in plan if not given.only or run[1].name in given.only]
    for model, row, how in track(plan, "attacks", disable=None):
        file = given.out / "runs" / model / f"{row.key}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        attack(
            model, how.pop("data"), row.name, how.pop("threat"), steps=row.steps, restarts=row.restarts,
            settings=row.settings, target=row.target, seed=0, out=file, resume=file.exists() or _begun(file),
            progress=False, **how,
        )  # fmt: skip
        write_text(table(given.out), given.out / "table.md")
        write_text(records(given.out), given.out / "records.json")


def _begun(file: Path) -> bool:
    return file.with_name(f"{file.name}.state").exists()


if __name__ == "__main__":
    main()

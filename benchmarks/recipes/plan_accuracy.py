"""How far `cmai-fast plan` is from every training step that was measured.

    python benchmarks/recipes/plan_accuracy.py        # the tables of docs/plan.md

The rows are those of `at_size.py` in benchmarks/results, whatever the file's name, and the times of `frontier.py`.
Steps that these recipes no longer have are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import at_size
import frontier
from sized_models import MODELS
from transformers import AutoConfig

from cmai_fast.evaluation.cost import STATEMENTS, Cost, Training, mean_cost, step_cost
from cmai_fast.evaluation.devices import DEVICES
from cmai_fast.evaluation.sizes import ModelSizes, model_sizes
from cmai_fast.mbat.passes import StepSettings
from cmai_fast.models import resolve

RESULTS = Path(__file__).parents[1] / "results"
_EASYVQA = {"prompt": 14, "answer": 2}  # tokens of a question beside the image's, padded to the longest of its batch
# That a verifier reads, by samples of a batch: medians over 3 batches of easy-VQA, which ask the same of many pictures.
_STATEMENTS = {32: 297, 64: 449}


@dataclass(frozen=True)
class Row:
    """`predicted` and `measured` in seconds, or in bytes of peak memory."""

    file: str
    step: str
    what: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def rows() -> Iterator[Row]:
    """Of every result file of a step at size, and of the frontier's times."""
    for path in sorted(RESULTS.rglob("*.json")):
        record = json.loads(path.read_text())
        if "seconds_a_step" in record and record.get("settings", {}).get("model") in MODELS:
            yield from _at_size(str(path.relative_to(RESULTS).with_suffix("")), record)
    small = AutoConfig.from_pretrained(resolve("easyvqa-llava"))
    yield from _frontier("frontier/times", small)
    small.text_config.num_hidden_layers = 24  # deepen_language.py
    yield from _frontier("frontier-deep/times", small)


def _at_size(name: str, record: dict[str, Any]) -> Iterator[Row]:
    settings, cpu = record["settings"], record["device"] == "cpu"
    device = "cpu" if cpu else next(kind for kind in DEVICES if kind.upper() in record["device"])
    how = Training(
        DEVICES[device], settings["batch"], 4 if cpu else 2, settings["bits"], "vision", settings["recompute"]
    )
    config = MODELS[settings["model"]]().config
    sizes = model_sizes(config, prompt=settings["prompt"], answer=settings["answer"])
    for step, seconds in record["seconds_a_step"].items():
        if step not in at_size.STEPS:
            continue
        values = {"inner_steps": settings["inner_steps"], **at_size.STEPS[step]}
        cost = _cost(sizes, replace(how, cuda_graphs=values.get("cuda_graphs", False)), values)
        yield Row(name, step, "time", cost.seconds, seconds)
        yield Row(name, step, "memory", cost.peak, record["peak_bytes"][step])


def _frontier(name: str, config: Any) -> Iterator[Row]:
    sizes = model_sizes(config, **_EASYVQA)
    times = json.loads((RESULTS / name).with_suffix(".json").read_text())["seconds_a_step"]
    for step, seconds in times.items():
        if step in frontier.ROWS and step not in frontier.TRAINERS:
            values = frontier.ROWS[step][1]
            how = Training(
                DEVICES["cpu"], values.get("batch_size", 64), 4, learns=values.get("trainable", "all"), muon=True
            )
            read = _STATEMENTS[how.batch] / how.batch
            cost = _cost(sizes, how, {"gamma": 0.0, "beta": 0.0, **values}, read)
            yield Row(name, step, "time", cost.seconds, seconds)


def _cost(sizes: ModelSizes, how: Training, values: dict[str, Any], read: float | None = None) -> Cost:
    """Of a step, or of a full one and those on S_c alone that follow it: their mean time, their largest peak. `read`:
    statements per sample, if S_c is a verifier's in every step."""
    step = StepSettings.of(values)
    alone = values.get("consistency_steps", 0)
    scored = bool(values.get("gamma", 0.1) or values.get("beta", 0.1))
    verifier = alone or read is not None
    statements = (STATEMENTS if read is None else read) if verifier and (scored or alone) else 0.0
    # `ConsistencyHeads` read a text with the language model; a verifier does not.
    texts = int(scored and not verifier)
    full = step_cost(sizes, how, step, texts=texts, statements=statements)
    return mean_cost(full, step_cost(sizes, how, step, statements=statements, alone=True), alone)


def main() -> None:
    print("| file | step | measured | predicted | | peak measured | predicted | |\n|---|---|---|---|---|---|---|---|")
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows():
        found.setdefault((row.file, row.step), {})[row.what] = row
    for (file, step), of in found.items():
        time, memory = of["time"], of.get("memory")
        cells = [f"{time.measured:.3f} s", f"{time.predicted:.3f} s", f"{time.error:+.0%}"]
        gib = 2**30
        cells += (
            [f"{memory.measured / gib:.1f} GiB", f"{memory.predicted / gib:.1f} GiB", f"{memory.error:+.0%}"]
            if memory
            else ["-", "-", "-"]
        )
        print(f"| `{file}` | {step} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

"""Heads for a model as it is, and the threshold under which the guard withholds an answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress, track
from torch import Tensor

from cmai_fast.cmcv import ConsistencyHeads, Threshold
from cmai_fast.cmcv.fit import fit_heads, fit_threshold
from cmai_fast.data import Sample, VQACollator
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.results import write_results
from cmai_fast.files import write_folder
from cmai_fast.metrics import auroc
from cmai_fast.pipeline import Generation, Pipeline
from cmai_fast.tasks import TASKS, Task

HEAD_STEPS = 300
RECORD = "calibration.json"
_FILES = {"heads.safetensors", "cmcv.json", RECORD}
_OTHERS = 256  # samples whose answers stand in for wrong ones where a sample has no choices


def calibrate(
    model: str,
    data: DataSource,
    *,
    out: Path,
    heads: str | Path | None = None,
    refit: bool = False,
    false_rejection_rate: float = 0.05,
    task: str = "vqa",
    limit: int = 1000,
    head_steps: int = HEAD_STEPS,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Fits heads where the model has none, sets the threshold, and writes both to `out`, whole or not at all.

    Args:
        data: heads are fitted on its train split, the threshold is set on its calibration split.
        out: a folder that is new, empty or of an earlier calibration, which is then replaced.
        heads: a folder of heads to start from; None: `cmcv/` in the model's folder or beside it, if there is one.
        refit: fit new heads also where there are some.
        false_rejection_rate: share of clean inputs that the threshold rejects at most.
        limit: samples of the calibration split to use.
        max_new_tokens: length of an answer; None: as the heads that were found were calibrated, else 16. It is saved
            with the threshold, and the guard generates so.

    Returns:
        What was found: the threshold, and how well S_c tells the model's own answers from wrong ones (`auroc`, and the
        share of wrong answers that the threshold rejects).

    Raises:
        ValueError: unknown names, data without these splits, samples without wrong answers, or `out` holds other files.
    """
    out = Path(out)
    _check_out(out)
    asked = TASKS[task]
    held_out = _asked(data.load("calibration", limit, seed), asked)
    pipeline = Pipeline.load(model, heads=heads, device=device, dtype=dtype, attention=attention)
    if max_new_tokens is not None:
        pipeline.generation = Generation(max_new_tokens)
    pipeline.threshold = None  # it is about to be set anew
    fitted = refit or pipeline.heads is None
    if fitted:
        train = _asked(data.load("train", None, seed), asked)
        pipeline.heads = new_heads(pipeline, train, asked, head_steps, batch_size, seed, progress)
    answers, scores = own_scores(pipeline, held_out, batch_size, progress)
    threshold = fit_threshold(torch.tensor(scores), "calibration", false_rejection_rate, pipeline.generation)
    record = {
        "model": model,
        "data": data.name,
        "fingerprint": data.fingerprint(),
        "task": task,
        "heads": "fitted" if fitted else "as found",
        "threshold": threshold.to_dict(),
        "wrong_answers": _wrong_answers(pipeline, held_out, scores, asked, threshold, batch_size, seed, progress),
        "seed": seed,
        "command": command,
    }

    def save(folder: Path) -> None:
        assert pipeline.heads is not None
        pipeline.heads.save_pretrained(folder, threshold)
        write_results(record, folder / RECORD)

    write_folder(out, save)
    return record


def new_heads(
    pipeline: Pipeline,
    train: Sequence[Sample],
    task: Task,
    steps: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> ConsistencyHeads:
    """Heads fitted to the model's own features on these samples; the same seed gives the same heads."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = ConsistencyHeads(pipeline.bridge.image_dim, pipeline.bridge.text_dim).to(pipeline.model.device)
    stream = training_batches(pipeline, train, task, batch_size, seed)
    with Progress(disable=not progress) as bar:
        shown = bar.add_task("consistency heads", total=steps)
        fit_heads(pipeline.bridge, heads, stream, steps=steps, on_step=lambda *_: bar.advance(shown))
    return heads


def training_batches(
    pipeline: Pipeline, train: Sequence[Sample], task: Task, batch_size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Endless batches, each sample with a wrong answer, in an order that depends on `seed` alone."""
    collate = VQACollator(pipeline.processor, negatives=1, max_length=pipeline.bridge.context, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    others = _others(train, seed)
    while True:
        rows = torch.randint(len(train), (batch_size,), generator=generator).tolist()
        yield pipeline.on_device(collate([with_wrong_answers(train[i], task, others) for i in rows]))


def with_wrong_answers(sample: Sample, task: Task, others: Sequence[Sample]) -> Sample:
    """The sample with the task's wrong answers among its choices, where the collator looks for them.

    Raises:
        ValueError: the task finds none.
    """
    wrong = task.wrong_answers(sample, others)
    if not wrong:
        raise ValueError(
            f"sample {sample.id!r} has no wrong answers: it has no choices, and no other sample has another answer of "
            "the same kind. Add choices to the records"
        )
    return replace(sample, choices=(sample.answer, *wrong))


def own_scores(
    pipeline: Pipeline, samples: Sequence[Sample], batch_size: int, progress: bool
) -> tuple[list[str], list[float]]:
    """The model's own answers and their S_c, of clean inputs: what a threshold is set on."""
    answers: list[str] = []
    scores: list[float] = []
    for rows in _parts(samples, batch_size, "calibration", progress):
        said, own = pipeline.answer(rows)
        answers, scores = answers + said, scores + own
    return answers, scores


def _wrong_answers(
    pipeline: Pipeline,
    samples: Sequence[Sample],
    scores: Sequence[float],
    task: Task,
    threshold: Threshold,
    batch_size: int,
    seed: int,
    progress: bool,
) -> dict[str, Any] | None:
    """How S_c tells the model's answers from wrong ones; None where the task knows no wrong answers."""
    rng, others = np.random.default_rng(seed), _others(samples, seed)
    choices = [task.wrong_answers(s, others) for s in samples]
    kept = [i for i, wrong in enumerate(choices) if wrong]
    if not kept:
        return None
    drawn = [(samples[i], choices[i][rng.integers(len(choices[i]))]) for i in kept]
    wrong: list[float] = []
    for rows in _parts(drawn, batch_size, "wrong answers", progress):
        wrong += pipeline.score([s for s, _ in rows], [a for _, a in rows]).tolist()
    own = np.array([scores[i] for i in kept])
    return {
        "n": len(kept),
        "auroc": auroc(own, np.array(wrong)),
        "rejected": float((np.array(wrong) < threshold.tau).mean()),
    }


def _asked(samples: Iterable[Sample], task: Task) -> list[Sample]:
    return [replace(sample, prompt=task.prompt(sample)) for sample in samples]


def _others(samples: Sequence[Sample], seed: int) -> list[Sample]:
    rows = np.random.default_rng(seed).permutation(len(samples))[:_OTHERS]
    return [samples[i] for i in rows.tolist()]


def _parts(rows: Sequence[Any], size: int, what: str, progress: bool) -> Iterator[Sequence[Any]]:
    for start in track(range(0, len(rows), size), what, disable=not progress):
        yield rows[start : start + size]


def _check_out(out: Path) -> None:
    """Refuses a folder whose files would be lost; changes nothing."""
    if not out.exists():
        return
    other = sorted({path.name for path in out.iterdir()} - _FILES) if out.is_dir() else [out.name]
    if other:
        raise ValueError(f"{out} holds {', '.join(other[:3])}; name a folder of heads or a new one with --out")

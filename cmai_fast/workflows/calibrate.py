"""Fits heads to an unchanged model, and sets the threshold below which the guard withholds an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmai_fast.cmcv import ConsistencyHeads, Threshold
from cmai_fast.cmcv.fit import fit_heads, fit_threshold
from cmai_fast.data import Sample
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.progress import Overall
from cmai_fast.evaluation.results import write_results
from cmai_fast.evaluation.versions import versions
from cmai_fast.files import write_folder
from cmai_fast.metrics import auroc
from cmai_fast.pipeline import Generation, Pipeline
from cmai_fast.tasks import TASKS
from cmai_fast.workflows.evaluate import data_settings
from cmai_fast.workflows.samples import asked, training_batches, training_samples

RECORD = "calibration.json"
_FILES = {"heads.safetensors", "cmcv.json", RECORD}
HEADS, _OWN, _WRONG = "consistency heads", "own answers", "wrong answers"


def calibrate(
    model: str,
    data: DataSource,
    *,
    out: Path,
    heads: str | Path | None = None,
    refit: bool = False,
    head_steps: int = 300,
    false_rejection_rate: float = 0.05,
    task: str = "vqa",
    limit: int = 1000,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Fits heads if the model has none, sets the threshold, and writes both to `out` atomically.

    Args:
        data: heads are fitted on its train split, and the threshold is set on its calibration split.
        out: a folder that is new, empty, or from an earlier calibration, which is then replaced.
        heads: a folder of heads to start from; None: `cmcv/` in the model's folder or beside it, if there is one.
        refit: fit new heads even if there are some.
        head_steps: number of batches that new heads are fitted on.
        false_rejection_rate: the maximum share of clean inputs that the threshold rejects.
        limit: samples of the calibration split to use.
        max_new_tokens: length of an answer; None: that of the existing heads' calibration, else 16. It is saved
            with the threshold, and the guard uses it.

    Returns:
        The threshold and, under `wrong_answers`, how well S_c separates the model's own answers from the task's wrong
        ones (`auroc`) and the share of wrong ones that the threshold rejects. Also written to `calibration.json`.

    Raises:
        ValueError: unknown names, data without these splits, samples without wrong answers if heads are fitted, a
            rate outside [0, 1), or `out` holds other files.
    """
    out = Path(out)
    _check_out(out)
    if not 0 <= false_rejection_rate < 1:
        raise ValueError(f"false_rejection_rate is {false_rejection_rate}; expected 0 <= rate < 1")
    held_out = asked(data, "calibration", task, limit, seed)
    pipeline = Pipeline.load(model, heads=heads, device=device, dtype=dtype, attention=attention)
    pipeline.threshold = None  # it is set below
    pipeline.choose_from(held_out)
    if max_new_tokens is not None:
        pipeline.generation = Generation(max_new_tokens)
    fitted = refit or pipeline.heads is None
    stages = {HEADS: 3.0 * head_steps * batch_size} if fitted else {}
    with Overall(stages | {_OWN: 6.0 * len(held_out), _WRONG: 2.0 * len(held_out)}, progress) as overall:
        if fitted:
            train = training_samples(data, task, pipeline)
            pipeline.heads = new_heads(pipeline, train, head_steps, batch_size, seed, overall)
        scores = _own_scores(pipeline, held_out, batch_size, overall)
        threshold = fit_threshold(torch.tensor(scores), "calibration", false_rejection_rate, pipeline.generation)
        wrong = _wrong_scores(pipeline, held_out, TASKS[task], batch_size, seed, overall)
    record = {
        "model": model, **data_settings(data), "task": task, "heads": "fitted" if fitted else "as found",
        "threshold": threshold.to_dict(), "wrong_answers": _separation(scores, wrong, threshold), "seed": seed,
        "versions": versions(), "command": command,
    }  # fmt: skip

    def save(folder: Path) -> None:
        assert pipeline.heads is not None
        pipeline.heads.save_pretrained(folder, threshold)
        write_results(record, folder / RECORD)

    write_folder(out, save)
    return record


def new_heads(
    pipeline: Pipeline, train: Sequence[Sample], steps: int, batch_size: int, seed: int, progress: Overall
) -> ConsistencyHeads:
    """Heads fitted to the model's own features on samples with choices; the same seed gives the same heads."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = ConsistencyHeads(pipeline.bridge.image_dim, pipeline.bridge.text_dim).to(pipeline.model.device)
    stream = training_batches(pipeline, train, batch_size, seed)
    progress.start(HEADS, steps)
    fit_heads(pipeline.bridge, heads, stream, steps=steps, on_step=lambda *_: progress.advance())
    return heads


def _own_scores(pipeline: Pipeline, samples: Sequence[Sample], batch_size: int, progress: Overall) -> list[float]:
    """S_c of clean samples with the model's own answers, on which the threshold is set."""
    progress.start(_OWN, len(samples))
    found: list[float] = []
    for start in range(0, len(samples), batch_size):
        found += pipeline.answer(samples[start : start + batch_size])[1]
        progress.advance(len(found) - start)
    return found


def _wrong_scores(
    pipeline: Pipeline, samples: Sequence[Sample], task: Any, batch_size: int, seed: int, progress: Overall
) -> dict[int, float]:
    """S_c of samples, each with one of the task's wrong answers, by index; samples without one are left out."""
    rng = np.random.default_rng(seed)
    others = [samples[i] for i in rng.permutation(len(samples))[:256].tolist()]
    wrong = {i: answers for i, s in enumerate(samples) if (answers := task.wrong_answers(s, others))}
    drawn = {i: answers[rng.integers(len(answers))] for i, answers in wrong.items()}
    progress.start(_WRONG, len(drawn))
    found: dict[int, float] = {}
    for start in range(0, len(drawn), batch_size):
        rows = list(drawn)[start : start + batch_size]
        scores = pipeline.score([samples[i] for i in rows], [drawn[i] for i in rows])
        found |= dict(zip(rows, scores.tolist(), strict=True))
        progress.advance(len(rows))
    return found


def _separation(scores: Sequence[float], wrong: dict[int, float], threshold: Threshold) -> dict[str, Any] | None:
    if not wrong:
        return None
    own, other = np.array([scores[i] for i in wrong]), np.array(list(wrong.values()))
    return {"n": len(wrong), "auroc": auroc(own, other), "rejected": float((other < threshold.tau).mean())}


def _check_out(out: Path) -> None:
    """Raises ValueError if files of `out` would be lost; changes nothing."""
    if not out.exists():
        return
    other = sorted({path.name for path in out.iterdir()} - _FILES) if out.is_dir() else [out.name]
    if other:
        raise ValueError(f"{out} holds {', '.join(other[:3])}; name a folder of heads or a new one with --out")

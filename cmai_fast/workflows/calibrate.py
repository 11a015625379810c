"""Fits a verifier to an unchanged model, and sets the threshold below which the guard withholds an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmai_fast.bridge import ModelBridge, bridge_of
from cmai_fast.cmcv import ConsistencyHeads, Threshold
from cmai_fast.cmcv.encoder import Encoder, check_pictures
from cmai_fast.cmcv.fit import fit_heads, fit_threshold
from cmai_fast.cmcv.statements import Statements
from cmai_fast.cmcv.tower import beside
from cmai_fast.cmcv.verifier import Verifier, set_tower, tower_weights
from cmai_fast.data import Sample
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.progress import Overall
from cmai_fast.evaluation.protocol import own_scores
from cmai_fast.evaluation.results import write_results
from cmai_fast.evaluation.versions import versions
from cmai_fast.files import write_folder
from cmai_fast.mbat.verifier import INNER_STEPS, fit_verifier
from cmai_fast.metrics import auroc, threshold_at_fpr, threshold_interval
from cmai_fast.models.encoders import is_image_text_model
from cmai_fast.models.loading import load_model
from cmai_fast.pipeline import Generation, Pipeline
from cmai_fast.pixels import PixelSpace
from cmai_fast.tasks import TASKS
from cmai_fast.threat import ThreatModel
from cmai_fast.workflows.evaluate import data_settings
from cmai_fast.workflows.samples import asked, endless, training_batches, training_collator, training_samples

RECORD = "calibration.json"
_FILES = {"heads.safetensors", "cmcv.json", "verifier.safetensors", "verifier.json", RECORD}
HEADS, VERIFIER, _OWN, _WRONG = "consistency heads", "verifier", "own answers", "wrong answers"
VERIFIER_STEPS = 300
OWN, COPY = "own", "copy"  # towers; anything else is the name of a model


def calibrate(
    model: str,
    data: DataSource,
    *,
    out: Path,
    heads: str | Path | None = None,
    refit: bool = False,
    head_steps: int = 300,
    verifier_steps: int | None = None,
    tower: str = COPY,
    eps: float = 8 / 255,
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
    """Fits a verifier if the model has none, sets the threshold of its score, and writes both to `out` atomically.

    A dual encoder has no questions to verify: it gets consistency heads, whose score is S_c.

    Args:
        data: verifier and heads are fitted on its train split, and the threshold is set on its calibration split.
        out: a folder that is new, empty, or from an earlier calibration, which is then replaced.
        heads: a folder of heads or a verifier to start from; None: `cmcv/` in the model's folder or beside it, if there
            is one.
        refit: fit a new verifier (or heads) even if there is one.
        head_steps: number of batches that new heads are fitted on.
        verifier_steps: number of batches, clean and attacked, that a new verifier is fitted on, after twice as many
            clean ones; None: 300; 0: no verifier, S_c of heads is the score.
        tower: what the verifier sees with. `copy`: a copy of the model's vision side, which is hardened with it; `own`:
            the model's own features, for a model that is already immunised; the name of an immunised model of the
            same architecture, whose vision side is taken; or the folder or hub id of a vision encoder of any
            architecture, such as a robust CLIP, which is left as it is.
        eps: radius of the attacks that the verifier is hardened against, in the [0, 1] pixel range.
        false_rejection_rate: the maximum share of clean inputs that the threshold rejects.
        limit: samples of the calibration split to use.
        max_new_tokens: length of an answer; None: that of the existing calibration, else 16. It is saved with the
            threshold, and the guard uses it.

    Returns:
        The threshold and, under `wrong_answers`, how well the score separates the model's own answers from the task's
        wrong ones (`auroc`) and the share of wrong ones that the threshold rejects. Also written to `calibration.json`.

    Raises:
        ValueError: unknown names, a tower that is neither a model nor an encoder, data without these splits, samples
            without wrong answers if heads are fitted, a rate outside [0, 1), or `out` holds other files.
    """
    out = Path(out)
    _check_out(out)
    if not 0 <= false_rejection_rate < 1:
        raise ValueError(f"false_rejection_rate is {false_rejection_rate}; expected 0 <= rate < 1")
    is_encoder = tower not in (OWN, COPY) and not is_image_text_model(tower)  # before the model, which takes longer
    held_out = asked(data, "calibration", task, limit, seed)
    pipeline = Pipeline.load(
        model, heads=heads, calibrated=False, device=device, dtype=dtype, attention=attention
    )  # fmt: skip
    pipeline.choose_from(held_out)
    if max_new_tokens is not None:
        pipeline.generation = Generation(max_new_tokens)
    verifier_steps = VERIFIER_STEPS if verifier_steps is None else verifier_steps
    verifies = verifier_steps > 0 and not pipeline.chooses
    if not verifies or refit:
        pipeline.verifier = None
    fitted = refit or (pipeline.verifier if verifies else pipeline.heads) is None
    if is_encoder and fitted and verifies:
        check_pictures(pipeline.bridge)
    stage, cost = (VERIFIER, 20.0 * verifier_steps) if verifies else (HEADS, 3.0 * head_steps)
    stages = {stage: cost * batch_size} if fitted else {}
    with Overall(stages | {_OWN: 6.0 * len(held_out), _WRONG: 2.0 * len(held_out)}, progress) as overall:
        if fitted:
            train = training_samples(data, task, pipeline)
            if verifies:
                ball = ThreatModel("linf", eps)
                pipeline.verifier = new_verifier(
                    pipeline, train, verifier_steps, tower, ball, batch_size, seed, overall
                )
            else:
                pipeline.heads = new_heads(pipeline, train, head_steps, batch_size, seed, overall)
        overall.start(_OWN, len(held_out))
        scores = own_scores(pipeline, held_out, batch_size, progress=overall)
        threshold = fit_threshold(
            torch.from_numpy(scores), "calibration", false_rejection_rate, pipeline.generation, pipeline.fingerprint()
        )
        wrong = _wrong_scores(pipeline, held_out, TASKS[task], batch_size, seed, overall)
    record = {
        "model": model, **data_settings(data), "task": task, "score": "verifier" if verifies else "heads",
        "fitted": fitted, "threshold": threshold.to_dict(), "thresholds": _thresholds(scores),
        "wrong_answers": _separation(scores, wrong, threshold),
        "seed": seed, "versions": versions(), "command": command,
    }  # fmt: skip
    if verifies and fitted:
        record["verifier"] = {"steps": verifier_steps, "tower": tower, "eps": eps, "batch_size": batch_size}

    def save(folder: Path) -> None:
        if pipeline.heads is not None:
            pipeline.heads.save_pretrained(folder, None if verifies else threshold)
        if pipeline.verifier is not None:
            pipeline.verifier.save_pretrained(folder, threshold)
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


def new_verifier(
    pipeline: Pipeline,
    train: Sequence[Sample],
    steps: int,
    tower: str,
    threat: ThreatModel,
    batch_size: int,
    seed: int,
    progress: Overall,
    inner_steps: int = INNER_STEPS,
) -> Verifier:
    """A verifier fitted to samples with answers; the same seed gives the same one. `tower`: as for `calibrate`;
    `inner_steps`: of the attacks that it is hardened against, 0: none."""
    bridge = pipeline.bridge
    beside_it = tower_of(bridge, pipeline.space, tower)
    statements = Statements(train, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        verifier = Verifier.new(bridge, pipeline.processor.tokenizer, statements.alternatives, beside_it)
    progress.start(VERIFIER, 3 * steps)
    verifier.statements = statements
    collate = training_collator(pipeline, seed, statements)
    batches = endless(pipeline, train, collate, batch_size, seed, statements.weights)
    fit_verifier(
        verifier, pipeline.space, batches, steps, threat,
        inner_steps=inner_steps, train_tower=tower == COPY, seed=seed, on_step=lambda *_: progress.advance(),
    )  # fmt: skip
    return verifier


def tower_of(bridge: ModelBridge, space: PixelSpace, tower: str) -> Any:
    """What the verifier of this model sees with, as of `calibrate`; None: the model's own features."""
    if tower == OWN:
        return None
    if tower != COPY and not is_image_text_model(tower):
        return Encoder.load(tower, bridge, space)
    found = beside(bridge)
    if tower != COPY:
        set_tower(bridge_of(found), tower_weights(bridge_of(load_model(tower, device=str(bridge.model.device))[0])))
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


def _separation(scores: np.ndarray, wrong: dict[int, float], threshold: Threshold) -> dict[str, Any] | None:
    if not wrong:
        return None
    own, other = scores[list(wrong)], np.array(list(wrong.values()))
    return {"n": len(wrong), "auroc": auroc(own, other), "rejected": float((other < threshold.tau).mean())}


def _thresholds(scores: np.ndarray) -> list[dict[str, Any]]:
    """The thresholds of two rates of false rejections, with bootstrap intervals."""
    return [
        {
            "false_rejection_rate": rate,
            "tau": threshold_at_fpr(scores, rate),
            "interval": threshold_interval(scores, rate),
        }
        for rate in (0.01, 0.05)
    ]


def _check_out(out: Path) -> None:
    """Raises ValueError if files of `out` would be lost; changes nothing."""
    if not out.exists():
        return
    other = sorted({path.name for path in out.iterdir()} - _FILES) if out.is_dir() else [out.name]
    if other:
        raise ValueError(f"{out} holds {', '.join(other[:3])}; name a folder of heads or a new one with --out")

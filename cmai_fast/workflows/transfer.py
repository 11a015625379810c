"""A saved adversarial set on another model: how much of what broke its source breaks this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cmai_fast.evaluation.answers import Answers
from cmai_fast.evaluation.goals import reaches
from cmai_fast.evaluation.results import STANDARD_OUTPUT, put_results
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.saved import AdversarialSet, read_set
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.evaluation.transfer import share, strict_transfer
from cmai_fast.evaluation.versions import versions
from cmai_fast.metrics import bootstrap_interval
from cmai_fast.pipeline import Generation, Pipeline
from cmai_fast.workflows.evaluate import check_names


def transfer(
    model: str,
    folder: Path,
    *,
    out: Path,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Scores a set that `attack --save-images` wrote on `model`; nothing is attacked. Writes one JSON file.

    The same samples are answered with their clean and with their attacked pictures, both read from the set's files by
    this model's own processor, and judged by the set's task. Attack success counts only samples that this model answers
    right without the attack; strict transfer, of these, only samples that broke the source model.

    Args:
        folder: the set; its hashes are checked before the model is loaded.
        out: the file; `Path("-")` is standard output.
        others: as for `evaluate`.

    Raises:
        ValueError: an unknown model, a set that was changed or that another model cannot read, or `out` exists.
    """
    out, found = Path(out), read_set(folder)
    check_names(model, task=found.about["task"], metrics=())
    if out != STANDARD_OUTPUT and out.exists():
        raise ValueError(f"{out} exists; name another file with --out, or delete it")
    generation = None if max_new_tokens is None else Generation(max_new_tokens)
    pipeline = Pipeline.load(model, device=device, dtype=dtype, attention=attention, generation=generation)
    clean, attacked = (
        Runner(pipeline, found.samples(attacked=adversarial), task=found.about["task"], batch_size=batch_size).clean()
        for adversarial in (False, True)
    )
    record = _record(found, clean, attacked) | {
        "target": {"model": model, "fingerprint": pipeline.fingerprint()},
        "precision": str(pipeline.model.dtype),
        "settings": {
            "model": model, "set": str(folder), "manifest_sha256": found.about["manifest_sha256"],
            "batch_size": batch_size, "max_new_tokens": max_new_tokens, "device": device, "dtype": dtype,
            "attention": attention, "command": command,
        },
        "versions": versions(),
    }  # fmt: skip
    put_results(record, out)
    return record


def _record(found: AdversarialSet, clean: Answers, attacked: Answers) -> dict[str, Any]:
    broke = np.array([line["broken"] for line in found.lines], dtype=bool)
    both = clean.right & attacked.right
    record: dict[str, Any] = {
        "source": found.about["source"],
        **{key: found.about[key] for key in ("task", "attack", "threat", "norm", "eps", "seed")},
        "n": len(found.lines),
        "broken_on_source": int(broke.sum()),
        **_accuracy("acc_clean", clean.right),
        **_accuracy("acc_robust", both),
        "transfer": share(~attacked.right[clean.right]),
        "strict": strict_transfer(broke, clean.right, attacked.right),
    }
    if "target" in found.about["attack"]:
        spec = AttackSpec(**found.about["attack"])
        reached = np.array([reaches(spec, text) for text in attacked.predictions])
        record["transfer_target"] = share(reached[clean.right])
    record["per_sample"] = [
        {
            "sample_id": line["id"],
            "question": line["question"],
            "references": line["references"],
            "broken_on_source": bool(broke[k]),
            "right_clean": bool(clean.right[k]),
            "right_adv": bool(both[k]),
            "prediction_clean": clean.predictions[k],
            "prediction_adv": attacked.predictions[k],
            **_scores(k, clean, attacked),
        }
        for k, line in enumerate(found.lines)
    ]
    return record


def _accuracy(name: str, right: np.ndarray) -> dict[str, Any]:
    return {name: float(right.mean()), f"{name}_interval": list(bootstrap_interval(right))}


def _scores(k: int, *answers: Answers) -> dict[str, float]:
    pairs = zip(("score_clean", "score_adv"), answers, strict=True)
    return {name: float(own.scores[k]) for name, own in pairs if own.scores is not None}

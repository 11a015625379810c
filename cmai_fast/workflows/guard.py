"""Decisions about one question or many, as JSON lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmai_fast.arm import Decision, Guard
from cmai_fast.arm.policies.policy import chain
from cmai_fast.data import Sample
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.progress import Overall
from cmai_fast.files import write_text
from cmai_fast.tasks import TASKS, posed


def guard(
    model: str,
    data: DataSource | None = None,
    *,
    images: Sequence[str | Path] = (),
    text: str | None = None,
    out: Path | None = None,
    write: Callable[[str], Any] = print,
    heads: str | Path | None = None,
    policies: Sequence[str] = ("reject",),
    settings: Mapping[str, Any] | None = None,
    certify: bool = False,
    threshold: float | None = None,
    task: str = "vqa",
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    progress: bool = True,
) -> int:
    """Decides every case in order, writing one line of JSON per case; returns the number of cases.

    Args:
        data: the cases: its test split. Answers are not needed.
        images, text: instead of `data`, one question about one or several images.
        out: a file, written when every case is decided; None: each line goes to `write` once it is decided.
        heads, threshold, max_new_tokens: as for `Guard.from_pretrained`.
        policies, settings: names, and settings by `POLICY.SETTING`, as values or text.
        certify: add a certificate to each accepted answer, with the settings of the policy `certify`.
        limit, seed: number of cases, drawn with the seed; None: all.

    Raises:
        ValueError: neither data nor a question, or both; unknown names; a case that cannot be read, named by its id.
    """
    if (data is None) == (text is None or not images):
        raise ValueError("expected either data, or images with a text")
    names = [*policies, *(["certify"] if certify else [])]
    made = dict(zip(names, chain(names, settings), strict=True))  # checked before a model is loaded
    samples: Sequence[Sample] = [] if data is None else data.load("test", limit, seed)
    guarded = Guard.from_pretrained(
        model, heads=heads, policies=[made[name] for name in policies], threshold=threshold,
        certify=made["certify"] if certify else None, max_new_tokens=max_new_tokens, device=device, dtype=dtype,
        attention=attention,
    )  # fmt: skip
    if data is None:
        decisions: Iterator[Decision] = iter(guarded.decide_batch([list(images)], [text or ""]))
    else:
        if guarded.pipeline.chooses:  # among the choices of the records, or else their captions
            every = [posed(TASKS[task], samples[i]) for i in range(len(samples))]
            guarded.pipeline.choose_from([s for s in every if s.choices or s.references])
        decisions = decided(guarded, samples, task, batch_size, progress)
    lines = []
    for decision in decisions:
        line = decision.to_json()
        if out is None:
            write(line)
        lines.append(line)
    if out is not None:
        write_text("".join(f"{line}\n" for line in lines), Path(out))
    return len(lines)


def decided(
    guarded: Guard, samples: Sequence[Sample], task: str, batch_size: int, progress: bool
) -> Iterator[Decision]:
    """Decisions in the order of the samples, `batch_size` at a time."""
    asked = TASKS[task]
    with Overall({"guard": 1.0}, progress) as overall:
        overall.start("guard", len(samples))
        for start in range(0, len(samples), batch_size):
            rows = [posed(asked, samples[i]) for i in range(start, min(start + batch_size, len(samples)))]
            yield from guarded.decide_samples([Sample(s.id, s.images, s.prompt) for s in rows])
            overall.advance(len(rows))

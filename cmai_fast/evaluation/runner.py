"""Runs attacks on the samples of one model, batch by batch, and scores the text that the model then generates.

Each finished batch is stored in the run's `State`, so that a run resumes after any interruption. A batch that does not
fit into memory is done in parts.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmai_fast.attacks import ATTACKS, AttackResult, Passes, Victim
from cmai_fast.attacks.deployed import Deployed
from cmai_fast.bridge import BatchImages
from cmai_fast.data import Sample
from cmai_fast.evaluation.answers import Answers, Attacked
from cmai_fast.evaluation.goals import Starts, aim, check_target, goal, texts_of
from cmai_fast.evaluation.parts import Parts
from cmai_fast.evaluation.progress import Overall, Silent
from cmai_fast.evaluation.state import Journal, State
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.evaluation.surface import images_of, noisy, shown, victim_of
from cmai_fast.evaluation.texts import Texts, typed
from cmai_fast.evaluation.universal import Universal
from cmai_fast.pipeline import Pipeline
from cmai_fast.pixels import levels, round_to_8bit
from cmai_fast.tasks import TASKS, Task, ranks, task_over
from cmai_fast.threat import Surface, ThreatModel

_PLAIN = Texts()


class Runner:
    """Attacks the samples on one model and scores its answers.

    Args:
        pipeline: the model, which is restored afterwards.
        samples: at least one, each with references.
        task: decides whether a generated text is right.
        state: stores finished batches; None: a temporary folder, deleted with the runner.
        surface: what attacks change; that of every threat model here.
        training: other samples, on which universal attacks find what they add to every image.
        batch_size: samples at a time; results do not depend on it.
        seed: of the attacks. Their result for a sample depends only on (seed, sample id).
        progress: receives stages and samples. A stage is named `<model>: <what>`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        samples: Sequence[Sample],
        *,
        task: Task | str = "vqa",
        surface: Surface | None = None,
        training: Sequence[Sample] = (),
        state: State | None = None,
        batch_size: int = 64,
        seed: int = 0,
        progress: Overall | None = None,
    ) -> None:
        if not samples:
            raise ValueError("there are no samples; expected at least one to measure a model on")
        self.pipeline, self.samples, self.seed, self.surface = pipeline, samples, seed, surface or Surface()
        self.task = task_over(TASKS[task] if isinstance(task, str) else task, samples)
        self.state, self.parts, self.progress = state or State.temporary(), Parts(batch_size), progress or Silent()
        self._clean: Answers | None = None
        self.universal = Universal(pipeline, training, samples, self.surface, self.state, seed)
        if ranks(self.task) and not pipeline.chooses:
            raise ValueError(
                f"{pipeline.name} generates its answers, and {self.task.name} needs a dual encoder (CLIP, SigLIP); use "
                "the task captioning"
            )
        pipeline.choose_from(samples)

    def resized(self, batch_size: int) -> Runner:
        """The same runner with another batch size and the same clean answers."""
        other = copy.copy(self)
        other.parts = Parts(batch_size)
        return other

    def right(self, rows: Sequence[int], predictions: Sequence[str]) -> np.ndarray:
        """(M,) bool: whether these texts are right by the task."""
        scores = [self.task.score(p, self.samples[i]) for i, p in zip(rows, predictions, strict=True)]
        return np.array(scores, dtype=float) >= self.task.broken_below

    def clean(self) -> Answers:
        """The answers to the samples' own images."""
        if self._clean is None:
            journal = self._stage("clean", range(len(self.samples)), self._untouched)
            self._clean = Answers(*self._answers(journal))
        return self._clean

    def _untouched(self, rows: list[int]) -> tuple[dict[str, Any], None]:
        # An attack on a blank picture starts from it, but the clean answer is that to the sample's own.
        surface = replace(self.surface, name="upload") if self.surface.name == "blank" else self.surface
        own = images_of(self.pipeline, [self.samples[i] for i in rows], surface)
        return self._judged(rows, _apart(own, own.pixels()), surface=surface), None

    def images(self, rows: Sequence[int]) -> list[Tensor]:
        """The samples' own images in [0, 1], one tensor each, as `BatchImages.split` returns them, on the CPU."""
        own = self.batch(rows)
        return _apart(own, own.pixels())

    def batch(self, rows: Sequence[int]) -> BatchImages:
        """The images of these samples as attacks take them."""
        return images_of(self.pipeline, [self.samples[i] for i in rows], self.surface)

    def attack(
        self,
        spec: AttackSpec,
        threat: ThreatModel,
        rows: Sequence[int] | None = None,
        *,
        stage: str | None = None,
        keep: bool = False,
        brief: bool = False,
        starts: Starts | None = None,
    ) -> Attacked:
        """One attack on the samples at `rows`; None: all whose clean answer is right.

        The attack moves away from the model's clean answer if that is right, else from the first reference, or where
        `spec` says; samples without such an answer are left out. Where it stopped at a changed token and the text is
        still right by the task, it runs again without such stops.

        Args:
            stage: its name in the state; None: attack and radius. A name must always mean the same attack.
            keep: keep the attacked images.
            brief: leave out the 8-bit images; the 8-bit fields then repeat the others.
            starts: for a `spec` that continues (`again`).
        """
        spec.check(threat)
        check_target(spec, texts_of(self.pipeline))
        rows = np.flatnonzero(self.clean().right).tolist() if rows is None else list(rows)
        rows = [i for i in rows if self._goal(spec, i, starts) is not None]
        stage = stage or f"{spec.key} at {threat.ball}"
        if ATTACKS[spec.name].fit is not None:
            self.universal.find(spec, threat)
        journal = self._stage(stage, rows, lambda part: self._attacked(spec, threat, part, keep, brief, starts))
        attacked = self._collected(journal)
        zero = int((attacked.zero_gradients > 0).sum())
        if zero:
            warnings.warn(
                f"{spec.key} met gradients that were exactly 0 on {zero} of {len(rows)} samples of "
                f"{self.pipeline.name}: what looks robust there may only have no gradient",
                RuntimeWarning,
                stacklevel=2,
            )
        return attacked

    def _attacked(
        self,
        spec: AttackSpec,
        threat: ThreatModel,
        rows: list[int],
        keep: bool,
        brief: bool,
        starts: Starts | None = None,
    ) -> tuple[dict[str, Any], dict[int, Tensor] | None]:
        start = time.perf_counter()
        # R@5 of an image that is not R@1 can be attacked too, so where texts are ranked nothing stops early.
        exact = spec.target is not None or not ranks(self.task)
        victim, clean, result = self._run(spec, threat, rows, exact, starts)
        forwards, backwards = victim.forwards.cpu(), victim.backwards.cpu()
        first, texts = _apart(victim, result.adv), Texts.of(result)
        # The clean answers are not those at the centre of the ball if that is a blank picture.
        own = None if self.surface.name == "blank" else _apart(victim, clean)
        entry, adv = self._judged(rows, first, own, texts=texts), list(first)
        passes, attacked = result.passes, result.adv
        # Another token, at which an attack stops, is no proof: the text may say the same, or be right as well.
        right = self.right(rows, entry["predictions"])
        left = [k for k, fooled in enumerate(result.fooled.tolist()) if fooled and right[k]]
        if left and spec.stops:
            other, _, again = self._run(spec, threat, [rows[k] for k in left], exact=False)
            for k, image in zip(left, _apart(other, again.adv), strict=True):
                adv[k] = image
            before, texts = texts, texts.put(left, Texts.of(again))
            passes, attacked = passes + again.passes, victim.join(adv).to(clean)
            result.nonfinite[left] += again.nonfinite
            result.zero_gradients[left] += again.zero_gradients
            forwards[left] += other.forwards.cpu()
            backwards[left] += other.backwards.cpu()
            for name, values in again.details.items():
                for k, value in zip(left, values, strict=True):
                    result.details[name][k] = value
            entry = self._judged(rows, adv, own, (first, before, entry), texts=texts)
        if not brief:
            rounded = _apart(victim, round_to_8bit(attacked, clean, threat))
            known = {k: entry[k] for k in ("predictions", "scores")}
            judged = self._judged(rows, rounded, own, (adv, texts, known), scored=False, texts=texts)
            entry["predictions_8bit"] = judged["predictions"]
        entry |= {
            "prompts": texts.prompts if texts.captions is None else texts.captions,
            "details": result.details,
            "fooled": result.fooled.tolist(),
            "passes": vars(passes),
            "forwards": forwards.tolist(),
            "backwards": backwards.tolist(),
            "nonfinite": result.nonfinite.tolist(),
            "zero_gradients": result.zero_gradients.tolist(),
            "seconds": time.perf_counter() - start,
        }
        if not keep:
            return entry, None
        kept = [levels(image) for image in adv] if self.surface.uploads else adv
        return entry, dict(zip(rows, kept, strict=True))

    def _said(self, row: int) -> str | None:
        clean = self.clean()
        return clean.predictions[row] if clean.right[row] else None

    def aims(self, spec: AttackSpec) -> bool:
        """Whether an attack has something to aim at for any sample that is right."""
        right = np.flatnonzero(self.clean().right).tolist()
        return spec.again or not right or any(self._goal(spec, i) is not None for i in right)

    def _goal(self, spec: AttackSpec, row: int, starts: Starts | None = None) -> Sample | None:
        reference = None
        if starts is not None:
            if row not in starts:
                return None
            reference = starts[row][1]
        return goal(spec, self.samples[row], self._said(row), texts_of(self.pipeline), reference)

    def _run(
        self,
        spec: AttackSpec,
        threat: ThreatModel,
        rows: list[int],
        exact: bool = True,
        starts: Starts | None = None,
    ) -> tuple[Victim, Tensor, AttackResult]:
        """The attack on the samples at `rows`; `exact`: as of `Victim`."""
        samples, said = [self.samples[i] for i in rows], [self._said(i) for i in rows]
        goals = [found for i in rows if (found := self._goal(spec, i, starts)) is not None]
        assert len(goals) == len(rows), "rows without a goal are left out before"
        batch = self.pipeline.collate(goals)
        victim = victim_of(self.pipeline, batch, goals, self.surface)
        victim.exact = exact and spec.reference is None and not spec.again
        aim(victim, spec, self.pipeline, samples, said)
        if ATTACKS[spec.name].text:
            victim.prompts = typed(self.pipeline, goals, samples)
        if self.pipeline.guarded:
            victim.deployed = Deployed(self.pipeline, goals)
        clean = victim.pixels()
        if starts is not None:
            victim.origin = victim.join([starts[i][0] for i in rows]).to(clean)
        if ATTACKS[spec.name].fit is not None:
            victim.common = self.universal.find(spec, threat)
        result: AttackResult = ATTACKS[spec.name](
            victim, clean, threat, steps=spec.steps, restarts=spec.restarts, seed=self.seed,
            sample_ids=batch["sample_ids"], **spec.settings,
        )  # fmt: skip
        if self.surface.uploads:  # what is uploaded is a file
            result.adv = round_to_8bit(result.adv, clean, threat)
        return victim, clean, result

    def transfer(
        self, images: Mapping[int, Tensor], threat: ThreatModel, rows: Sequence[int] | None = None, name="transfer"
    ) -> Attacked:
        """Adversarial images of another model, by row; samples without one keep their own. Otherwise as `attack`."""
        rows = np.flatnonzero(self.clean().right).tolist() if rows is None else list(rows)
        return self._collected(self._stage(name, rows, lambda part: (self._moved(images, threat, part), None)))

    def _moved(self, images: Mapping[int, Tensor], threat: ThreatModel, rows: list[int]) -> dict[str, Any]:
        start, batch = time.perf_counter(), self.batch(rows)
        clean = batch.pixels()
        own = _apart(batch, clean)
        joined = batch.join([images[i] if i in images else own[k] for k, i in enumerate(rows)]).to(clean)
        adv, rounded = _apart(batch, joined), _apart(batch, round_to_8bit(joined, clean, threat))
        entry = self._judged(rows, adv, own)
        known = {k: entry[k] for k in ("predictions", "scores")}
        entry["predictions_8bit"] = self._judged(rows, rounded, own, (adv, _PLAIN, known), scored=False)["predictions"]
        still = [0] * len(rows)
        return entry | {
            "fooled": (~self.right(rows, entry["predictions"])).tolist(),
            "passes": vars(Passes()),
            "forwards": still,
            "backwards": still,
            "nonfinite": still,
            "zero_gradients": still,
            "seconds": time.perf_counter() - start,
        }

    def noise(self, threat: ThreatModel, seed: int) -> np.ndarray:
        """(N,) bool: whether each sample is answered right with random noise in the ball."""
        journal = self._stage("noise", range(len(self.samples)), lambda part: (self._noisy(threat, seed, part), None))
        return self.right(journal.rows, [p for e in journal.entries for p in e["predictions"]])

    def _noisy(self, threat: ThreatModel, seed: int, rows: list[int]) -> dict[str, Any]:
        images = noisy(self.pipeline, [self.samples[i] for i in rows], threat, seed)
        return self._judged(rows, images, scored=False)

    def _judged(
        self,
        rows: list[int],
        images: Sequence[Tensor],
        own: Sequence[Tensor] | None = None,
        known: tuple[Sequence[Tensor], Texts, dict[str, Any]] | None = None,
        *,
        scored: bool = True,
        texts: Texts = _PLAIN,
        surface: Surface | None = None,
    ) -> dict[str, Any]:
        """Predictions for these images and texts of the samples at `rows`, and S_c with them.

        Args:
            own: the samples' own images; if image and text are unchanged, the clean answer is reused.
            known: other images and texts of these samples with their results, which are reused if both are equal.
            surface: of which these are the images; None: the runner's own.
        """
        scored = scored and self.pipeline.scores
        found: dict[str, Any] = {"predictions": [""] * len(rows), "scores": [0.0] * len(rows) if scored else None}
        left = []
        for k, (row, image) in enumerate(zip(rows, images, strict=True)):
            if known is not None and torch.equal(image, known[0][k]) and texts.same(k, known[1]):
                found["predictions"][k] = known[2]["predictions"][k]
                if scored:
                    found["scores"][k] = known[2]["scores"][k]
            elif own is not None and torch.equal(image, own[k]) and texts.plain(k, self.samples[row]):
                clean = self.clean()
                found["predictions"][k] = clean.predictions[row]
                if scored:
                    found["scores"][k] = float(clean.scores[row])  # type: ignore[index]
            else:
                left.append(k)
        asked = [texts.sample(k, self.samples[rows[k]]) for k in left]
        samples, moved = shown(asked, [images[k] for k in left], surface or self.surface)
        said = texts.answers(left, self.pipeline, samples, moved)
        scores = self.pipeline.score(samples, said, moved).double().tolist() if scored and left else []
        for place, k in enumerate(left):
            found["predictions"][k] = said[place]
            if scored:
                found["scores"][k] = scores[place]
        return found

    def _stage(
        self,
        name: str,
        rows: Sequence[int],
        work: Callable[[list[int]], tuple[dict[str, Any], Mapping[int, Tensor] | None]],
    ) -> Journal:
        """Does the rest of a stage, batch by batch."""
        journal, rows = self.state.journal(name), list(rows)
        done = journal.rows
        if done != rows[: len(done)]:
            raise ValueError(f"{journal.folder} belongs to a run on other samples; delete it to run the stage again")
        self.progress.start(f"{self.pipeline.name}: {name}", len(rows), len(done))
        for part, (entry, images) in self.parts.together(rows[len(done) :], work, self.state.processes):
            journal.append({"rows": part, **entry}, images)
            self.progress.advance(len(part))
        return journal

    def _answers(self, journal: Journal) -> tuple[list[int], list[str], np.ndarray, np.ndarray | None]:
        rows, predictions = journal.rows, _joined(journal, "predictions")
        scored = bool(rows) and journal.entries[0]["scores"] is not None
        scores = np.array(_joined(journal, "scores"), dtype=float) if scored else None
        return rows, predictions, self.right(rows, predictions), scores

    def _collected(self, journal: Journal) -> Attacked:
        rows, predictions, right, scores = self._answers(journal)
        brief = any("predictions_8bit" not in entry for entry in journal.entries)
        rounded = predictions if brief else _joined(journal, "predictions_8bit")
        return Attacked(
            rows=rows,
            predictions=predictions,
            right=right,
            scores=scores,
            predictions_8bit=rounded,
            right_8bit=self.right(rows, rounded),
            fooled=np.array(_joined(journal, "fooled"), dtype=bool),
            passes=sum((Passes(**entry["passes"]) for entry in journal.entries), Passes()),
            seconds=sum(entry["seconds"] for entry in journal.entries),
            forwards=np.array(_joined(journal, "forwards"), dtype=int),
            backwards=np.array(_joined(journal, "backwards"), dtype=int),
            nonfinite=np.array(_joined(journal, "nonfinite"), dtype=int),
            zero_gradients=np.array(_joined(journal, "zero_gradients"), dtype=int),
            images=journal,
            prompts=_joined(journal, "prompts") if rows and journal.entries[0].get("prompts") else None,
            details={
                name: [value for entry in journal.entries for value in entry["details"][name]]
                for name in (journal.entries[0].get("details", ()) if rows else ())
            },
        )


def _joined(journal: Journal, key: str) -> list[Any]:
    return [value for entry in journal.entries for value in entry[key]]


def _apart(batch: Any, pixels: Tensor) -> list[Tensor]:
    """One tensor per sample on the CPU, so that the device holds the images of one batch only."""
    return [image.detach().cpu() for image in batch.split(pixels)]

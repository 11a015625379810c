"""Adversarial sets on disk, made on one model, to be scored on any other.

A set is a folder with `set.json` (how it was made), `manifest.jsonl` (one line per attacked sample: texts, verdict on
the source model, budget, and the SHA-256 of each file) and the pictures, clean and attacked, as lossless PNG.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cmai_fast.attacks import ATTACKS
from cmai_fast.attacks.upload import read
from cmai_fast.data import Sample
from cmai_fast.evaluation.answers import Attacked
from cmai_fast.evaluation.protocol import Measured
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.evaluation.versions import versions
from cmai_fast.files import plain
from cmai_fast.pixels import round_to_8bit
from cmai_fast.preprocessing.jpeg import save_options
from cmai_fast.threat import ThreatModel

ABOUT, MANIFEST = "set.json", "manifest.jsonl"
SCHEMA = 1


@dataclass(frozen=True)
class AdversarialSet:
    """A set that was read and checked. `about` is `set.json`; `lines` are those of the manifest."""

    folder: Path
    about: dict[str, Any]
    lines: list[dict[str, Any]]

    def samples(self, *, attacked: bool) -> list[Sample]:
        """The samples with their clean or their attacked pictures (and questions), in the manifest's order."""
        return [self._sample(line, attacked) for line in self.lines]

    def _sample(self, line: dict[str, Any], attacked: bool) -> Sample:
        files = line["files" if attacked else "clean_files"]
        prompt = line.get("adversarial_question", line["question"]) if attacked else line["question"]
        pictures = tuple(str(self.folder / name) for name in files)
        return Sample(line["id"], pictures, prompt, tuple(line["references"]), tuple(line["choices"]))


def changed_text(attacked: Attacked) -> str:
    """What an attack on text changes."""
    return "question" if all(isinstance(text, str) for text in attacked.prompts or ()) else "captions"


def write_set(
    folder: Path, measured: Measured, spec: AttackSpec, threat: ThreatModel, model: str, data: dict[str, Any]
) -> None:
    """Writes the samples that `spec` ran on. An uploaded picture has its own size (and is a JPEG file, if pictures go
    through JPEG); else the image is as the model reads it, tile by tile.

    Args:
        measured: the runner has kept the images.
        model: what the source model was loaded from.
        data: what describes the data, for `set.json`.
    """
    runner, clean, attacked = measured.runner, measured.clean, measured.attacked[spec.key]
    quality, lines, whole = threat.surface.jpeg, [], True
    kind, options = ("png", {}) if quality is None else ("jpg", save_options(quality))

    def save(row: int, mark: str, pictures: Sequence[np.ndarray]) -> tuple[list[str], list[str]]:
        parts = [""] if len(pictures) == 1 else [f"-{k}" for k in range(len(pictures))]
        names = [f"{row:06}{mark}{part}.{kind}" for part in parts]
        for name, picture in zip(names, pictures, strict=True):
            Image.fromarray(np.asarray(picture)).save(folder / name, **options)
        return names, [_digest(folder / name) for name in names]

    for place, row in enumerate(attacked.rows):
        sample, batch = runner.samples[row], runner.batch([row])
        own = batch.pixels()
        (pictures,) = batch.pictures(round_to_8bit(batch.join([attacked.images[row]]).to(own), own, threat))
        # The centre of the ball is no clean picture if it is blank.
        before = read(sample) if threat.surface.name == "blank" else batch.pictures(own)[0]
        whole = whole and len(pictures) == len(sample.images)
        files, digests = save(row, "", pictures)
        clean_files, clean_digests = save(row, "-clean", before)
        lines.append(
            {
                "id": sample.id,
                "files": files,
                "sha256": digests,
                "clean_files": clean_files,
                "clean_sha256": clean_digests,
                "question": sample.prompt,
                "references": list(sample.references),
                "choices": list(sample.choices),
                "clean_prediction": clean.predictions[row],
                "adversarial_prediction": attacked.predictions_8bit[place],
                "broken": not attacked.right_8bit[place],
                "forward": int(attacked.forwards[place]),
                "backward": int(attacked.backwards[place]),
                "attack": spec.key,
                **({} if spec.target is None else {"target": spec.target}),
                "threat": str(threat.surface),
                "norm": threat.norm,
                "eps": threat.eps,
            }
            | {name: values[place] for name, values in attacked.details.items()}
            | ({} if attacked.prompts is None else {f"adversarial_{changed_text(attacked)}": attacked.prompts[place]})
        )
    text = "".join(json.dumps(plain(line), ensure_ascii=False) + "\n" for line in lines)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    about = {
        "schema": SCHEMA,
        "source": {"model": model, "fingerprint": runner.pipeline.fingerprint()},
        "task": runner.task.name,
        **data,
        "attack": spec.to_dict(),
        "threat": str(threat.surface),
        "norm": threat.norm,
        "eps": threat.eps,
        "seed": runner.seed,
        "n": len(clean.right),
        "attacked": len(lines),
        "broken": sum(line["broken"] for line in lines),
        "whole_pictures": whole,
        "versions": versions(),
        "manifest_sha256": _digest(folder / MANIFEST),
    }
    (folder / ABOUT).write_text(json.dumps(plain(about), indent=1, ensure_ascii=False), encoding="utf-8")


def read_set(folder: Path) -> AdversarialSet:
    """A set whose files are all those that were written.

    Raises:
        ValueError: no set, a file that is missing, changed or saved again as JPEG, or an adversarial input that another
            model cannot take; names it.
    """
    folder = Path(folder).expanduser()
    about = _about(folder)
    if _digest(folder / MANIFEST) != about["manifest_sha256"]:
        raise ValueError(f"{folder / MANIFEST} was changed after it was written; make the set again, or restore it")
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{folder} holds no attacked sample; the source model was right on none")
    for line in lines:
        for files, digests in (("files", "sha256"), ("clean_files", "clean_sha256")):
            for name, digest in zip(line[files], line[digests], strict=True):
                _check(folder / name, digest)
    found = AdversarialSet(folder, about, lines)
    _check_movable(found)
    return found


def _about(folder: Path) -> dict[str, Any]:
    for name in (ABOUT, MANIFEST):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}; expected a folder that cmai-fast attack --save-images has written"
            )
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about["schema"] != SCHEMA:
            raise ValueError(f"its schema is {about['schema']}, expected {SCHEMA}")
        return {**about, "manifest_sha256": about["manifest_sha256"], "source": dict(about["source"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / ABOUT} cannot be read ({error}); make the set again") from None


def _check(file: Path, digest: str) -> None:
    if not file.is_file():
        raise ValueError(f"{file} is missing; the set's manifest names it")
    if _digest(file) == digest:
        return
    if file.read_bytes()[:2] == b"\xff\xd8" and file.suffix == ".png":
        raise ValueError(
            f"{file} is a JPEG file, which loses most of a perturbation; expected the PNG that was written. To attack "
            "through JPEG, make the set with --threat upload:jpeg=75"
        )
    raise ValueError(f"{file} was changed after the set was written (its SHA-256 differs); restore it")


def _check_movable(found: AdversarialSet) -> None:
    name = found.about["attack"]["name"]
    if not found.about["whole_pictures"]:
        raise ValueError(
            f"{found.folder} holds the tiles that its source model reads, which are no pictures for another model; "
            "make the set with --threat upload"
        )
    if name in ATTACKS and ATTACKS[name].text and "adversarial_question" not in found.lines[0]:
        what = "captions" if "adversarial_captions" in found.lines[0] else "embeddings"
        raise ValueError(f"{found.folder} was made by {name}, which changes {what} of one model; no other reads them")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()

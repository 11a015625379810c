"""Adversarial sets as other tools read them: garak (JSON lines of conversations) and PyRIT (a seed dataset).

Both take the paths of pictures, which are written as absolute ones: export again after a set has moved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cmai_fast.evaluation.saved import AdversarialSet, read_set
from cmai_fast.files import write_text


def export_set(folder: Path, kind: str) -> Path:
    """Writes `garak.jsonl` or `pyrit.yaml` into the folder of a set (`saved.read_set`), from its attacked samples.

    Raises:
        ValueError: an unknown tool, a set that was changed, or a sample that the tool cannot take.
    """
    check_export([kind], folder)
    found = read_set(folder)
    name, write = _KINDS[kind]
    return write_text(write(found), found.folder / name)


def check_export(kinds: Sequence[str], folder: Path | None) -> None:
    """Raises ValueError for an unknown tool, or without a folder for the set."""
    for kind in kinds:
        if kind not in _KINDS:
            raise ValueError(f"cannot export for {kind!r}; expected one of {', '.join(_KINDS)}")
        if folder is None:
            raise ValueError(f"--export {kind} needs the folder of a set; name one with --save-images")


def _garak(found: AdversarialSet) -> str:
    """A line per sample, as `garak.attempt.Conversation.from_dict` reads it: a user's turn with text and picture."""
    written = []
    for sample, line in zip(found.samples(attacked=True), found.lines, strict=True):
        if len(sample.images) != 1:
            raise ValueError(
                f"sample {sample.id!r} has {len(sample.images)} pictures, and a message of garak holds one; export for "
                "pyrit"
            )
        path = Path(sample.images[0]).resolve()
        message = {
            "text": sample.prompt,
            "lang": "*",  # not to be translated
            "data_path": str(path),
            "data_type": [_MIME[path.suffix], None],
            "data_checksum": line["sha256"][0],
        }
        conversation = {"turns": [{"role": "user", "content": message}], "notes": _notes(line)}
        written.append(json.dumps(conversation, ensure_ascii=False) + "\n")
    return "".join(written)


def _pyrit(found: AdversarialSet) -> str:
    """A seed dataset as `pyrit.models.SeedDataset.from_yaml_file` reads it, a group per sample: text, then pictures.

    It is written as JSON, which is YAML too.
    """
    source, attack, seeds = found.about["source"]["model"], found.lines[0]["attack"], []
    for sample, line in zip(found.samples(attacked=True), found.lines, strict=True):
        parts = [(_literal(sample.prompt), "text")] if sample.prompt else []
        parts += [(_literal(str(Path(path).resolve())), "image_path") for path in sample.images]
        for value, kind in parts:
            seeds.append(
                {
                    "value": value,
                    "data_type": kind,
                    "role": "user",
                    "sequence": 0,
                    "prompt_group_alias": f"sample {sample.id}",
                    "metadata": _notes(line),
                }
            )
    dataset: dict[str, Any] = {
        "dataset_name": f"cmai_fast {attack} on {source}",
        "description": f"{len(found.lines)} adversarial samples of {attack}, made on {source}.",
        "source": "cmai-fast",
        "seed_type": "prompt",
        "seeds": seeds,
    }
    return json.dumps(dataset, indent=1, ensure_ascii=False) + "\n"


def _notes(line: dict[str, Any]) -> dict[str, Any]:
    keys = ("id", "references", "clean_prediction", "adversarial_prediction", "broken", "target", "attack", "threat",
            "norm", "eps")  # fmt: skip
    return {key: line[key] for key in keys if key in line}


def _literal(text: str) -> str:
    """PyRIT renders the values of a YAML file as Jinja templates: text with braces is a string of one."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if "{" in text else text


_MIME = {".png": "image/png", ".jpg": "image/jpeg"}
_KINDS: dict[str, tuple[str, Callable[[AdversarialSet], str]]] = {
    "garak": ("garak.jsonl", _garak), "pyrit": ("pyrit.yaml", _pyrit)
}  # fmt: skip

"""Store the case for a person."""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from PIL import Image

from cmai_fast.arm.policies.policy import Case, Decision, policy
from cmai_fast.files import plain, write_bytes
from cmai_fast.pipeline import Pipeline

CASES, IMAGES = "cases.jsonl", "images"


@policy("review", label="Store the case for a person, without an answer")
@dataclass(frozen=True)
class Review:
    """Withholds the answer and appends the case to `cases.jsonl`, one line of JSON per case. It always decides.

    The lines of a batch are appended in one write, under a lock, and are on disk before the decisions are returned.
    A full disk is an OSError, so that no case is lost unseen. Threads and processes may share a folder. Keys of a line:
    `case` (also in the decision's details), `time` (UTC), `id` (of the sample; in `decide_batch` its place),
    `question`, `answer` (the model's), `score`, `threshold`, `model`, `images` (SHA-256 of the PNG files).

    Args:
        folder: made if it does not exist.
        images: whether the pictures are kept, as `images/SHA-256.png`; else only their digests.
    """

    folder: str = ""
    images: bool = True

    def __post_init__(self) -> None:
        if not str(self.folder).strip():
            raise ValueError("review: folder is empty; expected the folder that cases are stored in, such as review")

    def bind(self, pipeline: Pipeline) -> Review:
        """Makes the folder, so that one that cannot be written shows before the first case."""
        folder = Path(self.folder)
        try:
            (folder / IMAGES if self.images else folder).mkdir(parents=True, exist_ok=True)
            append(folder / CASES, b"")
        except OSError as error:
            raise ValueError(
                f"review: folder {folder} cannot be written ({error.strerror or error}); name another"
            ) from error
        return self

    def decide_batch(self, cases: Sequence[Case]) -> list[Decision | None]:
        rows = [self._record(case) for case in cases]
        append(Path(self.folder) / CASES, "".join(json.dumps(plain(row)) + "\n" for row in rows).encode())
        return [case.decision(None, "review", case=row["case"]) for case, row in zip(cases, rows, strict=True)]

    def _record(self, case: Case) -> dict[str, Any]:
        return {
            "case": uuid.uuid4().hex,
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "id": case.sample.id,
            "question": case.sample.prompt,
            "answer": case.answer,
            "score": case.score,
            "threshold": case.threshold,
            "model": case.pipeline.name,
            "images": [self._stored(picture) for picture in case.sample.images],
        }

    def _stored(self, picture: Image.Image) -> str:
        file = io.BytesIO()
        picture.save(file, "PNG")
        digest = hashlib.sha256(file.getvalue()).hexdigest()
        path = Path(self.folder) / IMAGES / f"{digest}.png"
        if self.images and not path.is_file():
            # Under a name of its own first: threads may store the same picture at the same time.
            own = path.with_name(f".{uuid.uuid4().hex}.png")
            write_bytes(file.getvalue(), own)
            os.replace(own, path)
        return digest


def append(path: Path, lines: bytes) -> None:
    """Appends whole lines: all of them, or none if the disk is full. They are on disk afterwards.

    A line that a killed writer left incomplete is closed first, so that it does not swallow the next one.

    Raises:
        OSError: names the file; it is as it was.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        _lock(descriptor)  # until it is closed
        size = os.fstat(descriptor).st_size
        if size and lines and os.pread(descriptor, 1, size - 1) != b"\n":
            lines = b"\n" + lines
        try:
            written = os.write(descriptor, lines)
            if written < len(lines):
                raise OSError(28, "no space left on device")
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, size)
            reason = error.strerror or str(error)
            raise OSError(
                error.errno, f"could not append to {path}: {reason}; the file is as it was. Free some space"
            ) from error
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX)

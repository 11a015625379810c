"""The state of a run on disk: a run that is killed at any moment resumes, with the same numbers.

A run has its own folder (`run.json`: its settings; `lock`: held by the process that works on it) with one folder per
stage: `parts.jsonl`, a line per finished batch, and `0.safetensors`, `1.safetensors`, ... with the images of each line
if the stage keeps them. Images are written before their line, so a line means that the batch is complete. A truncated
last line is dropped. Of several processes that share a run, the first one writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from cmai_fast.evaluation.processes import Processes
from cmai_fast.files import plain, write_bytes, write_text

_SETTINGS, _LOCK, _PARTS = "run.json", "lock", "parts.jsonl"
# Settings that may differ between a run and its resumption; without graphs, since a run may end because of them.
_FREE = frozenset({"command", "cuda_graphs"})


class State:
    """A folder of stages, and of the states of parts of a run, such as each model's."""

    def __init__(self, folder: Path, keep: object = None, processes: Processes | None = None) -> None:
        self.folder, self._keep, self.processes = Path(folder), keep, processes or Processes()

    @classmethod
    def temporary(cls) -> State:
        """A state for a run that is not resumed; it is deleted with the last of its journals."""
        folder = tempfile.TemporaryDirectory(prefix="cmai-fast-")
        return cls(Path(folder.name), folder)

    def part(self, name: str) -> State:
        return State(self.folder / quote(name, safe=""), self._keep, self.processes)

    def journal(self, name: str) -> Journal:
        return Journal(self.folder / quote(name, safe=""), self._keep, self.processes.first)


class Journal(Mapping[int, Tensor]):
    """The finished batches of one stage, in `entries`; as a mapping, the stored images by row.

    Args:
        folder: of the stage.
        keep: what must live as long as the journal.
        writes: whether this process writes what is appended; else another one does, for all.

    Raises:
        ValueError: a complete line is damaged.
        OSError: the disk is full; names the folder.
    """

    def __init__(self, folder: Path, keep: object = None, writes: bool = True) -> None:
        self.folder, self._file, self._keep, self._writes = folder, folder / _PARTS, keep, writes
        self.entries: list[dict[str, Any]] = []
        self._place: dict[int, int] = {}  # row -> the entry with its image
        if not self._file.is_file():
            return
        whole, _, torn = self._file.read_bytes().rpartition(b"\n")
        if torn and writes:
            os.truncate(self._file, self._file.stat().st_size - len(torn))
        for line in whole.splitlines():
            try:
                self._add(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"line {len(self.entries) + 1} of {self._file} is damaged; delete {folder} to run this stage again"
                ) from None

    @property
    def rows(self) -> list[int]:
        return [row for entry in self.entries for row in entry["rows"]]

    def append(self, entry: dict[str, Any], images: Mapping[int, Tensor] | None = None) -> None:
        """Adds a finished batch; `entry["rows"]` are the indices of its samples, `images` those to keep, by row: pixels
        in [0, 1], or 8-bit levels, which are read as such pixels."""
        entry = {**entry, "images": images is not None}
        if self._writes:
            self._write(entry, images)
        self._add(entry)

    def _write(self, entry: dict[str, Any], images: Mapping[int, Tensor] | None) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if images is not None:
                tensors = {str(row): image.detach().cpu().contiguous() for row, image in images.items()}
                write_bytes(save(tensors), self._images(len(self.entries)))
            with open(self._file, "ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(
                error.errno, f"could not write to {self.folder}: {reason}. Free some space and run again with --resume"
            ) from error

    def _add(self, entry: dict[str, Any]) -> None:
        if entry["images"]:
            self._place.update(dict.fromkeys(entry["rows"], len(self.entries)))
        self.entries.append(entry)

    def _images(self, place: int) -> Path:
        return self.folder / f"{place}.safetensors"

    def __getitem__(self, row: int) -> Tensor:
        with safe_open(self._images(self._place[row]), "pt") as file:
            image = file.get_tensor(str(row))
            return image.float() / 255 if image.dtype == torch.uint8 else image

    def __iter__(self) -> Iterator[int]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


def check_resumable(folder: Path, settings: Mapping[str, Any], resume: bool, what: Path) -> bool:
    """Whether `folder` holds an unfinished run with these settings; changes nothing.

    `what` is the run's name in errors: its output.

    Raises:
        ValueError: there is a run with other settings, one that is still running, or one and `resume` is not given.
    """
    if not (folder / _SETTINGS).is_file():
        return False
    if not resume:
        raise ValueError(f"{what} holds an unfinished run; continue it with --resume, or name another with --out")
    check_settings(_read(folder / _SETTINGS), settings, what)
    if (folder / _LOCK).exists():
        with _locked(folder, what):
            pass
    return True


def check_settings(began: Mapping[str, Any], mine: Mapping[str, Any], what: Path) -> None:
    """Raises ValueError if settings differ from those that the run was started with, and lists them."""
    mine = {k: v for k, v in plain(dict(mine)).items() if k not in _FREE}
    missing = sorted(mine.keys() - began.keys())
    if missing:
        raise ValueError(
            f"{what} was written by another version of cmai-fast (it has no {missing[0]}); name a new --out"
        )
    changed = [f"{k} was {began[k]!r}, now {v!r}" for k, v in mine.items() if began[k] != v]
    if changed:
        raise ValueError(f"{what} was started with other settings ({'; '.join(changed)}); resume with the same ones")


@contextlib.contextmanager
def running(folder: Path, settings: Mapping[str, Any], what: Path) -> Iterator[State]:
    """The state in `folder`, new or existing, locked by this process.

    It is deleted at the end; after an exception only if nothing was finished.

    Raises:
        ValueError: another process has locked it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"could not create {folder}: {error.strerror}; name another with --out") from error
    with _locked(folder, what):
        if not (folder / _SETTINGS).is_file():
            write_text(json.dumps(plain(dict(settings)), indent=1) + "\n", folder / _SETTINGS)
        try:
            yield State(folder)
        except BaseException:
            if {path.name for path in folder.iterdir()} <= {_SETTINGS, _LOCK}:  # nothing was done
                shutil.rmtree(folder)
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()  # unless something else is there
            raise
        shutil.rmtree(folder)


@contextlib.contextmanager
def shared(claimed: contextlib.AbstractContextManager[State], processes: Processes) -> Iterator[State]:
    """The state that the first process claims, for all of them; it is given back when all are done with it."""
    with contextlib.ExitStack() as mine:
        folder = processes.by_first(lambda: mine.enter_context(claimed).folder)
        yield State(folder, mine, processes)
        processes.gathered(None)


@contextlib.contextmanager
def _locked(folder: Path, what: Path) -> Iterator[None]:
    """Locks `folder`; the system releases the lock when the process ends, however it ends."""
    import fcntl

    path = folder / _LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode(errors="replace") or "unknown"
            raise ValueError(
                f"{what} is being written by another process (id {owner}); wait for it to end, or name another --out"
            ) from None
        # The run that held it may have finished and deleted it between opening and locking.
        if not path.exists() or os.fstat(descriptor).st_ino != path.stat().st_ino:
            raise ValueError(f"{what} was finished by another process just now; run again with --resume to see it")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged; delete {path.parent} to start the run again")
    return found

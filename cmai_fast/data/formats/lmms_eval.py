"""Tasks of lmms-eval: their documents as samples (needs `lmms-eval`).

Only what lmms-eval has had since 0.2 is used: `TaskManager`, `get_task_dict`, and `doc_to_visual`, `doc_to_text` and
`doc_to_target` of a task.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cmai_fast.data.formats.format import data_format
from cmai_fast.data.records import ANSWERS, check_unique, sample_of
from cmai_fast.data.sample import Sample, SampleList


def check(place: str) -> None:
    task, colon, folder = place.partition(":")
    if not task or (colon and not folder):
        raise ValueError(
            f"lmms-eval:{place} names no task; expected lmms-eval:TASK, as in lmms-eval:vqav2_val, or "
            "lmms-eval:TASK:FOLDER for a task file of your own"
        )
    if folder and not Path(folder).expanduser().is_dir():
        raise ValueError(f"lmms-eval:{place}: there is no folder {folder}; expected one with task files (.yaml)")
    if "lmms_eval" not in sys.modules and find_spec("lmms_eval") is None:
        raise ValueError(f"lmms-eval:{place} needs the package lmms-eval: pip install 'cmai-fast[lmms-eval]'")


def fingerprint(place: str) -> str:
    docs = _task(place).eval_docs
    return f"lmms-eval {version('lmms_eval')} {place} {getattr(docs, '_fingerprint', len(docs))}"


@data_format("lmms-eval", takes="TASK[:FOLDER]", check=check, fingerprint=fingerprint)
def read_lmms_eval(place: str, split: str, fields: Mapping[str, str]) -> Documents:
    return Documents(_task(place), f"lmms-eval:{place}", fields)


@lru_cache(maxsize=1)  # it takes seconds to index the tasks, and a command asks more than once
def _task(place: str) -> Any:
    """lmms-eval's own object of a task, with its documents.

    Raises:
        ValueError: lmms-eval cannot be imported, knows no such task, or cannot load its data.
    """
    check(place)
    name, _, folder = place.partition(":")
    with _quiet():
        try:
            from lmms_eval.tasks import TaskManager, get_task_dict
        except Exception as error:  # it imports dozens of packages, and any of them may be broken
            raise ValueError(f"lmms-eval:{place}: the package lmms-eval cannot be imported: {_line(error)}") from error
        manager = TaskManager(
            include_path=str(Path(folder).expanduser().absolute()) if folder else None, include_defaults=not folder
        )
        several = name in manager.all_groups or name in manager.all_tags
        if several or name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [n for n in manager.all_subtasks if n != name], n=4)
            what = "is a group of tasks" if several else "is no task"
            raise ValueError(
                f"lmms-eval:{place}: {name} {what} of lmms-eval {version('lmms_eval')}; expected one task"
                + (f", such as {', '.join(near)}" if near else "")
            )
        try:
            return get_task_dict([name], manager)[name]
        except Exception as error:  # from the network, the hub or the task's own code
            raise ValueError(f"lmms-eval:{place} cannot be read: {_line(error.__cause__ or error)}") from error


class Documents(SampleList):
    """The documents of a task in lmms-eval's order; pictures are decoded when a sample is accessed.

    Args:
        task: lmms-eval's object of a task.
        name: of the data, in errors.
        fields: our key to a column of the documents, which then replaces what the task makes.

    Raises:
        ValueError: a column that the documents do not have, or two documents with one mapped id. On access: names the
            document and what is wrong with it.
    """

    def __init__(self, task: Any, name: str, fields: Mapping[str, str]) -> None:
        self._task, self._name, self._docs = task, name, task.eval_docs
        columns = list(getattr(self._docs, "column_names", ()) or (self._docs[0] if len(self._docs) else ()))
        for own, theirs in fields.items():
            if theirs not in columns:
                raise ValueError(
                    f"{name}: no column {theirs!r}, which --map {own}={theirs} names; expected one of "
                    f"{', '.join(columns)}"
                )
        self._fields = dict(fields)
        if "id" in fields:
            ids = self._docs[fields["id"]] if hasattr(self._docs, "column_names") else [
                doc[fields["id"]] for doc in self._docs
            ]  # fmt: skip
            check_unique(Sample(own, (), "", where=self._where(i)) for i, own in enumerate(ids))

    def __len__(self) -> int:
        return len(self._docs)

    def at(self, place: int) -> Sample:
        where = self._where(place)
        doc = _called("the data set", self._docs.__getitem__, place, where)  # decodes its pictures
        shown = _called("doc_to_visual", self._task.doc_to_visual, doc, where)
        record = {
            "id": place,
            "question": _called("doc_to_text", self._task.doc_to_text, doc, where),
            "images": shown if isinstance(shown, (list, tuple)) else [] if shown is None else [shown],
            **self._answers(doc, where),
            **{f"document.{theirs}": doc[theirs] for theirs in self._fields.values()},
        }
        fields = {own: f"document.{theirs}" for own, theirs in self._fields.items()}
        return sample_of(record, where, place, None, fields)

    def _where(self, place: int) -> str:
        return f"{self._name} document {place}"

    def _answers(self, doc: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The target, or the document's own answers: in some tasks (VQAv2, Flickr30k) the target is a word that is no
        column, and the task is scored by other columns."""
        config = self._task.config
        own = getattr(config, "doc_to_target", None)
        if own is None or (isinstance(own, str) and own not in doc and "{" not in own):
            return {key: doc[key] for key in ANSWERS if doc.get(key) is not None}
        target = _called("doc_to_target", self._task.doc_to_target, doc, where)
        choices: Any = ()
        if getattr(config, "doc_to_choice", None) is not None:
            choices = _called("doc_to_choice", self._task.doc_to_choice, doc, where)
        if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(choices):
            target = choices[target]
        if target is None or target in ("", []):  # a hidden test set
            return {}
        found: dict[str, Any] = {"answers" if isinstance(target, list) else "answer": target}
        # Where the target is a letter, its choices are texts that the prompt lists.
        return found | ({"choices": list(choices)} if target in choices else {})


def _called(what: str, function: Callable[[Any], Any], value: Any, where: str) -> Any:
    try:
        return function(value)
    except Exception as error:  # the task's own code
        raise ValueError(f"{where}: {what} fails: {type(error).__name__}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lmms-eval's log, which has a line for each file that is no task."""
    try:
        from loguru import logger
    except ImportError:
        yield
        return
    logger.disable("lmms_eval")
    try:
        yield
    finally:
        logger.enable("lmms_eval")

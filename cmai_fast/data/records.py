"""Makes a `Sample` from a record with any of the common key names; errors name file, line and sample.

docs/data.md lists the keys. Nothing here decodes a picture or imports PyTorch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cmai_fast.data.chat import Chat, chat_of
from cmai_fast.data.inline import picture_of
from cmai_fast.data.sample import Sample

PICTURES = ("image", "images", "file_name", "file_names")
SEVERAL = ("images", "file_names")
QUESTIONS = ("question", "prompt")
ANSWERS = ("answer", "answers", "completion", "caption", "captions")
CHATS = ("messages", "conversations")
IDS = ("id", "sample_id", "question_id")
CHOICES = ("choices",)
GROUPS = (PICTURES, QUESTIONS, ANSWERS, CHATS, IDS, CHOICES)
KEYS = tuple(key for group in GROUPS for key in group)
LISTS = ("images", "file_names", "answers", "captions", "choices", *CHATS)  # written as text in a table cell
NO_FIELDS: Mapping[str, str] = MappingProxyType({})
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def sample_of(
    record: Any,
    where: str,
    place: int,
    folder: Path | None = None,
    fields: Mapping[str, str] = NO_FIELDS,
    pictures: bool = True,
) -> Sample:
    """The sample of one record.

    Args:
        record: a mapping with keys among `KEYS`; other keys are ignored.
        where: file and line, for errors.
        place: the id of a record without one.
        folder: the folder that picture paths are relative to; None: the working directory.
        fields: our key to theirs, as `--map question=text`; a mapped key replaces the other keys of its group.
        pictures: False for a record without its pictures, of which only the text is checked.

    Raises:
        ValueError: names `where`, the sample, the key, what was found and what was expected.
    """
    row = _Row(record, where, place, fields)
    chat = row.chat()
    own = [picture_of(v, row.name(key), folder) for key, v in row.pictures()] if pictures else []
    if chat is None:
        question, answers = row.question(), row.answers()
    else:
        question = chat.prompt
        own = chat.join([picture_of(v, row.name("image"), folder) for v in chat.images], own) if pictures else []
        answers = row.answers() if chat.answer is None else row.only(chat.answer)
    choices = row.choices(answers)
    if pictures and not own:
        row.check_unread()
    where = where if where != f"record {place}" else ""
    return Sample(row.id, tuple(own), question, answers, choices, where)


def check_fields(fields: Mapping[str, str]) -> None:
    """Raises ValueError for an unknown key of ours."""
    for own, theirs in fields.items():
        if own not in KEYS:
            raise ValueError(f"--map {own}={theirs}: unknown key {own!r}; expected one of {', '.join(KEYS)}")


def check_unique(samples: Iterable[Sample]) -> list[Sample]:
    """The samples as a list.

    Raises:
        ValueError: two samples with one id; names both.
    """
    seen: dict[Any, Sample] = {}
    for sample in samples:
        if sample.id in seen:
            raise ValueError(
                f"{sample.name}: {seen[sample.id].where or 'another'} has the same id; expected one id per "
                "record. Make them unique, or remove the ids: records are then numbered"
            )
        seen[sample.id] = sample
    return list(seen.values())


def listed(cell: str | None, name: str) -> list[Any] | None:
    """The list in a table cell: a JSON list, or texts separated by `|`."""
    if cell is None:
        return None
    if not cell.lstrip().startswith("["):
        return [part.strip() for part in cell.split("|")]
    try:
        return json.loads(cell)
    except ValueError as error:
        raise ValueError(f"{name} is not a valid JSON list ({error}); expected [...] or a|b|c") from None


class _Row:
    """One record under our own names."""

    def __init__(self, record: Any, where: str, place: int, fields: Mapping[str, str]) -> None:
        if not isinstance(record, Mapping):
            raise ValueError(
                f"{where} is {_shown(record)}; expected a record with the keys question (or messages), answer, image"
            )
        self.where, self.own_id, self.keys = where, False, [str(key) for key in record]
        self.id: Any = None
        self.values = {k: record[k] for k in KEYS if k in record}
        self.rest = {k: v for k, v in record.items() if k not in self.values and k not in fields.values()}
        self._rename(record, fields)
        key = self._one_of(IDS)
        value = place if key is None else self.values[key]
        value = value.tolist() if hasattr(value, "tolist") else value  # NumPy scalars, tensors
        try:
            hash(value)
        except TypeError:
            raise self.error(f"{key} is {_shown(value)}; expected a text or a number") from None
        if value != value:
            raise self.error(f"{key} is {value}; expected a text or a number")
        self.id, self.own_id = value, key is not None

    def _rename(self, record: Mapping[str, Any], fields: Mapping[str, str]) -> None:
        self.mapped: set[str] = set(fields)
        if not fields:
            return
        mapped = {}
        for own, theirs in fields.items():
            # Pictures in a column each: images=left_image+right_image.
            several = own in SEVERAL and theirs not in record and "+" in theirs
            for part in theirs.split("+") if several else (theirs,):
                if part not in record:
                    raise self.error(f"no key {part!r}, which --map {own}={theirs} names; {self._has()}")
            mapped[own] = [record[part] for part in theirs.split("+")] if several else record[theirs]
        for group in GROUPS:
            # A mapped question replaces a chat; a mapped chat replaces question and answer.
            more = CHATS if group == QUESTIONS else (*QUESTIONS, *ANSWERS) if group == CHATS else ()
            rivals = (*group, *more)
            if any(key in mapped for key in group):
                self.values = {k: v for k, v in self.values.items() if k not in rivals}
        self.values |= mapped

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.name()}: {message}")

    def name(self, key: str = "") -> str:
        """File, line, sample and key."""
        sample = f" (sample {self.id!r})" if self.own_id else ""
        return f"{self.where}{sample}" + (f": {key}" if key else "")

    def _has(self) -> str:
        return f"its keys are {', '.join(self.keys) or 'none'}"

    def _one_of(self, group: Sequence[str]) -> str | None:
        """The key of the group that has a value."""
        present = [key for key in group if self.values.get(key) is not None]
        if len(present) > 1 and group != IDS:
            raise self.error(f"found both {present[0]} and {present[1]}; choose one: --map {present[0]}=KEY")
        return present[0] if present else None

    def pictures(self) -> list[tuple[str, Any]]:
        """Key and value of each picture."""
        key = self._one_of(PICTURES)
        if key is None:
            return []
        value = self.values[key]
        if not isinstance(value, (list, tuple)):
            return [(key, value)]
        if any(isinstance(v, (int, float, list, tuple)) for v in value):
            raise self.error(f"{key} is a list of numbers; expected a path, or the bytes of a PNG or JPEG")
        return [(f"{key}[{i}]", v) for i, v in enumerate(value)]

    def check_unread(self) -> None:
        """Refuses a picture under an unknown key: ignoring it would ask the question without its picture."""
        for key, value in self.rest.items():
            path = isinstance(value, str) and value.lower().endswith(_SUFFIXES)
            data = isinstance(value, Mapping) and {"bytes", "path"} <= set(value)
            if path or data or (hasattr(value, "convert") and hasattr(value, "mode")):
                raise self.error(f"no image, but {key} is {_shown(value)}; if that is it: --map image={key}")

    def chat(self) -> Chat | None:
        key = self._one_of(CHATS)
        if key is None and isinstance(self.values.get("prompt"), (list, tuple)):  # TRL's prompt and completion
            closing = self.values.get("completion")
            closing = self.values.pop("completion") if isinstance(closing, (list, tuple)) else []
            return chat_of([*self.values["prompt"], *closing], self.name("prompt"))
        if key is None:
            return None
        rival = self._one_of(QUESTIONS)
        if rival is not None:
            raise self.error(f"found both {key} and {rival}; choose: --map {key}={key} or --map {rival}={rival}")
        turns: Any = self.values[key]
        if isinstance(turns, str):  # a cell of a table
            turns = listed(turns, self.name(key))
        return chat_of(turns, self.name(key))

    def question(self) -> str:
        key = self._one_of(QUESTIONS)
        if key is None:
            empty = next((key for key in QUESTIONS if key in self.values), None)
            if empty is not None:
                raise self.error(f"{empty} is empty; expected a text")
            if any(self.values.get(key) is not None for key in ("caption", "captions")):
                return ""  # a picture and its caption, for dual encoders
            raise self.error(
                f"no question; expected {', '.join(QUESTIONS + CHATS)} (or caption, for a picture and its text); "
                f"{self._has()}. Other names: --map question=KEY"
            )
        value = self.values[key]
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{key} is {_shown(value)}; expected a text that is not empty")
        return value

    def only(self, answer: str) -> tuple[str, ...]:
        """The answer of a chat, unless the record gives another; one named by --map takes precedence."""
        if self.mapped & set(ANSWERS):
            return self.answers()
        rival = next((key for key in ("answer", "answers", "completion") if self.values.get(key) is not None), None)
        if rival is not None:
            raise self.error(f"the chat ends with an answer, and there is also {rival}; choose: --map answer={rival}")
        return (answer,)

    def answers(self) -> tuple[str, ...]:
        """Right answers; training uses the first. Duplicates are kept, since some scorers count them."""
        captions = ("caption", "captions")
        there = [k for k in ANSWERS if k in self.values and k not in captions] or [
            k for k in captions if k in self.values
        ]
        given = [k for k in there if self.values[k] is not None]
        if there and not given:
            raise self.error(f"{there[0]} is None; expected a text (leave the key out if no answer is known)")
        found: list[str] = []
        for key in given:
            texts = self._texts(key, nested="answer")
            if found and texts.count(found[0]):  # `answer` is also in `answers`: it comes first
                texts.remove(found[0])
            found += texts
        return tuple(found)

    def choices(self, answers: Sequence[str]) -> tuple[str, ...]:
        if self.values.get("choices") is None:
            return ()
        choices = self._texts("choices", nested="text")
        known = {" ".join(c.casefold().split()) for c in choices}
        if answers and not any(" ".join(a.casefold().split()) in known for a in answers):
            raise self.error(
                f"the answer {answers[0]!r} is not among the choices {', '.join(map(repr, choices))}; expected the "
                "text of a choice, not its number or letter"
            )
        return tuple(choices)

    def _texts(self, key: str, nested: str) -> list[str]:
        """One text or several, in a list or each under `nested` (VQAv2: answers: [{"answer": ...}])."""
        value = self.values[key]
        if hasattr(value, "tolist"):  # NumPy arrays and scalars
            value = value.tolist()
        if not isinstance(value, (list, tuple)):
            if key in LISTS and (key == "choices" or not isinstance(value, (str, Real))):
                raise self.error(f"{key} is {_shown(value)}; expected a list of texts")
            return [self._text(value, key)]
        if not value:
            raise self.error(f"{key} is an empty list; expected at least one text")
        items = [v[nested] if isinstance(v, Mapping) and nested in v else v for v in value]
        return [self._text(v, f"{key}[{i}]") for i, v in enumerate(items)]

    def _text(self, value: Any, key: str) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, (Real, Decimal)) and math.isfinite(value):
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{key} is {_shown(value)}; expected a text that is not empty, a number, or true or false")
        return value


def _shown(value: Any) -> str:
    """A value for errors: shortened, with its type if that is not plain."""
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    plain = value is None or isinstance(value, (str, int, float))
    return text if plain else f"{text} ({type(value).__name__})"

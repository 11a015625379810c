"""VQAv2 (and VQA v1) in its official files, with the ten human answers of each question.

The first answer is the most frequent one (`multiple_choice_answer`), which training uses; the others keep their order.

Source: Goyal et al., 2017, "Making the V in VQA Matter"; https://visualqa.org/download.html.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cmai_fast.data.formats.format import data_format
from cmai_fast.data.formats.official import (
    digest_of_files,
    files_of,
    first_folder,
    list_of,
    no_fields,
    number_of,
    read_json,
    text_of,
)
from cmai_fast.data.sample import Sample

_UNDER = ("annotations", "questions")
_QUESTIONS = r"(?:v2_)?OpenEnded_mscoco_([a-z-]+\d{4})_questions\.json"
_ANNOTATIONS = r"(?:v2_)?mscoco_([a-z-]+\d{4})_annotations\.json"
_PICTURES = ("{}", "images/{}", "Images/mscoco/{}", "images/mscoco/{}", "mscoco/{}", "coco/{}", "images")

# (question_id, image_id, multiple_choice_answer, answers) of an annotation
_Annotation = tuple[Any, Any, Any, Any]


def _questions(folder: str) -> dict[str, Path]:
    return files_of(folder, _QUESTIONS, _UNDER, "v2_OpenEnded_mscoco_val2014_questions.json")


def _annotations(folder: str) -> dict[str, Path]:
    return files_of(folder, _ANNOTATIONS, _UNDER)


def splits_of(folder: str) -> tuple[str, ...]:
    return tuple(_questions(folder))


def fingerprint(folder: str) -> str:
    return f"{digest_of_files(_questions(folder))} answers {digest_of_files(_annotations(folder))}"


@data_format("vqav2", takes="FOLDER", splits=splits_of, fingerprint=fingerprint, lone=True)
def read_vqav2(folder: str, split: str, fields: Mapping[str, str]) -> Iterator[Sample]:
    no_fields("vqav2", fields)
    file, answers = _questions(folder)[split], _annotations(folder).get(split)
    if answers is None and not split.startswith("test"):
        named = file.name.replace("OpenEnded_", "").replace("questions", "annotations")
        raise ValueError(f"{file} has no annotations beside it; expected {named} in the same folder or in annotations/")
    questions = list_of(read_json(file), "questions", file)
    images = _images(questions, file)
    references = {} if answers is None else _references(answers, file, images)
    pictures = split.replace("test-dev", "test")  # both sets of questions are about the images of test2015
    photos = str(first_folder(folder, [place.format(pictures) for place in _PICTURES]))
    for i, (question, (own, image)) in enumerate(zip(questions, images.items(), strict=True)):
        where = f"{file} questions[{i}]"
        path = f"{photos}/COCO_{pictures}_{image:012d}.jpg"
        yield Sample(own, (path,), text_of(question, "question", where), references.get(own, ()), where=where)


def _images(questions: list[Any], file: Path) -> dict[int, int]:
    """The image of each question, by their ids.

    Raises:
        ValueError: an id that is no number, or two questions with one id.
    """
    found: dict[int, int] = {}
    for i, question in enumerate(questions):
        where = f"{file} questions[{i}]"
        own = number_of(question, "question_id", where)
        if own in found:
            raise ValueError(f"{where}: question_id {own} is also that of questions[{[*found].index(own)}]; keep one")
        found[own] = number_of(question, "image_id", where)
    return found


def _references(path: Path, file: Path, images: Mapping[int, int]) -> dict[int, tuple[str, ...]]:
    """The answers of each question, by its id.

    Raises:
        ValueError: a question without an annotation, an annotation without its question or of another image, two of
            one question, or answers that are not texts.
    """
    texts: dict[str, str] = {}  # a few thousand different answers among millions
    lists: dict[tuple[str, ...], tuple[str, ...]] = {}
    found: dict[int, tuple[str, ...]] = {}
    for i, annotation in enumerate(list_of(read_json(path, _shorter), "annotations", path)):
        where = f"{path} annotations[{i}]"
        if not isinstance(annotation, tuple):
            raise ValueError(f"{where} has no question_id or no answers; expected the official file")
        own, image, chosen, answers = annotation
        if own in found:
            raise ValueError(f"{where}: question_id {own!r} has a second annotation; keep one")
        if own not in images:
            raise ValueError(
                f"{where}: question_id {own!r} is not in {file}; expected questions and annotations of the same version"
            )
        if images[own] != image:
            raise ValueError(f"{where}: image_id is {image!r}; question {own!r} in {file} is about image {images[own]}")
        texts_of = _ordered(answers, chosen, f"{where} (question_id {own!r})")
        texts_of = tuple(texts.setdefault(text, text) for text in texts_of)
        found[own] = lists.setdefault(texts_of, texts_of)
    without = [(i, own) for i, own in enumerate(images) if own not in found]
    if without:
        i, own = without[0]
        raise ValueError(
            f"{len(without)} of {len(images)} questions have no annotation in {path}; the first is question_id "
            f"{own!r} ({file} questions[{i}]). Expected questions and annotations of the same version"
        )
    return found


def _shorter(value: dict[str, Any]) -> Any:
    """An answer as its text alone, and an annotation as what is used of it."""
    if "answer_id" in value and "answer" in value:
        return value["answer"]
    if "question_id" in value and "answers" in value:
        return value["question_id"], value.get("image_id"), value.get("multiple_choice_answer"), value["answers"]
    return value


def _ordered(answers: Any, chosen: Any, where: str) -> tuple[str, ...]:
    """The answers as they are, but with one that the most people gave in front."""
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where}: answers is {answers!r:.80}; expected a list of texts")
    if chosen not in answers or not chosen.strip():
        said = Counter(answer for answer in answers if answer.strip())
        if not said:
            raise ValueError(f"{where}: all {len(answers)} answers are empty; expected at least one text")
        chosen = said.most_common(1)[0][0]
    at = answers.index(chosen)
    return (answers[at], *answers[:at], *answers[at + 1 :])

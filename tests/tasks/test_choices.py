"""Wrong answers for open questions."""

from __future__ import annotations

from typing import Any

import pytest

from cmai_fast.data import EasyVQA, Sample
from cmai_fast.tasks import TASKS, answer_kind, with_choices
from cmai_fast.tasks.choices import MOST

VQA = TASKS["vqa"]


def samples_of(*answers: str) -> list[Sample]:
    return [Sample(i, (), f"q{i}?", (a,)) for i, a in enumerate(answers)]


@pytest.mark.parametrize(
    "answer, kind",
    [("Yes", "yes/no"), ("no.", "yes/no"), ("12", "number"), ("-1,000.5", "number"), ("7 %", "number"), ("two", "text"),
     ("a1", "text"), ("1 2", "text"), ("None", "text")],
)  # fmt: skip
def test_kinds(answer, kind):
    assert answer_kind(answer) == kind


def test_wrong_answers_are_of_the_same_kind():
    samples = samples_of("yes", "3", "red", "4", "blue", "Red", "3")
    assert VQA.wrong_answers(samples[0], samples) == ("no",)  # nobody says no, and still it is the other one
    assert VQA.wrong_answers(samples[1], samples) == ("4",)
    assert VQA.wrong_answers(samples[2], samples) == ("blue",)
    assert VQA.wrong_answers(samples_of("5")[0], samples_of("red", "yes")) == ("red", "yes")  # no other number
    assert VQA.wrong_answers(Sample(0, (), "q?", ("red", "BLUE")), samples) == ("yes", "3", "4")


def test_an_answer_in_other_spelling_is_not_a_wrong_one():
    samples = samples_of("Two dogs.", "two  dogs", "Yes.", "a cat.", "A cat")
    assert VQA.wrong_answers(samples[0], samples) == ("a cat.",)
    assert VQA.wrong_answers(samples[2], samples) == ("no",)
    filled = [s.choices for s in with_choices(samples, VQA)]
    assert filled[:3] == [("Two dogs.", "a cat."), ("two  dogs", "a cat."), ("Yes.", "no")]
    assert filled[3:] == [("a cat.", "Two dogs."), ("A cat", "Two dogs.")]
    several = Sample(0, (), "q?", ("red", "crimson"), ("Red.", "blue", "crimson", "Blue", "?"))
    assert VQA.wrong_answers(several) == several.wrong_choices == ("blue", "?")


def test_choices_come_first():
    sample = Sample(0, (), "q?", ("red",), ("Red", "blue"))
    assert VQA.wrong_answers(sample, samples_of("green")) == ("blue",)
    assert with_choices([sample], VQA)[0] is sample


def test_samples_without_choices_get_them_from_the_whole_data_set():
    samples = samples_of("red", "yes", "blue", "3", "green", "red", "No")
    filled = with_choices(samples, VQA)
    assert len(filled) == 7 and [s.choices[0] for s in filled] == [s.answer for s in samples]
    assert set(filled[0].choices) == {"red", "blue", "green"}
    assert filled[1].choices == ("yes", "no") and filled[6].choices == ("No", "yes")
    assert set(filled[3].choices) == {"3", "red", "blue", "green", "yes", "No"}  # no other number
    assert (filled[4].id, filled[4].prompt, filled[4].references) == (4, "q4?", ("green",))
    assert [s.id for s in filled[5:]] == [5, 6]


def test_the_choices_do_not_depend_on_the_order_of_the_records():
    samples = [Sample(f"{a}{i}", (), "q?", (a,)) for i, a in enumerate("ab" * 3 + "cdefgh")]
    one = {s.id: s.choices for s in with_choices(samples, VQA)}
    assert one == {s.id: s.choices for s in with_choices(samples[::-1], VQA)}
    assert one["c6"][:3] == ("c", "a", "b")  # the most frequent first


def test_a_data_set_of_many_answers_keeps_the_most_frequent():
    samples = samples_of(*(f"word{i}" for i in range(3 * MOST)), *["often"] * 2, *map(str, range(5)))
    filled = with_choices(samples, VQA)
    assert len(filled[2 * MOST].choices) == MOST + 1 and "often" in filled[2 * MOST].choices
    assert set(filled[-1].choices) == {"0", "1", "2", "3", "4"}


def test_records_are_read_once_and_only_where_choices_are_missing():
    class Counted(list[Any]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            Counted.reads += 1
            return super().__getitem__(index)

    records = Counted({"question": "q?", "answer": a} for a in ("red", "blue", "green"))
    filled = with_choices(records, VQA)
    assert Counted.reads == 0
    assert filled[0].choices == ("red", "blue", "green") and Counted.reads == 4
    assert filled[1].id == 1 and Counted.reads == 5
    assert with_choices(EasyVQA("test", 4), VQA)[0].choices == EasyVQA("test", 4)[0].choices


def test_no_wrong_answer_and_no_answer_are_named():
    with pytest.raises(ValueError, match="sample 0: all samples have the answer 'red'"):
        with_choices(samples_of("red", "Red"), VQA)[0]
    with pytest.raises(ValueError, match=r"sample 'x' \(f line 1\) has no answer"):
        with_choices([Sample("x", (), "q?", where="f line 1")], VQA)[0]

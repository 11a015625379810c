"""Scores, metrics and wrong answers of the tasks, on answers by hand."""

from __future__ import annotations

import pytest

from cmai_fast.data import Sample
from cmai_fast.metrics import METRICS
from cmai_fast.tasks import TASKS, Task, posed, task_over

TEN = ("yellow",) * 5 + ("gold",) * 3 + ("golden", "orange")


@pytest.mark.parametrize("name", TASKS.names())
def test_each_task_is_whole(name):
    found = TASKS[name]
    assert isinstance(found, Task) and found.name == name and found.label
    assert all(metric in METRICS for metric in found.metric_names)
    references = {"open-vqa": TEN, "reasoning": ("true",), "pope": ("no",)}.get(name, ("a red dog",))
    sample = Sample("s", (), "What?", references, (*references[:1], "false", "a blue dog"))
    bound = task_over(found, [posed(found, sample), Sample("t", (), "", ("a house", "two cats"))])
    asked = posed(found, sample)
    assert bound.score(asked.answer, asked) >= bound.broken_below > bound.score("zebra crossing", asked)
    wrong = found.wrong_answers(asked, [])
    assert wrong and all(bound.score(w, asked) < bound.score(asked.answer, asked) for w in wrong)


def test_open_answers_score_by_the_people_who_gave_them():
    open_vqa, sample = TASKS["open-vqa"], Sample(3, (), "What color is it?", TEN, where="a.json questions[0]")
    assert posed(open_vqa, sample).prompt == "What color is it?\nAnswer the question using a single word or phrase."
    assert posed(open_vqa, posed(open_vqa, sample)) == posed(open_vqa, sample)  # lmms-eval's prompts ask it already
    scores = [open_vqa.score(a, sample) for a in ("Yellow.", "gold", "golden", "blue")]
    assert scores == pytest.approx([1.0, 0.9, 0.3, 0.0])
    assert open_vqa.metrics(["yellow", "blue"], [sample] * 2) == {"vqa-accuracy": 0.5, "vqa-accuracy-lmms": 0.5}
    others = [Sample(4, (), "?", ("red",) * 10), Sample(5, (), "?", ("yes",) * 10), Sample(6, (), "?", ("Gold",) * 10)]
    assert open_vqa.wrong_answers(sample, others) == ("red",)
    with pytest.raises(ValueError, match=r"sample 7: .*all people.*\(the task vqa\)"):
        open_vqa.score("red", Sample(7, (), "?", ("red",)))


def test_captions_weigh_words_by_all_samples():
    said = (("a red dog runs", "one red dog"), ("a blue cat runs", "one cat"), ("a teal cat sits", "the cat"))
    samples = [Sample(i, (), "", captions) for i, captions in enumerate(said)]
    captioning = task_over(TASKS["captioning"], samples)
    right, rare, common = (captioning.score(p, samples[0]) for p in ("a red dog runs", "red", "runs"))
    assert right > rare > common > captioning.score("the sea", samples[0]) == 0
    assert captioning.metrics([s.answer for s in samples], samples)["cider"] == pytest.approx(
        sum(captioning.score(s.answer, s) for s in samples) / 3
    )
    assert set(captioning.metrics(["x"], samples[:1])) == {"bleu-1", "bleu-4", "rouge-l", "cider"}


@pytest.mark.parametrize(
    ("said", "score"), [("true", 1), ("True.", 1), ("Yes, it is", 1), ("false", 0), ("", 0), ("untrue", 0)]
)
def test_statements_are_judged_by_the_first_word(said, score):
    assert TASKS["reasoning"].score(said, Sample(0, (), "A dog.", ("True",))) == score


def test_whether_an_object_is_there_is_judged_by_the_first_sentence():
    pope = TASKS["pope"]
    samples = [Sample(i, (), "Is there a dog in the image?", (a,), ("yes", "no")) for i, a in enumerate(("yes", "no"))]
    said = ["Yes, there is. It is not big.", "There is no dog"]
    assert [pope.score(p, s) for p, s in zip(said, samples, strict=True)] == [1, 1]
    assert [pope.score(p, s) for p, s in zip(said[::-1], samples, strict=True)] == [0, 0]
    assert [pope.wrong_answers(s) for s in samples] == [("no",), ("yes",)]
    assert pope.metrics(["Yes", "Yes"], samples) == pytest.approx(
        {"pope-f1": 2 / 3, "accuracy": 0.5, "precision": 0.5, "recall": 1.0, "yes-ratio": 1.0}
    )


def test_a_task_that_cannot_judge_says_so():
    with pytest.raises(ValueError, match=r"sample 5 has the answer 'red'; expected yes or no \(or the task vqa\)"):
        TASKS["pope"].score("yes", Sample(5, (), "What color?", ("red",)))
    with pytest.raises(ValueError, match=r"sample 4 has the answer 'maybe'; expected true or false"):
        TASKS["reasoning"].score("true", Sample(4, (), "A dog.", ("maybe",)))
    with pytest.raises(ValueError, match="captions of 0 samples"):
        TASKS["captioning"].score("a dog", Sample(0, (), "", ("a dog",)))


def test_a_sentence_is_consistent_if_it_is_judged_right_for_all_images():
    reasoning = TASKS["reasoning"]
    samples = [Sample(f"dev-{s}-{p}-0", (), "?", ("true",)) for s in (1, 2) for p in (0, 1)]
    assert reasoning.metrics(["true", "true", "true", "false"], samples) == {"accuracy": 0.75, "consistency": 0.5}
    assert reasoning.metrics(["true"], [Sample(5, (), "?", ("true",))]) == {"accuracy": 1.0}
    assert reasoning.wrong_answers(samples[0]) == ("false",)

"""BLEU, ROUGE-L and CIDEr against the values of the official package; METEOR and SPICE where they can run."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_cases import BLEU, CIDER, METEOR, PREDICTIONS, REFERENCES, ROUGE_L
from cmai_fast.metrics import METRICS, java_scorers, measure
from cmai_fast.metrics.bleu import bleu
from cmai_fast.metrics.cider import cider_scores
from cmai_fast.metrics.rouge_l import rouge_l_scores

NAMES = ("bleu-1", "bleu-2", "bleu-3", "bleu-4", "rouge-l", "cider")
captions = st.lists(st.sampled_from("a the dog dogs cat runs sees , . 's".split()), max_size=8).map(" ".join)
samples = st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=3).map(tuple)), min_size=1, max_size=5)


def test_values_are_those_of_the_official_package():
    assert bleu(PREDICTIONS, REFERENCES) == pytest.approx(BLEU, abs=1e-12)
    assert rouge_l_scores(PREDICTIONS, REFERENCES) == pytest.approx(ROUGE_L, abs=1e-12)
    assert cider_scores(PREDICTIONS, REFERENCES) == pytest.approx(CIDER, abs=1e-12)
    expected = (*BLEU, sum(ROUGE_L) / 8, sum(CIDER) / 8)
    assert measure(NAMES, PREDICTIONS, REFERENCES) == pytest.approx(dict(zip(NAMES, expected, strict=True)), abs=1e-12)


def test_one_sample_scores_the_same_with_the_references_of_all():
    for i, whole in enumerate(CIDER):
        alone = cider_scores(PREDICTIONS[i : i + 1], REFERENCES[i : i + 1], corpus=REFERENCES)
        assert alone == pytest.approx([whole], abs=1e-12)
    assert cider_scores(PREDICTIONS[:1], REFERENCES[:1]) == [0.0]  # every word is in every sample


@given(samples)
@settings(deadline=None, max_examples=50)
def test_bounds_and_what_is_perfect(pairs):
    predictions, references = map(list, zip(*pairs, strict=True))
    assert all(0 <= score <= 1 for score in (*bleu(predictions, references), *rouge_l_scores(predictions, references)))
    assert all(0 <= score <= 10 + 1e-9 for score in cider_scores(predictions, references))
    # Without the full stop, which may belong to the last word or not: that depends on the next caption.
    first = [known[0].replace(".", "") for known in references]
    assert rouge_l_scores(first, [(f,) for f in first]) == pytest.approx([1.0] * len(first))
    if any(f.replace(",", "").split() for f in first):
        assert bleu(first, [(f,) for f in first])[0] == pytest.approx(1.0, abs=1e-6)


@given(samples, st.randoms())
@settings(deadline=None, max_examples=30)
def test_the_order_of_references_does_not_matter(pairs, random):
    predictions, references = map(
        list, zip(*((p, tuple(c.replace(".", "") for c in r)) for p, r in pairs), strict=True)
    )
    shuffled = [tuple(random.sample(known, len(known))) for known in references]
    for name in NAMES:
        values = (METRICS[name](predictions, r) for r in (references, shuffled))
        assert next(values) == pytest.approx(next(values), abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "predictions, references, message",
    [
        ([], [], "0 predictions for 0 samples"),
        (["a"], [("a",), ("b",)], "1 predictions for 2 samples"),
        (["a", "b"], [("a",), ()], r"sample 1 has the references \(\)"),
        (["a"], ["a dog"], "sample 0 has the references 'a dog'; expected one or more captions"),
    ],
)
def test_predictions_without_references_are_refused(name, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        METRICS[name](predictions, references)


@pytest.mark.parametrize("name", ["meteor", "spice"])
def test_what_is_missing_is_named(name, monkeypatch, tmp_path):
    found = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})()
    monkeypatch.setattr(java_scorers, "find_spec", lambda _: None)
    with pytest.raises(
        ValueError, match=rf"{name} needs the package pycocoevalcap; pip install 'cmai-fast\[captions\]'"
    ):
        METRICS[name](["a"], [("a",)])
    monkeypatch.setattr(java_scorers, "find_spec", lambda _: found)
    monkeypatch.setattr(java_scorers.shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match=rf"{name} needs Java"):
        METRICS[name](["a"], [("a",)])


def test_spice_downloads_nothing_by_itself(monkeypatch, tmp_path):
    found = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})()
    monkeypatch.setattr(java_scorers, "find_spec", lambda _: found)
    monkeypatch.setattr(java_scorers.shutil, "which", lambda _: "/usr/bin/java")
    with pytest.raises(ValueError, match=r"spice needs stanford-corenlp-3\.6\.0\.jar .*get_stanford_models downloads"):
        METRICS["spice"](["a"], [("a",)])


def test_the_java_scorers_get_tokens_by_sample(monkeypatch):
    class Scorer:
        def compute_score(self, truth, results):
            assert results == {0: ["a dog"], 1: [""]} and truth == {0: ["the dog 's", "dog"], 1: ["x"]}
            return 0.25, [0.5, 0.0]

    monkeypatch.setattr(java_scorers, "_scorer", lambda name: Scorer())
    assert METRICS["meteor"](["A dog!", "..."], [("The dog's", "dog"), ("x",)]) == 0.25


@pytest.mark.skipif(
    find_spec("pycocoevalcap") is None or shutil.which("java") is None,
    reason="METEOR needs pycocoevalcap and Java; docs/metrics.md says when it was checked",
)
def test_meteor_gives_the_official_value():
    assert METRICS["meteor"](PREDICTIONS, REFERENCES) == pytest.approx(METEOR, abs=1e-9)

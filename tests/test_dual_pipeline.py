"""A dual encoder through pipeline and workflows: the answer is the nearest of the texts to choose from."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from PIL import Image

import colour_clip
from cmai_fast.cmcv import ConsistencyHeads, Threshold
from cmai_fast.data import Sample
from cmai_fast.data.choices import ChoiceCollator, choices_of
from cmai_fast.data.easyvqa import COLORS
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation import comparison
from cmai_fast.evaluation.comparison import IMMUNISED, Entry
from cmai_fast.evaluation.pictures import Shown
from cmai_fast.evaluation.protocol import measure
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.evaluation.texts import Texts
from cmai_fast.pipeline import Pipeline
from cmai_fast.tasks import TASKS, posed
from cmai_fast.threat import ThreatModel


@pytest.fixture
def samples() -> list[Sample]:
    return colour_clip.samples()


@pytest.fixture
def pipeline() -> Pipeline:
    """Texts may be chosen anew, so each test has its own."""
    return copy.copy(colour_clip.pipeline())


def test_texts_are_choices_or_else_captions(samples):
    captions = [replace(s, choices=(), references=(f"caption {i}", "another")) for i, s in enumerate(samples)]
    assert choices_of(samples) == tuple(f"a {c} shape" for c in COLORS)
    assert choices_of(captions[:3]) == ("caption 0", "caption 1", "caption 2")
    collate = ChoiceCollator(colour_clip.processor(), ("Red", "blue", "red"))
    asked = [replace(samples[0], references=r) for r in (("RED",), ("red",), ("scarlet", "Blue"))]
    assert collate(asked)["labels"].tolist() == [0, 2, 1]
    with pytest.raises(ValueError, match=r"'a pink shape' of sample 7 is not among the 8 texts"):
        ChoiceCollator(colour_clip.processor(), choices_of(samples))(
            [replace(samples[0], id=7, references=("a pink shape",))]
        )
    with pytest.raises(ValueError, match="sample 7 has 2 images"):
        ChoiceCollator(colour_clip.processor())([replace(samples[0], id=7, images=samples[0].images * 2)])


def test_the_answer_is_that_of_the_models_own_forward(pipeline, samples):
    own = pipeline.processor(
        images=[s.images[0] for s in samples], text=list(choices_of(samples)), padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        places = pipeline.model(**own).logits_per_image.argmax(1).tolist()
    answers = pipeline.generate(samples)
    assert answers == [choices_of(samples)[i] for i in places]
    assert sum(a == s.answer for a, s in zip(answers, samples, strict=True)) >= 14


def test_it_needs_to_know_the_texts(samples):
    with pytest.raises(ValueError, match=r"call choose_from"):
        Pipeline("clip", colour_clip.model(), colour_clip.processor()).generate(samples)


@pytest.mark.parametrize("loss", ["cross-entropy", "margin", "dlr"])
def test_the_first_text_is_a_target_like_any_other(pipeline, samples, loss):
    texts = choices_of(samples)
    spec = AttackSpec("apgd", 20, target=texts[0], settings={"loss": loss})
    attacked = Runner(pipeline, samples).attack(spec, ThreatModel("linf", 64 / 255))
    assert attacked.fooled.tolist() == [p == texts[0] for p in attacked.predictions]
    assert attacked.fooled.mean() >= 0.5 and all(samples[i].answer != texts[0] for i in attacked.rows)
    with pytest.raises(
        ValueError, match=r"the target 'pink' is none of the 8 texts to choose from, which begin with 'a"
    ):
        Runner(pipeline, samples).attack(replace(spec, target="pink"), ThreatModel("linf", 0.1))


def test_other_captions_of_an_image_are_no_other_answers(pipeline, samples):
    captions = [replace(s, choices=(), references=(s.answer, f"{s.answer.split()[1]} shape")) for s in samples[:4]]
    ranked = copy.copy(pipeline)
    runner = Runner(ranked, captions)
    texts, spec = ranked.collate.texts, AttackSpec("pgd", 1, settings={"loss": "dlr"}, other=1)
    victim = runner._run(spec, ThreatModel("linf", 0.01), [0, 1, 2, 3])[0]
    for row, sample in enumerate(captions):
        known = [texts[k] for k in range(len(texts)) if victim.others.place[row, k] >= 0]
        assert known == [t for t in texts if t not in sample.references]


def test_retrieval_ranks_all_captions_clean_and_attacked(pipeline, samples):
    captions = [
        replace(s, choices=(), references=(s.answer, f"{s.answer.split()[1]} shape"), images=s.images) for s in samples
    ]
    ranked = copy.copy(pipeline)
    ranked.choose_from(captions)
    assert len(ranked.collate.texts) == len({r for s in captions for r in s.references}), "not the first alone"
    suite = [AttackSpec("pgd", 5), AttackSpec("apgd", 5)]
    measured = measure(ranked, captions, ThreatModel("linf", 32 / 255), suite, task="retrieval")
    clean, robust = measured.record["metrics"]["clean"], measured.record["metrics"]["robust"]
    assert clean["image-to-text R@1"] == measured.record["acc_clean"] > 0.8
    assert robust["image-to-text R@1"] == measured.record["acc_robust"] < clean["image-to-text R@1"] - 0.3
    assert robust["text-to-image R@1"] < clean["text-to-image R@1"]
    assert all(clean[f"{way} R@1"] <= clean[f"{way} R@5"] for way in ("image-to-text", "text-to-image"))
    assert measured.record["attacks"]["pgd-5"]["attacked"] == round(clean["image-to-text R@1"] * len(captions))
    scored = ranked.similarities(captions)
    assert scored.shape == (16, len(ranked.collate.texts))
    with pytest.raises(ValueError, match="call choose_from"):
        Pipeline("clip", colour_clip.model(), colour_clip.processor()).similarities(captions)


def test_an_attack_moves_an_image_from_all_its_own_captions(pipeline, samples):
    """-log of the sum of their probabilities; without `relevant` the nearest of the others would win."""
    captions = [replace(s, choices=(), references=(s.answer, f"{s.answer.split()[1]} shape")) for s in samples]
    ranked = copy.copy(pipeline)
    ranked.choose_from(captions)
    batch = ranked.collate(captions)
    own = [[ranked.collate.texts.index(r) for r in s.references] for s in captions]
    assert [row.nonzero().flatten().tolist() for row in batch["relevant"]] == [sorted(o) for o in own]
    _, text = ranked.bridge.inputs(batch)
    with torch.no_grad():
        features = ranked.bridge.encode_image(batch["pixel_values"])
        logits = ranked.bridge.fuse(features, **text)[0].squeeze(1)
        losses, right = ranked.bridge.losses(features, **text)
        few = ranked.bridge.select(text, torch.tensor([3, 5]))
        some, _ = ranked.bridge.losses(features[[3, 5]], **few)
    p = logits.double().softmax(1)
    expected = torch.stack([-p[i, o].sum().log() for i, o in enumerate(own)])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(some, losses[[3, 5]])
    assert right.tolist() == [int(row.argmax()) in o for row, o in zip(logits, own, strict=True)]
    with pytest.raises(ValueError, match=r"relevant has shape \(16, 3\); expected"):
        ranked.bridge.losses(features, **{**text, "relevant": batch["relevant"][:, :3]})
    runner, threat = Runner(ranked, captions, task="retrieval"), ThreatModel("linf", 12 / 255)
    broken = {}
    for every in (True, False):
        if not every:
            runner._goal = lambda _, row, *a: replace(captions[row], references=(runner._said(row),))
        broken[every] = (~runner.attack(AttackSpec("pgd", 10), threat, stage=f"all {every}").right).sum()
    assert broken[True] > broken[False]


def test_recall_takes_transferred_images_and_captions_that_say_the_same(pipeline, samples):
    """Captions that differ in case and final mark are all right; images of another model's attack count too."""
    said = [replace(s, choices=(), references=(s.answer, f"{s.answer.capitalize()}.")) for s in samples]
    ranked, threat = copy.copy(pipeline), ThreatModel("linf", 64 / 255)
    ranked.choose_from(said)
    moved = Runner(ranked, said).attack(AttackSpec("pgd", 5), threat, range(len(said)), keep=True)
    images = {i: moved.images[i] for i in moved.rows}
    record = measure(ranked, said, threat, [], task="retrieval", transferred={"other": images}).record
    clean, robust = record["metrics"]["clean"], record["metrics"]["robust"]
    assert clean["image-to-text R@1"] == record["acc_clean"]
    assert robust["image-to-text R@1"] <= record["acc_robust"] < record["acc_clean"]


def test_models_that_are_loaded_again_for_the_pictures_know_the_texts(pipeline, samples):
    captions = [replace(s, choices=()) for s in samples]
    ranked = copy.copy(pipeline)
    ranked.choose_from(captions)
    own = ranked.images(captions[:1])
    (clean,) = own.split(own.pixels())
    picture = Shown(captions[0], clean, clean, record={"answers": {}})
    fresh = lambda: Pipeline("clip", pipeline.model, pipeline.processor)  # noqa: E731
    entries = [Entry(name, IMMUNISED, "clip", fresh) for name in ("a", "b")]
    comparison._ask(entries, [picture], captions, None)
    (said,) = ranked.generate(captions[:1])
    assert picture.record["answers"] == {name: {"clean": said, "adversarial": said} for name in ("a", "b")}


def test_a_sample_that_an_attack_does_not_run_on_again_keeps_its_score(pipeline, samples):
    scored = copy.copy(pipeline)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scored.heads = ConsistencyHeads(pipeline.bridge.image_dim, pipeline.bridge.text_dim, dim=8, hidden=16)
    runner = Runner(scored, samples)
    images = [image * 0.9 for image in runner.images([0, 1])]
    first = runner._judged([0, 1], images)
    assert all(abs(score) > 1e-3 for score in first["scores"])
    moved = [images[0], images[1] * 0.5]
    again = runner._judged([0, 1], moved, None, (images, Texts(), first))
    assert again["scores"][0] == first["scores"][0] and again["scores"][1] != first["scores"][1]


def test_zero_shot_asks_by_template(samples):
    named = replace(samples[0], references=("red",), choices=("red", "blue"))
    asked = posed(TASKS["zero-shot"], named)
    assert asked.choices == ("a photo of a red.", "a photo of a blue.") and asked.references == asked.choices[:1]
    assert TASKS["zero-shot"].score("A photo of a red", asked) == 1 and TASKS["zero-shot"].score("a red", asked) == 0


def test_it_is_attacked_evaluated_and_immunised_from_a_file(pipeline, samples, tmp_path: Path):
    from cmai_fast.workflows import attack, guard, immunize
    from cmai_fast.workflows.settings import ImmunizeSettings

    pipeline.model.save_pretrained(tmp_path / "clip")
    pipeline.processor.save_pretrained(tmp_path / "clip")
    with (tmp_path / "my.jsonl").open("w") as file:
        for s in samples:
            Image.fromarray(s.images[0]).save(tmp_path / f"{s.id}.png")
            record = {"id": s.id, "image": f"{s.id}.png", "caption": s.answer, "choices": s.choices}
            file.write(json.dumps(record) + "\n")
    clip, mine = str(tmp_path / "clip"), str(tmp_path / "my.jsonl")
    record = attack.attack(
        clip, DataSource(mine), "pgd", ThreatModel("linf", 64 / 255), steps=10, restarts=1, settings={}, task="vqa",
        metrics=(), limit=16, seed=0, batch_size=16, max_new_tokens=None, out=tmp_path / "a.json", save_images=None,
        resume=False, device="cpu", dtype=None, attention=None, progress=False, command="",
    )  # fmt: skip
    assert record["acc_clean"] > 0.8 and record["asr"] > 0.5
    captions = tmp_path / "captions.jsonl"  # no choices: they are chosen from
    rows = [{"id": s.id, "image": f"{s.id}.png", "caption": s.answer} for s in samples]
    captions.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    heads = ConsistencyHeads(pipeline.bridge.image_dim, pipeline.bridge.text_dim, dim=8, hidden=16)
    heads.save_pretrained(tmp_path / "cmcv", Threshold(-1.0, 0.05, 100, "calibration"))
    for file in (mine, str(captions)):
        said: list[str] = []
        guard.guard(clip, DataSource(file), heads=tmp_path / "cmcv", write=said.append, progress=False)
        decided = [json.loads(line) for line in said]
        assert [d["id"] for d in decided] == [s.id for s in samples]
        assert sum(d["answer"] == s.answer for d, s in zip(decided, samples, strict=True)) >= 14
    with pytest.raises(ValueError, match="give records with choices"):
        guard.guard(clip, images=[tmp_path / f"{samples[0].id}.png"], text="?", heads=tmp_path / "cmcv")
    settings = ImmunizeSettings(
        model=clip, data=mine, split_seed=0, max_steps=2, batch_size=4, attack_steps=2, restarts=1, limit=2,
        calibration_samples=2, device="cpu",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"consistency_steps is 5, and .*clip is a dual encoder"):
        immunize.immunize(replace(settings, defence="cmai"), tmp_path / "no", progress=False)
    assert not (tmp_path / "no").exists()
    results = immunize.immunize(settings, tmp_path / "run", progress=False)
    assert [m["role"] for m in results["models"]] == ["undefended", "immunised"]
    assert isinstance(Pipeline.load(tmp_path / "run").model, tf.CLIPModel)

"""Captions and images of a dual encoder: hotflip on captions, Co-Attack and SGA."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.distributions import Categorical, kl_divergence

import colour_clip
from cmai_fast.attacks import ATTACKS
from cmai_fast.attacks.captions import Captions
from cmai_fast.attacks.co_attack import divergence
from cmai_fast.attacks.gradients import Course
from cmai_fast.attacks.sga import SCALES, OverScales, resized
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.evaluation.surface import victim_of
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel
from cmai_fast.workflows.attack import attack
from fitted import colours, fitted
from typed_prompts import snapshot
from typed_prompts import victim as generative

STILL, LINF = ThreatModel("linf", 0.0), ThreatModel("linf", 8 / 255)
JOINT = ("co-attack", "sga")


@pytest.fixture(scope="module")
def samples():
    """Two captions a picture, without choices: all captions are the texts to choose from."""
    said = [(s.answer, f"the {s.answer.split()[1]} shape") for s in colour_clip.samples()]
    return [replace(s, choices=(), references=r) for s, r in zip(colour_clip.samples(), said, strict=True)]


@pytest.fixture(scope="module")
def pipeline(samples) -> Pipeline:
    found = copy.copy(colour_clip.pipeline())
    found.choose_from(samples)
    return found


def victim(pipeline, samples, exact=False):
    made = victim_of(pipeline, pipeline.collate(samples))
    made.prompts, made.exact = Captions(pipeline, samples), exact
    return made


def ranked(pipeline, sample, image, captions):
    """Whether one of `captions` is the nearest text, by the model's own forward; and the lead of the better one."""
    others = [t for t in pipeline.collate.texts if t not in sample.references]
    text = pipeline.processor.tokenizer([*others, *captions], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = pipeline.model(pixel_values=pipeline.space.to_model(image), **text).logits_per_image[0]
    lead = logits[len(others) :] - logits[: len(others)].max()
    return bool((lead > 0).any()), lead


def test_hotflip_finds_the_worst_substitution_of_every_caption(pipeline, samples):
    """By brute force, through the model's own forward: each word of the vocabulary in each place."""
    some = samples[:3]
    made = victim(pipeline, some)
    result = ATTACKS["hotflip"](made, made.pixels(), STILL, steps=1, candidates=10_000)
    words = [w for w in colour_clip.WORDS if w.isalpha()]
    for row, sample in enumerate(some):
        assert len(result.captions[row]) == 2
        lowest = []
        for caption, found in zip(sample.references, result.captions[row], strict=True):
            asked = caption.split()
            every = [[*asked[:k], w, *asked[k + 1 :]] for k in range(len(asked)) for w in words if w != asked[k]]
            texts = [caption, *(" ".join(t) for t in every)]
            others = [t for t in pipeline.collate.texts if t not in sample.references]
            tokens = pipeline.processor.tokenizer([*others, *texts], padding=True, return_tensors="pt")
            with torch.no_grad():
                logits = pipeline.model(
                    pixel_values=pipeline.space.to_model(made.pixels()[row : row + 1]), **tokens
                ).logits_per_image[0]
            own = logits[len(others) :, None]
            losses = F.cross_entropy(
                torch.cat([logits[: len(others)].expand(len(texts), -1), own], 1),
                torch.full((len(texts),), len(others)), reduction="none",
            )  # fmt: skip
            best = dict(zip(texts, losses.tolist(), strict=True))[found]
            assert best == pytest.approx(float(losses.max()), rel=1e-4)
            lowest.append(best)
        assert float(result.loss[row]) == pytest.approx(min(lowest), rel=1e-4)


@pytest.mark.parametrize("name", JOINT)
def test_images_and_captions_stay_in_their_budgets_and_are_judged_together(name, pipeline, samples):
    made = victim(pipeline, samples)
    clean = made.pixels()
    before = snapshot(pipeline.model)
    result = ATTACKS[name](made, clean, LINF, steps=4, keep="red,teal")
    assert snapshot(pipeline.model) == before and not made.exact
    assert (result.adv - clean).abs().amax() <= 8 / 255 + 1e-6 and not torch.equal(result.adv, clean)
    changed = 0
    for row, sample in enumerate(samples):
        for old, new in zip(sample.references, result.captions[row], strict=True):
            differ = [(a, b) for a, b in zip(old.split(), new.split(), strict=True) if a != b]
            assert len(differ) <= 1 and not {"red", "teal"} & {w for pair in differ for w in pair}
            changed += len(differ)
        right, _ = ranked(pipeline, sample, result.adv[row : row + 1], result.captions[row])
        assert bool(result.fooled[row]) == (not right)
    assert changed > len(samples) and result.fooled.sum() > 0


def test_co_attack_raises_its_divergences(pipeline, samples):
    a, b = torch.randn(2, 5, 7).unbind(0)
    expected = kl_divergence(Categorical(logits=a), Categorical(logits=b))
    torch.testing.assert_close(divergence(a, b), expected)
    made = victim(pipeline, samples)
    result = ATTACKS["co-attack"](made, made.pixels(), LINF, steps=6, candidates=100)
    captions = made.prompts
    with torch.no_grad():
        own, moved = (made.encode(pipeline.space.to_model(x)).squeeze(1) for x in (made.pixels(), result.adv))
        texts = [text for row in result.captions for text in row]
        typed, now = (
            pipeline.bridge.encode_texts(**pipeline.processor.tokenizer(t, padding=True, return_tensors="pt"))
            for t in (captions.captions, texts)
        )
    unit = lambda x: F.normalize(x, dim=-1)  # noqa: E731
    goal = lambda x: divergence(own, x) + 3 * divergence(unit(now), unit(x[captions.owner])).view(-1, 2).mean(1)  # noqa: E731
    assert (goal(moved) > goal(own)).all()
    words = [w for w in colour_clip.WORDS if w.isalpha()]
    for k in (0, 5):  # the captions moved as far as any word takes them
        asked = captions.captions[k].split()
        every = [" ".join([*asked[:p], w, *asked[p + 1 :]]) for p in range(len(asked)) for w in words]
        with torch.no_grad():
            far = pipeline.bridge.encode_texts(**pipeline.processor.tokenizer(every, padding=True, return_tensors="pt"))
        assert float(divergence(typed[k], now[k])) == pytest.approx(float(divergence(typed[k], far).max()), rel=1e-3)


def test_sga_turns_image_and_all_captions_apart(pipeline, samples):
    made = victim(pipeline, samples)
    result = ATTACKS["sga"](made, made.pixels(), LINF, steps=6)
    for row, sample in enumerate(samples):
        _, before = ranked(pipeline, sample, made.pixels()[row : row + 1], sample.references)
        _, after = ranked(pipeline, sample, result.adv[row : row + 1], result.captions[row])
        assert (after < before).all()
    both, alone = result.fooled.sum(), (ATTACKS["hotflip"](made, made.pixels(), STILL, steps=1).fooled.sum())
    made.exact = True
    image = ATTACKS["pgd"](made, made.pixels(), LINF, steps=6).fooled.sum()
    assert both >= max(int(image), int(alone)) and both > 0


def test_the_gradient_over_scales_is_that_of_the_sum(pipeline, samples):
    made = victim(pipeline, samples[:2])
    target = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    loss = lambda features, outputs, victim, rows: (features * target).flatten(1).sum(1)  # noqa: E731
    at = pipeline.space.to_model(made.pixels())
    grad, _ = OverScales().start(Course(made, loss, made.pixels(), torch.arange(2), 1))(at, None, 0)
    leaf = made.pixels().requires_grad_()
    views = [leaf, *(resized(leaf, s) for s in SCALES)]
    sum((made.encode(pipeline.space.to_model(v)) * target).sum() for v in views).backward()
    torch.testing.assert_close(grad, leaf.grad * pipeline.space.like(leaf)[1], rtol=1e-3, atol=1e-5)
    flat = torch.full((1, 3, 64, 64), 0.3)
    torch.testing.assert_close(resized(flat, 0.75), flat)


@pytest.mark.parametrize("name", [*JOINT, "gcg"])
def test_verdicts_do_not_depend_on_the_batch_and_need_every_caption(name, pipeline, samples):
    spec = AttackSpec(name, 3)
    runs = [Runner(pipeline, samples, task="retrieval", batch_size=n).attack(spec, LINF, keep=True) for n in (16, 5)]
    assert runs[0].prompts == runs[1].prompts and runs[0].predictions == runs[1].predictions
    assert not runs[0].right.all()
    for row, captions, right in zip(runs[0].rows, runs[0].prompts, runs[0].right, strict=True):
        assert right == ranked(pipeline, samples[row], runs[0].images[row], captions)[0]


def test_results_hold_the_captions(samples, tmp_path):
    own = colour_clip.pipeline()
    own.model.save_pretrained(tmp_path / "clip")
    own.processor.save_pretrained(tmp_path / "clip")
    with (tmp_path / "my.jsonl").open("w") as file:
        for s in samples:
            Image.fromarray(s.images[0]).save(tmp_path / f"{s.id}.png")
            file.write(json.dumps({"id": s.id, "image": f"{s.id}.png", "caption": s.answer}) + "\n")
    record = attack(
        str(tmp_path / "clip"), DataSource(str(tmp_path / "my.jsonl")), "co-attack", LINF, steps=2, task="retrieval",
        out=tmp_path / "a.json", save_images=tmp_path / "png", progress=False,
    )  # fmt: skip
    assert any(r["captions_adv"] != [r["answer"]] for r in record["per_sample"])
    assert set(record["metrics"]["robust"]) == set() and "image-to-text R@1" in record["metrics"]["clean"]
    line = json.loads((tmp_path / "png" / "manifest.jsonl").read_text().splitlines()[0])
    assert line["adversarial_captions"] == record["per_sample"][0]["captions_adv"]


def test_refused(pipeline, samples, make_tiny):
    for name in JOINT:
        made = generative(fitted(make_tiny), colours()[:2])
        with pytest.raises(ValueError, match="LlavaForConditionalGeneration: the attack changes captions"):
            ATTACKS[name](made, made.pixels(), LINF)
    with pytest.raises(ValueError, match="CLIPModel has no prompt and response"):
        ATTACKS["embedding-pgd"](victim(pipeline, samples), victim(pipeline, samples).pixels(), LINF)
    with pytest.raises(ValueError, match=r"co-attack: alpha is -1\.0; expected a finite number of at least 0"):
        AttackSpec("co-attack", settings={"alpha": "-1"})
    with pytest.raises(ValueError, match="sga: edits is 0; expected at least 1"):
        AttackSpec("sga", settings={"edits": 0})
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration is no dual encoder"):
        Captions(fitted(make_tiny), colours()[:2])

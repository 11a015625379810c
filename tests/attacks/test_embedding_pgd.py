"""PGD on the embeddings of what users typed: the ball, what is said, and the image beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cmai_fast.attacks import ATTACKS
from cmai_fast.attacks.pgd import pgd
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel
from fitted import colours, fitted
from processors import GENERATIVE, processor_of, samples_of
from typed_prompts import losses, snapshot, victim

STILL, LINF = ThreatModel("linf", 0.0), ThreatModel("linf", 4 / 255)
attacked = ATTACKS["embedding-pgd"]


@pytest.fixture(scope="module")
def pipeline(make_tiny) -> Pipeline:
    return fitted(make_tiny)


def run(pipeline, samples, threat=STILL, exact=False, **settings):
    made = victim(pipeline, samples, exact)
    return attacked(made, made.pixels(), threat, **{"steps": 6, "text_eps": 0.3, **settings})


def said(pipeline, samples, words, image=None):
    """Loss and greedy answer of each sample alone, with `words` added by the embedding itself, not by the decoder."""
    found = []
    for k, sample in enumerate(samples):
        delta = words[k]

        def add(module, args, out, delta=delta):
            return (
                out + torch.nn.functional.pad(delta, (0, 0, 0, out.shape[1] - len(delta))) if out.shape[1] > 1 else out
            )

        handle = pipeline.model.get_input_embeddings().register_forward_hook(add)
        try:
            own = None if image is None else [image[k : k + 1]]
            answer = pipeline.generate([sample], own)[0]
            loss = losses(pipeline, [sample], [sample.prompt])[0] if image is None else None
        finally:
            handle.remove()
        found.append((loss, answer))
    return found


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_words_stay_in_their_balls_and_raise_the_loss(norm, pipeline):
    samples = colours()[:4]
    result = run(pipeline, samples, text_norm=norm)
    assert torch.equal(result.adv, victim(pipeline, samples).pixels()) and result.prompts is None
    table = pipeline.model.get_input_embeddings()
    for sample, delta in zip(samples, result.words, strict=True):
        ids = pipeline.collate.prompts([sample])["input_ids"][0]
        asked = pipeline.processor.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
        own = table(ids).detach()
        size = delta.norm(dim=-1) if norm == "l2" else delta.abs().amax(-1)
        radius = 0.3 * (own.norm(dim=-1) if norm == "l2" else own.square().mean(-1).sqrt())
        typed = torch.tensor([int(i) in asked for i in ids])
        assert (size[~typed] == 0).all() and (size[typed] > 0).all() and (size <= radius * (1 + 1e-5)).all()
    before = losses(pipeline, samples, [s.prompt for s in samples])
    after = torch.stack([loss for loss, _ in said(pipeline, samples, result.words)])
    assert (after > before).all()
    torch.testing.assert_close(result.loss, after, rtol=1e-4, atol=1e-5)
    assert run(pipeline, samples, text_norm=norm, steps=12).loss.mean() > result.loss.mean()


def test_a_random_start_of_the_image_is_all_that_restarts_change(pipeline):
    one, two = (run(pipeline, colours()[:4], restarts=n) for n in (1, 2))
    torch.testing.assert_close(one.loss, two.loss)


def test_both_are_stronger_than_either(pipeline):
    samples = colours()
    text = run(pipeline, samples, text_eps=0.1)
    both = run(pipeline, samples, LINF, text_eps=0.1, image=True)
    made = victim(pipeline, samples, exact=False)
    image = pgd(made, made.pixels(), LINF, steps=6)
    assert both.loss.mean() > text.loss.mean() and both.loss.mean() > image.loss.mean()
    assert ((both.adv - made.pixels()).abs() <= 4 / 255 + 1e-6).all() and both.words is not None


def test_answers_are_those_that_perturbed_words_give_in_any_batch(pipeline):
    """The fitted model breaks, also where the answer that is given beyond the changed token is right."""
    spec = AttackSpec("embedding-pgd", 6, settings={"text_eps": 0.3, "image": True})
    samples = [replace(s, prompt="is " * (k % 3) + s.prompt) for k, s in enumerate(colours())]  # unequal lengths
    runs = [Runner(pipeline, samples, batch_size=size).attack(spec, LINF, keep=True) for size in (12, 5)]
    assert runs[0].predictions == runs[1].predictions and not runs[0].right.all()
    assert (runs[0].fooled == ~runs[0].right).all() and runs[0].prompts is None
    own = [samples[row] for row in runs[0].rows]
    result = attacked(
        made := victim(pipeline, own), made.pixels(), LINF, steps=6, text_eps=0.3, image=True,
        sample_ids=pipeline.collate(own)["sample_ids"],
    )  # fmt: skip
    alone = [answer for _, answer in said(pipeline, own, result.words, result.adv)]
    assert [a for a, f in zip(alone, result.fooled, strict=True) if f] == [
        p for p, f in zip(runs[0].predictions, runs[0].fooled, strict=True) if f
    ]


@pytest.mark.parametrize("family", GENERATIVE, ids=lambda f: f.name)
def test_every_generative_family_answers_to_perturbed_words(family):
    pipeline, samples = Pipeline(family.name, family.model(), processor_of(family)), samples_of(family)
    pipeline.collate.processor.tokenizer.padding_side = "left"
    spec = AttackSpec("embedding-pgd", 8, settings={"text_eps": 1.0})
    answered = [replace(s, references=(a,)) for s, a in zip(samples, pipeline.generate(samples), strict=True)]
    attacked = Runner(pipeline, answered, task="vqa").attack(spec, STILL, range(3))
    assert attacked.predictions != [s.answer for s in answered]


def test_the_model_and_the_victim_are_as_before_also_after_an_exception(pipeline):
    samples, before, calls = colours()[:3], snapshot(pipeline.model), []
    made = victim(pipeline, samples)

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    attacked(made, made.pixels(), LINF, steps=2, image=True)
    assert snapshot(pipeline.model) == before and made.words is None
    handle = pipeline.model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        attacked(made, made.pixels(), STILL, steps=4, text_eps=0.01)
    handle.remove()
    assert snapshot(pipeline.model) == before and made.words is None


def test_bad_settings_and_losses_are_refused(pipeline):
    for settings, said in (
        ({"text_norm": "l1"}, "text_norm is 'l1'; expected one of linf, l2"),
        ({"text_eps": "-1"}, "text_eps is -1.0; expected a finite share"),
    ):
        with pytest.raises(ValueError, match=said):
            AttackSpec("embedding-pgd", settings=settings)
    made = victim(pipeline, colours()[:2])
    made.heads = pipeline.heads
    for loss in ("lower-consistency", "feature-distance"):
        with pytest.raises(ValueError, match="does not depend on the words"):
            attacked(made, made.pixels(), STILL, loss=loss)

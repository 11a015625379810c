"""HotFlip and GCG: the estimate, the best substitution by brute force, the budget, and what is typed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cmai_fast.attacks import ATTACKS, Victim
from cmai_fast.attacks.prompts import Prompts, Vocabulary
from cmai_fast.data import Sample
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.state import Journal, State
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel
from cmai_fast.workflows.attack import attack
from cmai_fast.workflows.evaluate import evaluate
from families import FAMILIES
from fitted import colours, fitted, save
from processors import GENERATIVE, processor_of, samples_of
from typed_prompts import losses, snapshot, tokens, victim

STILL = ThreatModel("linf", 0.0)
NAMES = ("hotflip", "gcg")


@pytest.fixture(scope="module")
def pipeline(make_tiny) -> Pipeline:
    return fitted(make_tiny)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return colours()[:4]


def words_of(pipeline):
    """The words of the vocabulary, which are its tokens without those of control."""
    tokenizer = pipeline.processor.tokenizer
    return {w: i for w, i in tokenizer.get_vocab().items() if i not in tokenizer.all_special_ids and w.isalpha()}


def run(name, pipeline, samples, exact=False, **settings):
    made = victim(pipeline, samples, exact)
    return ATTACKS[name](made, made.pixels(), STILL, **{"steps": 1, **settings})


@pytest.mark.parametrize("name", NAMES)
def test_with_every_candidate_tried_the_best_of_all_substitutions_is_found(name, pipeline, samples):
    """By brute force: every word of the vocabulary typed in place of every word of the question."""
    result = run(name, pipeline, samples, candidates=10_000, edits=1)
    for row, sample in enumerate(samples):
        asked = sample.prompt.removesuffix("?").split()
        texts = [
            " ".join([*asked[:k], word, *asked[k + 1 :]]) + "?"
            for k in range(len(asked))
            for word in words_of(pipeline)
            if word[0].islower() and word != asked[k]
        ]
        found = losses(pipeline, [sample] * (len(texts) + 1), [*texts, sample.prompt])
        assert result.prompts[row] == [*texts, sample.prompt][int(found.argmax())]
        torch.testing.assert_close(result.loss[row], found.max(), rtol=1e-4, atol=1e-5)


def test_one_candidate_is_the_steepest_by_the_embedding_gradient(pipeline, samples):
    """Equation 1 of the paper, by a hook on the embedding and a product with its whole table."""
    model, ids = pipeline.model, words_of(pipeline)
    result = run("hotflip", pipeline, samples, candidates=1)
    for row, sample in enumerate(samples):
        batch, kept = pipeline.collate([sample]), []
        handle = model.get_input_embeddings().register_forward_hook(
            lambda m, a, out, kept=kept: kept.append(out.detach().requires_grad_()) or kept[-1]
        )
        image, text = pipeline.bridge.inputs(batch)
        pipeline.bridge.losses(pipeline.bridge.encode_image(batch["pixel_values"], **image), **text)[0].backward()
        handle.remove()
        model.zero_grad()
        line, table = batch["input_ids"][0].tolist(), model.get_input_embeddings().weight.detach()
        asked = sample.prompt.removesuffix("?").split()
        first = next(i for i in range(len(line)) if line[i : i + len(asked)] == [ids[w] for w in asked])
        slope = kept[0].grad[0, first : first + len(asked)]
        gains = {
            (k, word): float(slope[k] @ (table[i] - table[ids[old]]))
            for k, old in enumerate(asked)
            for word, i in ids.items()
            if word[0].islower() and word != old
        }
        k, word = max(gains, key=gains.get)
        tried = " ".join([*asked[:k], word, *asked[k + 1 :]]) + "?"
        before, after = losses(pipeline, [sample] * 2, [sample.prompt, tried])
        assert result.prompts[row] == (tried if after > before else sample.prompt)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("edits", [1, 2])
def test_budget_words_and_template_are_kept(name, edits, pipeline, samples):
    kept = "color,red"
    result = run(name, pipeline, samples, steps=6, edits=edits, keep=kept, candidates=4, restarts=2)
    typed = [replace(s, prompt=p) for s, p in zip(samples, result.prompts, strict=True)]
    changed = 0
    for old, new, sample, prompt in zip(
        tokens(pipeline, samples), tokens(pipeline, typed), samples, result.prompts, strict=True
    ):
        assert len(old) == len(new) and sum(a != b for a, b in zip(old, new, strict=True)) <= edits
        changed = max(changed, sum(a != b for a, b in zip(old, new, strict=True)))
        assert prompt.endswith("?") and set(prompt.removesuffix("?").split()) <= set(words_of(pipeline))
        assert prompt.split().index("color") == sample.prompt.split().index("color") and "red" not in prompt
        assert not {"USER", "ASSISTANT"} & set(prompt.split())  # lower case stays lower case
    assert changed == edits
    torch.testing.assert_close(result.loss, losses(pipeline, samples, result.prompts), rtol=1e-4, atol=1e-5)
    assert (result.loss > losses(pipeline, samples, [s.prompt for s in samples])).all()
    assert torch.equal(result.adv, victim(pipeline, samples).pixels()) and not result.zero_gradients.any()


def test_more_steps_and_edits_find_more(pipeline, samples):
    found = [
        run("gcg", pipeline, samples, steps=steps, edits=edits, candidates=8).loss.mean()
        for steps, edits in ((1, 1), (6, 1), (6, 3))
    ]
    assert found[0] <= found[1] < found[2]


@pytest.mark.parametrize("name", NAMES)
def test_verdicts_are_those_of_the_text_that_is_typed_and_do_not_depend_on_the_batch(name, pipeline):
    """The fitted model breaks, and whoever types the prompt gets the reported answer."""
    spec = AttackSpec(name, 4, settings={"edits": 2, "candidates": 4})
    runs = [Runner(pipeline, colours(), batch_size=size).attack(spec, STILL) for size in (12, 5)]
    first = runs[0]
    assert all(r.prompts == first.prompts and r.predictions == first.predictions for r in runs)
    typed = [replace(colours()[row], prompt=text) for row, text in zip(first.rows, first.prompts, strict=True)]
    assert [pipeline.generate([sample])[0] for sample in typed] == first.predictions
    assert not first.right.all() and (first.fooled == ~first.right).all()
    assert first.predictions_8bit == first.predictions
    left = Runner(pipeline, colours()).attack(spec, STILL).among(first.right)
    assert left.prompts == [p for p, right in zip(first.prompts, first.right, strict=True) if right]


@pytest.mark.parametrize("family", GENERATIVE, ids=lambda f: f.name)
def test_in_every_generative_family_a_substitution_raises_the_loss_of_what_is_typed(family):
    pipeline, samples = Pipeline(family.name, family.model(), processor_of(family)), samples_of(family)
    pipeline.collate.processor.tokenizer.padding_side = "left"
    result = run("hotflip", pipeline, samples, edits=1, candidates=16)
    before = losses(pipeline, samples, [s.prompt for s in samples])
    assert [p != s.prompt for p, s in zip(result.prompts, samples, strict=True)] == [True] * 3
    assert (result.loss > before).all()
    if family.name != "InstructBLIP":  # its image side reads the question too, and the attack leaves it alone
        torch.testing.assert_close(result.loss, losses(pipeline, samples, result.prompts), rtol=1e-4, atol=1e-5)


def test_pieces_of_words_are_put_in_only_where_they_read_back(make_tiny):
    """With a byte-level tokenizer, tokens have spaces before them, and two of them may read as a third one."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = ["is there a blue shape in the image?", "what color is the shape?", "no red circle is there, yes"]
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    bpe.train_from_iterator(texts * 3, trainers.BpeTrainer(vocab_size=110, special_tokens=special, show_progress=False))
    model, processor = make_tiny()
    processor.tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip
    model.resize_token_embeddings(112)
    pipeline = Pipeline("bytes", model, processor)
    asked = [replace(s, prompt=t) for s, t in zip(colours(), texts[:2], strict=False)]
    for readable in (True, False):
        result = run("gcg", pipeline, asked, steps=3, edits=2, readable=readable, candidates=16)
        typed = [replace(s, prompt=p) for s, p in zip(asked, result.prompts, strict=True)]
        for old, new in zip(tokens(pipeline, asked), tokens(pipeline, typed), strict=True):
            assert len(old) == len(new) and 1 <= sum(a != b for a, b in zip(old, new, strict=True)) <= 2
        torch.testing.assert_close(result.loss, losses(pipeline, asked, result.prompts), rtol=1e-4, atol=1e-5)
        if readable:
            known = set(Vocabulary.of(processor.tokenizer).spelled)
            assert all(w.strip("?,").isalpha() and w.strip("?,") in known for p in result.prompts for w in p.split())


def test_text_with_control_tokens_or_nothing_to_replace_stays(pipeline, samples):
    odd = [replace(samples[0], prompt="what </s> is the shape?"), replace(samples[1], prompt="??")]
    result = run("hotflip", pipeline, odd, steps=2)
    assert result.prompts == [s.prompt for s in odd] and (result.zero_gradients == 2).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_as_before_also_after_an_exception(name, pipeline, samples):
    pipeline.model.train()
    try:
        before = snapshot(pipeline.model)
        run(name, pipeline, samples, candidates=4)
        assert snapshot(pipeline.model) == before
        calls = []

        def fail(*_):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("out of memory")

        handle = pipeline.model.lm_head.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(name, pipeline, samples, candidates=4)
        handle.remove()
        assert snapshot(pipeline.model) == before
    finally:
        pipeline.model.eval()


def test_results_and_manifest_hold_the_prompts_and_a_run_resumes(make_tiny, tmp_path, monkeypatch):
    pipeline = fitted(make_tiny)
    folder = save(tmp_path / "fitted", pipeline.model, pipeline.processor, None)
    monkeypatch.setattr("cmai_fast.workflows.attack.asked", lambda *_: colours())
    settings = {
        "settings": {"edits": "2"}, "steps": 2, "batch_size": 5, "progress": False, "limit": 12,
    }  # fmt: skip
    data, saved = DataSource("easyvqa"), tmp_path / "png"
    whole = attack(str(folder), data, "hotflip", STILL, out=tmp_path / "a.json", save_images=saved, **settings)
    rows = whole["per_sample"]
    assert any(r["question_adv"] != r["question"] for r in rows) and whole["acc_robust"] < whole["acc_clean"]
    lines = [json.loads(line) for line in (saved / "manifest.jsonl").read_text().splitlines()]
    assert [m["adversarial_question"] for m in lines] == [r["question_adv"] for r in rows]
    assert [m["question"] for m in lines] == [r["question"] for r in rows]

    append, count = Journal.append, []

    def interrupted(journal, *args, **kwargs):
        append(journal, *args, **kwargs)
        count.append(journal.folder.name)
        if sum(name.startswith("hotflip") for name in count) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attack(str(folder), data, "hotflip", STILL, out=tmp_path / "b.json", **settings)
    monkeypatch.setattr(Journal, "append", append)
    again = attack(str(folder), data, "hotflip", STILL, out=tmp_path / "b.json", resume=True, **settings)
    assert again["per_sample"] == rows and not State(tmp_path / "b.json.state").folder.exists()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.kind != "generative"], ids=lambda f: f.name)
def test_models_without_a_prompt_are_refused_by_name(family, samples):
    class Other:
        bridge = None

    from cmai_fast.bridge import bridge_of

    Other.bridge = bridge_of(family.model())
    with pytest.raises(ValueError, match=f"{type(family.model()).__name__} has no prompt and response"):
        Prompts(Other, samples)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name, settings, said",
    [
        ("hotflip", {"edits": 0}, "hotflip: edits is 0; expected at least 1"),
        ("gcg", {"candidates": 0}, "gcg: candidates is 0; expected at least 1"),
        ("gcg", {"top_k": -1}, "gcg: top_k is -1; expected at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused_without_a_model(name, settings, said):
    with pytest.raises(ValueError, match=said):
        AttackSpec(name, settings=settings)


def test_what_cannot_be_attacked_is_refused(pipeline, samples, tmp_path):
    bare = Victim(pipeline.bridge, pipeline.space, pipeline.collate(samples))
    with pytest.raises(ValueError, match=r"set victim.prompts = Prompts\(pipeline, samples\)"):
        ATTACKS["gcg"](bare, bare.pixels(), STILL)
    made = victim(pipeline, samples)
    made.heads = pipeline.heads
    with pytest.raises(ValueError, match="does not depend on the words"):
        ATTACKS["gcg"](made, made.pixels(), STILL, loss="lower-consistency")
    with pytest.raises(ValueError, match="begins with hotflip-10, which changes prompts"):
        evaluate("easyvqa-llava", DataSource("easyvqa"), STILL, attacks=[AttackSpec("hotflip")], out=tmp_path / "x")

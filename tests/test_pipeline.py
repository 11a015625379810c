"""One way to generate and to score: the checkpoint's own generation settings, memory and threads do not change it."""

from __future__ import annotations

import json

import pytest
import torch

from cmai_fast.bridge import bridge_of
from cmai_fast.cmcv import ConsistencyHeads, Threshold
from cmai_fast.data import load_dataset
from cmai_fast.pipeline import Generation, Pipeline, in_parts
from families import FAMILIES
from processors import GENERATIVE, processor_of, samples_of

LENGTH = 6


@pytest.fixture(scope="module")
def samples():
    data = load_dataset("easyvqa", "test", limit=8, seed=1)
    return [data[i] for i in range(len(data))]


@pytest.fixture
def pipeline(make_tiny):
    model, processor = make_tiny()
    width = model.config.text_config.hidden_size
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = ConsistencyHeads(width, width, dim=8, hidden=16)
    return Pipeline("tiny", model, processor, heads, None, Generation(LENGTH))


HOSTILE = {
    "lengths": {"min_new_tokens": LENGTH, "min_length": 100, "max_length": 3, "max_time": 1e-9},
    "penalties": {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "encoder_repetition_penalty": 3.0},
    "sampling": {"do_sample": True, "temperature": 9.0, "top_k": 0, "top_p": 0.3},
    "beams": {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 9.0, "early_stopping": True},
    "forced": {"forced_bos_token_id": 9, "forced_eos_token_id": 9},
    "suppressed": {"suppress_tokens": list(range(3, 30)), "begin_suppress_tokens": list(range(20, 40))},
    "bias": {"sequence_bias": [[[9], 100.0]], "bad_words_ids": [[i] for i in range(3, 30)], "guidance_scale": 3.0},
    "stops": {"stop_strings": ["e"], "exponential_decay_length_penalty": (1, 99.0)},
    "output": {"return_dict_in_generate": True, "output_scores": True, "use_cache": False},
}


@pytest.mark.parametrize("settings", HOSTILE.values(), ids=HOSTILE)
def test_nothing_of_the_checkpoints_generation_config_changes_answers(pipeline, samples, settings):
    before, scores = pipeline.answer(samples)
    config = pipeline.model.generation_config
    for name, value in settings.items():
        setattr(config, name, value)
    after = pipeline.answer(samples)
    assert after == (before, scores) and len(set(before)) > 1
    assert pipeline.model.generation_config is config
    assert all(getattr(config, name) == value for name, value in settings.items())


def test_every_end_token_of_the_checkpoint_ends_an_answer(pipeline, samples):
    """And its settings come back after an error."""
    first = pipeline.processor.tokenizer.convert_tokens_to_ids(pipeline.generate(samples[:1])[0].split()[0])
    config = pipeline.model.generation_config
    config.eos_token_id = [config.eos_token_id, first]
    assert len(pipeline.generate(samples[:1])[0].split()) == 1
    pipeline.collate = None
    with pytest.raises(AttributeError):
        pipeline.generate(samples)
    assert pipeline.model.generation_config is config


def test_the_config_of_a_model_within_the_model_does_not_count_either():
    """BLIP-2 hands on to its language model, which has a generation config of its own."""
    family = next(f for f in FAMILIES if f.name == "BLIP-2")
    pipeline = Pipeline("blip", family.model(), processor_of(family), generation=Generation(LENGTH))
    samples = samples_of(family)
    before = pipeline.generate(samples)
    inner = pipeline.model.language_model.generation_config
    inner.suppress_tokens, inner.repetition_penalty, inner.min_new_tokens = list(range(22, 40)), 5.0, LENGTH
    assert pipeline.generate(samples) == before
    assert pipeline.model.language_model.generation_config is inner


def test_answer_is_generate_and_score_and_encodes_images_once(pipeline, samples):
    said = pipeline.generate(samples)
    scores = pipeline.score(samples, said).tolist()
    seen = []
    pipeline.model.model.vision_tower.register_forward_hook(lambda module, inputs, output: seen.append(1))
    assert pipeline.answer(samples) == (said, scores) and len(seen) == 1
    assert "get_image_features" not in vars(pipeline.model.model)
    assert pipeline.answer([]) == ([], []) and len(pipeline.score([], [])) == 0
    images = pipeline.images(samples)
    moved = [1 - image for image in images.split(images.pixels())]
    del seen[:]
    answers, moved_scores = pipeline.answer(samples, moved)
    assert len(seen) == 1 and answers == pipeline.generate(samples, moved) != said
    assert moved_scores == pipeline.score(samples, answers, moved).tolist() != scores


def test_what_does_not_fit_into_memory_is_answered_in_halves(pipeline, samples, monkeypatch):
    expected, scores = pipeline.answer(samples)
    generate, sizes = pipeline.model.generate, []

    def small(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    monkeypatch.setattr(pipeline.model, "generate", small)
    with pytest.warns(RuntimeWarning) as warned:
        answers, again = pipeline.answer(samples)
    said = [str(w.message) for w in warned if "do not fit" in str(w.message)]
    assert [text.split()[0] for text in said] == ["8", "4"] and "4 at a time" in said[0]
    assert answers == expected and again == pytest.approx(scores, abs=1e-5) and sizes == [8, 4, 2, 2, 2, 2]

    def never(rows):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    with pytest.raises(torch.OutOfMemoryError, match="a single sample does not fit"):
        in_parts(1, never)
    with pytest.raises(RuntimeError, match="another"):
        in_parts(2, lambda rows: (_ for _ in ()).throw(RuntimeError("another")))


def test_settings_come_with_the_threshold(pipeline, tmp_path):
    model, processor, heads = pipeline.model, pipeline.processor, pipeline.heads
    threshold = Threshold(0.1, 0.05, 9, "calibration", Generation(3))
    assert Pipeline("a", model, processor, heads, threshold).generation == Generation(3)
    assert Pipeline("a", model, processor, heads).generation == Generation(16)
    assert Pipeline("a", model, processor, heads, threshold, Generation(3)).generation == Generation(3)
    with pytest.raises(ValueError, match=r"max_new_tokens is 4, and the threshold of a .*at most 3 tokens"):
        Pipeline("a", model, processor, heads, threshold, Generation(4))


def test_heads_saved_before_the_settings_were_keep_eight_tokens(pipeline, tmp_path):
    pipeline.heads.save_pretrained(tmp_path, Threshold(0.1, 0.05, 9, "calibration", Generation(3)))
    assert ConsistencyHeads.from_pretrained(tmp_path)[1].generation == Generation(3)
    record = json.loads((tmp_path / "cmcv.json").read_text())
    del record["threshold"]["generation"]
    (tmp_path / "cmcv.json").write_text(json.dumps(record | {"format": 1}))
    assert ConsistencyHeads.from_pretrained(tmp_path)[1] == Threshold(0.1, 0.05, 9, "calibration", Generation(8))
    (tmp_path / "cmcv.json").write_text(json.dumps(record | {"format": 3}))
    with pytest.raises(ValueError, match="has format 3, and this version reads 1 and 2; upgrade"):
        ConsistencyHeads.from_pretrained(tmp_path)
    unknown = record["threshold"] | {"generation": {"max_new_tokens": 3, "num_beams": 2}}
    (tmp_path / "cmcv.json").write_text(json.dumps(record | {"threshold": unknown}))
    with pytest.raises(ValueError, match="num_beams"):
        ConsistencyHeads.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["easyvqa-llava", "easyvqa-llava-immune"])
def test_bundled_thresholds_say_how_answers_were_generated(name):
    threshold = Pipeline.load(name).threshold
    assert threshold.generation == Generation(8) and threshold.fingerprint is not None


@pytest.mark.parametrize("family", GENERATIVE, ids=lambda f: f.name)
def test_every_familys_answers_and_scores_are_those_of_two_passes(family):
    model = family.model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bridge = bridge_of(model)
        heads = ConsistencyHeads(bridge.image_dim, bridge.text_dim, dim=8, hidden=16)
    pipeline = Pipeline(family.name, model, processor_of(family), heads, generation=Generation(3))
    samples = samples_of(family)
    said = pipeline.generate(samples)
    assert pipeline.answer(samples) == (said, pipeline.score(samples, said).tolist())

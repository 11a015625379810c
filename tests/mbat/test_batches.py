"""What a step takes: streams, records of any kind, samples without an image, and errors that name the key."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset

from cmai_fast.bridge import BatchImages, Bridge, bridge_of, task_loss
from cmai_fast.data import Sample, VQACollator
from cmai_fast.mbat import MBATConfig, MBATTrainer
from cmai_fast.mbat.batches import RecordCollator, checked, rows_with_images
from cmai_fast.pixels import PixelSpace
from families import FAMILIES


class Stream(IterableDataset):
    def __init__(self, records: Any) -> None:
        self.records = records

    def __iter__(self) -> Any:
        return (self.records[i] for i in range(len(self.records)))


@pytest.mark.parametrize("dispatch", [None, True, False])
def test_wrong_answers_of_a_stream_arrive_whole(make_trainer, make_tiny, data, dispatch):
    """Whoever dispatches: the step sees the rows that the collator made, each with its own wrong answers."""
    seen, collate = [], VQACollator(make_tiny()[1], negatives=3)
    trainer = make_trainer(
        max_steps=2, save_strategy="no", accelerator_config={"dispatch_batches": dispatch},
        given={"train_dataset": Stream(data), "data_collator": collate},
    )  # fmt: skip
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *a: seen.append(inputs) or step(model, inputs, *a)
    trainer.train()
    assert len(seen) == 2
    for i, got in enumerate(seen):
        made = collate([data[j] for j in range(4 * i, 4 * i + 4)])
        assert got.keys() == made.keys() and all(torch.equal(got[k], v) for k, v in made.items())
        assert got["negative_input_ids"].shape[:2] == (4, 3)


def test_rows_that_accelerate_cut_are_refused(make_trainer, make_tiny, data):
    """A collator of the user's own, with a row for each wrong answer."""
    collate = VQACollator(make_tiny()[1], negatives=3)

    def flat(samples: Any) -> Any:
        return {k: v.flatten(0, 1) if k.startswith("negative_") else v for k, v in collate(samples).items()}

    trainer = make_trainer(
        max_steps=2, accelerator_config={"dispatch_batches": True},
        given={"train_dataset": Stream(data), "data_collator": flat},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"negative_input_ids has shape \(4, \d+\); expected \(N, K, M\).*dispatch"):
        trainer.train()


def test_records_of_any_kind_are_collated_when_no_collator_is_given(make_trainer, data):
    s = [data[i] for i in range(3)]
    records = [
        *s,
        *({"image": r.images[0], "question": r.prompt, "answer": r.answer, "choices": r.choices} for r in s),
    ]
    for rows in (records, Stream(records)):
        trainer = make_trainer(
            max_steps=2, per_device_train_batch_size=3, save_strategy="no",
            given={"train_dataset": rows, "data_collator": None},
        )  # fmt: skip
        seen, step = [], trainer._step
        trainer._step = lambda inputs, size, seen=seen, step=step: seen.append(inputs) or step(inputs, size)
        trainer.train()
        assert all(batch["negative_input_ids"].shape[:2] == (3, 1) for batch in seen) and len(seen) == 2
        assert isinstance(trainer.data_collator, RecordCollator)


def test_wrong_answers_are_collated_where_there_are_some_and_the_heads_learn(make_trainer, make_tiny, data, tmp_path):
    model, processor = make_tiny()
    open_ended = Sample("x/1", data[0].images, data[0].prompt, ("red",))
    for gamma, records, there in (
        (0.5, [data[0], data[1]], True), (0.0, [data[0], data[1]], False), (0.5, [data[0], open_ended], False)
    ):  # fmt: skip
        args = MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, gamma=gamma)
        batch = RecordCollator(processor, Bridge(model), args)(records)
        assert ("negative_labels" in batch) == there
        assert batch["input_ids"].shape[0] == 2


def test_rows_of_the_models_own_inputs_are_stacked(make_trainer, make_tiny, data):
    collate = VQACollator(make_tiny()[1], negatives=1)
    rows = [{k: v[0] for k, v in collate([data[i]]).items()} for i in range(4)]
    longest = max(len(r["input_ids"]) for r in rows)
    filling = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    rows = [
        {k: F.pad(v, (longest - len(v), 0), value=filling[k]) if k in filling else v for k, v in r.items()}
        for r in rows
    ]
    rows = [{k: v for k, v in r.items() if not k.startswith("negative_")} for r in rows]
    trainer = make_trainer(max_steps=1, save_strategy="no", given={"train_dataset": rows, "data_collator": None})
    trainer.train()
    assert trainer.state.global_step == 1


def without_picture(sample: Sample) -> Sample:
    return Sample(f"text {sample.id}", (), sample.prompt, sample.references, sample.choices)


def text_batch(processor: Any, samples: Any) -> dict[str, torch.Tensor]:
    """Prompts without the image token, as a text-only record is collated."""
    batch = VQACollator(processor)(samples)
    keep = [row != processor.image_token_id for row in batch["input_ids"]]
    length = max(int(k.sum()) for k in keep)
    rows = {}
    for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        rows[key] = torch.full((len(samples), length), fill)
        for i, k in enumerate(keep):
            rows[key][i, length - int(k.sum()) :] = batch[key][i][k]
    return rows


def mixed(whole: dict[str, torch.Tensor], text: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text between the first and the other samples with an image."""
    out = {k: v for k, v in whole.items() if k == "pixel_values"}
    length = whole["input_ids"].shape[1]
    for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        padded = torch.full((len(text[key]), length), fill)
        padded[:, length - text[key].shape[1] :] = text[key]
        out[key] = torch.cat([whole[key][:1], padded, whole[key][1:]])
    return out


@pytest.mark.parametrize("kind", ["texts", "mixed"])
def test_samples_without_an_image_are_trained_cleanly(make_trainer, make_tiny, data, kind):
    """Their loss counts in full, whatever lam is; the others are attacked as ever."""
    processor, samples = make_tiny()[1], [data[i] for i in range(4)]
    text = text_batch(processor, samples[:1] if kind == "mixed" else samples)
    whole = VQACollator(processor)(samples[1:])
    batch = text if kind == "texts" else mixed(whole, text)
    trainer = make_trainer(gamma=0.0, beta=0.0, arm=False, lam=0.4, eps=1e-9, inner_steps=1)
    total = trainer.training_step(trainer.model, dict(batch))
    plain = make_tiny()[0].train()
    names = ("input_ids", "attention_mask", "labels", "pixel_values")
    loss = plain(**{k: batch[k] for k in names if k in batch}).loss  # the mean over tokens, as Trainer's
    torch.testing.assert_close(total, loss.detach(), rtol=1e-4, atol=1e-4)
    loss.backward()
    for (name, p), q in zip(trainer.model.named_parameters(), plain.parameters(), strict=True):
        if q.grad is not None and bool(q.grad.any()):
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-3, atol=1e-4, msg=name)
    assert trainer.passes.vision_forward == (1 if kind == "mixed" else 0)


def test_a_loss_of_the_users_does_not_run_on_parts_of_a_batch(make_trainer, make_tiny, data):
    """It may be a mean over its batch."""
    processor, samples = make_tiny()[1], [data[i] for i in range(4)]
    batch = mixed(VQACollator(processor)(samples[1:]), text_batch(processor, samples[:1]))
    trainer = make_trainer(
        given={"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.mean()}
    )
    with pytest.raises(ValueError, match=r"3 of 4 samples of a batch have an image, and compute_loss_func is given"):
        trainer.training_step(trainer.model, batch)


def test_heads_learn_from_the_samples_with_an_image_alone(make_trainer, make_tiny, data):
    processor, samples = make_tiny()[1], [data[i] for i in range(4)]
    whole = VQACollator(processor)(samples[1:])
    batch = mixed(whole, text_batch(processor, samples[:1]))
    grads = []
    for given in (batch, whole):
        trainer = make_trainer(inner="none", gamma=0.5)
        trainer.training_step(trainer.model, dict(given))
        grads.append([p.grad for p in trainer.heads.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_a_step_of_texts_and_images_in_parts_is_the_whole_step(make_trainer, make_tiny, data):
    processor, samples = make_tiny()[1], [data[i] for i in range(5)]
    batch = mixed(VQACollator(processor)(samples[2:]), text_batch(processor, samples[:2]))
    found = []
    for at_once in (None, 2):
        trainer = make_trainer(gamma=0.5, beta=0.3)
        trainer.model.double(), trainer.heads.double()
        trainer._rows_at_once = at_once
        total = trainer.training_step(trainer.model, {**batch, "pixel_values": batch["pixel_values"].double()})
        found.append([total, *(p.grad for p in trainer.model.parameters() if p.grad is not None)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


def test_evaluation_counts_samples_without_an_image(make_trainer, make_tiny, data):
    processor, samples = make_tiny()[1], [data[i] for i in range(4)]
    whole, text = VQACollator(processor)(samples[1:]), text_batch(processor, samples[:1])
    batch = mixed(whole, text)
    batch["sample_ids"] = torch.tensor([1, 9, 2, 3])
    trainer = make_trainer(eval_attack_steps=2)
    found = trainer._look(batch)
    alone = trainer._look({**whole, "sample_ids": torch.tensor([1, 2, 3])})
    there = torch.tensor([True, False, True, True])
    for name, value in alone.items():
        torch.testing.assert_close(found[name][there], value, rtol=1e-3, atol=1e-5)
    assert found["loss"][1] == found["robust_loss"][1] and found["s_c"][1].isnan()
    with torch.no_grad():
        bridge = trainer.bridge
        expected = task_loss(*bridge.fuse(torch.zeros(1, 0, bridge.image_dim), **text))
    torch.testing.assert_close(found["loss"][1:2], expected, rtol=1e-4, atol=1e-5)


GENERATIVE = [f for f in FAMILIES if f.kind == "generative"]


@pytest.mark.parametrize("family", GENERATIVE, ids=lambda f: f.name)
def test_texts_alone_train_on_every_family(family, tmp_path):
    model = copy.deepcopy(family.model())
    args = MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = MBATTrainer(model, args, processing_class=family.processor)
    batch = family.batch(family.model(), family.samples())
    image = model.config.image_token_id
    keep = batch["input_ids"] != image
    of_images = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw")
    text = {k: v for k, v in batch.items() if k not in of_images}
    text["input_ids"] = torch.where(keep, text["input_ids"], 0)
    text["attention_mask"] = text["attention_mask"] * keep
    if "mm_token_type_ids" in text:
        text["mm_token_type_ids"] = text["mm_token_type_ids"] * 0
    loss = trainer.training_step(model, text)
    assert loss.isfinite() and trainer.passes.vision_forward == 0


def look(bridge: Any, space: PixelSpace, batch: dict[str, torch.Tensor]) -> None:
    """What a step does before it encodes images, and that."""
    batch = checked(bridge, batch)
    rows_with_images(bridge, batch)
    _ = BatchImages(bridge, space, batch).layout
    bridge.encode_image(**{k: batch[k] for k in ("pixel_values", *bridge.image_keys) if k in batch})


@pytest.mark.parametrize("family", GENERATIVE, ids=lambda f: f.name)
def test_images_that_no_sample_takes_and_images_that_were_cut_are_refused(family):
    """Trained on as texts, or on other samples' images, without a word."""
    model = family.model()
    bridge, batch = bridge_of(model), family.batch(model, family.samples())
    unseen = torch.where(batch["input_ids"] == model.config.image_token_id, 11, batch["input_ids"])
    with pytest.raises(ValueError, match=r"pixel_values of shape .*, and sample 0 of it has no image token \(id 5\)"):
        rows_with_images(bridge, {**batch, "input_ids": unseen})
    first = {**batch, "input_ids": torch.cat([unseen[:1], batch["input_ids"][1:]])}
    space = PixelSpace.from_processor(family.processor)
    with pytest.raises(ValueError, match=r"sample 0 of it has no image token|cannot be assigned in order"):
        look(bridge, space, first)
    cut = {k: v[: len(batch["labels"])] for k, v in batch.items()}  # as accelerate does
    if len(cut["pixel_values"]) < len(batch["pixel_values"]):
        with pytest.raises(ValueError, match=r"the images take .* tokens|image_grid_thw stands for .*dispatch_batches"):
            look(bridge, space, cut)


def test_any_hashable_id_names_a_sample(tiny_model, batch):
    bridge = Bridge(tiny_model)
    ids = checked(bridge, {**batch, "sample_ids": ["a/1.png", 7, ("b", 2), None]})["sample_ids"]
    assert ids.dtype == torch.int64 and len(set(ids.tolist())) == 4 and ids[1] == 7
    assert torch.equal(ids, checked(bridge, {**batch, "sample_ids": ["a/1.png", 7, ("b", 2), None]})["sample_ids"])
    plain = {k: v for k, v in batch.items() if k != "sample_ids"}
    assert checked(bridge, plain, 10)["sample_ids"].tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_ids": None}, r"the batch has no input_ids; it has .*labels.*VQACollator makes them"),
        ({"labels": None, "attention_mask": None}, "the batch has no attention_mask, no labels"),
        ({"pixel_values": None}, "the batch has no pixel_values, and 4 of its 4 samples have an image"),
        ({"labels": "red"}, "labels of the batch is a str; expected a tensor"),
        ({"sample_ids": torch.arange(3)}, r"sample_ids have shape \(3,\) .* for each of the 4 samples"),
        ({"sample_ids": ["a", "b"]}, r"sample_ids have shape \(2,\)"),
        ({"sample_ids": torch.rand(4)}, "dtype torch.float32; expected one whole number, or anything hashable"),
        ({"input_ids": torch.ones(3, 5, dtype=torch.long)}, "input_ids has 3 rows and labels 4; expected one per"),
        ({"negative_labels": torch.ones(8, 1, 5)}, "negative_labels has 8 rows and labels 4"),
    ],
)
def test_what_is_wrong_with_a_batch_is_named(make_trainer, batch, change, message):
    trainer = make_trainer()
    wrong = {k: v for k, v in {**batch, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        trainer.training_step(trainer.model, wrong)


def test_a_dual_encoder_says_what_it_learns_from(tmp_path):
    family = next(f for f in FAMILIES if f.kind == "dual")
    batch = family.batch(family.model(), family.samples())
    bridge = bridge_of(family.model())
    with pytest.raises(ValueError, match=r"the batch has no labels; it has .*the index of each image's own text"):
        checked(bridge, {k: v for k, v in batch.items() if k != "labels"})
    args = MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"record 0: no question; .*caption, for a picture and its text"):
        RecordCollator(family.processor, bridge, args)([{"image": None, "text": "a shape"}])

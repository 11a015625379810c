"""Users' own records in the trainer, with no collator given: dicts, chats, rows of `datasets`, streams, captions."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from cmai_fast.data.sample import numeric_id
from cmai_fast.mbat import MBATConfig, MBATTrainer
from families import FAMILIES

COLORS = ("red", "blue", "green", "yellow")


def picture(i: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def png(i: int) -> bytes:
    file = io.BytesIO()
    picture(i).save(file, "PNG")
    return file.getvalue()


def plain(i: int) -> dict[str, Any]:
    return {
        "id": f"shapes/{i}.png", "image": picture(i), "question": "what color is the shape?", "answer": COLORS[i % 4],
        "choices": list(COLORS),
    }  # fmt: skip


def trl(i: int) -> dict[str, Any]:
    asked = [{"type": "image"}, {"type": "text", "text": "what color is the shape?"}]
    answered = [{"type": "text", "text": COLORS[i % 4]}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return {"messages": messages, "images": [picture(i)]}


def prompt_completion(i: int) -> dict[str, Any]:
    messages = trl(i)["messages"]
    return {"prompt": messages[:1], "completion": messages[1:], "images": [picture(i)]}


def llava(i: int) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": "<image>\nwhat color is the shape?"},
        {"from": "gpt", "value": COLORS[i % 4]},
    ]
    return {"id": i, "image": picture(i), "conversations": turns}


def text_only(i: int) -> dict[str, Any]:
    return {"question": "is a red shape present?", "answer": "yes" if i % 2 else "no"}


def text_chat(i: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "what is red?"}, {"role": "assistant", "content": "a color"}]}


def several(i: int) -> dict[str, Any]:
    """No image, one, two, in turn."""
    images = [picture(10 * i + k) for k in range(i % 3)]
    return {"images": images, "question": "what shape is in the image?", "answer": COLORS[i % 4]}


class Rows:
    """Rows as `datasets.Dataset` gives them: an Image feature that is not decoded is a dict of bytes and path."""

    column_names = ("image", "question", "answer", "label_names")

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: Any) -> dict[str, Any]:
        row = {"image": {"bytes": png(i), "path": None}, "question": "what color?", "answer": COLORS[i % 4]}
        return row | {"label_names": None}


class Stream(IterableDataset):
    def __init__(self, form: Any) -> None:
        self.form = form

    def __iter__(self) -> Iterator[Any]:
        return map(self.form, range(8))


def trained(make_trainer: Any, rows: Any, **options: Any) -> tuple[MBATTrainer, list[dict[str, Any]]]:
    """A trainer after two steps on `rows`, and the batches that its steps saw."""
    defaults = {
        "max_steps": 2, "save_strategy": "no", "per_device_train_batch_size": 3, "inner_steps": 1,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    given = {"train_dataset": rows, "data_collator": None, **options.pop("given", {})}
    trainer = make_trainer(**(defaults | options), given=given)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    seen, step = [], trainer._step
    trainer._step = lambda inputs, size: seen.append(inputs) or step(inputs, size)
    trainer.train()
    assert trainer.state.global_step == 2 and len(seen) == 2
    assert any(not torch.equal(p, start[name]) for name, p in trainer.model.named_parameters())
    return trainer, seen


FORMS = [plain, trl, prompt_completion, llava, text_only, text_chat, several]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_records_of_every_form_train(make_trainer, make_tiny, form):
    processor = make_tiny()[1]
    trainer, seen = trained(make_trainer, [form(i) for i in range(8)])
    for k, batch in enumerate(seen):
        tokens = (batch["input_ids"] == processor.image_token_id).sum(1).tolist()
        images = [
            i % 3 if form is several else int(not form.__name__.startswith("text")) for i in range(3 * k, 3 * k + 3)
        ]
        assert tokens == [16 * n for n in images]
        assert len(batch["pixel_values"]) == sum(images) if sum(images) else "pixel_values" not in batch
        answers = processor.tokenizer.batch_decode([row[row != -100] for row in batch["labels"]])
        if form in (plain, trl, prompt_completion, llava, several):
            assert [a.split()[0] for a in answers] == [COLORS[i % 4] for i in range(3 * k, 3 * k + 3)]
        if form is plain:
            assert batch["sample_ids"].tolist() == [numeric_id(plain(i)["id"]) for i in range(3 * k, 3 * k + 3)]
            assert batch["negative_labels"].shape[:2] == (3, 1)
    assert trainer.evaluate([form(i) for i in range(3)])["eval_loss"] > 0


@pytest.mark.parametrize("rows", [Stream(plain), Stream(several), Rows()], ids=["one", "several", "rows"])
def test_streams_and_rows_of_datasets_train(make_trainer, rows):
    _, seen = trained(make_trainer, rows)
    assert [len(batch["labels"]) for batch in seen] == [3, 3]


def test_records_without_ids_are_told_apart_by_their_places_in_the_whole_batch(make_trainer):
    trainer, seen = trained(make_trainer, [trl(i) for i in range(8)])
    assert all(batch["sample_ids"].tolist() == [0, 1, 2] for batch in seen)
    ids, look = [], trainer._look
    trainer._look = lambda inputs: ids.extend(inputs["sample_ids"].tolist()) or look(inputs)
    trainer.args.per_device_eval_batch_size = 2
    trainer.evaluate([trl(i) for i in range(4)])
    assert ids == [0, 1, 2, 3]


def some_images(i: int) -> dict[str, Any]:
    """Of three records the first alone has an image."""
    return {**plain(i), "image": None if i % 3 else picture(i)}


def test_no_sample_of_a_stream_is_lost_where_images_are_fewer(make_trainer):
    """Dispatched batches are cut to the rows of their first tensor."""
    _, seen = trained(make_trainer, Stream(some_images), accelerator_config={"dispatch_batches": True})
    assert all(len(batch["labels"]) == 3 and len(batch["pixel_values"]) == 1 for batch in seen)


def test_an_evaluation_in_mid_training_changes_nothing(make_trainer):
    rows = [several(i) for i in range(8)]
    found = []
    for strategy in ("no", "steps"):
        given = {"eval_dataset": rows[:3]}
        trainer, _ = trained(make_trainer, rows, eval_strategy=strategy, eval_steps=1, eval_attack_steps=1, given=given)
        found.append([p.detach().clone() for p in (*trainer.model.parameters(), *trainer.heads.parameters())])
    logs = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in logs] == [1, 2]
    assert all({"eval_accuracy", "eval_robust_loss", "eval_s_c"} <= set(entry) for entry in logs)
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


DUAL = next(f for f in FAMILIES if f.kind == "dual")


class Words:
    """A tokenizer of words for the family's small vocabulary."""

    model_input_names = ("input_ids", "attention_mask")

    def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
        rows = [[1, *(10 + sum(map(ord, word)) % 30 for word in text.split()), 2] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def dual_trainer(folder: Any, rows: Any, **config: Any) -> MBATTrainer:
    processor = SimpleNamespace(image_processor=DUAL.processor, tokenizer=Words())
    args = MBATConfig(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=2, inner_steps=1,
        per_device_train_batch_size=3, save_strategy="no", train_sampling_strategy="sequential", **config,
    )  # fmt: skip
    model = copy.deepcopy(DUAL.model())
    return MBATTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=processor)


def caption(i: int) -> dict[str, Any]:
    return {"image": picture(i), "caption": f"a {COLORS[i % 2]} shape"}


def class_name(i: int) -> dict[str, Any]:
    return {"id": f"x{i}", "image": picture(i), "answer": COLORS[i % 4], "choices": list(COLORS), "question": "?"}


@pytest.mark.parametrize("form", [caption, class_name], ids=lambda f: f.__name__)
@pytest.mark.parametrize("stream", [False, True])
def test_dual_encoders_train_on_captions_and_class_names(tmp_path, form, stream):
    rows = Stream(form) if stream else [form(i) for i in range(7)]
    trainer = dual_trainer(tmp_path, rows)
    seen, step = [], trainer._step
    trainer._step = lambda inputs, size: seen.append(inputs) or step(inputs, size)
    trainer.train()
    names = [[f"a {c} shape" for c in ("red", "blue")], [f"a {c} shape" for c in ("blue", "red")]]
    for k, batch in enumerate(seen):
        texts = names[k] if form is caption else list(COLORS)
        assert torch.equal(batch["input_ids"], Words()(texts)["input_ids"])
        own = [f"a {COLORS[i % 2]} shape" if form is caption else COLORS[i % 4] for i in range(3 * k, 3 * k + 3)]
        assert batch["labels"].tolist() == [texts.index(text) for text in own]
        assert "negative_input_ids" not in batch
    found = trainer.evaluate()
    assert 0 <= found["eval_robust_accuracy"] <= found["eval_accuracy"] <= 1
    predicted = trainer.predict([form(i) for i in range(3)])
    assert predicted.metrics["test_loss"] > 0


def test_texts_of_a_dual_encoder_are_not_cut(tmp_path):
    with pytest.raises(
        ValueError, match="dispatch_batches is set, which MBATTrainer does not support for dual encoders"
    ):
        dual_trainer(tmp_path, Stream(caption), accelerator_config={"dispatch_batches": True})


def test_pictures_of_a_dual_encoder_are_one_per_sample(tmp_path):
    trainer = dual_trainer(tmp_path, [{**caption(0), "image": [picture(0), picture(1)]}])
    with pytest.raises(ValueError, match="sample 0 has 2 images; a dual encoder takes exactly one"):
        trainer.train()

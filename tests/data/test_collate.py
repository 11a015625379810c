from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.utils import find_batch_size, slice_tensors
from PIL import Image

from cmai_fast.data import VQACollator, format_prompt, load_dataset
from cmai_fast.data.collate import negative_texts
from cmai_fast.data.pictures import read_picture


@pytest.fixture(scope="module")
def samples():
    data = load_dataset("easyvqa", "calibration", limit=8, seed=1)
    return [data[i] for i in range(len(data))]


def words(processor, ids) -> str:
    return processor.tokenizer.decode(ids)


def test_labels_mark_the_response_and_its_end_and_nothing_else(tiny_processor, samples):
    tokenizer = tiny_processor.tokenizer
    batch = VQACollator(tiny_processor)(samples)
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1  # prompts of several lengths, so some padding
    for i, sample in enumerate(samples):
        labels, ids, mask = batch["labels"][i], batch["input_ids"][i], batch["attention_mask"][i]
        marked = labels != -100
        assert labels[marked].tolist() == [tokenizer.convert_tokens_to_ids(sample.answer), tokenizer.eos_token_id]
        assert torch.equal(labels[marked], ids[marked])
        assert marked[-2:].all()  # the last columns: the prompt comes before, the padding before that
        n = int(mask.sum())
        assert mask[-n:].all() and (ids[:-n] == tokenizer.pad_token_id).all()


def test_prompt_is_what_the_processor_itself_makes(tiny_processor, samples):
    batch = VQACollator(tiny_processor)(samples)
    for i, sample in enumerate(samples):
        text = format_prompt(tiny_processor, sample.prompt)
        own = tiny_processor(text=[text], images=[sample.images[0]], return_tensors="pt")
        n = int(batch["attention_mask"][i].sum())
        assert batch["input_ids"][i, -n:-2].tolist() == own["input_ids"][0].tolist()
        torch.testing.assert_close(batch["pixel_values"][i], own["pixel_values"][0], rtol=0, atol=0)
        assert sample.prompt.split()[0] in text


def test_prompts_for_generation_end_where_the_answer_begins(tiny_processor, samples):
    collate = VQACollator(tiny_processor)
    prompts, batch = collate.prompts(samples), collate(samples)
    assert torch.equal(prompts["input_ids"], batch["input_ids"][:, :-2])
    assert torch.equal(prompts["attention_mask"], batch["attention_mask"][:, :-2])


def test_a_sample_is_the_same_in_any_batch_but_for_padding(tiny_processor, samples):
    collate = VQACollator(tiny_processor, negatives=2)
    whole = collate(samples)
    for i, sample in enumerate(samples):
        alone = collate([sample])
        for key in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(whole[key][i, -alone[key].shape[1] :], alone[key][0])
            rows = whole[f"negative_{key}"][i]
            assert torch.equal(rows[:, -alone[f"negative_{key}"].shape[2] :], alone[f"negative_{key}"][0])
        assert torch.equal(whole["pixel_values"][i], alone["pixel_values"][0])
    assert whole["sample_ids"].tolist() == [s.id for s in samples]


def test_negatives_are_wrong_answers_of_the_same_kind_to_the_same_question(tiny_processor, samples):
    batch = VQACollator(tiny_processor, negatives=3)(samples)
    assert {batch[f"negative_{k}"].shape[:2] for k in ("input_ids", "attention_mask", "labels")} == {(len(samples), 3)}
    for i, sample in enumerate(samples):
        n = int(batch["attention_mask"][i].sum())
        for k in range(3):
            ids, labels = (batch[f"negative_{key}"][i, k] for key in ("input_ids", "labels"))
            answer = words(tiny_processor, ids[-2])
            assert answer in sample.choices and answer != sample.answer
            assert torch.equal(ids[-n:-2], batch["input_ids"][i, -n:-2])
            assert (labels[:-2] == -100).all() and torch.equal(labels[-2:], ids[-2:])


def test_no_reference_is_a_negative(tiny_processor, samples):
    sample = replace(samples[0], references=("red", "blue"), choices=("Red", "red.", "blue", "green"))
    batch = VQACollator(tiny_processor, negatives=20)([sample])
    labels = batch["negative_labels"][0]
    assert (labels == labels[0]).all()
    green = VQACollator(tiny_processor)([replace(sample, references=("green",))])["labels"][0]
    assert labels[0][labels[0] != -100].tolist() == green[green != -100].tolist()


def test_negatives_depend_on_seed_and_sample_id_alone(tiny_processor, samples):
    colours = next(s for s in samples if len(s.choices) == 8)

    def drawn(seed: int, sample_id: int) -> list[int]:
        batch = VQACollator(tiny_processor, negatives=6, seed=seed)([replace(colours, id=sample_id)])
        return batch["negative_input_ids"][0, :, -2].tolist()

    assert drawn(0, 5) == drawn(0, 5)
    assert drawn(0, 5) != drawn(1, 5) and drawn(0, 5) != drawn(0, 6)


def test_what_cannot_be_collated_is_named(tiny_processor, samples):
    length = VQACollator(tiny_processor)(samples)["input_ids"].shape[1]
    VQACollator(tiny_processor, max_length=length)(samples)
    with pytest.raises(
        ValueError, match=rf"sample \d+ has {length} tokens with its labels, the model's context is {length - 1}"
    ):
        VQACollator(tiny_processor, max_length=length - 1)(samples)
    for choices in ((), ("red",)):
        with pytest.raises(ValueError, match="sample 7 has no wrong answers"):
            VQACollator(tiny_processor, negatives=1)([replace(samples[0], id=7, references=("red",), choices=choices)])


def test_negatives_go_where_their_samples_go(tiny_processor, samples):
    """accelerate cuts the batches of a stream by rows of dim 0, to the number of rows that it finds in one of them."""
    batch = VQACollator(tiny_processor, negatives=3)(samples)
    assert find_batch_size(dict(reversed(batch.items()))) == len(samples)
    part = slice_tensors(batch, slice(2, 5))
    texts = negative_texts(part, ("input_ids", "labels"))
    assert set(texts) == {"input_ids", "labels"}
    whole = negative_texts(batch, ("input_ids",))["input_ids"]
    assert torch.equal(texts["input_ids"], whole[6:15])
    assert negative_texts({"input_ids": part["input_ids"]}, ("input_ids",)) == {}
    for rows in (whole[6:9], whole[6:15], batch["negative_input_ids"]):  # cut to N, flat, of other samples
        with pytest.raises(ValueError, match=r"negative_input_ids of shape .* for 3 samples; expected \(3, K, M\)"):
            negative_texts({**part, "negative_input_ids": rows}, ("input_ids",))


def test_a_broken_sample_is_named_with_its_key(tiny_processor, samples):
    good = replace(samples[0], id="good")
    for changes, message in (
        ({"references": ()}, "has no answer"),
        ({"references": (None,)}, "has no answer"),
        ({"references": (3,)}, r"its answer is 3 \(int\); expected a text"),
        ({"references": (["red"],)}, r"its answer is \['red'\] \(list\)"),
        ({"choices": ("red", None)}, r"its choice is None"),
        ({"prompt": None}, r"its question is None"),
        ({"prompt": 5}, r"its question is 5 \(int\)"),
        ({"prompt": "a \ud800"}, r"its question holds U\+D800 at character 2"),
        ({"prompt": "\ufdd1</s>"}, r"its question holds U\+FDD1"),
        ({"images": (None,)}, r"its image is None"),
        ({"images": "photo.png"}, "has a str as images; expected a tuple"),
        ({"images": (good.images[0], "gone.png")}, r"its image 1 'gone\.png' is not a file"),
        ({"images": (good.images[0] / 2.0,)}, r"its image has floats from"),
    ):
        broken = replace(good, id="x1", **{"references": ("red",), "choices": ("red", "blue"), **changes})
        with pytest.raises(ValueError, match=f"^sample 'x1':? {message}"):
            VQACollator(tiny_processor, negatives=1)([good, broken])
    with pytest.raises(ValueError, match=r"sample 1 has the id \['a'\]"):
        VQACollator(tiny_processor)([good, replace(good, id=["a"])])
    for nothing in ([], good, {"question": "a"}):
        with pytest.raises(ValueError, match="expected a list of at least one sample"):
            VQACollator(tiny_processor)(nothing)


def test_any_hashable_id_names_a_sample(tiny_processor, samples):
    ids = [7, "seven", ("scan", 7), -1, 2**70, 7.5, None]
    batch = VQACollator(tiny_processor, negatives=1)([replace(samples[0], id=i) for i in ids])
    found = batch["sample_ids"].tolist()
    assert batch["sample_ids"].dtype == torch.int64 and len(set(found)) == len(ids) and found[0] == 7


def test_a_photo_of_any_size_and_form_is_read_as_read_picture_does(tiny_processor, samples, tmp_path):
    clear = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 4), dtype=np.uint8))
    clear.save(tmp_path / "photo.png")
    floats = samples[0].images[0].astype(np.float32) / 255
    collate = VQACollator(tiny_processor)
    for form in (tmp_path / "photo.png", str(tmp_path / "photo.png"), clear, floats, torch.from_numpy(floats)):
        own = tiny_processor(text=["<image>"], images=[read_picture(form)], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(collate([replace(samples[0], images=(form,))])["pixel_values"], own, rtol=0, atol=0)
    uint8 = collate([samples[0]])["pixel_values"]
    torch.testing.assert_close(collate([replace(samples[0], images=(floats,))])["pixel_values"], uint8, rtol=0, atol=0)


def test_cached_pictures_are_not_mistaken_for_one_another(tiny_processor, samples):
    collate = VQACollator(tiny_processor)
    indices = np.zeros((64, 64), np.uint8)
    pictures = []
    for colour in ((255, 0, 0), (0, 0, 255)):  # equal palette indices, other colours
        image = Image.fromarray(indices, "P")
        image.putpalette(colour)
        pictures.append(image.convert("P"))
    red, blue = (collate([replace(samples[0], images=(p,))])["pixel_values"] for p in pictures)
    assert not torch.equal(red, blue)
    one, two = samples[0].images[0], samples[0].images[0].copy()
    two[0, 0, 0] ^= 255
    for _ in range(2):  # the second time from the cache
        a, b = (collate([replace(samples[0], images=(image,))])["pixel_values"] for image in (one, two))
        assert (a != b).sum() == 1

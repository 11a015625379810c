from __future__ import annotations

import numpy as np
import pytest
import torch

from cmai_fast.data import EasyVQA, answer_choices, load_dataset
from cmai_fast.data.easyvqa import COLORS, SHAPES


def pictures_of(data: EasyVQA) -> set[int]:
    return {data.image_ids[i] for i in data.sample_ids}


def test_splits_share_no_picture_and_leave_none_out():
    train, calibration, test = (EasyVQA(s) for s in ("train", "calibration", "test"))
    assert not pictures_of(train) & pictures_of(calibration)
    assert pictures_of(train) | pictures_of(calibration) == set(range(4000))
    assert len(pictures_of(calibration)) == 200 and pictures_of(test) == set(range(1000))
    assert len(train) + len(calibration) == 38_575 and len(test) == 9_673
    # Test pictures are other files: they number from 0 again.
    assert train._official == calibration._official != test._official


def test_test_pictures_come_from_the_test_part():
    train, test = EasyVQA("train"), EasyVQA("test")
    same = next(i for i, k in enumerate(test.sample_ids) if test.image_ids[k] == train.image_ids[train.sample_ids[0]])
    assert not np.array_equal(test[same].images[0], train[0].images[0])


def test_a_sample_holds_what_the_official_lists_say():
    import easy_vqa
    from PIL import Image

    questions, answers, pictures = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    data = load_dataset("easyvqa", "test")
    for i in (0, 4_321, 9_672):
        sample = data[i]
        assert (sample.id, sample.prompt, sample.answer) == (i, questions[i], answers[i])
        assert np.array_equal(sample.images[0], np.asarray(Image.open(paths[pictures[i]]).convert("RGB")))
        assert sample.images[0].shape == (64, 64, 3) and sample.images[0].dtype == np.uint8
        assert sample.answer in sample.choices


def test_a_limit_draws_the_same_questions_for_the_same_seed():
    one, again, other = (EasyVQA("test", 50, seed).sample_ids for seed in (0, 0, 1))
    assert one == again != other
    assert len(set(one)) == 50 and one == sorted(one) and set(one) <= set(range(9_673))
    assert max(one) > 5_000  # drawn from all of the split, not its head
    assert len(EasyVQA("calibration", 10**6)) == len(EasyVQA("calibration"))
    assert pictures_of(EasyVQA("calibration", 30)) <= pictures_of(EasyVQA("calibration"))


def test_unknown_names_and_limits_are_refused():
    with pytest.raises(ValueError, match="'validation'; easyvqa has train, calibration, test"):
        EasyVQA("validation")
    with pytest.raises(ValueError, match=r"unknown data 'vqa2'; did you mean vqav2:FOLDER\? Expected .*easyvqa"):
        load_dataset("vqa2", "test")
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"limit is {limit}"):
            EasyVQA("test", limit)
    with pytest.raises(ValueError, match="'purple' is not an easy-VQA answer"):
        answer_choices("purple")


def test_choices_are_of_the_answers_own_kind():
    assert answer_choices("red") == COLORS and answer_choices("circle") == SHAPES
    assert answer_choices("no") == ("no", "yes")


def test_picture_labels_agree_with_every_question_asked_of_the_picture():
    """Checked through the questions that were not used: a picture told to be red has no 'no' to 'is it red?'."""
    data = EasyVQA("calibration")
    pixels, colours, shapes = data.picture_labels()
    pictures = sorted(pictures_of(data))
    assert pixels.shape == (200, 3, 64, 64) and pixels.dtype == torch.uint8
    assert (colours >= 0).float().mean() > 0.8 and (shapes >= 0).float().mean() > 0.8
    place = {p: i for i, p in enumerate(pictures)}
    checked = 0
    for i in data.sample_ids:
        row = place[data.image_ids[i]]
        asked = set(data.questions[i].rstrip("?").split())
        yes_or_no = data.answers[i] in ("yes", "no")
        for names, label in ((COLORS, colours[row]), (SHAPES, shapes[row])):
            named = asked & set(COLORS + SHAPES)
            if data.answers[i] in names:
                assert label == names.index(data.answers[i])
            elif yes_or_no and label >= 0 and len(named) == 1 and named <= set(names):
                is_it = names[int(label)] in named
                negated = bool(asked & {"no", "not"})
                assert (data.answers[i] == "yes") == (is_it != negated)
                checked += 1
    assert checked > 500
    first = data[data.sample_ids.index(next(i for i in data.sample_ids if data.image_ids[i] == pictures[0]))].images[0]
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), first)

"""The division of one set of records, which never puts a picture in two splits."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from cmai_fast.data import Sample
from cmai_fast.data.splits import divide, picture_key


def samples_of(pictures: list[list[int]]) -> list[Sample]:
    images = [tuple({"bytes": b"picture %d" % p, "path": None} for p in own) for own in pictures]
    return [Sample(i, own, f"q{i}?") for i, own in enumerate(images)]


def pictures_of(samples, places) -> set[str]:
    return {picture_key(image) for place in places for image in samples[place].images}


def test_80_10_10_of_the_pictures():
    samples = samples_of([[i // 3] for i in range(300)])
    split = divide(samples, 0)
    assert {k: len(v) for k, v in split.items()} == {"train": 240, "calibration": 30, "test": 30}
    assert all(places == sorted(places) for places in split.values())
    assert divide(samples, 0) == split != divide(samples, 1)


# The small groups would all fit into one split.
@example([[0, 7], [0, 8, 12], [0, 13], [0, 4, 6], [0, 9, 11], [0, 10, 14], [3], [5], [0, 1, 2]], 0)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=1, max_size=40), st.integers(0, 3))
def test_no_picture_is_in_two_splits_and_the_order_does_not_matter(pictures, seed):
    samples = samples_of(pictures)
    try:
        split = divide(samples, seed)
    except ValueError:
        linked = [set(p) for p in pictures]  # by brute force
        while any(a is not b and a & b for a in linked for b in linked):
            a, b = next((a, b) for a in linked for b in linked if a is not b and a & b)
            linked = [x for x in linked if x is not a and x is not b] + [a | b]
        assert len(linked) < 3
        return
    assert sorted(place for places in split.values() for place in places) == list(range(len(samples)))
    own = [pictures_of(samples, places) for places in split.values()]
    assert all(own) and sum(map(len, own)) == len(set.union(*own))
    shuffled = random.Random(0).sample(samples, len(samples))
    again = divide(shuffled, seed)
    for name in split:
        assert {samples[i].id for i in split[name]} == {shuffled[i].id for i in again[name]}


def test_a_large_group_leaves_the_small_splits_small():
    samples = samples_of([[i, i + 1] for i in range(60)] + [[100 + i] for i in range(20)])
    for seed in range(5):
        split = divide(samples, seed)
        assert len(split["test"]) <= 8 and len(split["calibration"]) <= 8 and set(range(60)) <= set(split["train"])


def test_a_copy_is_the_same_picture_and_a_moved_folder_divides_alike(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(12):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "a" / f"{i}.png")
    shutil.copy(tmp_path / "a" / "0.png", tmp_path / "a" / "copy.png")
    names = [*(f"{i}.png" for i in range(12)), "copy.png", "../a/0.png"]
    samples = [Sample(i, (str(tmp_path / "a" / n),), "q?") for i, n in enumerate(names)]
    samples.append(Sample(14, ({"bytes": (tmp_path / "a" / "0.png").read_bytes(), "path": None},), "q?"))
    split = divide(samples, 5)
    (home,) = [name for name, places in split.items() if 0 in places]
    assert {12, 13, 14} <= set(split[home])
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = [Sample(i, (str(tmp_path / "b" / n.removeprefix("../a/")),), "q?") for i, n in enumerate(names)]
    assert divide([*moved, samples[14]], 5) == split


def test_pictures_in_memory_are_told_apart_by_what_they_show():
    array = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    keys = [picture_key(x) for x in (array, array.copy(), array.astype(np.float32), array.reshape(2, 8, 3))]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    picture = Image.fromarray(array)
    assert picture_key(picture) == picture_key(picture.copy()) != picture_key(picture.convert("L"))
    palette = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    other = palette.copy()
    other.putpalette(list(reversed(palette.getpalette())))
    assert picture_key(palette) != picture_key(other)


def test_a_file_that_changes_is_read_again(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"one")
    before = picture_key(str(file))
    file.write_bytes(b"three")
    assert picture_key(str(file)) != before


def test_text_is_divided_by_its_prompt():
    samples = [Sample(i, (), f"q{i % 10}?") for i in range(30)]
    split = divide(samples, 0)
    assert {len(split[name]) for name in ("test", "calibration")} == {3}
    assert len({samples[i].prompt for i in split["test"]}) == 1


def test_too_few_pictures_are_refused():
    divide(samples_of([[0], [1], [2]]), 0)
    for pictures in ([[0], [1]], [[0], [0], [0]], [[0, 1], [1, 2], [2, 3], [9]]):
        with pytest.raises(ValueError, match=rf"{len(pictures)} records have [12] pictures .*train, calibration, test"):
            divide(samples_of(pictures), 0)

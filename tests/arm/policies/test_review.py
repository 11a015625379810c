from __future__ import annotations

import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone

import numpy as np
import pytest
from PIL import Image

from cmai_fast.arm.policies import Review
from cmai_fast.arm.policies.policy import decide
from cmai_fast.arm.policies.review import append


def lines_of(folder):
    return [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]


def test_a_case_is_one_line_with_its_picture_and_gets_no_answer(attacked, tmp_path):
    policy, cases = Review(str(tmp_path / "review")).bind(None), attacked.cases[:3]
    decisions = decide(policy, cases)
    lines = lines_of(tmp_path / "review")
    assert [d.answer for d in decisions] == [None] * 3 and {d.route for d in decisions} == {"review"}
    assert [d.details["case"] for d in decisions] == [line["case"] for line in lines]
    for case, line, decision in zip(cases, lines, decisions, strict=True):
        assert decision.withheld_answer == case.answer == line["answer"]
        assert (line["id"], line["question"], line["model"]) == (case.sample.id, case.sample.prompt, "easyvqa-llava")
        assert (line["score"], line["threshold"]) == (case.score, case.threshold)
        assert abs((datetime.now(timezone.utc) - datetime.fromisoformat(line["time"])).total_seconds()) < 60
        (digest,) = line["images"]
        path = tmp_path / "review" / "images" / f"{digest}.png"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
        with Image.open(path) as stored:
            assert np.array_equal(np.asarray(stored), np.asarray(case.sample.images[0]))


def test_without_images_only_their_digests_are_stored(attacked, tmp_path):
    decide(Review(str(tmp_path), images=False).bind(None), attacked.cases[:1])
    assert [p.name for p in tmp_path.iterdir()] == ["cases.jsonl"]
    assert len(lines_of(tmp_path)[0]["images"][0]) == 64


def test_threads_write_whole_lines(attacked, tmp_path):
    policy = Review(str(tmp_path)).bind(None)
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda _: decide(policy, attacked.cases[:4]), range(40)))
    written = lines_of(tmp_path)
    assert {line["case"] for line in written} == {d.details["case"] for decisions in done for d in decisions}
    assert len(written) == 160 and not list(tmp_path.glob("images/.*"))


def test_a_line_that_was_cut_off_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_bytes(b'{"a": 1}\n{"cut')
    append(path, b'{"b": 2}\n')
    assert path.read_bytes() == b'{"a": 1}\n{"cut\n{"b": 2}\n'


@pytest.mark.parametrize("written", [5, None])
def test_a_full_disk_leaves_the_file_as_it_was_and_is_named(tmp_path, monkeypatch, written):
    path = tmp_path / "cases.jsonl"
    append(path, b'{"a": 1}\n')
    real = os.write

    def full(descriptor, data):
        if written is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:written])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"could not append to .*cases\.jsonl: .*space left.*as it was"):
        append(path, b'{"b": 2}\n')
    assert path.read_bytes() == b'{"a": 1}\n'


def test_bad_folders_are_named_when_the_guard_is_made(tmp_path):
    with pytest.raises(ValueError, match="review: folder is empty"):
        Review()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"review: folder .*file cannot be written \(.*name another"):
        Review(str(tmp_path / "file")).bind(None)

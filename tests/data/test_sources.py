"""Names, splits and draws of data sources; what is refused before a model is loaded."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
from PIL import Image

from cmai_fast.data import EasyVQA, Sample, data_format, load_dataset
from cmai_fast.data.formats import FORMATS, read_text
from cmai_fast.data.formats.folder import split_named
from cmai_fast.data.sources import DataSource


def lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.fixture
def asked(tmp_path):
    """20 questions about 10 pictures."""
    for i in range(10):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    records = [{"image": f"{i % 10}.png", "question": f"q{i}?", "answer": str(i)} for i in range(20)]
    return lines(tmp_path / "asked.jsonl", records)


def test_checking_data_loads_neither_pytorch_nor_transformers(asked):
    code = (
        "import sys\nfrom cmai_fast.data.sources import DataSource\nfrom cmai_fast.data import FORMATS, Sample\n"
        "from cmai_fast.tasks import TASKS, with_choices\nfrom cmai_fast.metrics import METRICS\n"
        f"DataSource({str(asked)!r}, split_seed=0).check('train', 'test', answers=True)\n"
        "DataSource('easyvqa').check('train')\nassert DataSource('easyvqa').fingerprint()\n"
        "TASKS.check('vqa'); METRICS.check('exact-match')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_is_whatever_is_asked_for_but_train(asked):
    source = DataSource(str(asked))
    source.check()
    samples = source.load("test")
    assert len(samples) == 20 and samples == source.load("calibration")
    assert samples[3] == Sample(3, (str(asked.parent / "3.png"),), "q3?", ("3",))
    assert samples[3].where == f"{asked} line 4" and "line 4" in samples[3].name
    with pytest.raises(ValueError, match=r"one set of records.*--split-seed N.*folder"):
        source.check("train")
    with pytest.raises(ValueError, match="split is 'val'; expected one of train, calibration, test"):
        source.load("val")


def test_a_limit_draws_the_same_samples_for_the_same_seed(asked):
    source = DataSource(str(asked))
    one, again, other = ([s.id for s in source.load("test", 5, seed)] for seed in (0, 0, 1))
    assert one == again != other and one == sorted(one) and len(set(one)) == 5
    assert len(source.load("test", 100)) == 20
    with pytest.raises(ValueError, match="limit is 0"):
        source.load("test", 0)


def test_a_limit_of_easyvqa_draws_what_it_always_drew():
    samples = load_dataset("easyvqa", "test", 48, seed=3)
    own = EasyVQA("test", 48, seed=3)
    assert [s.id for s in samples] == own.sample_ids and len(samples) == 48
    assert [s.id for s in samples[2:4]] == own.sample_ids[2:4]
    assert isinstance(load_dataset("easyvqa", "calibration"), EasyVQA)
    with pytest.raises(ValueError, match="easyvqa has fixed keys; leave out --map question"):
        DataSource("easyvqa", {"question": "text"}).check()


def test_a_split_seed_divides_one_set(asked):
    source = DataSource(str(asked), split_seed=0)
    source.check()
    parts = {split: source.load(split) for split in ("train", "calibration", "test")}
    assert {k: len(v) for k, v in parts.items()} == {"train": 16, "calibration": 2, "test": 2}
    pictures = [{s.images[0] for s in part} for part in parts.values()]
    assert len(set.union(*pictures)) == sum(map(len, pictures)) == 10
    assert len(source.load("train", 3)) == 3
    few = lines(asked.parent / "few.jsonl", [{"image": f"{i}.png", "question": "q?"} for i in (1, 2, 1)])
    with pytest.raises(ValueError, match=r"few\.jsonl: 3 records have 2 pictures"):
        DataSource(str(few), split_seed=0).check()
    with pytest.raises(ValueError, match=r"has the splits train, calibration, test; leave out --split-seed"):
        DataSource("easyvqa", split_seed=0).check()


def test_a_folder_of_files_is_split_by_their_names(asked):
    folder = asked.parent
    lines(folder / "train.jsonl", [{"question": "a?"}])
    lines(folder / "val.ndjson", [{"question": "b?"}])
    source = DataSource(str(folder))
    source.check()
    assert source.load("train")[0].prompt == "a?" and source.load("calibration")[0].prompt == "b?"
    with pytest.raises(ValueError, match=r"has train, calibration, and no split 'test'\. Add test or testing"):
        source.check("train", "test")
    (folder / "test.csv").write_text("prompt\nc?\n")
    assert source.load("test")[0].prompt == "c?"
    before = source.fingerprint()
    lines(folder / "validation.jsonl", [{"question": "b?"}])
    with pytest.raises(ValueError, match=r"val\.ndjson and .*validation\.jsonl both belong to the split calibration"):
        source.check()
    (folder / "validation.jsonl").unlink()
    assert source.fingerprint() == before
    (folder / "test.csv").write_text("prompt\nd?\n")
    assert source.fingerprint() != before


def test_a_named_split_is_the_one_set_of_records(asked):
    folder = asked.parent
    asked.rename(folder / "validation.jsonl")
    lines(folder / "test.jsonl", [{"question": "b?"}])
    one = DataSource(str(folder), split="calibration")
    one.check()
    assert len(one.load("test")) == len(one.load("calibration")) == 20
    with pytest.raises(ValueError, match=r" calibration is one set of records.*--split-seed N"):
        one.load("train")
    parts = DataSource(str(folder), split="calibration", split_seed=0)
    parts.check("train", "calibration", "test")
    assert [len(parts.load(split)) for split in ("train", "calibration", "test")] == [16, 2, 2]
    with pytest.raises(ValueError, match=r"has no split 'val'; expected one of calibration, test"):
        DataSource(str(folder), split="val").check()
    with pytest.raises(ValueError, match=r"is one set of records without a split 'test'; leave out --split"):
        DataSource(str(folder / "test.jsonl"), split="test").check()
    assert len(DataSource("easyvqa", split="test").load("calibration")) == 9673
    assert len({s.fingerprint() for s in (one, parts, DataSource(str(folder)))}) == 3


@pytest.mark.parametrize(
    "split, names, own",
    [
        ("test", ("train", "test"), "test"),
        ("test", ("test1", "test2"), "test1"),
        ("test", ("test2015", "test"), "test"),
        ("test", ("test-dev2015", "test2"), None),
        ("calibration", ("val2014", "train2014"), "val2014"),
        ("calibration", ("val2014", "dev"), "dev"),
        ("train", ("train_small",), None),
    ],
)
def test_a_year_or_a_1_may_follow_the_word_of_a_split(split, names, own):
    assert split_named(split, names) == own


def test_a_folder_of_nothing_known_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds notes\.txt; expected files train, calibration and test .*metadata"):
        DataSource(str(tmp_path)).check()


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "mine",
            r"unknown data 'mine'; expected a file, a folder, easyvqa, easyvqa-captions, easyvqa-pairs, "
            r"or one of coco-captions:FOLDER, csv:FILE",
        ),
        ("vqa2", r"unknown data 'vqa2'; did you mean vqav2:FOLDER\?"),
        ("nlvr2", r"unknown data 'nlvr2'; did you mean nlvr2:FOLDER\?"),
        ("vqav2:nowhere", "vqav2:nowhere: there is no such folder"),
        ("easyvqq", r"did you mean easyvqa\?"),
        ("nowhere.jsonl", "unknown data 'nowhere.jsonl'"),
        ("jsonl:nowhere.txt", "jsonl:nowhere.txt: there is no such file"),
        ("imagefolder:nowhere", "imagefolder:nowhere: there is no such folder"),
        ("easyvqa:x", "easyvqa is a data set by itself"),
        ("jsonl", "unknown data 'jsonl'"),
    ],
)
def test_unknown_names_are_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        DataSource(name).check()


def test_a_misspelt_file_and_an_unknown_suffix(asked):
    with pytest.raises(ValueError, match=r"did you mean .*asked\.jsonl\?"):
        DataSource(str(asked.with_name("askd.jsonl"))).check()
    text = asked.rename(asked.with_name("asked.txt"))
    with pytest.raises(ValueError, match=r"ends in \.txt; expected .*\.csv, \.json, \.jsonl, .* as in jsonl:"):
        DataSource(str(text)).check()
    assert len(DataSource(f"jsonl:{text}").load("test")) == 20


def test_missing_pictures_are_counted_and_named(asked):
    for i in (1, 2):
        (asked.parent / f"{i}.png").unlink()
    with pytest.raises(
        ValueError,
        match=r"^2 of 10 pictures are missing, and 4 of 20 samples need them: .*1\.png \(.*asked\.jsonl line 2\), .*; ",
    ):
        DataSource(str(asked)).check()


def test_ids_answers_and_fields_are_checked(tmp_path):
    file = lines(tmp_path / "a.jsonl", [{"id": 1, "question": "a?", "answer": "x"}, {"id": 1, "question": "b?"}])
    with pytest.raises(ValueError, match=r"sample 1 \(.*a\.jsonl line 2\): .*a\.jsonl line 1 has the same id"):
        DataSource(str(file)).check()
    lines(file, [{"question": "a?", "answer": "x"}, {"question": "b?"}])
    DataSource(str(file)).check()
    with pytest.raises(ValueError, match=r"1 of 2 samples have no answer: sample 1 \(.*line 2\)"):
        DataSource(str(file)).check(answers=True)
    with pytest.raises(ValueError, match=r"2 of 2 samples have no image: sample 0 \(.*line 1\), sample 1"):
        DataSource(str(file)).check(images=True)
    with pytest.raises(ValueError, match="--map ask=q: unknown key 'ask'; expected one of image"):
        DataSource(str(file), {"ask": "q"}).check()


def test_the_fingerprint_knows_records_fields_and_seed(asked):
    source = DataSource(str(asked))
    others = [DataSource(str(asked), {"question": "question"}), DataSource(str(asked), split_seed=1)]
    before = {s.fingerprint() for s in (source, *others)}
    assert len(before) == 3 and source.fingerprint() in before
    moved = asked.rename(asked.with_name("other.jsonl"))
    assert DataSource(str(moved)).fingerprint() in before
    moved.write_text(moved.read_text() + '{"question": "more?"}\n')
    assert DataSource(str(moved)).fingerprint() not in before


def test_a_source_can_be_copied_and_pickled(asked):
    source = DataSource(str(asked), {"question": "question"}, 3)
    assert pickle.loads(pickle.dumps(source)) == copy.deepcopy(source) == source


def test_a_format_of_a_plugin_is_one_function(tmp_path, monkeypatch):
    monkeypatch.setattr(FORMATS, "_things", dict(FORMATS._things))

    @data_format("numbered", suffixes=(".numbered",))
    def read(path, split, fields):
        for i, line in enumerate(read_text(path).splitlines()):
            yield Sample(i, (), line, where=f"{path} line {i + 1}")

    file = tmp_path / "a.numbered"
    file.write_text("what?\nwhere?\n")
    assert [s.prompt for s in DataSource(str(file)).load("test")] == ["what?", "where?"]
    assert "numbered" in FORMATS and len(DataSource(f"numbered:{file}").load("test", 1)) == 1

"""A saved adversarial set: what is in it, other models that are scored on it, what is refused, and the exports."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from jinja2 import Template
from PIL import Image

from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.export import export_set
from cmai_fast.evaluation.saved import read_set
from cmai_fast.evaluation.transfer import share, strict_transfer
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import Surface, ThreatModel
from cmai_fast.workflows.attack import attack
from cmai_fast.workflows.transfer import transfer
from fitted import colours

THREAT = ThreatModel("linf", 48 / 255)


@pytest.fixture(scope="module")
def made(fitted_folder, tmp_path_factory) -> tuple[Path, dict]:
    """A set on the fitted model, and the record of the attack. Leave it as it is."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        from shortened import shorten

        shorten(patch)
        record = attack(
            str(fitted_folder), DataSource("easyvqa"), "pgd", THREAT, steps=4, limit=6, seed=3, out=folder / "a.json",
            save_images=folder / "set", export=["garak", "pyrit"], progress=False,
        )  # fmt: skip
    return folder / "set", record


def test_the_set_says_how_it_was_made_and_hashes_every_file(made, fitted_folder):
    folder, record = made
    about, lines = (json.loads((folder / "set.json").read_text()), read_set(folder).lines)
    assert about["source"] == {
        "model": str(fitted_folder), "fingerprint": Pipeline.load(str(fitted_folder)).fingerprint(),
    }  # fmt: skip
    assert about["attack"] == {"name": "pgd", "steps": 4, "restarts": 1, "settings": {}} and about["seed"] == 3
    assert (about["eps"], about["norm"], about["threat"], about["task"]) == (48 / 255, "linf", "input", "vqa")
    assert (about["attacked"], about["broken"]) == (6, sum(line["broken"] for line in lines)) and about["broken"] > 0
    rows = {row["sample_id"]: row for row in record["per_sample"]}
    for line, sample in zip(lines, colours()[::2], strict=True):
        assert line["forward"] == rows[line["id"]]["forward"] > 0 and line["choices"] == list(sample.choices)
        for files, digests in (("files", "sha256"), ("clean_files", "clean_sha256")):
            (name,), (digest,) = line[files], line[digests]
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        clean = np.asarray(Image.open(folder / line["clean_files"][0]))
        assert np.array_equal(clean, sample.images[0])


def test_the_source_itself_is_broken_by_exactly_what_broke_it(made, fitted_folder, tmp_path):
    folder, _ = made
    found = transfer(str(fitted_folder), folder, out=tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text()) == json.loads(json.dumps(found))
    lines = read_set(folder).lines
    assert [row["prediction_adv"] for row in found["per_sample"]] == [m["adversarial_prediction"] for m in lines]
    assert [row["prediction_clean"] for row in found["per_sample"]] == [m["clean_prediction"] for m in lines]
    broken = sum(m["broken"] for m in lines)
    assert found["transfer"]["broken"] == broken and found["transfer"]["attacked"] == found["n"] == 6
    assert found["strict"]["asr"] == 1 and found["strict"]["attacked"] == broken
    assert found["source"]["fingerprint"] == found["target"]["fingerprint"]
    assert found["acc_robust"] == pytest.approx(1 - broken / 6)


def test_another_model_is_scored_only_on_what_it_has_right(made, model_folder, tmp_path):
    """A random model is right on little, and what it has wrong counts for nothing."""
    found = transfer(str(model_folder), made[0], out=tmp_path / "t.json", batch_size=4)
    rows = found["per_sample"]
    right = [row for row in rows if row["right_clean"]]
    assert found["transfer"]["attacked"] == len(right) < 6
    assert found["strict"]["attacked"] == sum(row["broken_on_source"] for row in right)
    assert found["acc_clean"] == len(right) / 6
    assert found["source"]["fingerprint"]["weights"] != found["target"]["fingerprint"]["weights"]
    with pytest.raises(ValueError, match=r"t\.json exists"):
        transfer(str(model_folder), made[0], out=tmp_path / "t.json")


def test_shares_are_counted_by_hand():
    broke, clean, adv = (np.array(v, dtype=bool) for v in ([1, 1, 1, 0, 0], [1, 1, 0, 1, 1], [0, 1, 0, 0, 1]))
    strict = strict_transfer(broke, clean, adv)
    assert (strict["attacked"], strict["broken"], strict["asr"]) == (2, 1, 0.5)
    low, high = strict["asr_interval"]
    assert 0 <= low <= 0.5 <= high <= 1
    assert share(np.zeros(0, dtype=bool)) == {"attacked": 0, "broken": 0, "asr": None, "asr_interval": None}


def test_what_was_changed_is_refused_by_name(made, tmp_path):
    def changed(name: str, change) -> Path:
        folder = tmp_path / name
        shutil.copytree(made[0], folder)
        change(folder)
        return folder

    def flip(folder: Path) -> None:
        picture = np.array(Image.open(folder / "000002.png"))
        picture[0, 0, 0] ^= 1
        Image.fromarray(picture).save(folder / "000002.png")

    def recorded(folder: Path) -> None:
        text = (folder / "manifest.jsonl").read_text()
        (folder / "manifest.jsonl").write_text(text.replace('"broken": true', '"broken": false'))

    def about(**changes):
        def change(folder: Path) -> None:
            own = json.loads((folder / "set.json").read_text())
            (folder / "set.json").write_text(json.dumps(own | changes))

        return change

    as_jpeg = lambda f: Image.open(f / "000001.png").save(f / "000001.png", format="JPEG")  # noqa: E731
    for name, change, message in (
        ("flipped", flip, r"000002\.png was changed after the set was written \(its SHA-256 differs\)"),
        ("jpeg", as_jpeg, r"000001\.png is a JPEG file, which loses most of a perturbation; expected the PNG"),
        ("gone", lambda f: (f / "000003-clean.png").unlink(), r"000003-clean\.png is missing"),
        ("recorded", recorded, r"manifest\.jsonl was changed after it was written"),
        (
            "bare",
            lambda f: (f / "set.json").unlink(),
            r"bare has no set\.json; expected a folder that cmai-fast attack",
        ),
        ("newer", about(schema=9), r"its schema is 9, expected 1"),
        ("tiles", about(whole_pictures=False), "holds the tiles that its source model reads"),
        ("words", about(attack={"name": "embedding-pgd"}), "embedding-pgd, which changes embeddings of one model"),
    ):
        with pytest.raises(ValueError, match=message):
            transfer("no-such-model", changed(name, change), out=tmp_path / "t.json")


def test_what_is_uploaded_keeps_its_size_and_goes_through_jpeg_where_asked(fitted_folder, few, tmp_path):
    for name, surface in (("png", Surface("upload")), ("jpg", Surface("upload", jpeg=90))):
        attack(
            str(fitted_folder), DataSource("easyvqa"), "fgsm", ThreatModel("linf", 24 / 255, surface), limit=4,
            out=tmp_path / f"{name}.json", save_images=tmp_path / name, progress=False,
        )  # fmt: skip
        found = transfer(str(fitted_folder), tmp_path / name, out=tmp_path / f"t-{name}.json")
        lines = read_set(tmp_path / name).lines
        assert all(file.endswith(name) for line in lines for file in line["files"] + line["clean_files"])
        assert [row["prediction_adv"] for row in found["per_sample"]] == [m["adversarial_prediction"] for m in lines]


def test_garak_gets_a_conversation_per_line(made):
    """The fields of `Conversation`, `Turn` and `Message` of garak 0.17.1."""
    folder, _ = made
    lines = [json.loads(line) for line in (folder / "garak.jsonl").read_text().splitlines()]
    for line, own in zip(lines, read_set(folder).lines, strict=True):
        assert set(line) == {"turns", "notes"} and [set(turn) for turn in line["turns"]] == [{"role", "content"}]
        message = line["turns"][0]["content"]
        assert set(message) == {"text", "lang", "data_path", "data_type", "data_checksum"}
        assert line["turns"][0]["role"] == "user" and message["text"] == own["question"]
        assert message["data_type"] == ["image/png", None] and Path(message["data_path"]).is_absolute()
        assert hashlib.sha256(Path(message["data_path"]).read_bytes()).hexdigest() == message["data_checksum"]
        assert line["notes"]["references"] == own["references"] and line["notes"]["broken"] == own["broken"]


def test_pyrit_gets_a_group_of_text_and_picture_per_sample(made, tmp_path):
    """The fields of `SeedDataset` and `SeedPrompt` of PyRIT 1.1.0, which refuse any other."""
    import yaml

    folder = tmp_path / "moved"
    shutil.copytree(made[0], folder)
    text = (folder / "manifest.jsonl").read_text().replace("what color", "what {% endraw %} '{{ color }}")
    (folder / "manifest.jsonl").write_text(text)
    about = json.loads((folder / "set.json").read_text())
    about["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "set.json").write_text(json.dumps(about))
    dataset = yaml.safe_load(export_set(folder, "pyrit").read_text())
    assert set(dataset) == {"dataset_name", "description", "source", "seed_type", "seeds"}
    lines, seeds = read_set(folder).lines, dataset["seeds"]
    assert len(seeds) == 2 * len(lines) == 12
    for line, said, shown in zip(lines, seeds[::2], seeds[1::2], strict=True):
        for seed in (said, shown):
            assert set(seed) == {"value", "data_type", "role", "sequence", "prompt_group_alias", "metadata"}
            assert (seed["role"], seed["sequence"], seed["metadata"]["id"]) == ("user", 0, line["id"])
        assert said["prompt_group_alias"] == shown["prompt_group_alias"]
        assert said["data_type"] == "text" and shown["data_type"] == "image_path"
        # A question is no template.
        assert Template(said["value"]).render() == line["question"] and "{{ color }}" in line["question"]
        assert Path(shown["value"]) == (folder / line["files"][0]).resolve()
    assert len({seed["prompt_group_alias"] for seed in seeds}) == 6


def test_exports_that_cannot_be(made, model_folder, tmp_path):
    with pytest.raises(ValueError, match="cannot export for 'garrak'; expected one of garak, pyrit"):
        export_set(made[0], "garrak")
    with pytest.raises(ValueError, match="--export pyrit needs the folder of a set; name one with --save-images"):
        attack(
            str(model_folder), DataSource("easyvqa"), "pgd", THREAT, out=tmp_path / "a.json", export=["pyrit"],
            progress=False,
        )  # fmt: skip


def test_a_set_with_several_targets_counts_each_of_them(made, fitted_folder, tmp_path):
    folder = tmp_path / "aimed"
    shutil.copytree(made[0], folder)
    about = json.loads((folder / "set.json").read_text())
    said = transfer(str(fitted_folder), folder, out=tmp_path / "plain.json")["per_sample"]
    wanted = ["no such answer", max(row["prediction_adv"] for row in said if row["right_clean"])]
    about["attack"] = {"name": "universal-image", "steps": 1, "restarts": 1, "settings": {}, "target": "|".join(wanted)}
    (folder / "set.json").write_text(json.dumps(about))
    found = transfer(str(fitted_folder), folder, out=tmp_path / "aimed.json")["transfer_target"]
    right = [row for row in said if row["right_clean"]]
    reached = sum(row["prediction_adv"].startswith(tuple(wanted)) for row in right)
    assert (found["attacked"], found["broken"]) == (len(right), reached) and reached > 0

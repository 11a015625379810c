"""How a model is named: bundled, folder, run, hub id, or a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmai_fast import models
from cmai_fast.models import resolve


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of bundled models with one, `small-llava`, in it."""
    home = tmp_path / "bundled"
    make_model(home / "small-llava")
    monkeypatch.setattr(models, "_HERE", home)
    monkeypatch.setattr(models, "BUNDLED", ("small-llava",))
    return home


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_bundled_names_are_the_model_folders_that_are_there():
    home = Path(models.__file__).parent
    folders = [path for path in home.iterdir() if path.suffix != ".partial" and (path / "config.json").is_file()]
    assert sorted(path.name for path in folders) == list(models.BUNDLED)
    assert [resolve(name) for name in models.BUNDLED] == sorted(folders)


def test_a_bundled_name_comes_before_a_folder_of_that_name(bundled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local = make_model(tmp_path / "small-llava")
    assert resolve("small-llava") == bundled / "small-llava"
    assert Path(resolve("./small-llava")).resolve() == local


def test_a_model_folder_is_itself_and_a_run_is_its_model(tmp_path):
    model = make_model(tmp_path / "run" / "model")
    for given in (model, tmp_path / "run"):
        assert resolve(given) == resolve(str(given)) == model


def test_a_folder_of_adapters_is_a_model_where_peft_can_read_it(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert resolve(tmp_path) == tmp_path
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"holds adapters, which need PEFT; pip install 'cmai-fast\[lora\]'"):
        resolve(tmp_path)


def test_an_existing_folder_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "owner" / "name")
    assert resolve("owner/name") == Path("owner/name")
    assert resolve("owner/other") == "owner/other"


def test_a_folder_without_a_model_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json in .*run"):
        resolve(tmp_path / "run")


@pytest.mark.parametrize(
    "wrong", ["small-lava", "", "./runs/a", "/no/such/folder", "a/b/c", "runs/a/", "../x", "a b/c"]
)
def test_what_is_none_of_these_is_refused_with_the_known_names(bundled, wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no folder of these names is
    with pytest.raises(ValueError, match=r"small-llava\).*hub id") as raised:
        resolve(wrong)
    assert repr(wrong) in str(raised.value)


def test_a_path_that_does_not_exist_is_no_hub_id():
    with pytest.raises(ValueError, match="unknown model"):
        resolve(Path("runs/a"))

"""Models as the hub hands them out: its cache, old names of parameters, shards, and what can go wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import save_file

from cmai_fast.arm import Guard
from cmai_fast.cli import app
from cmai_fast.cmcv import ConsistencyHeads, Threshold
from cmai_fast.models import loading
from cmai_fast.models.loading import chosen_device, load_model
from cmai_fast.pipeline import Pipeline

REVISION = "0123456789" * 4


class Hub:
    """The cache of huggingface_hub, offline: blobs, and snapshots of links to them."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def put(self, name: str, folder: Path, files: Iterable[Path] | None = None) -> None:
        place = self.cache / f"models--{name.replace('/', '--')}"
        snapshot = place / "snapshots" / REVISION
        (place / "blobs").mkdir(parents=True)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(REVISION)
        snapshot.mkdir(parents=True)
        for i, file in enumerate(files or (f for f in folder.rglob("*") if f.is_file())):
            shutil.copy(file, place / "blobs" / str(i))
            link = snapshot / file.relative_to(folder)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(place / "blobs" / str(i))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """As HF_HUB_CACHE and HF_HUB_OFFLINE=1 set it, which are read when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return Hub(tmp_path / "hub")


@pytest.fixture(scope="module")
def saved(make_tiny, tmp_path_factory):
    """A model folder that has its heads with it."""
    folder = tmp_path_factory.mktemp("saved")
    model, processor = make_tiny()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    width = model.config.text_config.hidden_size
    ConsistencyHeads(width, width, dim=8, hidden=16).save_pretrained(
        folder / "cmcv", Threshold(0.0, 0.05, 100, "calibration")
    )
    return folder


def assert_same_weights(model, make_tiny):
    expected, found = make_tiny()[0].state_dict(), model.state_dict()
    assert set(expected) == set(found)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_model_of_the_hubs_cache(hub, saved, make_tiny):
    hub.put("owner/name", saved)
    subject = Pipeline.load("owner/name")
    assert_same_weights(subject.model, make_tiny)
    assert subject.threshold == Threshold(0.0, 0.05, 100, "calibration") and not subject.model.training
    assert Guard.from_pretrained("owner/name").threshold == 0.0
    hub.put("owner/bare", saved, [f for f in saved.iterdir() if f.is_file()])
    assert Pipeline.load("owner/bare").heads is None
    with pytest.raises(ValueError, match="no consistency heads for owner/bare"):
        Guard.from_pretrained("owner/bare")


def test_the_command_takes_it(hub, saved, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    hub.put("owner/name", saved)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(
        app, "attack --model owner/name --limit 4 --steps 2 --out a.json --no-progress --device cpu".split()
    )
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["n"] == 4 and record["settings"]["model"] == "owner/name" and record["settings"]["device"] == "cpu"


def old_name(name: str) -> str:
    """As in `llava-hf/llava-1.5-7b-hf`, from before `model.` stood before all of them and CLIP lost a level."""
    name = name.replace("model.language_model.", "language_model.model.", 1).removeprefix("model.")
    name = name.replace("lm_head", "language_model.lm_head", 1)
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


@pytest.mark.parametrize("rename", [old_name, lambda name: name], ids=["hub", "today"])
def test_parameters_under_the_names_that_the_hub_still_has(hub, saved, make_tiny, tmp_path, rename):
    named = {rename(name): value.clone() for name, value in make_tiny()[0].state_dict().items()}
    tops = {name.split(".")[0] for name in named}
    assert tops == {"language_model", "vision_tower", "multi_modal_projector"} or tops == {"model", "lm_head"}
    shutil.copytree(saved, tmp_path / "old")
    save_file(named, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    hub.put("owner/old", tmp_path / "old")
    assert_same_weights(load_model("owner/old")[0], make_tiny)


def test_weights_in_several_files(hub, saved, make_tiny, tmp_path):
    model, processor = make_tiny()
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    processor.save_pretrained(tmp_path / "shards")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 2
    hub.put("owner/shards", tmp_path / "shards")
    assert_same_weights(load_model("owner/shards")[0], make_tiny)
    shards[1].unlink()
    hub.put("owner/lacking", tmp_path / "shards")
    with pytest.raises(ValueError, match="cannot load the model 'owner/lacking'"):
        load_model("owner/lacking")


def refused(name, **how):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the callers look at what it says
        load_model(name, **how)
    said = str(error.value)
    assert "\n" not in said and len(said) < 300
    return said


def test_what_is_not_there(hub, saved, tmp_path):
    assert refused("owner/unknown") == (
        "cannot load the model 'owner/unknown': the hub cannot be reached, and owner/unknown is not in the cache; "
        "check the connection, or name a folder"
    )
    with pytest.raises(ValueError, match="owner/unknown is not in the cache"):
        Guard.from_pretrained("owner/unknown")
    shutil.copytree(saved, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    hub.put("owner/pickled", tmp_path / "pickled")
    for name in ("owner/pickled", str(tmp_path / "pickled")):
        assert "holds no *.safetensors" in refused(name) and "is refused" in refused(name)
    assert "only ['pytorch_model.bin']" in refused(str(tmp_path / "pickled"))


@pytest.mark.parametrize(
    "kind, said",
    [
        (GatedRepoError, "access to owner/name is restricted"),
        (RepositoryNotFoundError, "the hub has no model owner/name"),
    ],
)
def test_what_the_hub_does_not_hand_out(monkeypatch, kind, said):
    def refuse(*args, **kwargs):
        try:
            raise kind("401 Client Error.", response=SimpleNamespace(headers={}, request=None))
        except kind as error:
            raise OSError("owner/name is not a local folder\nand is not a valid model identifier") from error

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", refuse)
    assert said in refused("owner/name")


def test_what_is_no_image_text_model(hub, tmp_path):
    for kind, said in (("bert", "BertConfig (model_type 'bert')"), ("nonsense", "has model type `nonsense`")):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        hub.put(f"owner/{kind}", folder)
        assert said in refused(f"owner/{kind}")
        assert said in refused(str(folder))


def test_precision_is_the_checkpoints_unless_another_is_asked_for(saved, make_tiny, tmp_path):
    model, processor = make_tiny()
    model.bfloat16().save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    assert load_model(tmp_path / "half")[0].dtype == torch.bfloat16
    assert load_model(tmp_path / "half", dtype="float32")[0].dtype == torch.float32
    assert load_model(saved)[0].dtype == torch.float32
    assert load_model(saved, dtype="float16", device="cpu")[0].dtype == torch.float16
    assert load_model(saved, attention="sdpa")[0].config._attn_implementation == "sdpa"


def test_the_device_is_cuda_where_torch_sees_one(monkeypatch):
    assert chosen_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device(None).type == "cpu"
    with pytest.raises(ValueError, match=r"device is 'cuda', and torch .* sees 0 CUDA devices"):
        chosen_device("cuda")
    with pytest.raises(ValueError, match="device is 'gpu'; expected cpu, cuda"):
        chosen_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert chosen_device(None).type == "cuda" and chosen_device("cuda:1").index == 1
    with pytest.raises(ValueError, match=r"device is 'cuda:2', and torch .* sees 2"):
        chosen_device("cuda:2")


def test_flash_attention_is_refused_where_it_cannot_run(saved, monkeypatch):
    assert "attention is 'fast'; expected one of sdpa, flash_attention_2" in refused(saved, attention="fast")
    flash = {"attention": "flash_attention_2"}
    assert "runs on CUDA devices only, and the device is cpu" in refused(saved, device="cpu", dtype="bfloat16", **flash)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "takes float16 and bfloat16, and the model is in torch.float32" in refused(saved, device="cuda", **flash)
    assert "takes float16" in refused(saved, device="cuda", dtype=torch.float32, **flash)
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    said = refused(saved, device="cuda", dtype="bfloat16", **flash)
    assert "needs the package flash-attn, which is not installed: pip install 'cmai-fast[flash]'" in said

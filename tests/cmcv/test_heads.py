import json
import os

import pytest
import torch

from cmai_fast.cmcv import ConsistencyHeads, Threshold

THRESHOLD = Threshold(0.125, 0.05, 200, "calibration")


@pytest.fixture
def heads():
    torch.manual_seed(0)
    return ConsistencyHeads(6, 5, dim=8, hidden=7)


def test_score_is_the_cosine_of_the_projections(heads):
    v, t = heads.project_image(torch.randn(4, 3, 6)), heads.project_text(torch.randn(4, 5))
    assert v.shape == t.shape == (4, 8)
    torch.testing.assert_close(heads.score(v, t), torch.cosine_similarity(v, t))
    torch.testing.assert_close(heads.score(v, v), torch.ones(4))
    torch.testing.assert_close(heads.score(v, -v), -torch.ones(4))
    assert torch.equal(heads.score(torch.zeros_like(v), t), torch.zeros(4))


def test_score_reaches_image_text_and_heads_by_gradient(heads):
    image, text = torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    heads.score(heads.project_image(image), heads.project_text(text)).sum().backward()
    assert image.grad.abs().sum() > 0 and text.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for n, p in heads.named_parameters() if n != "logit_scale")


def test_an_object_in_one_token_is_not_averaged_away(heads):
    token = torch.randn(6)
    balanced = torch.stack([token, -token])[None]
    assert not torch.allclose(heads.project_image(balanced), heads.project_image(torch.zeros(1, 2, 6)), atol=1e-3)


def test_a_row_does_not_depend_on_its_batch(heads):
    image = torch.randn(5, 3, 6)
    torch.testing.assert_close(heads.project_image(image)[2:3], heads.project_image(image[2:3]))


def test_low_precision_features_are_taken(heads):
    assert heads.project_image(torch.randn(2, 3, 6).bfloat16()).dtype == torch.float32
    assert heads.project_text(torch.randn(2, 5).bfloat16()).dtype == torch.float32


def test_scale_starts_at_one_over_007_and_stops_at_100(heads):
    assert heads.scale.item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        heads.logit_scale.fill_(9.0)
    assert heads.scale.item() == pytest.approx(100)


def test_features_of_another_width_are_refused(heads):
    with pytest.raises(ValueError, match="image_dim 6"):
        heads.project_image(torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match=r"\(N, T, image_dim\)"):
        heads.project_image(torch.randn(2, 6))
    with pytest.raises(ValueError, match="text_dim 5"):
        heads.project_text(torch.randn(2, 6))
    with pytest.raises(ValueError, match="hidden is 0"):
        ConsistencyHeads(6, 5, hidden=0)


@pytest.mark.parametrize("threshold", [None, THRESHOLD])
def test_saved_heads_come_back_exactly(heads, threshold, tmp_path):
    heads.save_pretrained(tmp_path / "new" / "cmcv", threshold)
    loaded, saved = ConsistencyHeads.from_pretrained(tmp_path / "new" / "cmcv")
    assert saved == threshold and loaded.settings == heads.settings and not loaded.training
    for name, value in heads.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert sorted(os.listdir(tmp_path / "new" / "cmcv")) == ["cmcv.json", "heads.safetensors"]


def test_a_failed_write_leaves_the_old_heads_and_nothing_else(heads, tmp_path, monkeypatch):
    heads.save_pretrained(tmp_path, THRESHOLD)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        ConsistencyHeads(6, 5, dim=8, hidden=7).save_pretrained(tmp_path, None)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_save_interrupted_between_its_files_is_noticed(heads, tmp_path, monkeypatch):
    heads.save_pretrained(tmp_path, THRESHOLD)
    replace, calls = os.replace, []

    def killed_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        ConsistencyHeads(6, 5, dim=8, hidden=7).save_pretrained(tmp_path, THRESHOLD)
    with pytest.raises(ValueError, match="interrupted"):
        ConsistencyHeads.from_pretrained(tmp_path)


def test_missing_and_damaged_files_are_named(heads, tmp_path):
    with pytest.raises(ValueError, match=r"heads\.safetensors.*save_pretrained"):
        ConsistencyHeads.from_pretrained(tmp_path / "nowhere")
    heads.save_pretrained(tmp_path)
    weights, record = tmp_path / "heads.safetensors", tmp_path / "cmcv.json"
    whole = record.read_text()
    for text in ("{", "[]", json.dumps({}), whole.replace('"dim": 8', '"dim": "8"')):
        record.write_text(text)
        with pytest.raises(ValueError, match=r"cmcv\.json is damaged"):
            ConsistencyHeads.from_pretrained(tmp_path)
    record.write_text(whole.replace('"dim": 8', '"dim": 9'))
    with pytest.raises(ValueError, match="does not fit"):
        ConsistencyHeads.from_pretrained(tmp_path)
    record.write_text(whole)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        ConsistencyHeads.from_pretrained(tmp_path)

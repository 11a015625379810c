"""A language model in 4 and 8 bits: what is quantised, what learns, and what the pixels feel of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from cmai_fast.attacks import Victim, exact_gradient
from cmai_fast.attacks.pgd import pgd
from cmai_fast.bridge import Bridge, task_loss
from cmai_fast.data import VQACollator
from cmai_fast.mbat import MBATConfig, MBATTrainer, quantized_language_model
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel

BITS = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture
def load(folder):
    def load(bits: int) -> Any:
        config = quantized_language_model(folder, bits, torch.float32)
        return AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config, device_map="cpu")

    return load


@pytest.fixture
def make(load, data, tiny_processor, tmp_path):
    def make(bits: int, **config: Any) -> MBATTrainer:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"), "inner_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4,
            "learning_rate": 1e-2, "save_steps": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        }  # fmt: skip
        return MBATTrainer(
            load(bits),
            MBATConfig(**(defaults | config)),
            train_dataset=data,
            data_collator=VQACollator(tiny_processor, negatives=1),
            processing_class=tiny_processor,
        )

    return make


def quantised(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")}


@BITS
def test_the_language_model_alone_is_quantised(load, bits):
    model = load(bits)
    linear = {n for n, m in model.model.language_model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert quantised(model) == {f"model.language_model.{name}" for name in linear} and linear
    with pytest.raises(ValueError, match="bits is 5; expected 4 or 8"):
        quantized_language_model("nowhere", 5)


@BITS
def test_gradients_reach_the_pixels_and_no_quantised_weight(load, tiny_model, batch, bits):
    text = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    grads = []
    model = load(bits)
    for part in (tiny_model, model):
        pixels = batch["pixel_values"].clone().requires_grad_()
        bridge = Bridge(part)
        loss = task_loss(*bridge.fuse(bridge.encode_image(pixels), **text)).sum()
        grads.append(torch.autograd.grad(loss, pixels)[0].flatten(1))
    # Of a random model: 4 bits keep the direction, 8 bits nearly all of it.
    likeness = torch.cosine_similarity(*grads)
    assert (likeness > {4: 0.8, 8: 0.97}[bits]).all() and (likeness < 0.999999).all()
    objective = Victim(Bridge(model), PixelSpace([0.5, 0.4, 0.3], [0.5, 0.25, 0.2]), batch)
    clean = objective.space.to_pixels(batch["pixel_values"])
    result = pgd(objective, clean, ThreatModel("linf", 8 / 255), steps=3, early_stop=False)
    assert (result.loss > objective(batch["pixel_values"]).loss).all()
    assert all(p.grad is None for p in model.parameters())


def test_a_pass_without_gradient_before_does_not_take_the_gradient_away(load, batch):
    """Where the processor has AVX512-BF16, bitsandbytes would pack the weights in that pass."""
    model, grads = load(4), []
    for _ in range(2):
        objective = Victim(Bridge(model), PixelSpace([0.5, 0.4, 0.3], [0.5, 0.25, 0.2]), batch)
        with objective.attack_mode():
            grads.append(exact_gradient(objective, batch["pixel_values"])[0])
        with torch.no_grad():
            objective(batch["pixel_values"])
    # Packing rounds the scales of the weights to bfloat16, which cannot be undone.
    assert (torch.cosine_similarity(*(g.flatten(1) for g in grads)) > 0.99).all()


@BITS
def test_a_rows_result_does_not_depend_on_its_batch(load, batch, bits):
    bridge = Bridge(load(bits))
    text = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}

    def losses(rows: slice) -> torch.Tensor:
        features = bridge.encode_image(batch["pixel_values"][rows])
        return task_loss(*bridge.fuse(features, **{k: v[rows] for k, v in text.items()}))

    with torch.no_grad():
        torch.testing.assert_close(losses(slice(0, 2)), losses(slice(None))[:2], rtol=1e-4, atol=1e-4)


@BITS
@pytest.mark.parametrize("inner", ["bridge", "pgd"])
def test_training_moves_the_vision_side_alone(make, bits, inner):
    trainer = make(bits, inner=inner)
    before = copy.deepcopy(dict(trainer.model.named_parameters()))
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(name.startswith(("model.vision_tower", "model.multi_modal_projector")) for name in moved)
    assert any("vision_tower" in name for name in moved) and any("projector" in name for name in moved)
    assert not any(p.requires_grad for p in trainer.model.model.language_model.parameters())


@BITS
def test_a_run_goes_on_from_its_checkpoint(make, bits, tmp_path):
    whole = make(bits)
    whole.train()
    rest = make(bits)
    rest.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for (name, p), (_, q) in zip(whole.model.named_parameters(), rest.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_quantised_vision_side_is_refused(folder, tiny_processor, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    )
    with pytest.raises(ValueError, match=r"the weight .* is quantised \(torch.uint8\).*quantized_language_model"):
        MBATTrainer(
            model, MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True), processing_class=tiny_processor
        )


def test_nothing_to_train_is_named(make_tiny, data, tmp_path):
    model, processor = make_tiny()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of LlavaForConditionalGeneration requires a gradient"):
        MBATTrainer(
            model, MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True), processing_class=processor
        )

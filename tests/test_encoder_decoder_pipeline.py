"""An encoder-decoder (ViT-GPT2) through loading, pipeline, attacks, calibration and training: it describes images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from cmai_fast.data import Sample
from cmai_fast.data.captions import CaptionCollator
from cmai_fast.data.easyvqa import COLORS, SHAPES
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.protocol import measure
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.mbat import MBATConfig, MBATTrainer
from cmai_fast.models.loading import load_model
from cmai_fast.pipeline import Generation, Pipeline
from cmai_fast.threat import ThreatModel

WORDS = ("<|endoftext|>", "a", "<unk>", *COLORS, *SHAPES)


def tokenizer() -> Any:
    """As GPT-2's: one special token, and none for padding."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = "<|endoftext|>"
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token=end, eos_token=end, unk_token="<unk>")


def model() -> Any:
    encoder = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=64, patch_size=16
    )
    decoder = tf.GPT2Config(
        vocab_size=len(WORDS), n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = config.pad_token_id = config.eos_token_id = 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = tf.VisionEncoderDecoderModel(config).eval()
    made.generation_config = tf.GenerationConfig(decoder_start_token_id=0, eos_token_id=0, pad_token_id=0)
    return made


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [replace(s, prompt="") for s in DataSource("easyvqa-captions").load("test", 16)]


@pytest.fixture(scope="module")
def folder(samples, tmp_path_factory) -> Path:
    """As the hub has it: a model, an image processor and a tokenizer; trained for a few seconds."""
    place = tmp_path_factory.mktemp("vit-gpt2")
    images = tf.ViTImageProcessorPil(size={"height": 64, "width": 64})
    own, processor = model(), tf.TrOCRProcessor(images, tokenizer())
    batch = CaptionCollator(processor)(samples)
    optimizer = torch.optim.AdamW(own.parameters(), 3e-3, weight_decay=0.0)
    for _ in range(240):
        loss = own(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    own.save_pretrained(place)
    images.save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def pipeline(folder) -> Pipeline:
    return Pipeline.load(str(folder), generation=Generation(6))


def test_a_folder_without_a_processor_loads(folder):
    own, processor = load_model(str(folder))
    assert isinstance(own, tf.VisionEncoderDecoderModel)
    assert processor.tokenizer.pad_token == "<|endoftext|>" and processor.image_processor.size["height"] == 64


def test_the_collator_makes_what_the_model_trains_on(pipeline, samples):
    few = [replace(samples[0], references=("a red",)), replace(samples[1], references=("a red circle",))]
    batch = pipeline.collate(few)
    red, circle = WORDS.index("red"), WORDS.index("circle")
    assert batch["labels"].tolist() == [[1, red, 0, -100], [1, red, circle, 0]]
    assert batch["pixel_values"].shape == (2, 3, 64, 64) and batch["sample_ids"].tolist() == [s.id for s in few]
    wrong = CaptionCollator(pipeline.processor, negatives=2)(samples[:3])["negative_labels"]
    assert wrong.shape[:2] == (3, 2)
    spelt = pipeline.collate([replace(samples[0], references=("a <|endoftext|> red",))])["labels"][0].tolist()
    assert spelt.count(0) == 1 and spelt[-1] == 0, "a control token in a caption is text"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "what color is it?"}, r"sample 7 asks 'what color is it\?'.*--task captioning"),
        ({"images": ()}, "sample 7 has 0 images; an encoder-decoder takes exactly one"),
        ({"references": ("a " * 40,)}, "sample 7: its caption has 41 tokens, the decoder's context is 16"),
        ({"references": (" ",)}, None),
    ],
)
def test_what_it_cannot_describe_is_named(pipeline, samples, change, message):
    sample = replace(samples[0], id=7, where="", **change)
    if message is None:
        assert pipeline.collate([sample])["labels"].tolist() == [[0]]
        return
    with pytest.raises(ValueError, match=message):
        pipeline.collate([sample])


def test_it_describes_is_attacked_and_measured(pipeline, samples):
    said = pipeline.generate(samples)
    own = pipeline.processor.image_processor(images=[s.images[0] for s in samples], return_tensors="pt")
    with torch.no_grad():
        plain = pipeline.model.generate(**own, max_new_tokens=6, do_sample=False)
    assert said == [t.strip() for t in pipeline.processor.tokenizer.batch_decode(plain, skip_special_tokens=True)]
    assert sum(a == s.answer for a, s in zip(said, samples, strict=True)) >= 12
    record = measure(
        pipeline, samples, ThreatModel("linf", 64 / 255), [AttackSpec("pgd", 10)], task="captioning"
    ).record
    assert record["acc_clean"] > 0.7 and record["asr"] > 0.5
    assert record["metrics"]["robust"]["cider"] < record["metrics"]["clean"]["cider"] / 2


def test_what_cannot_be_asked_is_refused_before_any_attack(pipeline, samples):
    with pytest.raises(ValueError, match="retrieval needs a dual encoder"):
        measure(pipeline, samples, ThreatModel("linf", 8 / 255), [AttackSpec("pgd", 1)], task="retrieval")
    pipeline.generation = Generation(20)
    with pytest.raises(ValueError, match="max_new_tokens is 20, and the decoder's context is 16"):
        pipeline.generate(samples[:1])


def test_the_trainer_takes_records_without_a_collator(pipeline, samples, tmp_path):
    """Every part of CMAI: attack, adversarial loss, contrastive loss with wrong captions."""
    args = MBATConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, inner_steps=2, report_to="none", use_cpu=True,
        save_strategy="no", gamma=0.1, beta=0.1, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    records = [{"image": s.images[0], "caption": s.answer, "choices": list(s.choices)} for s in samples]
    trainer = MBATTrainer(pipeline.model, args, train_dataset=records, processing_class=pipeline.processor)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss_contrastive" in entry]
    assert logged and all(entry["loss_contrastive"] > 0 for entry in logged)


def test_commands_take_it(folder, samples, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from cmai_fast.cli import app

    monkeypatch.chdir(tmp_path)
    with Path("my.jsonl").open("w") as file:
        for s in samples:
            Image.fromarray(s.images[0]).save(f"{s.id}.png")
            file.write(json.dumps({"id": s.id, "image": f"{s.id}.png", "captions": [s.answer, "a shape"]}) + "\n")
    line = f"attack --model {folder} --data my.jsonl --task captioning --attack pgd --steps 5 --eps 64/255 --out a.json"
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.output
    assert json.loads(Path("a.json").read_text())["asr"] > 0.3
    refused = CliRunner().invoke(app, f"attack --model {folder} --data easyvqa --limit 4 --out b.json".split())
    assert refused.exit_code != 0 and "--task captioning" in refused.output

"""A verifier that sees with a vision encoder of another architecture and another size."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers as tf

from cmai_fast.attacks import ATTACKS, Victim
from cmai_fast.attacks.deployed import Deployed
from cmai_fast.bridge import ModelBridge, bridge_of
from cmai_fast.cmcv import Threshold
from cmai_fast.cmcv.alternatives import Alternatives
from cmai_fast.cmcv.encoder import Encoder, EncoderBridge, check_pictures, resized
from cmai_fast.cmcv.verifier import Verifier
from cmai_fast.data import load_dataset
from cmai_fast.mbat.verifier import inconsistent
from cmai_fast.models.encoders import is_image_text_model, load_encoder
from cmai_fast.pipeline import Pipeline
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel
from families import FAMILIES

KINDS = Alternatives((("no", "yes"), ("red", "blue", "teal")))
SIDE, WIDTH = 32, 16
VISION = {
    "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": SIDE, "patch_size": 8, "initializer_range": 0.2,
}  # fmt: skip
TEXT = {
    "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SIZE = {"height": SIDE, "width": SIDE}
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
BOTH = {"vision_config": VISION, "text_config": TEXT}
# What is saved, and its image processor: each as the hub has it.
ENCODERS = {
    "CLIP": lambda: (
        tf.CLIPModel(tf.CLIPConfig(**BOTH)),
        tf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIZE, image_mean=MEAN, image_std=STD),
    ),
    "CLIP, vision side": lambda: (
        tf.CLIPVisionModel(tf.CLIPVisionConfig(**VISION)),
        tf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIZE, image_mean=MEAN, image_std=STD),
    ),
    "SigLIP": lambda: (tf.SiglipModel(tf.SiglipConfig(**BOTH)), tf.SiglipImageProcessorPil(size=SIZE)),
    "SigLIP, vision side": lambda: (
        tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION)),
        tf.SiglipImageProcessorPil(size=SIZE),
    ),
    "DINOv2": lambda: (
        tf.Dinov2Model(tf.Dinov2Config(**VISION)),
        tf.BitImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIZE, image_mean=MEAN, image_std=STD),
    ),
    "ViT": lambda: (  # its checkpoints have no pooler
        tf.ViTForImageClassification(tf.ViTConfig(**VISION)),
        tf.ViTImageProcessorPil(size=SIZE, resample=2),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, make in ENCODERS.items():
        found[name] = tmp_path_factory.mktemp("encoders") / "encoder"
        with torch.random.fork_rng():
            torch.manual_seed(3)
            for part in make():
                part.save_pretrained(found[name])
    return found


@pytest.fixture
def copied(folders, tmp_path):
    """A folder of its own, for tests that break it."""
    return shutil.copytree(folders["CLIP, vision side"], tmp_path / "copied")


@pytest.fixture
def pipeline(make_tiny):
    model, processor = make_tiny()
    return Pipeline("tiny", model, processor)


@pytest.fixture(scope="module")
def samples():
    return list(load_dataset("easyvqa", "test", 6, seed=3))


def seeing(pipeline: Pipeline, folder) -> Verifier:
    """The pipeline's new verifier, which sees with the encoder of a folder."""
    tower = Encoder.load(folder, pipeline.bridge, pipeline.space)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = pipeline.processor.tokenizer
        verifier = Verifier.new(pipeline.bridge, tokenizer, KINDS, tower, width=16, dim=8, heads=2)
    verifier.network.eval().requires_grad_(False)
    pipeline.verifier = verifier
    return verifier


@pytest.mark.parametrize("name", ENCODERS)
def test_it_reads_the_picture_as_its_own_processor_does(name, folders, pipeline, samples):
    """The picture that the model reads, in 8 bits, by the encoder's own processor."""
    encoder = Encoder.load(folders[name], pipeline.bridge, pipeline.space)
    images = pipeline.images(samples)
    pixels = images.pixels()
    noise = torch.randint(0, 256, pixels.shape, generator=torch.Generator().manual_seed(0)) / 255
    processor = tf.AutoImageProcessor.from_pretrained(folders[name])
    for shown in (pixels, noise):
        pictures = [p for (p,) in images.pictures(shown)]
        theirs = processor(pictures, return_tensors="pt")["pixel_values"]
        _, mine = read_by(encoder, pipeline.space.to_model(shown))
        # Pillow rounds to 8 bits after each direction: measured, at most 1.1 levels apart, 0.32 on average.
        level = 1 / 255 / torch.tensor(processor.image_std)[:, None, None]
        assert ((mine - theirs) / level).abs().max() < 1.3 and ((mine - theirs) / level).abs().mean() < 0.4
        whole = tf.AutoModel.from_pretrained(folders[name])
        with torch.no_grad():
            states = getattr(whole, "vision_model", whole)(pixel_values=mine).last_hidden_state
            features = encoder(pipeline.space.to_model(shown))
        assert features.shape == (6, 16, WIDTH) and encoder.image_dim == WIDTH
        torch.testing.assert_close(features, states[:, states.shape[1] - 16 :], rtol=1e-4, atol=1e-4)


def read_by(encoder: Encoder, model_input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The features, and the pixel values from which the encoder made them."""
    seen = []
    hook = encoder.encoder.register_forward_pre_hook(lambda m, a, k: seen.append(k["pixel_values"]), with_kwargs=True)
    try:
        with torch.no_grad():
            return encoder(model_input), seen[0]
    finally:
        hook.remove()


@pytest.mark.parametrize("size", [(32, 32), (96, 96), (80, 96), (64, 64)])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_resized_is_pillow_without_its_rounding(size, resample):
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture[20:40, 20:40] = 255  # at whose edges bicubic weights overshoot
    picture[:16] = 0
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].double() / 255
    found = resized(x, size, resample)
    kind = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[resample]
    theirs = np.asarray(Image.fromarray(picture).resize(size[::-1], kind))
    assert found.min() >= 0 and found.max() <= 1
    assert np.abs(found[0].permute(1, 2, 0).numpy() * 255 - theirs).max() < 1.3
    assert size != (64, 64) or torch.equal(found, x)


def test_plain_areas_have_a_gradient():
    """Where all is black or white, bicubic weights overshoot, and rounding does."""
    x = torch.zeros(1, 3, 64, 64)
    x[..., 20:40, 20:40] = 1.0
    x.requires_grad_()
    weight = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((weight * resized(x, (96, 96), "bicubic")).sum(), x)
    plain = torch.nn.functional.interpolate(x, (96, 96), mode="bicubic", antialias=True)
    (expected,) = torch.autograd.grad((weight * plain).sum(), x)
    assert plain.min() < -0.01 and plain.max() > 1.01
    torch.testing.assert_close(gradient, expected)
    assert (gradient != 0).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_its_gradient_is_that_of_finite_differences(name, folders, pipeline):
    encoder = Encoder.load(folders[name], pipeline.bridge, pipeline.space).double()
    generator = torch.Generator().manual_seed(0)
    pixels = 0.4 + 0.2 * torch.rand(2, 3, 64, 64, generator=generator, dtype=torch.float64)
    x = pipeline.space.to_model(pixels).requires_grad_()
    way = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, 16, WIDTH, generator=generator, dtype=torch.float64)
    value = lambda at: (weight * encoder(at)).sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(value(x), x)
    with torch.no_grad():
        slope = (value(x + 1e-5 * way) - value(x - 1e-5 * way)) / 2e-5
    torch.testing.assert_close((gradient * way).sum(), slope, rtol=1e-6, atol=1e-8)
    assert all(not p.requires_grad and p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize("name", ENCODERS)
def test_saved_and_loaded_it_scores_alike(name, folders, pipeline, samples, tmp_path):
    before = {k: v.clone() for k, v in pipeline.model.state_dict().items()}
    folder = shutil.copytree(folders[name], tmp_path / "encoder")
    verifier = seeing(pipeline, folder)
    assert isinstance(verifier.bridge, ModelBridge) and verifier.network.settings["image_dim"] == WIDTH
    answers = [s.answer for s in samples]
    first = pipeline.score(samples, answers)
    alone = [pipeline.score([s], [s.answer])[0] for s in samples]
    torch.testing.assert_close(torch.stack(alone), first, rtol=1e-4, atol=1e-5)
    threshold = Threshold(-0.5, 0.05, 9, "calibration", pipeline.generation)
    verifier.save_pretrained(tmp_path / "cmcv", threshold)
    shutil.rmtree(folder)  # the saved verifier needs nothing else
    rng = torch.get_rng_state()
    again, read = Verifier.from_pretrained(tmp_path / "cmcv", pipeline.bridge, pipeline.processor.tokenizer)
    assert torch.equal(torch.get_rng_state(), rng) and read == threshold
    assert isinstance(again.tower, Encoder) and again.tower.reading == verifier.tower.reading
    assert not any(m.training for m in again.tower.modules())
    assert not any(p.requires_grad for p in again.tower.parameters())
    pipeline.verifier = again
    assert torch.equal(pipeline.score(samples, answers), first)
    again.save_pretrained(tmp_path / "twice", threshold)
    for file in ("verifier.json", "verifier.safetensors"):
        assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / "cmcv" / file).read_bytes()
    assert all(torch.equal(v, before[k]) for k, v in pipeline.model.state_dict().items())


def test_scores_depend_on_the_picture_and_follow_it_in_bfloat16(folders, pipeline, samples):
    seeing(pipeline, folders["CLIP"])
    answers, own = [s.answer for s in samples], pipeline.images(samples)
    pixels = own.pixels()
    first = pipeline.score(samples, answers, own.split(pixels))
    moved = pipeline.score(samples, answers, own.split((pixels + 0.2 * torch.rand_like(pixels)).clamp(0, 1)))
    assert (first - moved).abs().min() > 1e-4
    pipeline.model.to(torch.bfloat16)
    half = seeing(pipeline, folders["CLIP"])
    assert half.tower.encoder.dtype == torch.bfloat16
    torch.testing.assert_close(pipeline.score(samples, answers).float(), first, rtol=0.1, atol=0.2)


def victim_of(pipeline: Pipeline, samples) -> Victim:
    victim = Victim(pipeline.bridge, pipeline.space, pipeline.on_device(pipeline.collate(samples)))
    victim.deployed = Deployed(pipeline, samples)
    return victim


def test_attacks_go_through_it(folders, pipeline, samples):
    """The attack of its training, and the adaptive attack, whose wanted answer is scored higher in the end."""
    verifier = seeing(pipeline, folders["SigLIP"])
    ball, answers = ThreatModel("linf", 16 / 255), [s.answer for s in samples]
    batch = pipeline.on_device(pipeline.collate(samples))
    texts = verifier.texts([s.prompt for s in samples], answers)
    own = Victim(verifier.bridge, pipeline.space, batch)
    found = inconsistent(verifier, own, texts, own.pixels(), ball, 5, 0)
    with torch.no_grad():
        first, last = (
            verifier.log_p(own.encode(x), texts) for x in (own.space.to_model(own.pixels()), found.model_input)
        )
    assert (last < first - 1e-3).all()
    assert found.passes.full_forward == 0 and found.zero_gradients.sum() == 0

    pipeline.threshold = Threshold(100.0, 0.05, 9, "calibration", pipeline.generation)  # never reached
    victim = victim_of(pipeline, samples)
    wanted = [w[0] for w in victim.deployed.wrong()]
    result = ATTACKS["adaptive"](victim, victim.pixels(), ball, steps=8, restarts=1, mode="lagrangian", targets=1)
    before, after = (pipeline.score(samples, wanted, victim.split(x)) for x in (victim.pixels(), result.adv))
    assert (after > before + 1e-3).all() and not result.fooled.any()
    aim = victim.deployed.aim(wanted)
    x = victim.space.to_model(result.adv)
    with victim.deployed.frozen(), torch.no_grad():
        features = victim.encode(x)
        excess = aim.excess(features, None, x, None)
        part = aim.excess(features[[4, 1]], None, x[[4, 1]], torch.tensor([4, 1]))
    torch.testing.assert_close(excess + 100.0, after, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(part, excess[[4, 1]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fault", [False, True])
def test_everything_comes_back_as_it_was(folders, pipeline, samples, monkeypatch, fault):
    verifier = seeing(pipeline, folders["DINOv2"])
    pipeline.threshold = Threshold(0.0, 0.05, 9, "calibration", pipeline.generation)
    victim = victim_of(pipeline, samples)
    parts = (pipeline.model.train(), verifier.network.train(), verifier.tower.train())
    for p in (*verifier.network.parameters(), *list(verifier.tower.parameters())[::2]):
        p.requires_grad_(True)
    state = lambda: [([m.training for m in p.modules()], [q.requires_grad for q in p.parameters()]) for p in parts]  # noqa: E731
    before, rng, ball = state(), torch.get_rng_state(), ThreatModel("linf", 8 / 255)
    if fault:
        monkeypatch.setattr(victim.bridge, "fuse", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ATTACKS["adaptive"](victim, victim.pixels(), ball, steps=2, restarts=1)
    else:
        ATTACKS["adaptive"](victim, victim.pixels(), ball, steps=2, restarts=1)
        own = Victim(verifier.bridge, pipeline.space, pipeline.collate(samples))
        inconsistent(verifier, own, verifier.texts(["q?"] * 6, ["red"] * 6), own.pixels(), ball, 2, 0)
    assert state() == before and torch.equal(torch.get_rng_state(), rng)
    assert all(q.grad is None for p in parts for q in p.parameters())


def test_training_of_the_model_refuses_it(folders, pipeline):
    verifier = seeing(pipeline, folders["ViT"])
    with pytest.raises(ValueError, match="a tower of its own, which training would not change"):
        verifier.of(pipeline.bridge)
    with pytest.raises(ValueError, match="features of ViTModel are for the verifier"):
        verifier.bridge.losses(torch.zeros(1, 16, WIDTH))


def test_what_cannot_be_an_encoder_is_named(copied, tmp_path, folders, pipeline):
    load = lambda: load_encoder(copied)  # noqa: E731
    text = tmp_path / "text"
    tf.BertModel(tf.BertConfig(**TEXT)).save_pretrained(text)
    for ask in (is_image_text_model, load_encoder):
        with pytest.raises(
            ValueError, match=r"holds a BertConfig .model_type 'bert'., which is neither.*CLIPVisionModel"
        ):
            ask(text)
    config = json.loads((copied / "preprocessor_config.json").read_text())

    def processor(**changes):
        values = {k: v for k, v in (config | changes).items() if v is not None}
        (copied / "preprocessor_config.json").write_text(json.dumps(values))

    processor(resample=1)
    with pytest.raises(ValueError, match=r"resample is 1; expected 2 .bilinear. or 3"):
        load()
    processor(size={"longest_edge": 32}, do_center_crop=False)
    with pytest.raises(ValueError, match=r"name no size of the images .* set size to"):
        load()
    processor(crop_size={"height": 48, "width": 48})
    with pytest.raises(ValueError, match="CLIPVisionModel does not read pictures of 48 x 48"):
        load()
    processor(do_resize=False)
    assert load()[1].size == (SIDE, SIDE), "of the config"
    (copied / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"no image processor that can be read .* save the encoder's own there"):
        load()
    processor()
    weights = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(weights[:-8])
    with pytest.raises(ValueError, match="its weights are damaged"):
        load()
    (copied / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no \*.safetensors"):
        load()
    tensors = tf.CLIPVisionModel.from_pretrained(folders["CLIP, vision side"]).state_dict()
    from safetensors.torch import save_file

    save_file({k: v for k, v in tensors.items() if "fc1" not in k}, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks the weights \['encoder.layers.0.mlp.fc1.bias', "):
        load()
    video = tmp_path / "video"
    tf.VideoMAEModel(tf.VideoMAEConfig(**VISION, num_frames=2)).save_pretrained(video)
    processor()
    shutil.copy(copied / "preprocessor_config.json", video)
    with pytest.raises(ValueError, match=r"VideoMAEModel does not read pictures of 32 x 32"):
        load_encoder(video)
    with pytest.raises(ValueError, match=r"no config.json in"):
        is_image_text_model(tmp_path)
    assert not any(map(is_image_text_model, folders.values())) and is_image_text_model("easyvqa-llava")


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "Qwen2-VL", "SmolVLM"])
def test_tiles_and_patches_are_refused(name, folders):
    bridge = bridge_of(next(family for family in FAMILIES if family.name == name).build())
    for ask in (check_pictures, lambda b: Encoder.load(folders["CLIP"], b, PixelSpace(MEAN, STD))):
        with pytest.raises(ValueError, match=r"takes \w+ beside its pixel_values; .*calibrate --tower copy"):
            ask(bridge)


def test_several_pictures_of_a_sample_are_refused(folders, pipeline):
    bridge = seeing(pipeline, folders["CLIP"]).bridge
    assert isinstance(bridge, EncoderBridge)
    with pytest.raises(ValueError, match=r"of 1 samples have shape \(2, 3, 64, 64\).*one picture"):
        bridge.encode_image(torch.zeros(2, 3, 64, 64), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"have shape \(1, 2, 3, 64, 64\)"):
        bridge.encode_image(torch.zeros(1, 2, 3, 64, 64))


def test_damaged_records_are_refused(folders, pipeline, tmp_path):
    verifier = seeing(pipeline, folders["CLIP"])
    verifier.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "verifier.json").read_text())
    assert record["format"] == 2, "which older versions refuse"
    tower, tokenizer = record["tower"], pipeline.processor.tokenizer

    def load(message, **changes):
        (tmp_path / "verifier.json").write_text(json.dumps(record | {"tower": tower | changes}))
        with pytest.raises(ValueError, match=message + r".*calibrate again"):
            Verifier.from_pretrained(tmp_path, pipeline.bridge, tokenizer)

    load("model_type is 'clip_vision', which this version", config=tower["config"] | {"model_type": "clip_vision"})
    load("neither an image-text model nor", config={"model_type": "bert"})
    load("does not make an encoder: RuntimeError", config=tower["config"] | {"intermediate_size": 8})
    load("does not make an encoder", config=tower["config"] | {"num_attention_heads": 5})
    load("resample is 'nearest'; expected bilinear or bicubic", reading=tower["reading"] | {"resample": "nearest"})
    load("size is .'32', 32.", reading=tower["reading"] | {"size": ["32", 32]})
    load("KeyError, 'mean'", reading={})
    load("std is", model=tower["model"] | {"std": [0.0, 1.0, 1.0]})

"""Every supported family: the smallest random-weight model that is real, and its own image processor, built offline."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import Tensor

from cmai_fast.models.photos import PhotoDualEncoder, PhotoDualEncoderConfig

PAD, START, END, IMAGE, SEPARATOR, VIDEO = 0, 1, 2, 5, 6, 7
VOCABULARY, WIDTH, SIZE = 48, 16, 32
MEAN, STD = [0.5, 0.4, 0.3], [0.5, 0.25, 0.2]
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": START,
    "eos_token_id": END,
}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Sample:
    """Pictures (H, W, 3) uint8, and the tokens of prompt and response."""

    pictures: tuple[np.ndarray, ...]
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def answer_tokens(family: Family, labels: Tensor) -> Tensor:
    """How many tokens of each sample (N,) are predicted; of a dual encoder, one text."""
    if family.kind == "dual":
        return torch.ones_like(labels)
    return (labels[:, int(family.kind == "generative") :] != -100).sum(1)


def picture(seed: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def sample(seed: int, prompt: int, answer: int, *sizes: tuple[int, int]) -> Sample:
    words = np.random.default_rng(seed).integers(10, VOCABULARY, prompt + answer).tolist()
    pictures = tuple(picture(100 * seed + i, *size) for i, size in enumerate(sizes))
    return Sample(pictures, tuple(words[:prompt]), tuple(words[prompt:]))


@dataclass(frozen=True, eq=False)
class Family:
    """`build()` gives the model, `processor` its image processor; `sizes` are of the pictures of the three samples."""

    name: str
    build: Callable[[], Any]
    processor: Any
    sizes: Sequence[Sequence[tuple[int, int]]] = (((SIZE, SIZE),), ((SIZE, SIZE),), ((SIZE, SIZE),))
    nested: bool = False  # the processor takes a list of pictures a sample
    by_sample: bool = False  # and pads images by sample
    extra: Callable[[dict[str, Any], Sequence[Sample]], dict[str, Any]] = field(default=lambda batch, samples: {})
    kind: str = "generative"
    single: bool = False  # a sample is one image, always

    def model(self) -> Any:
        return _random_weights(self.build)

    def samples(self) -> list[Sample]:
        """Three, of different lengths, with responses that the model itself gives."""
        return _answered(self)

    def own_forward(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits (N, L', V) and targets (N, L') by the model's own forward, without the bridge."""
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        if self.kind == "dual":
            return model(**inputs).logits_per_image[:, None], batch["labels"][:, None]
        if self.kind == "encoder-decoder":
            return model(**batch).logits, batch["labels"]
        return model(**inputs).logits[:, :-1], batch["labels"][:, 1:]

    def batch(self, model: Any, samples: Sequence[Sample], side: str = "left") -> dict[str, Any]:
        """What the model's own forward takes, with labels."""
        nested = [list(s.pictures) for s in samples]
        images = nested if self.nested else [p for own in nested for p in own]
        batch = dict(self.processor(images=images, return_tensors="pt"))
        batch = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k not in ("num_crops", "num_patches")}
        if self.kind == "dual":
            texts = _pad([[START, *s.prompt, *s.answer, END] for s in samples], [1] * len(samples), "right")
            with torch.no_grad():
                own = model(**batch, **{k: v for k, v in texts.items() if k != "labels"}).logits_per_image
            return {**batch, **texts, "labels": own.argmax(1)}
        if self.kind == "encoder-decoder":
            rows = [[*s.prompt, *s.answer] for s in samples]
            return {**batch, "labels": _pad(rows, [len(r) for r in rows], side)["labels"]}
        return {**batch, **self.extra(batch, samples), **self._text(model, batch, samples, side)}

    def _text(self, model: Any, batch: dict[str, Any], samples: Sequence[Sample], side: str) -> dict[str, Any]:
        runs = iter(self._tokens(model, {**batch, **self.extra(batch, samples)}))
        rows = []
        for s in samples:
            row = [START]
            for _ in (0,) if self.by_sample else s.pictures:
                row += [IMAGE] * next(runs) + [SEPARATOR]
            rows.append([*row, *s.prompt, *s.answer])
        text = _pad(rows, [len(s.answer) for s in samples], side)
        forward = inspect.signature(model.forward).parameters
        kind = (text["input_ids"] == IMAGE).long()
        if "mm_token_type_ids" in forward:
            text["mm_token_type_ids"] = kind
        if self.name == "PaliGemma":
            text["token_type_ids"] = (text["labels"] != -100).long()  # 0: prefix, read in both directions
        elif "token_type_ids" in forward:
            text["token_type_ids"] = kind
        return text

    def _tokens(self, model: Any, batch: dict[str, Any]) -> list[int]:
        """How many tokens each image takes (or all images of a sample together), by the model itself."""
        keys = {k: v for k, v in batch.items() if k in inspect.signature(model.get_image_features).parameters}
        with torch.no_grad():
            return [len(f) for f in model.get_image_features(**keys, return_dict=True).pooler_output]


def _pad(rows: list[list[int]], answers: list[int], side: str) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (row, n) in enumerate(zip(rows, answers, strict=True)):
        start = length - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
        labels[i, start + len(row) - n : start + len(row)] = torch.tensor(row[-n:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@functools.cache
def _random_weights(build: Callable[[], Any]) -> Any:
    """Shared by all tests, which leave it as it is. Weights of unit gain: answers depend on what is seen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
        for p in model.parameters():
            if p.dim() > 1:
                p.data.normal_(0, p[0].numel() ** -0.5)
        if head := model.get_output_embeddings():
            head.weight.data[:10] = 0  # no answer is a special token
    return model


@functools.cache
def _answered(family: Family) -> list[Sample]:
    model, found = family.model(), []
    for i, sizes in enumerate(family.sizes):
        s = sample(i, 3 + 2 * i, 1 + i % 2, *sizes)
        if family.kind == "encoder-decoder":
            s = Sample(s.pictures, (), (*s.prompt, *s.answer))
        for k in range(len(s.answer) if family.kind != "dual" else 0):
            with torch.no_grad():
                logits, targets = family.own_forward(model, family.batch(model, [s], side="right"))
            token = int(logits[0][targets[0] != -100][k].argmax())
            s = Sample(s.pictures, s.prompt, (*s.answer[:k], token, *s.answer[k + 1 :]))
        found.append(s)
    return found


def _siglip(**kwargs: Any) -> Any:
    return tf.SiglipVisionConfig(**{**VISION, "vision_use_head": False, **kwargs})


def _llava() -> Any:
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**VISION, projection_dim=WIDTH),
            text_config=tf.LlamaConfig(**TEXT),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        )
    )


def _llava_next() -> Any:
    return tf.LlavaNextForConditionalGeneration(
        tf.LlavaNextConfig(
            vision_config=tf.CLIPVisionConfig(**VISION, projection_dim=WIDTH),
            text_config=tf.LlamaConfig(**TEXT),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        )
    )


def _llava_onevision() -> Any:
    return tf.LlavaOnevisionForConditionalGeneration(
        tf.LlavaOnevisionConfig(
            vision_config=_siglip(),
            text_config=tf.Qwen2Config(**TEXT),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        )
    )


_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_SPECIAL = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 8, "vision_end_token_id": 9}


def _qwen2_vl() -> Any:
    vision = {"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
    return tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": _ROPE}, vision_config=vision, **_SPECIAL)
    )


def _qwen2_5_vl() -> Any:
    vision = {
        "depth": 2, "hidden_size": WIDTH, "out_hidden_size": WIDTH, "num_heads": 2, "intermediate_size": 32,
        "patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": _ROPE}, vision_config=vision, **_SPECIAL)
    )


def _qwen3_vl() -> Any:
    vision = {
        "depth": 2, "hidden_size": WIDTH, "out_hidden_size": WIDTH, "num_heads": 2, "intermediate_size": 32,
        "patch_size": 8, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = {**TEXT, "head_dim": 8, "rope_parameters": _ROPE}
    return tf.Qwen3VLForConditionalGeneration(tf.Qwen3VLConfig(text_config=text, vision_config=vision, **_SPECIAL))


def _idefics(model: Any, config: Any, vision: Any) -> Any:
    return model(
        config(
            vision_config=vision(**{**VISION, "image_size": 32}),
            text_config=tf.LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=PAD,
        )
    )


def _smolvlm() -> Any:
    return _idefics(tf.SmolVLMForConditionalGeneration, tf.SmolVLMConfig, tf.SmolVLMVisionConfig)


def _idefics3() -> Any:
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

    return _idefics(tf.Idefics3ForConditionalGeneration, tf.Idefics3Config, Idefics3VisionConfig)


def _paligemma() -> Any:
    return tf.PaliGemmaForConditionalGeneration(
        tf.PaliGemmaConfig(
            vision_config=_siglip(projection_dim=WIDTH),
            text_config=tf.GemmaConfig(**TEXT, head_dim=8),
            image_token_index=IMAGE,
            projection_dim=WIDTH,
            hidden_size=WIDTH,
        )
    )


def _gemma3() -> Any:
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            vision_config=_siglip(),
            text_config=tf.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=64, query_pre_attn_scalar=8),
            image_token_index=IMAGE,
            boi_token_index=8,
            eoi_token_index=9,
            mm_tokens_per_image=4,
        )
    )


def _internvl() -> Any:
    vision = {**VISION, "image_size": [SIZE, SIZE], "patch_size": [8, 8]}
    return tf.InternVLForConditionalGeneration(
        tf.InternVLConfig(
            vision_config=tf.InternVLVisionConfig(**vision),
            text_config=tf.Qwen2Config(**TEXT),
            image_token_id=IMAGE,
            image_seq_length=4,
        )
    )


_QFORMER = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "encoder_hidden_size": WIDTH, "vocab_size": VOCABULARY, "cross_attention_frequency": 1,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def _blip2() -> Any:
    text = tf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, word_embed_proj_dim=WIDTH, pad_token_id=PAD,
        dropout=0.0,
    )  # fmt: skip
    return tf.Blip2ForConditionalGeneration(
        tf.Blip2Config(
            vision_config=tf.Blip2VisionConfig(**VISION),
            qformer_config=tf.Blip2QFormerConfig(**_QFORMER),
            text_config=text,
            num_query_tokens=4,
            image_token_index=IMAGE,
        )
    )


def _instructblip() -> Any:
    return tf.InstructBlipForConditionalGeneration(
        tf.InstructBlipConfig(
            vision_config=tf.InstructBlipVisionConfig(**VISION),
            qformer_config=tf.InstructBlipQFormerConfig(**_QFORMER),
            text_config=tf.LlamaConfig(**TEXT),
            num_query_tokens=4,
            image_token_index=IMAGE,
        )
    )


def _vit_gpt2() -> Any:
    encoder = tf.ViTConfig(**VISION)
    decoder = tf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=2, n_head=2, bos_token_id=START,
        eos_token_id=END, pad_token_id=PAD, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = START, PAD
    return tf.VisionEncoderDecoderModel(config)


def _clip() -> Any:
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))


def _siglip_model() -> Any:
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    return tf.SiglipModel(tf.SiglipConfig(text_config={**text, "projection_size": WIDTH}, vision_config=VISION))


def _photos() -> Any:
    vision = {
        "image_size": SIZE, "stem_width": 8, "stages": [[1, 3, 1, 1, 8], [2, 3, 2, 2, 12], [1, 5, 2, 2, 16]],
        "hidden_size": 24,
    }  # fmt: skip
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = {k: TEXT[k] for k in names} | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return PhotoDualEncoder(PhotoDualEncoderConfig(vision, text))


_SQUARE = {"size": {"height": SIZE, "width": SIZE}, "image_mean": MEAN, "image_std": STD}
_CLIP = tf.CLIPImageProcessorPil(**_SQUARE, crop_size={"height": SIZE, "width": SIZE}, do_center_crop=False)
_TILED = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]], "image_mean": MEAN, "image_std": STD}
_QWEN = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 256, "max_pixels": 8192}
_QWEN_PIL = tf.Qwen2VLImageProcessorPil(**_QWEN, image_mean=MEAN, image_std=STD)
_SPLITS = {
    "size": {"longest_edge": 64}, "max_image_size": {"longest_edge": SIZE}, "image_mean": MEAN, "image_std": STD,
}  # fmt: skip

_SEVERAL = (((SIZE, SIZE),), ((SIZE, SIZE), (SIZE, SIZE)), ((SIZE, SIZE),))
_SIZES = (((40, 60),), ((64, 32), (32, 32)), ((33, 64),))
_GRIDS = (((32, 48),), ((64, 32), (32, 32)), ((48, 48),))


def _instruction(batch: dict[str, Any], samples: Sequence[Sample]) -> dict[str, Any]:
    text = _pad([[START, *s.prompt] for s in samples], [1] * len(samples), "right")
    return {"qformer_input_ids": text["input_ids"], "qformer_attention_mask": text["attention_mask"]}


FAMILIES = [
    Family("LLaVA", _llava, _CLIP, _SEVERAL),
    Family(
        "LLaVA-NeXT",
        _llava_next,
        tf.LlavaNextImageProcessorPil(
            **_TILED, size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
        ),
        _SIZES,
    ),
    Family(
        "LLaVA-OneVision",
        _llava_onevision,
        tf.LlavaOnevisionImageProcessorPil(**_TILED, size={"height": SIZE, "width": SIZE}),
        _SIZES,
        nested=True,
    ),
    Family("Qwen2-VL", _qwen2_vl, _QWEN_PIL, _GRIDS),
    Family("Qwen2.5-VL", _qwen2_5_vl, _QWEN_PIL, _GRIDS),
    Family("Qwen3-VL", _qwen3_vl, _QWEN_PIL, _GRIDS),
    Family("SmolVLM", _smolvlm, tf.SmolVLMImageProcessorPil(**_SPLITS), _SIZES, nested=True, by_sample=True),
    Family("Idefics3", _idefics3, tf.Idefics3ImageProcessorPil(**_SPLITS), _SIZES, nested=True, by_sample=True),
    Family("PaliGemma", _paligemma, tf.SiglipImageProcessorPil(**_SQUARE), _SEVERAL),
    Family("Gemma 3", _gemma3, tf.Gemma3ImageProcessorPil(**_SQUARE), _SEVERAL),
    Family("InternVL", _internvl, tf.GotOcr2ImageProcessorPil(**_SQUARE), _SEVERAL),
    Family("BLIP-2", _blip2, tf.BlipImageProcessorPil(**_SQUARE), single=True),
    Family("InstructBLIP", _instructblip, tf.BlipImageProcessorPil(**_SQUARE), extra=_instruction, single=True),
    Family("ViT-GPT2", _vit_gpt2, tf.ViTImageProcessorPil(**_SQUARE), kind="encoder-decoder", single=True),
    Family("CLIP", _clip, _CLIP, kind="dual", single=True),
    Family("SigLIP", _siglip_model, tf.SiglipImageProcessorPil(**_SQUARE), kind="dual", single=True),
    Family("photo-dual-encoder", _photos, _CLIP, kind="dual", single=True),
]

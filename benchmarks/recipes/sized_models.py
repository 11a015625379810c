"""Models by their published configs with random weights: time and memory of a training step need no trained ones.

| name | what |
|---|---|
| `llava-7b` | LLaVA-1.5-7B: CLIP ViT-L/14 at 336 pixels, a Llama of 32 layers |
| `qwen2.5-vl-7b` | Qwen2.5-VL-7B, pictures of 448 x 448 |
| `clip-l-336` | CLIP ViT-L/14-336, against a fixed set of 1,000 texts, as zero-shot classification and TeCoA have it |
| `llava-100m` | LLaVA's proportions for a small machine: the language side costs about 20 times the vision side |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessorPil,
)

from cmai_fast.bridge import bridge_of

MEAN_STD = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@dataclass(frozen=True)
class SizedModel:
    """`config`; `processor` of its images; `batch(count, prompt, answer)` of random pictures and words, in tokens."""

    config: Any
    processor: Any
    batch: Callable[[int, int, int], dict[str, Tensor]]


def llava(vision: dict[str, Any], text: dict[str, Any]) -> SizedModel:
    side, tokens = vision["image_size"], (vision["image_size"] // vision["patch_size"]) ** 2
    image_token = text["vocab_size"] - 64  # 32,000 in LLaVA-1.5
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_index=image_token,
        image_seq_length=tokens,
    )

    def batch(count: int, prompt: int, answer: int) -> dict[str, Tensor]:
        made = _text([image_token] * tokens, image_token, count, prompt, answer)
        return made | {"pixel_values": _pictures(count, side)}

    return SizedModel(config, _square(side), batch)


def qwen2_5_vl(vision: dict[str, Any], text: dict[str, Any], side: int) -> SizedModel:
    patch, merge = vision["patch_size"], 2
    grid, special = side // patch, text["vocab_size"] - 412  # 151,652 and on in the published vocabulary
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        vision_start_token_id=special,
        vision_end_token_id=special + 1,
        image_token_id=special + 3,
        video_token_id=special + 4,
        tie_word_embeddings=False,
    )
    processor = Qwen2VLImageProcessorPil(**MEAN_STD, patch_size=patch, temporal_patch_size=2, merge_size=merge)

    def batch(count: int, prompt: int, answer: int) -> dict[str, Tensor]:
        image = [special, *[special + 3] * (grid // merge) ** 2, special + 1]
        made = _text(image, special, count, prompt, answer)
        patches = torch.rand(count * grid * grid, 3, 1, patch, patch, generator=torch.Generator().manual_seed(0))
        return made | {
            "pixel_values": ((patches - 0.5) / 0.5).expand(-1, -1, 2, -1, -1).flatten(1),
            "image_grid_thw": torch.tensor([[1, grid, grid]] * count),
            "mm_token_type_ids": (made["input_ids"] == special + 3).long(),
        }

    return SizedModel(config, processor, batch)


def clip(vision: dict[str, Any], text: dict[str, Any], width: int) -> SizedModel:
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=width)

    def batch(count: int, prompt: int, answer: int) -> dict[str, Tensor]:  # the texts are read already
        generator = torch.Generator().manual_seed(0)
        return {
            "pixel_values": _pictures(count, vision["image_size"]),
            "text_embeds": torch.randn(1000, width, generator=generator),
            "labels": torch.randint(1000, (count,), generator=generator),
        }

    return SizedModel(config, _square(vision["image_size"]), batch)


def _text(image: list[int], words: int, count: int, prompt: int, answer: int) -> dict[str, Tensor]:
    drawn = torch.randint(3, words, (count, prompt + answer), generator=torch.Generator().manual_seed(0))
    input_ids = torch.cat([torch.tensor([image] * count), drawn], dim=1)
    labels = torch.full_like(input_ids, -100)
    labels[:, -answer:] = input_ids[:, -answer:]
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def _pictures(count: int, side: int) -> Tensor:
    return (torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) - 0.5) / 0.5


def _square(side: int) -> Any:
    return CLIPImageProcessorPil(**MEAN_STD, size={"height": side, "width": side}, do_center_crop=False)


_VIT_L_336 = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
MODELS: dict[str, Callable[[], SizedModel]] = {
    "llava-7b": lambda: llava(
        _VIT_L_336,
        {
            "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096,
        },
    ),
    "qwen2.5-vl-7b": lambda: qwen2_5_vl(
        {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
            "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
        {
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        side=448,
    ),
    "clip-l-336": lambda: clip(
        _VIT_L_336,
        {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "projection_dim": 768,
        },
        width=768,
    ),
    "llava-100m": lambda: llava(
        {
            "hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 6, "num_attention_heads": 5,
            "image_size": 112, "patch_size": 14, "projection_dim": 320,
        },
        {
            "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
            "num_key_value_heads": 12, "vocab_size": 32064, "max_position_embeddings": 1024,
        },
    ),
}  # fmt: skip


def build(
    sized: SizedModel,
    bits: int | None,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "sdpa",
) -> Any:
    """The model with random weights, made a layer at a time where it is to be: no second copy is ever held.

    The language model and the output layer are frozen, in 4 or 8 bits or as they are; of CLIP the text tower is.
    """
    kind = AutoModel if isinstance(sized.config, CLIPConfig) else AutoModelForImageTextToText
    with init_empty_weights(include_buffers=False):  # buffers hold computed values, such as rotary frequencies
        model = kind.from_config(sized.config, dtype=dtype, attn_implementation=attention)
    torch.manual_seed(0)
    bridge = bridge_of(model, empty=True)
    learns = {id(p) for p in bridge.vision_parameters}
    if bits:
        _quantise(bridge.text_model, bits, device, dtype)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.is_meta:
                norm = p.dim() == 1 and name == "weight"
                value = torch.ones if norm else lambda shape, **where: torch.randn(shape, **where) * 0.02
                filled = nn.Parameter(value(p.shape, dtype=dtype, device=device), requires_grad=id(p) in learns)
                setattr(module, name, filled)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    return model


def _quantise(language: nn.Module, bits: int, device: torch.device, dtype: torch.dtype) -> None:
    for name, module in list(language.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(language.get_submodule(parent), leaf, _quantised(module, bits, device, dtype))


def _quantised(module: nn.Linear, bits: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    shape, bias = (module.in_features, module.out_features), module.bias is not None
    layer: Any
    if bits == 4:
        weight = torch.randn(module.weight.shape, dtype=dtype, device=device) * 0.02
        layer = bnb.nn.Linear4bit(*shape, bias=bias, compute_dtype=dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    else:
        # On the CPU: it is quantised on its way from there.
        weight = torch.randn(module.weight.shape, dtype=dtype) * 0.02
        layer = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, threshold=0.0)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if bias:
        layer.bias = nn.Parameter(torch.zeros(shape[1], dtype=dtype), requires_grad=False)
    return layer.to(device)

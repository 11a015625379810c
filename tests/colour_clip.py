"""A small CLIP that reads the colours of easy-VQA's pictures. Fitted once per process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from cmai_fast.data import Sample, load_dataset
from cmai_fast.data.easyvqa import COLORS
from cmai_fast.pipeline import Pipeline

WORDS = ("<pad>", "<s>", "</s>", "<unk>", "a", "shape", *COLORS)


def processor() -> Any:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    size = {"height": 64, "width": 64}
    return tf.CLIPProcessor(
        image_processor=tf.CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tf.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ),
    )


def model() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.CLIPConfig(
        text_config={**sizes, "vocab_size": len(WORDS), "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 64, "patch_size": 16},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.CLIPModel(config).eval()


@cache
def samples() -> list[Sample]:
    """Sixteen pictures whose texts name a colour."""
    data, found = load_dataset("easyvqa", "test"), {}
    for sample in (data[i] for i in range(len(data))):
        if sample.prompt.startswith("what color") and sample.images[0].tobytes() not in found:
            found[sample.images[0].tobytes()] = replace(
                sample,
                prompt="",
                references=(f"a {sample.answer} shape",),
                choices=tuple(f"a {c} shape" for c in COLORS),
            )
        if len(found) == 16:
            return list(found.values())
    raise AssertionError("too few pictures")


@cache
def pipeline() -> Pipeline:
    """Fitted to the samples for a few seconds, so that there is something to break. Leave it as it is."""
    made = Pipeline("clip", model(), processor())
    made.choose_from(samples())
    batch = made.collate(samples())
    optimizer = torch.optim.AdamW(made.model.parameters(), 2e-3, weight_decay=0.0)
    for _ in range(80):
        _, text = made.bridge.inputs(batch)
        loss = made.bridge.losses(made.bridge.encode_image(batch["pixel_values"]), **text)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return made

"""The whole processor of each generative family, built offline: its own class, image processor, and form of a chat.

Those of Qwen-VL, LLaVA-OneVision, SmolVLM and InternVL also want one for videos, which needs torchvision; here an empty
one stands in its place. SmolVLM's wants num2words, for videos too.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any
from unittest import mock

import transformers as tf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers.models.smolvlm import processing_smolvlm
from transformers.processing_utils import ProcessorMixin
from transformers.video_processing_utils import BaseVideoProcessor

from cmai_fast.data import Sample
from families import FAMILIES, VOCABULARY, Family

GENERATIVE = [f for f in FAMILIES if f.kind == "generative"]

# At the places that tests/families.py gives them.
_SPECIAL = (
    "<pad> <s> </s> <unk> <mask> <image> <sep> <video> <boi> <eoi> <fake_token_around_image> <global-img> "
    "<end_of_utterance> <row_1_col_1> <row_1_col_2> <row_2_col_1> <row_2_col_2> <|im_start|> <|im_end|> "
    "<start_of_turn> <end_of_turn>"
).split()
_WORDS = (
    ": ? user assistant model User Assistant USER ASSISTANT Question Answer answer en is the shape a red blue what "
    "color circle there green"
).split()
assert len(_SPECIAL) + len(_WORDS) <= VOCABULARY

SAMPLES = [
    Sample(3, (), "what color is the shape?", ("red",), ("red", "blue", "green")),
    Sample(5, (), "is there a blue circle?", ("blue circle",), ("red", "blue circle")),
    Sample(8, (), "what is there?", ("circle",), ("circle", "shape")),
]


def samples_of(family: Family) -> list[Sample]:
    """Questions of different lengths about pictures of the family's sizes, one each."""
    return [replace(s, images=(own.pictures[0],)) for s, own in zip(SAMPLES, family.samples(), strict=True)]


def tokenizer(start: bool = True, **names: str) -> Any:
    """Words and special tokens, `<s>` before a text if `start`; `names` are what a processor asks its tokenizer for,
    such as `image_token`."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*_SPECIAL, *_WORDS))}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in _SPECIAL])
    if start:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=names, padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def no_videos() -> Any:
    video = object.__new__(BaseVideoProcessor)
    video.num_frames, video.fps = 8, 1
    return video


def chat(user: str, image: str, end: str, model: str, answer: str, start: str = "") -> str:
    """`start`, then each message: what opens it, its images and texts, what ends it; then what opens an answer."""
    return (
        f"{start}{{% for m in messages %}}{{% if m.role == 'user' %}}{user}{{% else %}}{model}{{% endif %}}"
        f"{{% for c in m.content %}}{{% if c.type == 'image' %}}{image}{{% else %}}{{{{ c.text }}}}{{% endif %}}"
        f"{{% endfor %}}{end}{{% endfor %}}{{% if add_generation_prompt %}}{answer}{{% endif %}}"
    ).replace("\n", "{{ '\n' }}")


_VICUNA = chat("USER: ", "<image>\n", " ", "ASSISTANT: ", "ASSISTANT:")
_CHATML = ("<|im_end|>\n", "<|im_start|>assistant\n", "<|im_start|>assistant\n")
_QWEN = chat("<|im_start|>user\n", "<sep><image><sep>", *_CHATML)
_IDEFICS = chat("User:", "<image>", "<end_of_utterance>\n", "Assistant: ", "Assistant:", "<|im_start|>")


@functools.cache
def processor_of(family: Family) -> Any:
    """Shared by all tests: leave it as it is."""
    build = {
        "LLaVA": lambda i: tf.LlavaProcessor(
            i, tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=_VICUNA,
        ),
        "LLaVA-NeXT": lambda i: tf.LlavaNextProcessor(
            i, tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=_VICUNA,
        ),
        # Its own template has a space before the line break of an answer, and none where it asks for one.
        "LLaVA-OneVision": lambda i: tf.LlavaOnevisionProcessor(
            i, tokenizer(), no_videos(), num_image_tokens=16, vision_feature_select_strategy="full",
            chat_template=chat(
                "<|im_start|>user ", "<image>\n", "<|im_end|>", "<|im_start|>assistant \n", "<|im_start|>assistant\n"
            ),
        ),
        **{
            name: lambda i, own=own: own(
                i, tokenizer(image_token="<image>", video_token="<video>"), no_videos(), chat_template=_QWEN
            )
            for name, own in (
                ("Qwen2-VL", tf.Qwen2VLProcessor),
                ("Qwen2.5-VL", tf.Qwen2_5_VLProcessor),
                ("Qwen3-VL", tf.Qwen3VLProcessor),
            )
        },
        "SmolVLM": lambda i: tf.SmolVLMProcessor(i, tokenizer(), no_videos(), image_seq_len=4, chat_template=_IDEFICS),
        "Idefics3": lambda i: tf.Idefics3Processor(i, tokenizer(), image_seq_len=4, chat_template=_IDEFICS),
        "PaliGemma": lambda i: tf.PaliGemmaProcessor(i, tokenizer(start=False)),
        "Gemma 3": lambda i: tf.Gemma3Processor(
            i, tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>"), image_seq_length=4,
            chat_template=chat(
                "<start_of_turn>user\n", "<boi>", "<end_of_turn>\n", "<start_of_turn>model\n", "<start_of_turn>model\n",
                "{{ bos_token }}",
            ),
        ),
        "InternVL": lambda i: tf.InternVLProcessor(
            i,
            tokenizer(
                start_image_token="<boi>", end_image_token="<eoi>", context_image_token="<image>", video_token="<video>"
            ),
            no_videos(), image_seq_length=4, chat_template=chat("<|im_start|>user\n", "<image>\n", *_CHATML),
        ),
        "BLIP-2": lambda i: tf.Blip2Processor(i, tokenizer(), num_query_tokens=4),
        "InstructBLIP": lambda i: tf.InstructBlipProcessor(i, tokenizer(), tokenizer(), num_query_tokens=4),
    }  # fmt: skip
    images = copy.deepcopy(family.processor)
    images.image_seq_length = 16  # what PaliGemma's asks its image processor for
    # It would look for the class of video processors, which is not there without torchvision.
    unchecked = mock.patch.object(ProcessorMixin, "check_argument_for_proper_class")
    with mock.patch.object(processing_smolvlm, "num2words", str), unchecked:
        return build[family.name](images)

"""A random-weight LLaVA, small enough that any test can afford it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cmai_fast.data.easyvqa import COLORS, SHAPES, YES_NO


def pytest_configure(config: pytest.Config) -> None:
    """`pytest -m gpu` runs what needs a GPU; the other tests compare with tensors on the CPU and fork processes, so for
    them there is none."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # pytest's processes share the cores already

IMAGE_SIZE, PATCH_SIZE, WIDTH = 64, 16, 32
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
QUESTION_WORDS = "? : USER ASSISTANT a color contain does image in is not of present shape the there what".split()
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture(autouse=True, scope="module")
def _imported_things_are_no_garbage() -> None:
    """Every training run collects garbage, and Python looks at all that lives for it: at PyTorch, transformers and
    thousands of tests, for most of a second, longer than such a run of ours takes. Frozen, they are not looked at; what
    a test makes is."""
    gc.collect()
    gc.freeze()


def _make_processor() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    words = (*SPECIAL, *sorted({*QUESTION_WORDS, *COLORS, *SHAPES, *YES_NO}))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size=size, crop_size=size, do_center_crop=False, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.25, 0.2]
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            additional_special_tokens=["<image>"],
            padding_side="left",
            model_max_length=128,
            clean_up_tokenization_spaces=False,
        ),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _make_model(processor: Any, seed: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = processor.tokenizer
    layers = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **layers, intermediate_size=2 * WIDTH, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, projection_dim=WIDTH
        ),
        # Not the vision tower's width, so that its output cannot pass for the projector's.
        text_config=LlamaConfig(
            **{**layers, "hidden_size": 2 * WIDTH},
            num_key_value_heads=4,
            vocab_size=-(-len(tokenizer) // 16) * 16,
            intermediate_size=2 * WIDTH,
            max_position_embeddings=128,
            # Ten times the default: a random model's answers then depend on what it sees.
            initializer_range=0.2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def _make_tiny(seed: int = 0) -> tuple[Any, Any]:
    """A new (model, processor): LLaVA, 1 + 1 layers, 64 x 64 images, 16 image tokens, easy-VQA's words."""
    processor = _make_processor()
    return _make_model(processor, seed), processor


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., tuple[Any, Any]]:
    """`make_tiny(seed=0) -> (model, processor)`, for tests that change the model."""
    return _make_tiny


@pytest.fixture(scope="session")
def _tiny() -> tuple[Any, Any]:
    return _make_tiny()


@pytest.fixture(scope="session")
def tiny_model(_tiny: tuple[Any, Any]) -> Any:
    """Shared by all tests: leave it as it is."""
    return _tiny[0]


@pytest.fixture(scope="session")
def tiny_processor(_tiny: tuple[Any, Any]) -> Any:
    """Shared by all tests: leave it as it is."""
    return _tiny[1]

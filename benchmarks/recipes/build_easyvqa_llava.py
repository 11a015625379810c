"""Trains the bundled model `easyvqa-llava` from scratch, for accuracy alone, in the `transformers` layout.

    python benchmarks/recipes/build_easyvqa_llava.py --out cmai_fast/models/easyvqa-llava

Five stages on easy-VQA's `train` split, the first three as LLaVA is trained. The vision tower reads colour and
shape: inside the full model, a from-scratch ViT learns colours at once and stalls on shapes. Projector and language
model learn to answer on the frozen tower: at their learning rate it would forget the shapes again. Everything is
tuned together. Then projector and language model go on, first on all questions, then with 3 in 8 of a batch drawn
from those still answered wrongly: it takes long to see that "is there a green shape?" is about the same green as
"what color is the shape?". Pictures are mirrored and shifted; no smoothing, no noise: nothing makes it tougher or
more fragile.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from rich.progress import track
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from cmai_fast.bridge import Bridge, is_right
from cmai_fast.data import EasyVQA, VQACollator
from cmai_fast.data.easyvqa import COLORS, SHAPES

IMAGE_SIZE = 64
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_processor(patch_size: int) -> LlavaProcessor:
    """A word tokenizer over the training questions, and CLIP's image processing at 64 x 64."""
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    data = EasyVQA("train")
    words = {"USER", "ASSISTANT", ":"}
    for text in set(data.questions) | set(data.answers):
        words.update(piece for piece, _ in split.pre_tokenize_str(text))
    vocab = {word: i for i, word in enumerate((*SPECIAL, *sorted(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=fast,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    processor: LlavaProcessor, width: int, vision_layers: int, text_layers: int
) -> LlavaForConditionalGeneration:
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=processor.patch_size,
        projection_dim=width,
    )
    text = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 16) * 16,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=text_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=processor.image_token_id,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_seq_length=(IMAGE_SIZE // processor.patch_size) ** 2,
        )
    )
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def one_cycle(parameters, steps: int, lr: float):
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)


def augment(pixels: torch.Tensor, shift: int = 4) -> torch.Tensor:
    """Mirrors half of the pictures and shifts the batch by up to `shift` pixels: answers stay true."""
    flip = torch.rand(len(pixels), 1, 1, 1) < 0.5
    pixels = F.pad(torch.where(flip, pixels.flip(-1), pixels), [shift] * 4, mode="replicate")
    top, left = torch.randint(2 * shift + 1, (2,)).tolist()
    return pixels[:, :, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]


def pretrain_vision(model: LlavaForConditionalGeneration, steps: int, lr: float, batch: int = 64) -> None:
    """Stage 1: colour and shape from the mean patch token; the two linear heads are thrown away."""
    tower = model.model.vision_tower
    pixels, colours, shapes = EasyVQA("train").picture_labels()
    heads = nn.Linear(tower.config.hidden_size, len(COLORS) + len(SHAPES))
    optimizer, schedule = one_cycle([*tower.parameters(), *heads.parameters()], steps, lr)
    for step in track(range(steps), "vision tower: colours and shapes"):
        rows = torch.randint(len(pixels), (batch,))
        x = augment(pixels[rows].float() / 127.5 - 1)
        colour, shape = heads(tower(x).last_hidden_state[:, 1:].mean(1)).split((len(COLORS), len(SHAPES)), 1)
        loss = F.cross_entropy(colour, colours[rows], ignore_index=-1) + F.cross_entropy(
            shape, shapes[rows], ignore_index=-1
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"vision {step}: loss {loss.item():.4f}", flush=True)


def train_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    what: str,
    steps: int,
    lr: float,
    batch: int = 64,
    hard: int = 0,
) -> None:
    """Stages 2 to 5: next-token cross-entropy on the answers, over all weights that are not frozen.

    With `hard`, that many samples of each batch are drawn from the training questions that the model answers wrongly,
    found anew every quarter of the steps, as long as there are more than 50.
    """
    data = EasyVQA("train")
    collate = VQACollator(processor)
    optimizer, schedule = one_cycle([p for p in model.parameters() if p.requires_grad], steps, lr)
    wrong = torch.empty(0, dtype=torch.long)
    start = time.time()
    for step in track(range(steps), f"{what}: questions"):
        if hard and step % (steps // 4) == 0:
            wrong = wrong_questions(model, collate, data)
            print(f"{what} {step}: {len(wrong)} of {len(data)} training questions wrong", flush=True)
        rows = torch.randint(len(data), (batch,))
        if hard and len(wrong) > 50:
            rows[:hard] = wrong[torch.randint(len(wrong), (hard,))]
        inputs = collate([data[i] for i in rows.tolist()])
        inputs.pop("sample_ids")
        inputs["pixel_values"] = augment(inputs["pixel_values"])
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"{what} {step}: loss {loss.item():.4f}, {time.time() - start:.0f} s", flush=True)


@torch.no_grad()
def wrong_questions(model: LlavaForConditionalGeneration, collate: VQACollator, data: EasyVQA) -> torch.Tensor:
    """The rows of `data` that the model does not answer word for word."""
    bridge, wrong = Bridge(model), []
    for start in range(0, len(data), 512):
        batch = collate([data[i] for i in range(start, min(start + 512, len(data)))])
        text = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
        right = is_right(*bridge.fuse(bridge.encode_image(batch["pixel_values"]), **text))
        wrong.append(start + torch.nonzero(~right).squeeze(1))
    return torch.cat(wrong)


@torch.no_grad()
def generated_accuracy(folder: Path, batch: int = 256) -> float:
    """Share of all test questions answered word for word, by nothing but `transformers`."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    data, right = EasyVQA("test"), 0
    for start in track(range(0, len(data), batch), "test questions"):
        samples = [data[i] for i in range(start, min(start + batch, len(data)))]
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": s.prompt}]}],
                add_generation_prompt=True,
            )
            for s in samples
        ]
        inputs = processor(images=[s.images[0] for s in samples], text=prompts, padding=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(a.strip() == s.answer for a, s in zip(answers, samples, strict=True))
    return right / len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vision-layers", type=int, default=4)
    parser.add_argument("--text-layers", type=int, default=3)
    parser.add_argument("--vision-steps", type=int, default=3000)
    parser.add_argument("--answer-steps", type=int, default=3500)
    parser.add_argument("--joint-steps", type=int, default=1500)
    parser.add_argument("--joint-lr", type=float, default=2e-4)
    parser.add_argument("--second-steps", type=int, default=2500)
    parser.add_argument("--hard-steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty; name a new folder")
    torch.manual_seed(args.seed)
    start = time.time()
    processor = build_processor(args.patch_size)
    model = build_model(processor, args.width, args.vision_layers, args.text_layers)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    pretrain_vision(model, args.vision_steps, args.lr)
    model.model.vision_tower.requires_grad_(False)
    train_answers(model, processor, "projector and language model", args.answer_steps, args.lr)
    model.requires_grad_(True)
    train_answers(model, processor, "whole model", args.joint_steps, args.joint_lr)
    torch.manual_seed(args.seed + 1)
    model.model.vision_tower.requires_grad_(False)
    train_answers(model, processor, "projector and language model, second cycle", args.second_steps, args.lr)
    torch.manual_seed(args.seed + 2)
    train_answers(model, processor, "hard questions", args.hard_steps, args.lr / 2, hard=24)
    model.requires_grad_(True)
    staging = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    processor.save_pretrained(staging)
    record = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"},
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.time() - start),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "acc_clean": generated_accuracy(staging),
        "questions": len(EasyVQA("test")),
    }
    (staging / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    staging.rename(args.out)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()

"""Trains the bundled model `easyvqa-llava-tasks`: questions, captions and statements about two images, in one model.

    python benchmarks/recipes/build_easyvqa_tasks.py --out cmai_fast/models/easyvqa-llava-tasks

It goes on from `easyvqa-llava`, whose vision tower already reads colours and shapes and stays frozen; the words of the
new prompts join the tokenizer. Projector and language model learn from batches of 56, drawn from the train splits of
`easyvqa` (16), `easyvqa-captions` (8) and `easyvqa-pairs` (32), with the prompts of the tasks, for
accuracy alone. Pictures are mirrored and shifted as there. It is measured by the text that it generates for the test
splits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from build_easyvqa_llava import augment, one_cycle
from rich.progress import track
from tokenizers import Tokenizer
from torch import nn

from cmai_fast.data import VQACollator
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.versions import versions
from cmai_fast.metrics.exact_match import folded
from cmai_fast.models.loading import load_model
from cmai_fast.pipeline import Generation, Pipeline
from cmai_fast.workflows.samples import asked

MIX = {"easyvqa": ("vqa", 16), "easyvqa-captions": ("captioning", 8), "easyvqa-pairs": ("reasoning", 32)}
BATCH = sum(count for _, count in MIX.values())


def with_words(tokenizer, texts: set[str]):
    """Adds the words of these texts to a word tokenizer."""
    backend = tokenizer.backend_tokenizer
    vocabulary = json.loads(backend.to_str())
    words = vocabulary["model"]["vocab"]
    for text in sorted(texts):
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(text):
            words.setdefault(word, max(words.values()) + 1)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(vocabulary))


def accuracy(pipeline: Pipeline, data: str, task: str, limit: int | None = None) -> float:
    """The share of test samples that are answered word for word."""
    samples, right = asked(DataSource(data), "test", task, limit), 0.0
    for start in track(range(0, len(samples), 256), f"{data}, test"):
        rows = samples[start : start + 256]
        right += sum(folded(a) == folded(s.answer) for a, s in zip(pipeline.generate(rows), rows, strict=True))
    return right / len(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty; name a new folder")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = time.time()
    model, processor = load_model("easyvqa-llava")
    parts = {data: asked(DataSource(data), "train", task, None) for data, (task, _) in MIX.items()}
    with_words(processor.tokenizer, {t for part in parts.values() for s in part for t in (s.prompt, *s.references)})
    model.resize_token_embeddings(-(-len(processor.tokenizer) // 16) * 16, mean_resizing=False)
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    collate = VQACollator(processor)
    optimizer, schedule = one_cycle([p for p in model.parameters() if p.requires_grad], args.steps, args.lr)
    for step in track(range(args.steps), "questions, captions, statements"):
        optimizer.zero_grad()
        losses = {}
        for data, (_, count) in MIX.items():  # one after the other, since their prompts differ in length
            rows = torch.randint(len(parts[data]), (count,)).tolist()
            inputs = collate([parts[data][i] for i in rows])
            inputs.pop("sample_ids")
            inputs["pixel_values"] = augment(inputs["pixel_values"])
            loss = model(**inputs).loss
            (loss * count / BATCH).backward()
            losses[data] = round(loss.item(), 4)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"{step}: losses {losses}, {time.time() - start:.0f} s", flush=True)
        if step % 1000 == 999:
            pipeline = Pipeline("tasks", model.eval(), processor, generation=Generation(8))
            print({data: accuracy(pipeline, data, task, 500) for data, (task, _) in MIX.items()}, flush=True)
    model.requires_grad_(True)
    staging = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    processor.save_pretrained(staging)
    seconds = round(time.time() - start)
    pipeline = Pipeline.load(str(staging), generation=Generation(8))
    record = {
        "recipe": "benchmarks/recipes/build_easyvqa_tasks.py",
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "versions": versions(),
        "acc_clean": {data: accuracy(pipeline, data, task) for data, (task, _) in MIX.items()},
    }
    (staging / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    staging.rename(args.out)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()

"""Gives a bundled LLaVA a deeper language side, so that it dominates a step as it does in models of billions.

    python benchmarks/recipes/deepen_language.py --layers 24 --out runs/deep/model
    python benchmarks/recipes/frontier.py time --model runs/deep/model --out benchmarks/results/frontier-deep

Each decoder layer becomes n equal ones that add an n-th of what it added: the residual stream in finer steps (Chang et
al. 2018, multi-level residual networks). Then projector and language model go on learning the answers; the tower stays.
`deepening.json` says what the model reaches, and what is left of it when the new layers are skipped.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from build_easyvqa_llava import train_answers
from full_strength import DATA, TASK
from torch import nn

from cmai_fast.evaluation.results import write_results
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.versions import versions
from cmai_fast.files import write_folder
from cmai_fast.metrics import accuracy
from cmai_fast.pipeline import Pipeline
from cmai_fast.workflows.samples import asked


def deepen(model: nn.Module, layers: int) -> list[int]:
    """Replaces each decoder layer by several that add as much together, `layers` in all; the rows of the new ones.

    Raises:
        ValueError: `layers` is no multiple of those there are, or not more.
    """
    language = model.model.language_model
    old = len(language.layers)
    if layers <= old or layers % old:
        raise ValueError(f"layers is {layers}; expected a multiple of {old}, the layers there are, and more than that")
    many = layers // old
    found = [copy.deepcopy(layer) for layer in language.layers for _ in range(many)]
    for i, layer in enumerate(found):
        scale_output(layer, 1 / many)
        layer.self_attn.layer_idx = i
    language.layers = nn.ModuleList(found)
    for config in (model.config.text_config, language.config):
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[0]] * layers
    return [i for i in range(layers) if i % many]


def scale_output(layer: nn.Module, factor: float) -> None:
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        with torch.no_grad():
            linear.weight.mul_(factor)


def clean_accuracy(subject: Pipeline, limit: int) -> float:
    return accuracy(Runner(subject, asked(DATA, "test", TASK, limit), batch_size=128).clean().right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="easyvqa-llava")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=1000, help="test questions of deepening.json")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} is there; name a new folder")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    subject, start = Pipeline.load(args.model), time.perf_counter()
    subject.heads = subject.verifier = subject.threshold = None
    record = {"settings": {k: v for k, v in vars(args).items() if k not in ("out", "threads")}}
    record["accuracy_before"] = clean_accuracy(subject, args.limit)
    new = deepen(subject.model, args.layers)
    record["accuracy_deepened"] = clean_accuracy(subject, args.limit)
    for name, parameter in subject.model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    train_answers(subject.model.train(), subject.processor, "deeper", args.steps, args.lr)
    subject.model.eval().requires_grad_(False)
    record |= {"accuracy": clean_accuracy(subject, args.limit), "seconds": time.perf_counter() - start}
    write_folder(args.out, lambda d: (subject.model.save_pretrained(d), subject.processor.save_pretrained(d)))
    for i in new:
        scale_output(subject.model.model.language_model.layers[i], 0.0)
    record["accuracy_without_new_layers"] = clean_accuracy(subject, args.limit)
    write_results(record | {"versions": versions()}, args.out / "deepening.json")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()

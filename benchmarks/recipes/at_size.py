"""Time and memory of a training step at size, with random weights: neither needs trained ones.

    python benchmarks/recipes/at_size.py --size 7b --bits 4 --batch 8 --out benchmarks/results/h200/llava-7b.json
    python benchmarks/recipes/at_size.py --size 100m --out benchmarks/results/llava-100m.json      # on a CPU

`7b` is LLaVA-1.5-7B by its published config: CLIP ViT-L/14 at 336 pixels and a Llama of 32 layers. `100m` keeps its
proportions on a small machine: the language side costs about twenty times the vision side. The language model is
frozen, in 4 or 8 bits or as it is; the vision tower and the projector learn. Steps alternate, medians are reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from cmai_fast.evaluation.overhead import CLEAN_STEP
from cmai_fast.evaluation.results import write_results
from cmai_fast.evaluation.versions import versions
from cmai_fast.mbat import MBATConfig, MBATTrainer

IMAGE_TOKEN = 32000
SIZES: dict[str, dict[str, dict[str, int]]] = {
    "7b": {
        "vision": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "image_size": 336, "patch_size": 14, "projection_dim": 768,
        },
        "text": {
            "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096,
        },
    },
    "100m": {
        "vision": {
            "hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 6, "num_attention_heads": 5,
            "image_size": 112, "patch_size": 14, "projection_dim": 320,
        },
        "text": {
            "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
            "num_key_value_heads": 12, "vocab_size": 32064, "max_position_embeddings": 1024,
        },
    },
}  # fmt: skip
STEPS: dict[str, dict[str, Any]] = {
    "clean": CLEAN_STEP,
    "pgd-at": {"inner": "pgd", "lam": 1.0, "beta": 0.0, "gamma": 0.0},
    "mbat-pgd": {"inner": "pgd"},
    "mbat-bridge-r0": {"inner": "bridge", "refreshes": 0},
    "mbat-bridge-r1": {"inner": "bridge", "refreshes": 1},
    "mbat-bridge-r2": {"inner": "bridge", "refreshes": 2},
}


def build(size: str, bits: int | None, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with random weights, made a layer at a time where it is to be: no second copy is ever held."""
    vision, text = SIZES[size]["vision"], SIZES[size]["text"]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).to(dtype)
    torch.manual_seed(0)
    for name, module in list(model.model.language_model.named_modules()):
        if bits and isinstance(module, nn.Linear):
            parent = model.model.language_model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _quantised(module, bits, device, dtype))
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.is_meta:
                filled = torch.ones if p.dim() == 1 and name == "weight" else lambda s, **o: torch.randn(s, **o) * 0.02
                setattr(module, name, nn.Parameter(filled(p.shape, dtype=dtype, device=device)))
    # Buffers (rotary frequencies, positions) hold computed values: a small model on the CPU has the same ones.
    _fill_buffers(model, config, device)
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    return model


def _quantised(module: nn.Linear, bits: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    shape, weight = (module.in_features, module.out_features), torch.randn(module.weight.shape, dtype=dtype) * 0.02
    layer: Any
    if bits == 4:
        layer = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    else:
        layer = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=0.0)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer.to(device)


def _fill_buffers(model: Any, config: LlavaConfig, device: torch.device) -> None:
    shallow = LlavaConfig.from_dict(config.to_dict())
    shallow.vision_config.num_hidden_layers = shallow.text_config.num_hidden_layers = 0
    shallow.text_config.vocab_size = shallow.text_config.intermediate_size = 64
    shallow.image_token_index = 0
    values = dict(LlavaForConditionalGeneration(shallow).named_buffers())
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, values[name].to(device))


def make_batch(size: str, count: int, text_length: int, answer_length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    vision = SIZES[size]["vision"]
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2
    words = torch.randint(3, 32000, (count, text_length + answer_length), generator=generator)
    input_ids = torch.cat([torch.full((count, tokens), IMAGE_TOKEN), words], dim=1)
    labels = torch.full_like(input_ids, -100)
    labels[:, -answer_length:] = input_ids[:, -answer_length:]
    pixels = torch.rand(count, 3, vision["image_size"], vision["image_size"], generator=generator)
    return {
        "pixel_values": (pixels - 0.5) / 0.5,
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
    }


def peak_bytes(device: torch.device, run: Callable[[], None]) -> int:
    """The most memory of the process (CPU: its resident set; GPU: what PyTorch had allocated) during a run."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: sets the record back to the present
    run()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), required=True)
    parser.add_argument("--bits", type=int, choices=(4, 8), help="of the language model's layers; default: as they are")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--inner-steps", type=int, default=10)
    parser.add_argument("--recompute", default="none", help="none, encoder, selective or full")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=sorted(STEPS))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build(args.size, args.bits, device, dtype)
    batch = make_batch(args.size, args.batch, text_length=32, answer_length=8)
    image = SIZES[args.size]["vision"]["image_size"]
    processor = CLIPImageProcessorPil(
        image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": image, "width": image}, do_center_crop=False
    )
    runs: dict[str, Callable[[], None]] = {}
    for name, changes in STEPS.items():
        if args.only and name not in args.only:
            continue
        settings = {
            "inner_steps": args.inner_steps,
            "recompute": args.recompute,
            "bf16": device.type == "cuda",
        } | changes
        config = MBATConfig(output_dir=str(args.out.with_suffix("")), report_to="none", **settings)
        trainer = MBATTrainer(model, config, processing_class=processor)
        trainer.create_optimizer()

        def step(trainer: MBATTrainer = trainer) -> None:
            trainer.training_step(model, dict(batch))
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        runs[name] = step
    memory = {name: peak_bytes(device, run) for name, run in runs.items()}  # warms up too
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(args.rounds), "rounds of all steps"):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(t) for name, t in times.items()}
    record = {
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_a_step": seconds,
        "over_clean": {n: s / seconds["clean"] for n, s in seconds.items()} if "clean" in seconds else None,
        "peak_bytes": memory,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(dtype),
        "versions": versions(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_results(record, args.out)
    for name in runs:
        ratio = f"{record['over_clean'][name]:.2f} of a clean step, " if record["over_clean"] else ""
        print(f"{name:16} {seconds[name]:.3f} s, {ratio}peak {memory[name] / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()

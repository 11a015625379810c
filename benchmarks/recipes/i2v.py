"""How far I2V carries from an image encoder to a video model that is never asked: a small VideoMAE on moving shapes.

    python benchmarks/recipes/i2v.py --out benchmarks/results/i2v.json

Videos are 8 frames of 64 x 64: a bright square or disc on a darker, noisy background, which moves left, right, up or
down; the class is the direction. A VideoMAE of `transformers` learns it from scratch. The image encoders are the vision
tower of `easyvqa-llava`, which has never seen these frames, and a small ViT that learns in which quarter of the frame
the shape is. Compared at each radius: random signs, I2V through either encoder and through both (ENS-I2V), and PGD-20
on the video model itself, which is what an attacker could do with it at hand.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, ViTConfig, ViTForImageClassification

from cmai_fast.attacks.i2v import i2v_frames, layer_features
from cmai_fast.evaluation.versions import versions
from cmai_fast.files import write_text
from cmai_fast.metrics import bootstrap_interval
from cmai_fast.pipeline import Pipeline

SIZE, FRAMES, RADIUS, BATCH = 64, 8, 9, 16
DIRECTIONS = torch.tensor([(-1, 0), (1, 0), (0, -1), (0, 1)])
WIDTHS = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}


def videos(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, T, 3, H, W) in 8-bit levels, directions (N,), and the quarter with the shape in each frame (N, T)."""
    g = torch.Generator().manual_seed(seed)
    direction, shape = torch.randint(4, (count,), generator=g), torch.randint(2, (count,), generator=g)
    speed = 2 + 2 * torch.rand(count, generator=g)
    middle = SIZE / 2 + 12 * (torch.rand(count, 2, generator=g) - 0.5)
    colour = 0.55 + 0.3 * torch.rand(count, 1, 3, 1, 1, generator=g)
    back = 0.15 + 0.3 * torch.rand(count, 1, 3, 1, 1, generator=g)
    clock = torch.arange(FRAMES) - (FRAMES - 1) / 2
    centre = middle[:, None] + (speed[:, None] * clock)[..., None] * DIRECTIONS[direction][:, None]
    grid = torch.arange(SIZE).float()
    x = (grid - centre[..., 0, None])[:, :, None, :]
    y = (grid - centre[..., 1, None])[:, :, :, None]
    disc, square = (x**2 + y**2).sqrt() <= RADIUS, torch.maximum(x.abs(), y.abs()) <= RADIUS * 0.9
    inside = torch.where(shape.view(-1, 1, 1, 1) == 0, square, disc)[:, :, None]
    frames = torch.where(inside, colour, back) + 0.05 * torch.randn(count, FRAMES, 3, SIZE, SIZE, generator=g)
    return (frames.clamp(0, 1) * 255).round() / 255, direction, ((centre > SIZE / 2) * torch.tensor([1, 2])).sum(-1)


def normal(pixels: Tensor) -> Tensor:
    return (pixels - 0.5) / 0.5


def learn(model: nn.Module, steps: int, image: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    model.train()
    for step in range(steps):
        frames, direction, quarter = videos(BATCH, seed=1000 + step)
        inputs, labels = (frames[:, step % FRAMES], quarter[:, step % FRAMES]) if image else (frames, direction)
        loss = F.cross_entropy(model(pixel_values=normal(inputs)).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"{type(model).__name__}: step {step + 1}, loss {loss.item():.3f}", flush=True)
    model.eval()


def pgd(model: nn.Module, frames: Tensor, labels: Tensor, eps: float, steps: int = 20) -> Tensor:
    """On the video model itself."""
    adv = frames.clone()
    for k in range(steps):
        leaf = adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(pixel_values=normal(leaf)).logits, labels), leaf)
        adv = (frames + (adv + 2 * eps * (1 - k / steps) * grad.sign() - frames).clamp(-eps, eps)).clamp(0, 1)
    return adv


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--steps", type=int, default=300, help="of training the video model")
    options.add_argument("--count", type=int, default=64, help="of test videos")
    options.add_argument("--eps", type=int, nargs="+", default=[16], help="of 255")
    chosen = options.parse_args()
    torch.manual_seed(0)
    video = VideoMAEForVideoClassification(
        VideoMAEConfig(image_size=SIZE, patch_size=16, num_frames=FRAMES, tubelet_size=2, num_labels=4, **WIDTHS)
    )
    vit = ViTForImageClassification(ViTConfig(image_size=SIZE, patch_size=16, num_labels=4, **WIDTHS))
    learn(video, chosen.steps, image=False)
    learn(vit, chosen.steps // 2, image=True)
    llava = Pipeline.load("easyvqa-llava")
    tower = llava.model.model.vision_tower
    encoders = {
        "easyvqa-llava's tower": [layer_features(tower, lambda x: tower(llava.space.to_model(x)))],
        "a ViT on these frames": [layer_features(vit, lambda x: vit(pixel_values=normal(x)))],
    }
    encoders["both"] = [one for several in encoders.values() for one in several]
    frames, labels, quarter = videos(chosen.count, seed=0)

    def measured(images: Tensor) -> dict[str, object]:
        with torch.no_grad():
            right = (model_logits(images).argmax(1) == labels).double().numpy()
        return {"accuracy": float(right.mean()), "interval": list(bootstrap_interval(right))}

    def model_logits(images: Tensor) -> Tensor:
        return video(pixel_values=normal((images * 255).round() / 255)).logits

    with torch.no_grad():
        named = float((vit(pixel_values=normal(frames[:, 0])).logits.argmax(1) == quarter[:, 0]).double().mean())
    record: dict[str, object] = {"clean": measured(frames), "accuracy of the ViT": named, "videos": chosen.count}
    signs = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0)).sign()
    for eps in chosen.eps:
        rows = {"random signs": measured((frames + eps / 255 * signs).clamp(0, 1))}
        for name, several in encoders.items():
            start = time.perf_counter()
            adv = i2v_frames(frames, several, eps=eps / 255)
            rows[f"I2V, {name}"] = measured(adv) | {"seconds": round(time.perf_counter() - start, 1)}
            print(eps, name, rows[f"I2V, {name}"], flush=True)
        rows["PGD-20 on the video model"] = measured(pgd(video, frames, labels, eps / 255))
        record[f"{eps}/255"] = rows
        print(json.dumps(rows, indent=1), flush=True)
    write_text(json.dumps(record | {"versions": versions()}, indent=1) + "\n", chosen.out)


if __name__ == "__main__":
    main()

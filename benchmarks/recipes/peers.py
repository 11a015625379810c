"""Attacks of other libraries on the same classifier, with the same budget, in one process.

    pip install torchattacks==3.5.1 --no-deps; pip install foolbox==3.3.4 adversarial-robustness-toolbox==1.20.1
    git clone https://github.com/fra31/auto-attack
    python benchmarks/recipes/peers.py --parts parity strength --autoattack auto-attack --out peers.json

The classifiers are a ViT with random weights, and the bundled models as classifiers: the question "what color is the
shape?", and the logits of the eight colours where the answer begins. A peer that is not installed is left out, and the
output says so; `benchmarks/test_peers.py` times them. AutoAttack is run from its own repository, and is no part of this
one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmai_fast.attacks import ATTACKS, OtherAnswers, Victim
from cmai_fast.bridge.one_image import OneImageBridge
from cmai_fast.data.easyvqa import COLORS, EasyVQA
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.evaluation.suites import suite
from cmai_fast.evaluation.versions import versions
from cmai_fast.files import write_text
from cmai_fast.pipeline import Pipeline
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel

QUESTION = "what color is the shape?"
PEERS = ("torchattacks", "foolbox", "adversarial-robustness-toolbox")
UNIT = PixelSpace([0.0] * 3, [1.0] * 3)


class ClassifierBridge(OneImageBridge):
    """Any classifier of images in [0, 1] as a model under attack: (N, 3, H, W) to logits (N, classes)."""

    image_size = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def _encode(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values).unsqueeze(1)

    def select(self, inputs: Mapping[str, Tensor], rows: Tensor, images_per_row: Any = None) -> dict[str, Tensor]:
        return {k: v[rows] for k, v in inputs.items()}

    def fuse(self, image_features: Tensor, labels: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return image_features, labels[:, None]


class Colours(nn.Module):
    """A generative model as a classifier: one question, the colours' logits where the answer begins."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.model, self.bridge, self.space = pipeline.model, pipeline.bridge, pipeline.space
        sample = next(s for s in EasyVQA("test") if s.prompt == QUESTION)
        closed = [pipeline.collate([_with(sample, colour)]) for colour in COLORS]
        self.text = pipeline.bridge.inputs(closed[0])[1]
        first = [batch["labels"][0][batch["labels"][0] != -100][0] for batch in closed]
        self.tokens = torch.stack(first)
        assert len(set(self.tokens.tolist())) == len(COLORS)

    def forward(self, pixels: Tensor) -> Tensor:
        text = {k: v.expand(len(pixels), -1) for k, v in self.text.items()}
        logits, _ = self.bridge.fuse(self.bridge.encode_image(self.space.to_model(pixels)), **text)
        return logits[:, 0, self.tokens]


def _with(sample: Any, answer: str) -> Any:
    from dataclasses import replace

    return replace(sample, references=(answer,))


def vit(dtype: torch.dtype = torch.float32) -> nn.Module:
    """6 layers, 192 wide, 3 x 64 x 64 pixels in patches of 8, ten classes; random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor) -> Tensor:
            return self.model(pixels).logits

    config = ViTConfig(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768, image_size=64, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    torch.manual_seed(0)
    return Logits(ViTForImageClassification(config)).eval().to(dtype)


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, 64, 64) in [0, 1] and the index of their colour, one per picture of the test split."""
    found: dict[bytes, tuple[Tensor, int]] = {}
    for sample in EasyVQA("test"):
        if sample.prompt == QUESTION and len(found) < count:
            image = torch.tensor(sample.images[0]).permute(2, 0, 1).float() / 255
            found.setdefault(sample.images[0].tobytes(), (image, COLORS.index(sample.answer)))
    return torch.stack([x for x, _ in found.values()]), torch.tensor([y for _, y in found.values()])


def victim_of(model: nn.Module, labels: Tensor, classes: int) -> Victim:
    victim = Victim(ClassifierBridge(model), UNIT, {"labels": labels})  # type: ignore[arg-type]
    victim.others = OtherAnswers.classes(labels, classes)
    return victim


def right(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 64) -> Tensor:
    with torch.no_grad():
        return torch.cat(
            [model(x).argmax(1) == y for x, y in zip(images.split(batch), labels.split(batch), strict=True)]
        )


def robust(model: nn.Module, plan: Sequence[AttackSpec], x: Tensor, y: Tensor, eps: float, batch: int = 64) -> Any:
    """Which of `x` still stand after the attacks, each on those that stand; with passes per image and seconds."""
    standing, classes = right(model, x, y), int(model(x[:1]).shape[1])
    forwards, backwards, start, after = torch.zeros(len(x)), torch.zeros(len(x)), time.perf_counter(), {}
    for spec in plan:
        for rows in torch.nonzero(standing).squeeze(1).split(batch):
            if not len(rows):
                continue
            victim = victim_of(model, y[rows], classes)
            if spec.other is not None:
                with torch.no_grad():
                    leads = victim.others.leads(victim.outputs(victim.encode(x[rows])), None)
                if spec.other >= classes - 1:
                    continue
                victim.others.aim = leads.argsort(1, descending=True)[:, spec.other]
            result = ATTACKS[spec.name](
                victim, x[rows], ThreatModel("linf", eps), steps=spec.steps, restarts=spec.restarts, sample_ids=rows,
                **spec.settings,
            )  # fmt: skip
            assert (result.adv - x[rows]).abs().max() <= eps + 1e-6
            standing[rows] = right(model, result.adv, y[rows])
            forwards[rows] += victim.forwards
            backwards[rows] += victim.backwards
        after[spec.key] = float(standing.float().mean())
    return {
        "robust": after, "final": float(standing.float().mean()), "seconds": time.perf_counter() - start,
        "forward_per_image": float(forwards.mean()), "backward_per_image": float(backwards.mean()),
    }  # fmt: skip


# Parts. Each gives a JSON-ready record.


def parity() -> dict[str, Any]:
    """The largest difference to torchattacks' PGD-10 from the same start, in float32 and float64.

    Attacks compute a patch embedding as a product of matrices, whose rounding may turn the sign of a gradient that is
    nearly 0 in float32: with the model's own convolution the difference is that of the same rounding.
    """
    import torchattacks

    from cmai_fast.attacks import victim as victims

    found: dict[str, Any] = {}
    quick = victims.patches_by_matmul
    for dtype in (torch.float32, torch.float64):
        model, x = vit(dtype), pictures(32)[0].to(dtype)
        y = model(x).argmax(1)
        torch.manual_seed(7)
        theirs = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10)(x, y)
        for way, patched in (("as it runs", quick), ("own convolution", lambda _: contextlib.nullcontext())):
            victim = victim_of(model, y, 10)
            torch.manual_seed(7)  # their own first draw
            victim.origin = (x + torch.empty_like(x).uniform_(-8 / 255, 8 / 255)).clamp(0, 1)
            victims.patches_by_matmul = patched  # type: ignore[assignment]
            try:
                ours = ATTACKS["pgd"](
                    victim, x, ThreatModel("linf", 8 / 255), steps=10, step_size=2 / 255, early_stop=False
                )
            finally:
                victims.patches_by_matmul = quick
            away = (ours.adv - theirs).abs()
            found[f"{dtype}, {way}".removeprefix("torch.")] = {
                "largest difference": float(away.max()), "elements above 1e-6": int((away > 1e-6).sum()),
            }  # fmt: skip
    return {"model": "vit", "images": 32, "eps": "8/255", "alpha": "2/255", "steps": 10, "found": found}


def pgd_of(peer: str, model: nn.Module, x: Tensor, y: Tensor, classes: int) -> Callable[[], Any]:
    """PGD-10 without a random start and without an early stop, 8/255, steps of 2/255."""
    eps, alpha = 8 / 255, 2 / 255
    if peer == "torchattacks":
        import torchattacks

        return lambda: torchattacks.PGD(model, eps=eps, alpha=alpha, steps=10, random_start=False)(x, y)
    if peer == "foolbox":
        import foolbox

        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
        attack = foolbox.attacks.LinfPGD(abs_stepsize=alpha, steps=10, random_start=False)
        return lambda: attack(wrapped, x, y, epsilons=eps)  # as documented, with a verdict of each picture, as ours
    if peer == "adversarial-robustness-toolbox":
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
        from art.estimators.classification import PyTorchClassifier

        classifier = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0, 1), device_type="cpu"
        )
        attack = ProjectedGradientDescentPyTorch(
            classifier, norm="inf", eps=eps, eps_step=alpha, max_iter=10, batch_size=len(x), verbose=False
        )
        images, labels = x.numpy(), y.numpy()
        return lambda: attack.generate(images, labels)
    raise ValueError(f"unknown peer {peer!r}; expected one of {', '.join(PEERS)}")


class AnswerToken(nn.Module):
    """A generative model as a classifier of images in [0, 1] with the texts of a batch: the logits of the vocabulary
    where the answer begins."""

    def __init__(self, pipeline: Pipeline, batch: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.space = pipeline.model, pipeline.space
        self.texts = {k: batch[k] for k in ("input_ids", "attention_mask")}
        at = (batch["labels"] != -100).to(torch.int8).argmax(1)
        self.answers, self.before = batch["labels"].gather(1, at[:, None]).squeeze(1), at - 1

    def forward(self, pixels: Tensor) -> Tensor:
        logits = self.model(pixel_values=self.space.to_model(pixels), **self.texts).logits
        return logits[torch.arange(len(pixels)), self.before]


def plain_step(pipeline: Pipeline, batch: Mapping[str, Tensor], eps: float) -> Callable[[], Any]:
    """A step of adversarial training as one writes it: PGD-10 of torchattacks, the mean of the model's own losses of
    clean and adversarial images, AdamW."""
    import torchattacks

    model, classifier = pipeline.model.train(), AnswerToken(pipeline, batch)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    own = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    images = pipeline.space.to_pixels(batch["pixel_values"])
    attack = torchattacks.PGD(classifier, eps=eps, alpha=eps / 4, steps=10)

    def step() -> None:
        adversarial = pipeline.space.to_model(attack(images, classifier.answers))
        for pixel_values in (batch["pixel_values"], adversarial):
            (model(pixel_values=pixel_values, **own).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def strength(name: str, radius: float, count: int, queries: int, autoattack: Path | None) -> dict[str, Any]:
    """Robust accuracy under our suites, AutoAttack (standard, without a limit of ours), and torchattacks' APGD."""
    (x, y), model = pictures(count), Colours(Pipeline.load(name)).eval()
    for p in model.parameters():
        p.requires_grad_(False)
    record: dict[str, Any] = {
        "images": count, "Square queries": queries, "eps": radius, "clean": float(right(model, x, y).float().mean())
    }  # fmt: skip
    for kind in ("standard", "autoattack"):
        record[kind] = robust(model, [_limited(spec, queries) for spec in suite(kind)], x, y, radius)
        print(name, kind, json.dumps(record[kind]), flush=True)
    if autoattack is not None:
        record["AutoAttack"] = theirs(model, x, y, radius, queries, autoattack)
        print(name, "AutoAttack", json.dumps(record["AutoAttack"]), flush=True)
    for peer in ("torchattacks", "foolbox"):
        if installed(peer):
            record[peer] = _strongest(peer, model, x, y, radius)
            print(name, peer, json.dumps(record[peer]), flush=True)
    return record


def _limited(spec: AttackSpec, queries: int) -> AttackSpec:
    return AttackSpec("square", queries) if spec.name == "square" else spec


def theirs(model: nn.Module, x: Tensor, y: Tensor, eps: float, queries: int, folder: Path) -> dict[str, Any]:
    """AutoAttack, version standard: APGD-CE, targeted APGD-DLR, targeted FAB, Square."""
    sys.path.insert(0, str(folder))
    from autoattack import AutoAttack

    attack = AutoAttack(model, norm="Linf", eps=eps, version="standard", device="cpu", verbose=False, seed=0)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 7
    attack.square.n_queries = queries
    start, standing, after = time.perf_counter(), right(model, x, y), {}
    for name in attack.attacks_to_run:
        rows = torch.nonzero(standing).squeeze(1)
        attack.attacks_to_run = [name]
        adv = attack.run_standard_evaluation(x[rows], y[rows], bs=64)
        standing[rows] = right(model, adv, y[rows])
        after[name] = float(standing.float().mean())
    return {"robust": after, "final": float(standing.float().mean()), "seconds": time.perf_counter() - start}


def _strongest(peer: str, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, Any]:
    start = time.perf_counter()
    if peer == "torchattacks":
        import torchattacks

        name = "APGD-CE-100, then APGD-DLR-100"
        attacks = [torchattacks.APGD(model, eps=eps, steps=100, loss=loss, verbose=False) for loss in ("ce", "dlr")]
        runs = [lambda a, b, attack=attack: attack(a, b) for attack in attacks]
    else:
        import foolbox

        name = "LinfPGD-50, 2 restarts"
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
        attack = foolbox.attacks.LinfPGD(rel_stepsize=0.05, steps=50)
        runs = [lambda a, b: attack.run(wrapped, a, b, epsilon=eps)] * 2
    standing = right(model, x, y)
    torch.manual_seed(0)
    for run in runs:
        for rows in torch.nonzero(standing).squeeze(1).split(64):
            adv = run(x[rows], y[rows])
            assert (adv - x[rows]).abs().max() <= eps + 1e-6
            standing[rows] = right(model, adv, y[rows])
    return {"attack": name, "final": float(standing.float().mean()), "seconds": time.perf_counter() - start}


def installed(peer: str) -> bool:
    try:
        importlib.metadata.version(peer)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("parity", "strength"), required=True)
    parser.add_argument("--autoattack", type=Path, help="a clone of github.com/fra31/auto-attack")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--queries", type=int, default=1000, help="of Square, ours and theirs")
    parser.add_argument("--eps", nargs="+", default=["easyvqa-llava=8/255", "easyvqa-llava-immune=16/255"])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    radii = {name: float(int(top) / 255) for name, top in (e.removesuffix("/255").split("=") for e in given.eps)}
    known = json.loads(given.out.read_text()) if given.out.is_file() else {}
    known["versions"] = versions() | {p: importlib.metadata.version(p) for p in PEERS if installed(p)}
    known["left out"] = [p for p in PEERS if not installed(p)] + ([] if given.autoattack else ["AutoAttack"])
    known["threads"] = 1
    runs: dict[str, Callable[[], dict[str, Any]]] = {"parity": parity} if "parity" in given.parts else {}
    if "strength" in given.parts:
        for name, radius in radii.items():
            runs[f"strength, {name}"] = functools.partial(
                strength, name, radius, given.images, given.queries, given.autoattack
            )
    for part, run in runs.items():
        known[part] = run()
        print(part, json.dumps(known[part], indent=1), flush=True)
        write_text(json.dumps(known, indent=1) + "\n", given.out)


if __name__ == "__main__":
    main()

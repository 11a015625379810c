"""Invented results of an evaluation, for tests of what reads them."""

from __future__ import annotations

import base64
import copy
import io
import itertools
import math
import random
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

EDGES = [i / 20 - 1 for i in range(41)]


@cache
def fake_histogram(mean: float, spread: float, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    values = sorted(min(max(draw.gauss(mean, spread), -0.999), 0.999) for _ in range(1000))
    counts = [sum(low <= value < high for value in values) for low, high in itertools.pairwise(EDGES)]
    quantiles = {str(q): values[int(q * 1000)] for q in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)}
    return {"mean": sum(values) / 1000, "quantiles": quantiles, "histogram": {"edges": EDGES, "counts": counts}}


@cache
def fake_roc(power: float) -> dict[str, list[float]]:
    fpr = [0.0, *[10 ** (-3 + 3 * i / 200) for i in range(201)]]
    return {"fpr": fpr, "tpr": [f**power for f in fpr]}


def fake_model(robust: float, asr: float, clean: float, falls_at: float, detector: float) -> dict[str, Any]:
    levels = [1, 2, 4, 8, 16, 24]
    return {
        "acc_clean": clean,
        "acc_clean_interval": [clean - 0.011, clean + 0.009],
        "acc_robust": robust,
        "acc_robust_interval": [robust - 0.021, robust + 0.024],
        "acc_robust_8bit": robust + 0.002,
        "asr": asr,
        "n": 1000,
        "attacks": {
            "pgd": {
                "acc_robust": robust + 0.004,
                "asr": asr - 0.004,
                "steps": 50,
                "restarts": 2,
                "seconds": 84.2,
                "passes": {"forward": 102000, "backward": 100000},
            },
            "apgd": {
                "acc_robust": robust + 0.001,
                "asr": asr - 0.001,
                "steps": 100,
                "restarts": 1,
                "seconds": 97.5,
                "passes": {"forward": 101000, "backward": 100000},
            },
        },
        "curve": [
            {
                "eps": n / 255,
                "acc_robust": clean / (1 + math.exp((n - falls_at) / 2.1)),
                "score": {"mean": 0.6 - 0.01 * n, "low": 0.4 - 0.01 * n, "high": 0.7 - 0.01 * n},
                "fooled_and_accepted": 0.004 * n,
            }
            for n in levels
        ],
        "s_c": {
            "clean": fake_histogram(0.62, 0.1, 1),
            "adversarial": fake_histogram(0.62 - 0.3 * detector, 0.16, 2),
        },
        "detection": {
            "auroc": 0.5 + 0.45 * detector,
            "tpr_at_1_fpr": 0.31 * detector,
            "tpr_at_5_fpr": 0.58 * detector,
            "roc": fake_roc(1 / (1 + 5 * detector)),
            "threshold": 0.44,
            "clean_rejection_rate": 0.048,
            "acc_robust_with_rejection": min(1.0, robust + 0.3 * detector),
        },
        "sanity": [
            {"check": "robust accuracy falls with eps", "passed": True, "detail": "from 98.1% to 0.0%"},
            {"check": "random noise is weaker than gradients", "passed": True, "detail": "noise leaves 97.9%"},
            {"check": "8-bit rounded inputs give the same verdict", "passed": True, "detail": "2 of 1,000 differ"},
            {"check": "results do not depend on the batch size", "passed": None},
        ],
    }


def fake_png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@cache
def fake_picture(seed: int, against: str, question: str, answer: str, wrong: str) -> dict[str, Any]:
    noise = np.random.default_rng(seed)
    clean = Image.new("RGB", (64, 64), tuple(noise.integers(220, 250, 3).tolist()))
    ImageDraw.Draw(clean).ellipse((14, 20, 42, 48), fill=tuple(noise.integers(0, 200, 3).tolist()))
    delta = 16 * np.sign(noise.normal(size=(64, 64, 3)))
    return {
        "question": question,
        "answer": answer,
        "against": against,
        "amplification": 8,
        "clean_png": fake_png(np.asarray(clean)),
        "perturbation_png": fake_png(128 + 7 * delta),
        "adversarial_png": fake_png(np.asarray(clean) + delta),
        "answers": {
            "undefended": {"clean": answer, "adversarial": wrong},
            "immunised": {"clean": answer, "adversarial": wrong if seed == 5 else answer},
        },
    }


def fake_results() -> dict[str, Any]:
    """Everything the schema knows, all of it invented, of two models. A new one at each call."""
    return copy.deepcopy(_two_models())


@cache
def _two_models() -> dict[str, Any]:
    draw = random.Random(0)
    steps = list(range(10, 2010, 10))
    fall = [math.exp(-step / 500) for step in steps]
    questions = [
        ("what color is the shape?", "red", "brown"),
        ("does the image not contain a rectangle?", "yes", "no"),
        ("what shape is present?", "triangle", "circle"),
    ]
    return {
        "schema": 2,
        "settings": {
            "model": "fake-llava",
            "data": "fakevqa",
            "split": "test",
            "limit": 1000,
            "eps": 16 / 255,
            "norm": "linf",
            "inner": "bridge",
            "refreshes": 0,
            "steps": 10,
            "alpha": 1.0,
            "beta": 0.1,
            "lam": 0.5,
            "gamma": 0.1,
            "learning_rate": 3e-4,
            "batch_size": 64,
            "arm": True,
            "max_steps": 2000,
            "command": "cmai-fast immunize --model fake-llava --data fakevqa --eps 16/255 --out runs/fake",
        },
        "versions": {"cmai_fast": "0.0.0-fake", "torch": "2.13.0", "python": "3.11", "device": "cpu"},
        "seed": 0,
        "sample_ids": list(range(1000)),
        "models": [
            {"name": "undefended", "role": "undefended", **fake_model(0.089, 0.909, 0.986, 9.0, 0.9)},
            {"name": "immunised", "role": "immunised", **fake_model(0.941, 0.041, 0.981, 25.0, 0.35)},
        ],
        "overhead": {
            "time_ratio": 2.41,
            "memory_ratio": 1.12,
            "clean_step_s": 0.118,
            "mbat_step_s": 0.284,
            "protocol": "Batch 64, float32, 2 threads; 30 steps of each kind in turn, medians.",
        },
        "training": {
            "step": steps,
            "loss": [0.2 + 1.9 * f + 0.1 * draw.random() for f in fall],
            "loss_clean": [0.03 + 0.3 * f + 0.05 * draw.random() for f in fall],
            "loss_adv": [0.12 + 1.4 * f + 0.15 * draw.random() for f in fall],
            "loss_contrastive": [0.4 + 2.6 * f + 0.1 * draw.random() for f in fall],
            "s_c_adv": [0.55 - 0.5 * f + 0.05 * draw.random() for f in fall],
            "beta": [min(0.5, 0.1 + 0.05 * (step // 200)) for step in steps],
            "seconds": 431.0,
        },
        "pictures": [
            fake_picture(seed, "undefended" if seed < 3 else "immunised", *questions[seed % 3]) for seed in range(6)
        ],
    }


def fake_results_of(count: int) -> dict[str, Any]:
    """The same of `count` models, three or more: the first defence is the best, every other one a baseline."""
    results = fake_results()
    for i in range(2, count):
        robust = 0.9 - 0.05 * i
        model = fake_model(robust, 1 - robust, 0.98, 25.0 - i, 0.3)
        name, role = f"defence-{i}", "baseline" if i % 2 else "immunised"
        results["models"].append(copy.deepcopy({"name": name, "role": role, **model}))
        for picture in results["pictures"]:
            picture["answers"][name] = {"clean": picture["answer"], "adversarial": "wrong"}
    return results


def models_of(results: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The undefended and the immunised model of `results`."""
    return results["models"][0], results["models"][1]

"""The report on invented results: what it says, what it escapes, and what it does with holes."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cmai_fast.report import render_report, write_report

EDGES = [i / 20 - 1 for i in range(41)]


def fake_histogram(mean: float, spread: float, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    values = sorted(min(max(draw.gauss(mean, spread), -0.999), 0.999) for _ in range(1000))
    counts = [sum(low <= value < high for value in values) for low, high in itertools.pairwise(EDGES)]
    quantiles = {str(q): values[int(q * 1000)] for q in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)}
    return {"mean": sum(values) / 1000, "quantiles": quantiles, "histogram": {"edges": EDGES, "counts": counts}}


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
        "curve": [{"eps": n / 255, "acc_robust": clean / (1 + math.exp((n - falls_at) / 2.1))} for n in levels],
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
        "undefended": {"clean": answer, "adversarial": wrong},
        "immunised": {"clean": answer, "adversarial": wrong if seed == 5 else answer},
    }


def fake_results() -> dict[str, Any]:
    """Everything the schema knows, all of it invented."""
    draw = random.Random(0)
    steps = list(range(10, 2010, 10))
    fall = [math.exp(-step / 500) for step in steps]
    questions = [
        ("what color is the shape?", "red", "brown"),
        ("does the image not contain a rectangle?", "yes", "no"),
        ("what shape is present?", "triangle", "circle"),
    ]
    return {
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
        "undefended": fake_model(0.089, 0.909, 0.986, 9.0, 0.9),
        "immunised": fake_model(0.941, 0.041, 0.981, 25.0, 0.35),
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


def section(page: str, anchor: str) -> str:
    found = re.search(rf'<section id="{anchor}">(.*?)</section>', page, re.DOTALL)
    assert found, f"no section {anchor}"
    return found.group(1)


def element(page: str, tag: str) -> str:
    found = re.search(rf"<{tag}>.*?</{tag}>", page, re.DOTALL)
    assert found, f"no <{tag}>"
    return found.group(0)


def charts(html: str) -> int:
    return html.count('<svg class="chart"')


class Balance(HTMLParser):
    """Fails where tags are not closed in the order they were opened."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing near {self.getpos()}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert not parser.open, f"left open: {parser.open}"
    return parser


def visible(page: str) -> str:
    return " ".join("".join(parsed(page).texts).split())


def test_headline_states_the_finding() -> None:
    page = visible(render_report(fake_results()))
    assert (
        "The worst of PGD-50 (2 restarts) and APGD-CE-100 at 16/255 in L\N{INFINITY} breaks 91% of the right answers "
        "of the undefended model, 4.1% of those of the immunised one." in page
    )
    assert "Attack success falls by 95% relative to undefended." in page
    assert "Clean accuracy goes from 98.6% to 98.1% (\N{MINUS SIGN}0.5 points)" in page
    assert "Before you trust the headline" not in page


def test_numbers_of_the_tables_appear() -> None:
    page = render_report(fake_results())
    table = visible(section(page, "accuracy"))
    for text in ("98.6%", "6.8 to 11.3%", "94.1%", "+85.2 points", "9.1%", "102,000", "1 min 24 s", "1 min 38 s"):
        assert text in table, text
    assert "0.657" in section(page, "detector") and "35.9%" in section(page, "detector")
    assert "2.41\N{MULTIPLICATION SIGN}" in section(page, "overhead")
    settings = visible(section(page, "protocol"))
    for text in ("cmai-fast immunize", "16/255 = 0.0627451", "2.13.0", "1,000, listed in results.json", "right before"):
        assert text in settings, text


def test_one_chart_per_section_that_has_numbers() -> None:
    page = render_report(fake_results())
    found = {name: charts(section(page, name)) for name in ("eps", "consistency", "detector", "training", "overhead")}
    assert found == {"eps": 1, "consistency": 2, "detector": 1, "training": 4, "overhead": 1}
    labels = re.findall(r'<svg class="chart"[^>]*aria-label="([^"]+)"', page)
    assert len(labels) == 9 and all(label.endswith(".") for label in labels)


def test_chart_places_its_points_where_the_numbers_are() -> None:
    results = fake_results()
    results["undefended"] = None
    results["immunised"].update(
        acc_clean=1.0, curve=[{"eps": 8 / 255, "acc_robust": 0.5}, {"eps": 16 / 255, "acc_robust": 0.0}]
    )
    drawn = section(render_report(results), "eps")
    path = re.search(r'<path class="line immunised" d="(M[^"]+)"/>(?!</svg>)<rect', drawn)
    assert path
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, pair.split())) for pair in re.split("[ML]", path.group(1))[1:]]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.15) and x0 < x1
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.15) and y0 < y1  # SVG's y grows downwards


def test_page_is_well_formed_and_asks_the_network_for_nothing() -> None:
    page = render_report(fake_results())
    parsed(page)
    assert not re.search(r"https?://|@import|<link|<iframe|url\(", page)
    sources = re.findall(r"""\b(?:src|href)\s*=\s*["']?([^"'\s>]+)""", page)
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)


def test_all_text_of_the_data_is_escaped() -> None:
    evil = "<script>alert(1)</script>\"'&"

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: poison(v, k) for k, v in value.items()} | (
                {evil: evil} if key in ("settings", "versions") else {}
            )
        if isinstance(value, list):
            return [poison(item) for item in value]
        return evil if isinstance(value, str) and key != "norm" else value

    page = render_report(poison(fake_results()))
    assert "<script>alert" not in page
    assert page.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in section(page, "pictures")
    assert "&lt;script&gt;alert(1)" in section(page, "protocol")
    assert "base64" not in section(page, "pictures")  # what is no PNG is not put into the page
    parsed(page)


def test_answers_are_marked_by_words_and_shape_too() -> None:
    results = fake_results()
    results["pictures"] = results["pictures"][:1]
    drawn = section(render_report(results), "pictures")
    assert drawn.count("\N{CHECK MARK}</i>") == 3 and drawn.count("\N{BALLOT X}</i><u>brown</u>") == 1
    assert drawn.count(", right</span>") == 3 and drawn.count(", wrong</span>") == 1
    assert drawn.count("<img") == 3
    assert "undefended model" in drawn and "The attack was made on the immunised model" not in drawn


def test_a_single_evaluated_model_is_not_called_immunised() -> None:
    results = fake_results()
    results["undefended"] = None
    results["pictures"] = []
    text = visible(element(render_report(results), "main"))
    assert "breaks 4.1% of the right answers of the model." in text
    assert "this model" in text and "change" not in text.split("Attack by attack")[0]
    assert "immunised" not in text and "undefended" not in text


def test_missing_parts_are_said_in_words_and_draw_nothing() -> None:
    results = fake_results()
    for key in ("training", "overhead", "pictures", "sample_ids"):
        results[key] = None
    for model in (results["undefended"], results["immunised"]):
        model.update(dict.fromkeys(("curve", "s_c", "detection", "sanity", "attacks", "acc_robust_8bit", "asr")))
        model.update(dict.fromkeys(("acc_clean_interval", "acc_robust_interval")))
    page = render_report(results)
    parsed(page)
    assert charts(page) == 0
    for name in ("eps", "consistency", "detector", "training", "overhead", "pictures", "sanity"):
        assert 'class="absent"' in section(page, name), name
    assert "leaves a robust accuracy of 8.9% for the undefended model" in page
    assert "not measured" in section(page, "accuracy")
    assert not re.search(r"\b(None|nan|NaN|null)\b", element(page, "main"))


@pytest.mark.parametrize("key", ["sample_ids", "overhead", "training", "pictures"])
def test_any_optional_part_may_be_absent(key: str) -> None:
    results = fake_results()
    del results[key]
    parsed(render_report(results))


@pytest.mark.parametrize(
    "key", [key for key in fake_model(0.1, 0.9, 0.98, 9, 1) if key not in ("acc_clean", "acc_robust", "n")]
)
def test_any_optional_part_of_one_model_may_be_absent(key: str) -> None:
    for model in ("undefended", "immunised"):
        results = fake_results()
        del results[model][key]
        parsed(render_report(results))


def test_holes_in_the_training_log_break_the_line() -> None:
    results = fake_results()
    results["training"] = {"step": [1, 2, 3, 4, 5], "loss_adv": [1.0, 0.8, None, 0.5, 0.4], "beta": [None] * 5}
    drawn = section(render_report(results), "training")
    assert charts(drawn) == 1 and drawn.count("Not recorded in this run.") == 3
    assert re.search(r'class="line immunised" d="M[^M]+M[^M]+"', drawn)


def test_caveats_stand_at_the_top() -> None:
    results = fake_results()
    results["undefended"]["n"] = results["immunised"]["n"] = 200
    results["immunised"]["sanity"][1]["passed"] = False
    results["immunised"].update(acc_clean=0.95, acc_robust_interval=[0.1, 0.3])
    text = visible(element(render_report(results), "header"))
    for caveat in (
        "Only 200 samples; a headline needs 500 or more.",
        "1 of 4 sanity checks failed for the immunised model: random noise is weaker than gradients.",
        "The intervals of the two robust accuracies overlap",
        "The immunised model lost 3.6 points of clean accuracy.",
    ):
        assert caveat in text, caveat


def test_different_attacks_are_told_unless_the_immunised_model_faced_transferred_images_more() -> None:
    results, caveat = fake_results(), "The two models were not given the same attacks."
    attacks = results["immunised"]["attacks"]
    attacks.setdefault("transfer", {"acc_robust": 0.9, "asr": 0.05})
    results["undefended"]["attacks"].pop("transfer", None)
    assert caveat not in visible(element(render_report(results), "header"))
    attacks.pop(next(key for key in attacks if key != "transfer"))
    assert caveat in visible(element(render_report(results), "header"))


def test_no_gain_is_called_no_gain() -> None:
    results = fake_results()
    results["immunised"]["asr"] = 0.95
    assert "Immunisation did not help against this attack." in render_report(results)
    results["undefended"]["asr"] = 0.0
    assert "There was nothing to gain" in render_report(results)


def test_l2_eps_is_not_written_in_255ths() -> None:
    results = fake_results()
    results["settings"].update(norm="l2", eps=1.5)
    for model in (results["undefended"], results["immunised"]):
        model["curve"] = [{"eps": 0.5, "acc_robust": 0.9}, {"eps": 1.5, "acc_robust": 0.4}]
    page = render_report(results)
    assert "at 1.5 in L2" in page and "/255" not in section(page, "eps") and "L2 distance" in section(page, "eps")


def test_results_from_memory_and_from_the_file_give_the_same_page() -> None:
    read, made = fake_results(), fake_results()
    read["immunised"]["asr"] = None
    made["immunised"]["asr"] = float("nan")
    made["undefended"]["acc_clean_interval"] = np.array(made["undefended"]["acc_clean_interval"])
    made["immunised"]["sanity"][0]["passed"] = np.bool_(True)
    assert render_report(made) == render_report(read)


def test_incomplete_results_are_refused_by_name() -> None:
    results = fake_results()
    del results["versions"], results["immunised"]["acc_robust"]
    with pytest.raises(ValueError, match=r"versions is missing.*immunised\.acc_robust is missing"):
        render_report(results)


def test_write_report_replaces_the_old_file_and_returns_its_path(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    assert write_report(fake_results(), path) == path
    first = path.read_text(encoding="utf-8")
    assert first == render_report(
        json.loads(json.dumps(fake_results()))
    )  # nothing of the page depends on time or order
    results = fake_results()
    results["seed"] = 7
    write_report(results, path)
    assert path.read_text(encoding="utf-8") != first
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]

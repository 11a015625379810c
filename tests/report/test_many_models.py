"""The report on three, twelve and twenty models."""

from __future__ import annotations

import re

import pytest

from cmai_fast.report import render_report
from cmai_fast.report.findings import caveats, consequence, finding
from cmai_fast.report.models import shown
from html_pages import charts, element, parsed, section, visible
from invented_results import fake_results, fake_results_of


def leaderboard(page: str) -> list[str]:
    rows = re.search(r'<div class="card leaderboard">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    assert rows
    return [visible(row) for row in re.findall(r"<tr>.*?</tr>", rows.group(1), re.DOTALL)]


@pytest.mark.parametrize("count", [3, 12])
def test_every_model_stands_in_every_section(count: int) -> None:
    results = fake_results_of(count)
    page = render_report(results)
    parsed(page)
    for anchor in ("accuracy", "eps", "consistency", "detector", "pictures", "sanity", "protocol"):
        text = visible(section(page, anchor))
        for name in (model["name"] for model in results["models"]):
            assert name in text, (name, anchor)
    assert charts(section(page, "eps")) == charts(section(page, "detector")) == 1
    assert charts(section(page, "consistency")) == 2 * count
    assert f"{count} models on fakevqa" in visible(element(page, "header"))


def test_leaderboard_has_a_row_per_model_the_most_robust_first() -> None:
    results = fake_results_of(4)
    results["models"][2]["attacks"]["pgd"]["acc_robust"] = 0.0
    results["models"][3]["acc_robust_interval"] = None
    assert leaderboard(render_report(results)) == [
        "immunised immunised 98.1% 94.1% 92.0 to 96.5% 4.1% 94.3% APGD-CE-100",
        "defence-2 immunised 98.0% 80.0% 77.9 to 82.4% 20.0% 80.2% PGD-50 (2 restarts)",
        "defence-3 baseline 98.0% 75.0% 25.0% 75.2% APGD-CE-100",
        "undefended undefended 98.6% 8.9% 6.8 to 11.3% 90.9% 9.1% APGD-CE-100",
    ]


def test_headline_compares_the_best_defended_with_the_undefended_model() -> None:
    results = fake_results_of(12)
    assert finding(results) == (
        "The worst of PGD-50 (2 restarts) and APGD-CE-100 at 16/255 in L\N{INFINITY} breaks 91% of the right answers "
        "of the undefended model, 4.1% of those of the immunised one, the best of 11 defended models."
    )
    results["models"][0]["name"], results["models"][1]["name"] = "llava", "llava-mbat"
    assert "of llava (undefended), 4.1% of those of llava-mbat (immunised), the best of 11" in finding(results)
    assert "relative to llava." in consequence(results)


def test_a_baseline_that_wins_is_said_to_win() -> None:
    results = fake_results_of(4)
    results["models"][3].update(acc_robust=0.96, asr=0.02)
    assert "2.0% of those of defence-3 (baseline), the best of 3 defended models." in finding(results)
    assert (
        "The best immunised model, immunised, stays behind this baseline: robust accuracy 94.1% against 96.0%."
        in consequence(results)
    )


def test_of_several_undefended_models_the_strongest_is_compared_with() -> None:
    results = fake_results_of(3)
    results["models"][2].update(role="undefended", name="bigger", asr=0.5, acc_robust=0.5)
    assert "breaks 50% of the right answers of bigger (undefended), 4.1% of those of the immunised" in finding(results)
    assert "the best of" not in finding(results)


@pytest.mark.parametrize("role", ["undefended", "baseline"])
def test_models_of_one_kind_are_compared_least_with_most_robust(role: str) -> None:
    results = fake_results_of(3)
    for i, model in enumerate(results["models"]):
        model.update(role=role, name="abc"[i])
    assert f"91% of the right answers of a ({role}), 4.1% of those of b ({role}), the best of 3 mod" in finding(results)
    assert "falls by" not in consequence(results) and "Clean accuracy differs: 98.6% and 98.1%" in consequence(results)


def test_caveats_name_models_that_differ_and_rivals_too_close_to_order() -> None:
    results = fake_results_of(4)
    assert caveats(results) == []
    results["models"][2].update(acc_robust_interval=[0.9, 0.95], n=400, sanity=None)
    results["models"][3].update(sanity=[])
    results["models"][3]["attacks"].pop("pgd")
    assert caveats(results) == [
        "No sanity checks were run for defence-2 and defence-3.",
        "Only 400 samples; a headline needs 500 or more.",
        "The models were measured on different numbers of samples, 400 to 1,000.",
        "The intervals of robust accuracy of the immunised model and defence-2, the next, overlap: their order may be "
        "chance.",
        "The models were not given the same attacks.",
    ]


def test_looks_are_distinct_and_the_same_on_every_page() -> None:
    models = shown(fake_results_of(37))
    assert len({(model.look.split()[0], model.marker) for model in models}) == 37
    assert models[0].look == "hue0 dashed" and models[1].look == "hue1 solid" and models[3].look.endswith("dotted")
    two = shown(fake_results())
    assert [m.look for m in two] == [m.look for m in models[:2]] and [m.marker for m in two] == ["circle", "square"]


def test_failed_checks_of_many_models_are_named_with_their_model() -> None:
    results = fake_results_of(12)
    results["models"][7]["sanity"][1].update(passed=False, detail="noise leaves 1.0%")
    page = render_report(results)
    assert "1 of 4 sanity checks failed for defence-7: random noise" in visible(element(page, "header"))
    counted = section(page, "sanity").split("<details>")[0]
    assert "random noise is weaker than gradients 11 \N{BALLOT X} defence-7 noise leaves 1.0% 0" in visible(counted)


def test_many_lines_get_a_legend_and_a_few_their_names_at_their_ends() -> None:
    assert '<ul class="legend">' not in section(render_report(fake_results()), "eps")
    assert section(render_report(fake_results_of(12)), "eps").count('class="key"') == 24  # legend and table
    results = fake_results_of(3)
    results["models"][1]["name"] = "a name that would leave no room for the lines themselves"
    assert '<ul class="legend">' in section(render_report(results), "eps")


def test_twenty_models_are_drawn() -> None:
    parsed(render_report(fake_results_of(20)))

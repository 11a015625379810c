"""The report on invented results: what it says, what it escapes, and what it does with holes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from cmai_fast.report import render_report, write_report
from html_pages import charts, element, parsed, section, visible
from invented_results import fake_model, fake_results, fake_roc, models_of


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
    assert found == {"eps": 1, "consistency": 4, "detector": 1, "training": 4, "overhead": 1}
    labels = re.findall(r'<svg class="chart"[^>]*aria-label="([^"]+)"', page)
    assert len(labels) == 11 and all(label.endswith(".") for label in labels)


def test_chart_places_its_points_where_the_numbers_are() -> None:
    results = fake_results()
    results["models"] = [{**results["models"][1], "name": "fake-llava"}]
    results["models"][0].update(
        acc_clean=1.0, curve=[{"eps": 8 / 255, "acc_robust": 0.5}, {"eps": 16 / 255, "acc_robust": 0.0}]
    )
    drawn = section(render_report(results), "eps")
    path = re.search(r'<path class="line hue1 solid" d="(M[^"]+)"/>(?!</svg>)<rect', drawn)
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


def test_answers_are_marked_by_words_and_shape_too() -> None:
    results = fake_results()
    results["pictures"] = results["pictures"][:1]
    drawn = section(render_report(results), "pictures")
    assert drawn.count("&#10003;</i>") == 3 and drawn.count("&#10007;</i><bdi><u>brown</u></bdi>") == 1
    assert drawn.count(", right</span>") == 3 and drawn.count(", wrong</span>") == 1
    assert drawn.count("<img") == 3
    assert "undefended model" in drawn and "The attack was made on the immunised model" not in drawn


def test_a_single_evaluated_model_is_not_called_immunised() -> None:
    results = fake_results()
    results["models"] = [{**results["models"][1], "name": "fake-llava"}]
    results["pictures"] = []
    text = visible(element(render_report(results), "main"))
    assert "breaks 4.1% of the right answers of fake-llava." in text
    assert "fake-llava94.1%" in text and "change" not in text.split("Attack by attack")[0]
    assert "immunised" not in text and "undefended" not in text


def test_sections_with_nothing_to_show_are_left_out_of_page_and_navigation() -> None:
    results = fake_results()
    for key in ("training", "overhead", "pictures", "sample_ids"):
        results[key] = None
    for model in models_of(results):
        model.update(dict.fromkeys(("curve", "s_c", "detection", "sanity", "attacks", "acc_robust_8bit", "asr")))
        model.update(dict.fromkeys(("acc_clean_interval", "acc_robust_interval")))
    page = render_report(results)
    parsed(page)
    assert charts(page) == 0
    assert re.findall(r'<section id="(\w+)"', page) == ["accuracy", "sanity", "protocol"]
    assert re.findall(r'<a href="#(\w+)"', page) == ["accuracy", "sanity", "protocol"]
    assert 'class="absent"' in section(page, "sanity")  # that nothing was checked is worth knowing
    assert "leaves a robust accuracy of 8.9% for the undefended model" in page
    assert "not measured" not in page and "Robust accuracy, 8-bit" not in page
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
    for i in range(2):
        results = fake_results()
        del results["models"][i][key]
        parsed(render_report(results))


def test_holes_in_the_training_log_break_the_line() -> None:
    results = fake_results()
    results["training"] = {"step": [1, 2, 3, 4, 5], "loss_adv": [1.0, 0.8, None, 0.5, 0.4], "beta": [None] * 5}
    drawn = section(render_report(results), "training")
    assert charts(drawn) == 1 and "beta" not in drawn and "Not recorded" not in drawn
    assert re.search(r'class="line hue1 solid" d="M[^M]+M[^M]+"', drawn)


def test_what_arm_moved_is_drawn_and_what_it_left_is_not() -> None:
    results, steps = fake_results(), list(range(1, 6))
    rest = {"step": steps, "s_c_adv": [0.1] * 5, "beta": [0.1] * 5, "eps": [16 / 255] * 5, "lam": [0.5] * 5}
    results["training"] = rest
    drawn = section(render_report(results), "training")
    assert charts(drawn) == 1 and "ARM:" not in drawn
    results["training"] = rest | {
        "eps": [16 / 255, 16 / 255, 0.07, 20 / 255, 20 / 255],
        "tau_train": [None, *[0.2] * 4],
    }
    drawn = section(render_report(results), "training")
    assert charts(drawn) == 2 and "ARM: radius of the attack" in drawn
    assert "eps ends at 20.000" in drawn and "eps (n/255" in drawn and "threshold ends at 0.200" in drawn


def test_caveats_stand_at_the_top() -> None:
    results = fake_results()
    models_of(results)[0]["n"] = models_of(results)[1]["n"] = 200
    models_of(results)[1]["sanity"][1]["passed"] = False
    models_of(results)[1].update(acc_clean=0.95, acc_robust_interval=[0.1, 0.3])
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
    attacks = models_of(results)[1]["attacks"]
    attacks.setdefault("transfer", {"acc_robust": 0.9, "asr": 0.05})
    models_of(results)[0]["attacks"].pop("transfer", None)
    assert caveat not in visible(element(render_report(results), "header"))
    attacks.pop(next(key for key in attacks if key != "transfer"))
    assert caveat in visible(element(render_report(results), "header"))


def test_no_gain_is_called_no_gain() -> None:
    results = fake_results()
    models_of(results)[1]["asr"] = 0.95
    assert "Immunisation did not help against this attack." in render_report(results)
    models_of(results)[0]["asr"] = 0.0
    assert "There was nothing to gain" in render_report(results)


def test_l2_eps_is_not_written_in_255ths() -> None:
    results = fake_results()
    results["settings"].update(norm="l2", eps=1.5)
    for model in models_of(results):
        model["curve"] = [{"eps": 0.5, "acc_robust": 0.9}, {"eps": 1.5, "acc_robust": 0.4}]
    page = render_report(results)
    assert "at 1.5 in L2" in page and "/255" not in section(page, "eps") and "L2 distance" in section(page, "eps")


def test_results_from_memory_and_from_the_file_give_the_same_page() -> None:
    read, made = fake_results(), fake_results()
    models_of(read)[1]["asr"] = None
    models_of(made)[1]["asr"] = float("nan")
    models_of(made)[0]["acc_clean_interval"] = np.array(models_of(made)[0]["acc_clean_interval"])
    models_of(made)[1]["sanity"][0]["passed"] = np.bool_(True)
    assert render_report(made) == render_report(read)


def test_incomplete_results_are_refused_by_name() -> None:
    results = fake_results()
    del results["versions"], models_of(results)[1]["acc_robust"]
    with pytest.raises(ValueError, match=r"versions is missing.*models\[1\]\.acc_robust is missing"):
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


def test_bad_gradients_stand_in_the_attack_table_only_where_there_are_any() -> None:
    results = fake_results()
    for model in models_of(results):
        for attack in model["attacks"].values():
            attack.update(nonfinite_gradients=0, zero_gradients=0)
    assert "gradients" not in visible(section(render_report(results), "accuracy"))
    models_of(results)[1]["attacks"]["apgd"]["zero_gradients"] = 1234
    text = visible(section(render_report(results), "accuracy"))
    assert "ASR zero gradients passes" in text and "1,234" in text and "only hide its gradients" in text
    assert "non-finite" not in text
    models_of(results)[0]["attacks"]["pgd"]["nonfinite_gradients"] = 56
    assert "non-finite gradients zero gradients" in visible(section(render_report(results), "accuracy"))


def test_what_could_not_be_measured_is_a_dash_and_what_was_not_is_said() -> None:
    results = fake_results()
    models_of(results)[1]["attacks"]["transfer"] = {"acc_robust": 0.98, "asr": 0.01, "seconds": 2.0}
    drawn = section(render_report(results), "accuracy")
    assert "transfer \N{EN DASH} \N{EN DASH} 98.0% 1.0% \N{EN DASH} \N{EN DASH} 2.0 s" in visible(drawn)
    assert "not measured" not in drawn
    models_of(results)[1]["attacks"]["transfer"]["strict"] = {"attacked": 40, "broken": 3, "asr": 0.075}
    strict = visible(section(render_report(results), "accuracy"))
    dashes = " \N{EN DASH}" * 3
    assert f"transfer, only what broke its source{dashes} 7.5%{dashes}" in strict and "not measured" not in strict
    del models_of(results)[1]["attacks"]["transfer"]["seconds"], models_of(results)[1]["acc_robust_8bit"]
    assert visible(section(render_report(results), "accuracy")).count("not measured") == 3  # time, 8-bit and its change


def test_an_attack_success_over_no_right_answer_is_not_defined() -> None:
    results = fake_results()
    models_of(results)[0].update(acc_clean=0.0, acc_robust=0.0, asr=None)
    assert "not defined" in section(render_report(results), "accuracy")


def test_detector_without_threshold_shows_no_row_about_rejection() -> None:
    results = fake_results()
    for model in models_of(results):
        for key in ("threshold", "clean_rejection_rate", "acc_robust_with_rejection"):
            del model["detection"][key]
    text = visible(section(render_report(results), "detector"))
    assert "AUROC" in text and "with rejection" not in text and "eps/2" not in text and "not measured" not in text


def test_the_score_over_eps_is_drawn_with_the_threshold_and_what_passes_it() -> None:
    results = fake_results()
    page = render_report(results)
    assert page.count("Score of attacked inputs over eps for") == 2
    assert "Answered wrongly and accepted: 0.4% at 1, " in page
    for model in models_of(results):
        for point in model["curve"]:
            point["score"], point["fooled_and_accepted"] = {"mean": None, "low": 0.1, "high": "x"}, None
    assert "Score over eps" not in render_report(results)


def test_the_adaptive_attack_has_a_curve_of_its_own() -> None:
    results = fake_results()
    model = models_of(results)[1]
    model["attacks"]["adaptive-100x3"] = {"name": "adaptive", "acc_robust": 0.5, "asr": 0.4}
    found = {"n": 40, "auroc": 0.777, "tpr_at_1_fpr": 0.2, "tpr_at_5_fpr": 0.4, "roc": fake_roc(0.4)}
    model["detection"]["successful"] = {"pgd": found | {"auroc": 0.999}, "adaptive-100x3": found}
    drawn = section(render_report(results), "detector")
    assert 'adaptive" d="M' in drawn and "successful adaptive-100x3, AUROC 0.777" in visible(drawn)
    assert "Successful adaptive attacks: AUROC" in visible(drawn) and "0.999" not in visible(drawn)
    plain = section(render_report(fake_results()), "detector")
    assert 'adaptive" d="M' not in plain and "adaptive attacks" not in visible(plain)


def test_what_the_guard_makes_of_a_picture_is_said() -> None:
    results = fake_results()
    pictures = results["pictures"]
    pictures[0]["accepted"], pictures[1]["accepted"] = True, False
    text = visible(section(render_report(results), "pictures"))
    assert text.count("its guard accepts the attacked answer") == 1 == text.count("its guard rejects the attacked")


def test_metrics_of_the_task_and_the_task_are_shown() -> None:
    results = fake_results()
    models_of(results)[1].update(
        task="captioning", metrics={"clean": {"cider": 1.234}, "robust": {"cider": 0.567, "bleu": 0.25}}
    )
    page = render_report(results)
    text = visible(section(page, "accuracy"))
    assert "cider, clean 1.234 cider, attacked 0.567 bleu, attacked 0.250" in text, "in the order of the record"
    assert "task captioning" in visible(section(page, "protocol"))


def test_the_label_of_an_attack_is_the_one_recorded_with_it() -> None:
    results = fake_results()
    models_of(results)[1]["attacks"]["made-up-7"] = {
        "name": "made-up",
        "label": "MadeUp",
        "steps": 7,
        "acc_robust": 0.1,
    }
    text = visible(render_report(results))
    assert "MadeUp-7 7" in text and "PGD-50 (2 restarts), APGD-CE-100 and MadeUp-7 at 16/255" in text


def test_two_models_need_no_leaderboard_and_are_put_in_the_order_of_the_change() -> None:
    results = fake_results()
    results["models"].reverse()  # the undefended model last
    page = render_report(results)
    assert "Leaderboard" not in page
    head = re.search(r"<thead>.*?</thead>", section(page, "accuracy"), re.DOTALL)
    assert head and visible(head.group(0)) == "undefended immunised change"
    assert "+85.2 points" in section(page, "accuracy")
    assert "undefended model, 4.1% of those" in page


def test_roles_stand_under_names_that_do_not_say_them() -> None:
    results = fake_results()
    results["models"][0]["name"], results["models"][1]["name"] = "llava", "llava-mbat"
    head = re.search(r"<thead>.*?</thead>", section(render_report(results), "accuracy"), re.DOTALL)
    assert head and visible(head.group(0)) == "llava undefended llava-mbat immunised change"
    results["models"].pop()
    assert "undefended" not in section(render_report(results), "accuracy")  # nothing to tell it from


def test_text_that_no_utf8_file_can_hold_is_replaced(tmp_path: Path) -> None:
    results = fake_results()
    results["pictures"][0]["question"] = json.loads('"half a pair: \\ud800"')
    assert "half a pair: ?" in write_report(results, tmp_path / "r.html").read_text(encoding="utf-8")

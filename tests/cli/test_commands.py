"""How each command reads its options, and what it hands on to the workflow behind it."""

from __future__ import annotations

import functools
import json
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image
from transformers import CLIPConfig

import official_files as official
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.results import write_results
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.models import resolve
from cmai_fast.threat import Surface, ThreatModel
from cmai_fast.workflows import plan as plan_workflow
from cmai_fast.workflows.settings import ImmunizeSettings

COMMANDS = ("demo", "immunize", "attack", "transfer", "evaluate", "calibrate", "guard", "report", "info", "plan")
ATTACKED = {"n": 9, "acc_clean": 1.0, "acc_robust": 0.25, "asr": 0.75, "asr_target": 0.625}
MOVED = {"attacked": 8, "broken": 2, "asr": 0.25}
TRANSFERRED = {
    "source": {"model": "a"}, "n": 9, "acc_clean": 8 / 9, "transfer": MOVED,
    "strict": {"attacked": 4, "broken": 2, "asr": 0.5},
}  # fmt: skip
MODEL = "easyvqa-llava"


@pytest.fixture
def mine(tmp_path):
    """A user's own file of records: enough for all splits."""
    rows = []
    for i in range(12):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"id": f"q{i}", "image": f"{i}.png", "text": "what?", "answer": "red"}))
    (tmp_path / "my.jsonl").write_text("\n".join(rows))
    return "my.jsonl"


def example(command):
    return import_module(f"cmai_fast.cli.{command}").EXAMPLE


@functools.cache
def planned():
    return plan_workflow.plan(plan_workflow.PlanSettings(MODEL, "a100", inner_steps=3, bits=4, price=2.0, gpus=2))


def as_one_line(text):
    return " ".join(text.split())


def test_immunize_hands_on_every_option(run, replace_workflow, results, mine):
    called = replace_workflow("immunize", results)
    typed = (
        "immunize --model easyvqa-llava-immune --data my.jsonl --map question=text --split-seed 3 --task vqa "
        "--defence mbat --max-new-tokens 5 "
        "--eps 4/255 --norm l2 --inner pgd --steps 7 --refreshes 2 --alpha 0.5 --beta 0.2 "
        "--lam 0.3 --gamma 0.4 --arm --tau-train 0.15 --variance-max 0.2 --beta-max 0.8 --beta-step 0.1 "
        "--eps-max 16/255 --eps-step 1/255 --lam-max 0.7 --lam-step 0.05 "
        "--trainable vision --max-steps 11 --batch-size 12 --learning-rate 1e-5 --muon "
        "--eps-warmup 0.6 --save-steps 13 --attack-steps 14 --restarts 3 --limit 15 --seed 16 --out 'a b' --resume "
        "--no-progress --device cuda:1 --dtype bfloat16 --attention sdpa"
    )
    done = run(*shlex.split(typed))
    assert done.exit_code == 0, done.output
    assert called.args == (
        ImmunizeSettings(
            model="easyvqa-llava-immune", data=mine, fields={"question": "text"}, split_seed=3, task="vqa",
            defence="mbat", max_new_tokens=5, eps=4 / 255, norm="l2", inner="pgd", inner_steps=7, refreshes=2,
            alpha=0.5, beta=0.2, lam=0.3, gamma=0.4, arm=True, tau_train=0.15, variance_max=0.2,
            beta_max=0.8, beta_step=0.1, eps_max=16 / 255, eps_step=1 / 255, lam_max=0.7, lam_step=0.05,
            trainable="vision", max_steps=11, batch_size=12, learning_rate=1e-5, muon=True,
            eps_warmup=0.6, save_steps=13, attack_steps=14, restarts=3, limit=15, seed=16,
            device="cuda:1", dtype="bfloat16", attention="sdpa", command=f"cmai-fast {typed}",
        ),
        Path("a b"),
    )  # fmt: skip
    assert called.kwargs == {"resume": True, "progress": False}


def test_immunize_names_a_bound_of_eps_that_is_no_radius(run, replace_workflow, results):
    replace_workflow("immunize", results)
    done = run("immunize", "--out", "x", "--eps-max", "12")
    assert done.exit_code != 0 and "--eps-max is 12; " in as_one_line(done.output)


def test_immunize_shows_the_defaults_that_the_library_has(run, replace_workflow, results):
    called = replace_workflow("immunize", results)
    assert run("immunize", "--out", "x").exit_code == 0
    assert called.args == (ImmunizeSettings(command="cmai-fast immunize --out x"), Path("x"))
    assert called.kwargs == {"resume": False, "progress": True}


def test_immunize_ends_with_the_numbers_and_the_report(run, replace_workflow, results):
    replace_workflow("immunize", results)
    out = "a-folder-whose-name-is-longer-than-the-terminal-" * 3
    done = run("immunize", "--out", out)
    for expected in ("98.0%", "97.0%", "10.0%", "87.5%", "90.0%", "9.8%", "8/255"):
        assert expected in done.stdout
    assert done.stdout.splitlines()[-1] == f"Report: {out}/report.html"


def test_attack_hands_on_every_option(run, replace_workflow, mine):
    called = replace_workflow("attack", ATTACKED)
    typed = (
        "attack --model easyvqa-llava --data my.jsonl --map question=text --split-seed 3 --task vqa "
        "--metric exact-match --attack apgd --set early_stop=no --set decay=0.5 --target red --eps 0.03 --norm linf "
        "--steps 7 --restarts 3 --limit 9 --batch-size 5 --max-new-tokens 6 --seed 4 --out a.json --save-images pngs "
        "--export garak --export pyrit --resume --no-progress --device cpu --dtype float16 "
        "--attention flash_attention_2"
    )
    done = run(*typed.split())
    assert done.exit_code == 0, done.output
    assert called.args == (MODEL, DataSource(mine, {"question": "text"}, 3), "apgd", ThreatModel("linf", 0.03))
    assert called.kwargs == {
        "steps": 7, "restarts": 3, "settings": {"early_stop": "no", "decay": "0.5"}, "target": "red",
        "task": "vqa", "metrics": ["exact-match"], "limit": 9, "seed": 4, "batch_size": 5, "max_new_tokens": 6,
        "out": Path("a.json"), "save_images": Path("pngs"), "export": ["garak", "pyrit"], "resume": True,
        "progress": False,
        "device": "cpu", "dtype": "float16", "attention": "flash_attention_2", "command": f"cmai-fast {typed}",
    }  # fmt: skip
    said = as_one_line(done.stdout)
    assert "9 samples: clean accuracy 100.0%, robust accuracy 25.0%, attack success 75.0%. The target was" in said
    assert "given by 62.5% of those attacked." in said
    assert said.endswith("Results: a.json Images: pngs")


def test_attack_leaves_the_budget_to_the_attack(run, replace_workflow):
    called = replace_workflow("attack", ATTACKED)
    assert run("attack", "--model", MODEL, "--out", "a.json").exit_code == 0
    assert called.args == (MODEL, DataSource("easyvqa"), "pgd", ThreatModel("linf", 8 / 255))
    assert (called.kwargs["steps"], called.kwargs["restarts"], called.kwargs["settings"]) == (None, 1, {})


def test_an_attack_without_a_bound_is_on_uploads_unless_another_threat_is_named(run, replace_workflow):
    called = replace_workflow("attack", ATTACKED)
    for typed, threat in (
        ("", ThreatModel("linf", 1.0, Surface("upload"))),
        (" --threat upload:jpeg=75", ThreatModel("linf", 1.0, Surface("upload", jpeg=75))),
        (" --threat input --eps 8/255", ThreatModel("linf", 8 / 255)),  # which the workflow refuses
    ):
        done = run(*f"attack --model {MODEL} --attack typographic --out a.json{typed}".split())
        assert done.exit_code == 0 and called.args[3] == threat


def test_transfer_hands_on_every_option(run, replace_workflow):
    called = replace_workflow("transfer", TRANSFERRED)
    typed = (
        "transfer some/set --model easyvqa-llava --batch-size 5 --max-new-tokens 6 --device cpu --dtype float16 "
        "--attention sdpa --out t.json"
    )
    done = run(*typed.split())
    assert done.exit_code == 0, done.output
    assert called.args == (MODEL, Path("some/set"))
    assert called.kwargs == {
        "out": Path("t.json"), "batch_size": 5, "max_new_tokens": 6, "device": "cpu", "dtype": "float16",
        "attention": "sdpa", "command": f"cmai-fast {typed}",
    }  # fmt: skip
    said = as_one_line(done.stdout)
    assert (
        "9 samples made on a: clean accuracy 88.9%, transfer 25.0% of 8 right ones, strict transfer 50.0% of 4" in said
    )
    assert said.endswith("Results: t.json")


def test_attack_leaves_standard_output_to_the_record(run, replace_workflow):
    called = replace_workflow("attack", ATTACKED)
    done = run("attack", "--model", MODEL, "--out", "-")
    assert called.kwargs["out"] == Path("-") and not done.stdout and "9 samples" in done.stderr


def test_evaluate_hands_on_every_option(run, replace_workflow, results, mine):
    called = replace_workflow("evaluate", results)
    typed = (
        "evaluate --model easyvqa-llava --against easyvqa-llava-immune --against a/b --data my.jsonl "
        "--map question=text,id=id --task vqa --metric exact-match --eps 1.5 --norm l2 --steps 7 --restarts 3 "
        "--limit 9 --batch-size 5 --max-new-tokens 6 --seed 4 --out runs/e --resume --no-progress --device cpu "
        "--dtype float32 --attention sdpa --attack adaptive:5x2 --attack apgd"
    )
    done = run(*typed.split())
    assert done.exit_code == 0, done.output
    assert called.args == (MODEL, DataSource(mine, {"question": "text", "id": "id"}), ThreatModel("l2", 1.5))
    assert called.kwargs == {
        "also": [AttackSpec("adaptive", 5, 2), AttackSpec("apgd")], "against": ["easyvqa-llava-immune", "a/b"],
        "suite": None, "out": Path("runs/e"), "limit": 9, "steps": 7, "restarts": 3, "batch_size": 5, "seed": 4,
        "task": "vqa", "metrics": ["exact-match"], "max_new_tokens": 6, "resume": True, "progress": False,
        "device": "cpu", "dtype": "float32", "attention": "sdpa", "command": f"cmai-fast {typed}",
    }  # fmt: skip


@pytest.mark.parametrize("command", ["attack", "evaluate", "calibrate", "guard", "immunize"])
def test_official_files_take_a_split_and_a_number_of_missing_pictures(run, replace_workflow, command, tmp_path):
    called = replace_workflow(command, KeyboardInterrupt())
    rows = [{"sentence": "A dog.", "label": "True", "identifier": f"dev-{n}-0-0"} for n in range(12)]
    for n in range(11):
        for side in (0, 1):
            official.picture(tmp_path / "dev" / f"dev-{n}-0-img{side}.png", (n, side, 0))
    official.write(tmp_path / "dev.json", "\n".join(map(json.dumps, rows)))
    official.nlvr2(tmp_path, "test1")
    typed = f"{command} --model {MODEL} --data nlvr2:. --split dev --split-seed 3 --out x"
    done = run(*typed.split(), "--missing", "1")
    assert done.exit_code == 2 and "2 of 24 pictures are missing, and 1 of 12 samples need them" in done.stderr
    assert "--missing N leaves such samples out" in done.stderr and done.stderr.count("\n") == 1 and not called.calls
    run(*typed.split(), "--missing", "2")
    given = called.args[0].source if command == "immunize" else called.args[1]
    assert given == DataSource("nlvr2:.", {}, 3, "dev", 2)
    done = run(*typed.replace("--split dev", "--split test").split())
    assert done.stderr == "error: nlvr2:. has no split 'test'; expected one of dev, test1\n" and len(called.calls) == 1


def test_evaluate_of_one_model(run, replace_workflow, results):
    called = replace_workflow("evaluate", results | {"models": results["models"][1:]})
    done = run("evaluate", "--model", MODEL, "--out", "e")
    assert called.kwargs["against"] == ()
    assert "immunised" in done.stdout and "undefended" not in done.stdout


def test_evaluate_takes_a_standard_set_of_attacks_without_a_budget(run, replace_workflow, results):
    called = replace_workflow("evaluate", results)
    assert run("evaluate", "--model", MODEL, "--suite", "autoattack", "--out", "e").exit_code == 0
    assert called.kwargs["suite"] == "autoattack"
    for typed, said in (
        ("--suite quik", "unknown suite 'quik'; did you mean quick"),
        ("--suite quick --steps 50", "--suite quick has budgets of its own; leave --steps out"),
    ):
        done = run("evaluate", "--model", MODEL, "--out", "f", *typed.split())
        assert done.exit_code != 0 and said in as_one_line(done.stderr)
    assert len(called.calls) == 1


def test_evaluate_prints_the_results_alone(run, monkeypatch, results):
    from cmai_fast.workflows import evaluate as workflow

    monkeypatch.setattr(
        workflow, "evaluate", lambda *_, out, **__: write_results(results, out / "results.json") and results
    )
    done = run("evaluate", "--model", MODEL, "--out", "-")
    assert json.loads(done.stdout) == results
    assert not list(Path().iterdir())


def test_demo_goes_on_with_an_interrupted_one_and_then_leaves_it_alone(run, replace_workflow, results):
    from cmai_fast.cli.demo import DEMO

    called = replace_workflow("immunize", results)
    done = run("demo")
    assert done.exit_code == 0, done.output
    assert called.args == (ImmunizeSettings(**DEMO, command="cmai-fast demo"), Path("runs/demo"))
    assert called.kwargs == {"resume": True, "progress": True}
    assert "Report: runs/demo/report.html" in done.stdout
    write_results(results, Path("runs/demo/results.json"))
    again = run("demo")
    assert len(called.calls) == 1
    assert "Report: runs/demo/report.html" in again.stdout and "delete runs/demo" in as_one_line(again.stdout)
    assert Path("runs/demo/report.html").is_file(), "the results of a demo killed before its report get one"


@pytest.mark.parametrize("given", ["runs/a", "runs/a/results.json"])
def test_report_is_made_from_the_results_alone(run, results, given):
    write_results(results, Path("runs/a/results.json"))
    done = run("report", given)
    assert done.stdout == "Report: runs/a/report.html\n"
    first = Path("runs/a/report.html").read_text()
    assert "easyvqa" in first
    assert run("report", given, "--out", "other.html").stdout == "Report: other.html\n"
    assert Path("other.html").read_text() == first
    assert run("report", given, "--out", "-").stdout == first


def test_info_shows_versions_devices_and_backends(run):
    from cmai_fast import __version__, models, ops

    facts = json.loads(run("info", "--json").stdout)
    assert facts["versions"]["cmai_fast"] == __version__
    assert set(facts["versions"]) >= {"python", "torch", "transformers"} and "cpu" in facts["devices"]
    assert facts["backends"] == ops.backend_report() | {"in use": ops.chosen_backend()}
    assert set(facts["models"]) == set(models.BUNDLED)
    assert facts["extension"] == ops.build_report() and set(facts["extension"]) >= {"compiler", "flags", "cuda"}
    shown = run("info").stdout
    assert all(value in shown for value in facts["versions"].values())


def test_info_shows_a_backend_that_cannot_be_had(run, monkeypatch):
    from cmai_fast import ops

    def refuse():
        raise RuntimeError("CMAI_FAST_BACKEND=cuda is unavailable")

    monkeypatch.setattr(ops, "chosen_backend", refuse)
    done = run("info", "--json")
    assert done.exit_code == 0 and "is unavailable" in json.loads(done.stdout)["backends"]["in use"]


def test_version(run):
    from cmai_fast import __version__

    assert run("--version").stdout == f"cmai-fast {__version__}\n"


def test_plan_hands_on_every_option(run, replace_workflow):
    called = replace_workflow("plan", planned())
    typed = (
        f"plan --model {MODEL} --gpu 4090 --inner-steps 7 --batch 3 --bits 8 --recompute full --trainable vision "
        "--dtype float32 --muon --prompt 5 --answer 6 --image-size 224 --tiles 4 --gpus 2 --steps 9 --price 0.5"
    )
    done = run(*shlex.split(typed))
    assert done.exit_code == 0, done.output
    assert called.args == (
        plan_workflow.PlanSettings(
            MODEL, "4090", inner_steps=7, batch=3, bits=8, recompute="full", trainable="vision", dtype="float32",
            muon=True, prompt=5, answer=6, image_size=224, tiles=4, gpus=2, steps=9, price=0.5,
        ),
    )  # fmt: skip


def test_plan_says_what_a_config_costs(run, tmp_path):
    """A table, or the same numbers as JSON, from a config alone."""
    (tmp_path / "mine.json").write_text((resolve(MODEL) / "config.json").read_text())
    options = "plan --model mine.json --gpu h100 --inner-steps 1 --steps 7200 --price 2 --gpus 3".split()
    done = run(*options, "--json", "-")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert {(r["bits"], r["recompute"]) for r in record["rows"]} == {
        (bits, mode) for bits in (None, 8, 4) for mode in plan_workflow.RECOMPUTE
    }
    steps = [r["step"] for r in record["rows"] if (r["bits"], r["recompute"]) == (None, "none")]
    assert steps == ["clean", "pgd", "bridge R=0", "bridge R=1", "fare", "consistency", "cmai"]  # R is at most K
    for row in record["rows"]:
        assert row["hours"] == pytest.approx(2 * row["seconds"]) and row["price"] == pytest.approx(6 * row["hours"])
        assert row["peak_bytes"] > 0 and row["fits"]
    shown = run(*options, "--json", "made.json")
    assert json.loads(Path("made.json").read_text())["rows"] == record["rows"]
    text = as_one_line(shown.stdout)
    said = ("bridge R=0", "price", "no step was ever measured on h100", "several cards were never measured")
    for part in (*said, "without S_c (beta and gamma 0)"):
        assert part in text, part
    assert f"{record['rows'][1]['price']:.2f}" in text


def test_plan_explains_cmai_where_it_has_a_row(run, tmp_path):
    CLIPConfig().to_json_file(tmp_path / "clip.json")
    for model, there in ((MODEL, True), (tmp_path / "clip.json", False)):
        done = run("plan", "--model", str(model))
        assert done.exit_code == 0, done.output
        assert ("cmai: what immunize does by default" in as_one_line(done.output)) is there


def test_plan_leaves_out_what_shards_refuse_and_marks_what_is_too_large(run):
    shards = plan_workflow.plan(plan_workflow.PlanSettings(MODEL, gpus=2, sharded=True))["rows"]
    assert {r["step"] for r in shards} == {"clean", "pgd", "bridge R=0", "bridge R=1", "bridge R=2"}
    assert {r["bits"] for r in shards} == {None}
    graphs = plan_workflow.plan(plan_workflow.PlanSettings(MODEL, cuda_graphs=True))["rows"]
    assert {r["recompute"] for r in graphs} == {"none"}
    done = run("plan", "--model", MODEL, "--gpu", "4090", "--batch", "100000")
    assert done.exit_code == 0 and "!" in done.stdout.replace("!: more", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example_that_can_be_copied(run, command):
    done = run(command, "--help")
    assert done.exit_code == 0
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    assert lines[-2:] == ["Example:", example(command)]
    assert example(command).startswith(f"cmai-fast {command}")


def readme_lines():
    readme = Path(__file__).parents[2] / "README.md"
    lines = [line for line in readme.read_text().splitlines() if line.startswith("cmai-fast ")]
    assert {shlex.split(line)[1] for line in lines} >= set(COMMANDS) - {"demo"}
    return lines


@pytest.mark.parametrize("line", [*map(example, COMMANDS), *readme_lines()])
def test_the_examples_work(run, replace_workflow, results, monkeypatch, line):
    monkeypatch.setattr("cmai_fast.cli.options.check", lambda *_, **__: None)  # of models and files that are not here
    for name in ("immunize", "evaluate"):
        replace_workflow(name, results)
    replace_workflow("attack", ATTACKED)
    replace_workflow("transfer", TRANSFERRED)
    replace_workflow("plan", planned())
    replace_workflow("guard", 1)
    threshold = {"tau": 0.1, "samples": 9}
    replace_workflow("calibrate", {"threshold": threshold, "wrong_answers": {"auroc": 0.9, "rejected": 0.6}})
    for folder in ("runs/a", "runs/a-eval"):
        write_results(results, Path(folder, "results.json"))
    Path("x.png").touch()
    Path("runs/a-guard").mkdir()
    done = run(*shlex.split(line, comments=True)[1:])
    assert done.exit_code == 0, done.output


def test_every_command_is_tested(run):
    listed = run("--help").stdout
    assert all(f" {command} " in listed for command in COMMANDS)
    from cmai_fast.cli import app

    assert {command.name for command in app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize(
    "command, expected",
    [
        ("attack", ["pgd", "apgd", "mi-fgsm", "linf, l2", "step_size=None", "upload"]),
        ("evaluate", ["vqa", "Question answering", "jsonl:FILE", "easyvqa", "exact-match"]),
        ("guard", ["reject", "Withhold the answer"]),
    ],
)
def test_lists_need_no_other_option(run, command, expected):
    done = run(command, "--list")
    assert done.exit_code == 0, done.output
    assert all(part in as_one_line(done.stdout) for part in expected)

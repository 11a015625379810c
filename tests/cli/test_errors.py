"""What goes wrong is one line on stderr and an exit code."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError


def evaluate(run, *options):
    return run("evaluate", "--model", "easyvqa-llava", "--out", "e", *options)


@pytest.mark.parametrize(
    "eps, message",
    [
        ("8", "eps is 8; it is measured in the [0, 1] pixel range, so it lies between 0 and 1; did you mean 8/255?"),
        ("-0.1", "between 0 and 1"),
        ("nan", "eps is 'nan'; expected a fraction"),
        ("8/0", "expected a fraction such as 8/255"),
        ("eight", "eps is 'eight'"),
    ],
)
@pytest.mark.parametrize("command", ["immunize", "attack", "evaluate"])
def test_a_wrong_eps_is_refused_with_the_reason(run, replace_workflow, results, command, eps, message):
    called = replace_workflow(command, results)
    done = run(command, "--model", "easyvqa-llava", f"--eps={eps}", "--out", "x")
    assert done.exit_code == 2 and not called.calls
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_an_l2_radius_may_exceed_1_but_must_be_a_number(run, replace_workflow, results):
    called = replace_workflow("evaluate", results)
    assert evaluate(run, "--norm", "l2", "--eps", "3/2").exit_code == 0
    assert called.args[2].eps == 1.5
    for wrong in ("much", "1/0", "-1", "inf"):
        done = evaluate(run, "--norm", "l2", f"--eps={wrong}")
        assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "eps is" in done.stderr
    assert len(called.calls) == 1


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("unknown data 'x';\n  known: easyvqa"), 2, "error: unknown data 'x'; known: easyvqa"),
        (FileNotFoundError("no such thing"), 2, "error: no such thing"),
        (OSError(errno.ENOSPC, "could not write e: disk full"), 1, "error: could not write e: disk full"),
        (PermissionError(errno.EACCES, "Permission denied", "e/x"), 1, "error: Permission denied: e/x"),
        (RuntimeError("CMAI_FAST_BACKEND=cuda is unavailable"), 1, "error: CMAI_FAST_BACKEND=cuda is unavailable"),
        (FloatingPointError("the loss is [not] finite"), 1, "error: the loss is [not] finite"),
        (SafetensorError("header too large"), 1, "error: header too large"),
        (MemoryError(), 1, "error: MemoryError"),
        (ValueError("long " * 100), 2, "error: " + "long " * 99 + "long"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(run, replace_workflow, error, code, line):
    replace_workflow("evaluate", error)
    done = evaluate(run)
    assert (done.exit_code, done.stderr, done.stdout) == (code, line + "\n", "")


@pytest.mark.parametrize(
    "error, line",
    [
        ("leave out --split-seed (split_seed)", "leave out --split-seed"),
        ("give --split-seed N (split_seed) to divide it", "give --split-seed N to divide it"),
        ("fgsm takes one step; steps is 3 and restarts is 2", "fgsm takes one step; --steps is 3 and --restarts is 2"),
        ("batch_size is 0", "--batch-size is 0"),
        ("my.jsonl line 1: data is a word here", "my.jsonl line 1: data is a word here"),
    ],
)
def test_an_error_names_the_option_once(run, replace_workflow, error, line):
    replace_workflow("evaluate", ValueError(error))
    assert evaluate(run).stderr == f"error: {line}\n"


@pytest.mark.parametrize("own, heard", [(logging.NOTSET, []), (logging.WARNING, ["no such kernel"])])
def test_bitsandbytes_does_not_speak_between_our_lines(run, results, monkeypatch, caplog, own, heard):
    """Where PEFT is installed transformers imports it, and it warns as it is imported; a user's own level stands."""
    logger = logging.getLogger("bitsandbytes")
    monkeypatch.setattr(
        "cmai_fast.workflows.evaluate.evaluate",
        lambda *_, **__: logging.getLogger("bitsandbytes.backends.cpu.ops").warning("no such kernel") or results,
    )
    before = logger.level
    try:
        logger.setLevel(own)
        assert evaluate(run, "--eps", "8/255").exit_code == 0
    finally:
        logger.setLevel(before)
    assert caplog.messages == heard


def test_the_traceback_is_there_on_request(run, replace_workflow, monkeypatch):
    replace_workflow("evaluate", ValueError("wrong"))
    monkeypatch.setenv("CMAI_FAST_TRACEBACK", "1")
    done = evaluate(run)
    assert done.exit_code == 2
    assert "Traceback (most recent call last)" in done.stderr and done.stderr.endswith("\nerror: wrong\n")


def test_a_bug_keeps_its_traceback(run, replace_workflow):
    replace_workflow("evaluate", KeyError("a bug"))
    assert isinstance(evaluate(run).exception, KeyError)


def test_ctrl_c_says_how_to_go_on(run, replace_workflow):
    replace_workflow("immunize", KeyboardInterrupt())
    typed = ("immunize", "--eps", "4/255", "--out", "a folder")
    done = run(*typed)
    assert done.exit_code == 130
    assert done.stderr == "interrupted; resume with: cmai-fast immunize --eps 4/255 --out 'a folder' --resume\n"
    again = run(*typed, "--resume")
    assert again.stderr == done.stderr, "the second time --resume is there already"
    demo = run("demo", "--out", "d")
    assert (demo.exit_code, demo.stderr) == (130, "interrupted; resume with: cmai-fast demo --out d\n")
    for name in ("attack", "evaluate"):
        replace_workflow(name, KeyboardInterrupt())
        typed = (name, "--model", "easyvqa-llava", "--out")
        done = run(*typed, "a.json")
        assert (done.exit_code, done.stderr) == (
            130, f"interrupted; resume with: cmai-fast {name} --model easyvqa-llava --out a.json --resume\n"
        )  # fmt: skip
        assert run(*typed, "-").stderr == "interrupted\n", "standard output cannot be resumed"
    replace_workflow("guard", KeyboardInterrupt())
    assert run("guard", "--model", "easyvqa-llava", "--data", "easyvqa").stderr == "interrupted\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["immunize"],
        ["immunize", "--out", "x", "--inner", "newton"],
        ["immunize", "--out", "x", "--steps", "0"],
        ["evaluate", "--model", "m", "--out", "x", "--norm", "l3"],
        ["attack", "--model", "m", "--out", "x", "--limit", "0"],
        ["guard", "--mode", "m"],
        ["attack", "--model", "m", "--out", "x", "--device", "gpu"],
        ["attack", "--model", "m", "--out", "x", "--seed", "4294967296"],
        ["--frobnicate"],
        ["immunise", "--out", "x"],
    ],
)
def test_wrong_usage_exits_2(run, replace_workflow, results, arguments):
    called = [replace_workflow(name, results) for name in ("immunize", "evaluate", "attack")]
    done = run(*arguments)
    assert done.exit_code == 2 and not done.stdout and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "--help shows the options" in done.stderr
    assert not any(recorder.calls for recorder in called)


BAD_NAMES = [
    ("plan --model no-such-model", "unknown model 'no-such-model'"),
    ("plan --model easyvqa-llava --price -1", "--price is -1.0; expected the price of one card"),
    ("plan --model easyvqa-llava --sharded", "--gpus is 1"),
    ("plan --model easyvqa-llava --cuda-graphs --recompute full", "--recompute is 'full'; expected a card"),
    ("plan --model easyvqa-llava --sharded --gpus 2 --bits 4", "--bits is 4"),
    ("plan --model easyvqa-llava --gpu b300", "'b300' is not one of 'h100'"),
    ("attack --model easyvqa-llava --attack cw2 --out x", "unknown attack 'cw2'"),
    ("attack --model no-such-model --out x", "unknown model 'no-such-model'"),
    ("attack --model easyvqa-llava --data no.jsonl --out x", "unknown data 'no.jsonl'"),
    ("attack --model easyvqa-llava --data bad.jsonl --out x", "bad.jsonl line 1"),
    ("attack --model easyvqa-llava --map question --out x", "--map question: expected NAME=VALUE"),
    ("attack --model easyvqa-llava --set steps --out x", "--set steps: expected NAME=VALUE"),
    ("attack --model easyvqa-llava --threat png --out x", "the threat is 'png'; expected one of input, upload"),
    ("attack --model easyvqa-llava --norm l2 --out x", "--eps is missing: an l2 ball needs its radius"),
    ("evaluate --model easyvqa-llava --against nope --out x", "unknown model 'nope'"),
    ("evaluate --model easyvqa-llava --task vqq --out x", "unknown task 'vqq'; did you mean vqa"),
    ("evaluate --model easyvqa-llava --metric exactmatch --out x", "unknown metric 'exactmatch'"),
    ("evaluate --model easyvqa-llava --resume --out -", "--out - has nothing to resume"),
    ("attack --model easyvqa-llava --data blind.jsonl --out x", "1 of 1 samples have no image: sample 0 (blind.jsonl"),
    ("guard --model easyvqa-llava --data blind.jsonl --out x", "1 of 1 samples have no image"),
    ("calibrate --model easyvqa-llava --out -", "--out - is standard output"),
    ("calibrate --model easyvqa-llava --tower nowhere --out x", "unknown model 'nowhere'"),
    ("calibrate --model easyvqa-llava --data bad.jsonl --out x", "bad.jsonl line 1"),
    ("guard --model easyvqa-llava --image x.png --text a --policy nope", "unknown policy 'nope'"),
    ("guard --model easyvqa-llava", "expected --image and --text, or --data"),
    ("guard --model easyvqa-llava --text a", "add the --image of this --text"),
    ("guard --model easyvqa-llava --image none.png --text a", "--image none.png is not a file"),
    ("guard --model easyvqa-llava --image bad.jsonl --text a --heads none", "--heads none is not a folder"),
    ("guard --model easyvqa-llava --image bad.jsonl --text a --threshold nan", "--threshold is nan"),
    ("guard --model easyvqa-llava --image a.png --text=", "--text is ''; expected a question"),
    ("guard --model easyvqa-llava --image a.png --text @none.txt", "--text @none.txt cannot be read: No such file"),
]


def test_bad_names_are_refused_before_pytorch_is_loaded(tmp_path):
    """One fresh process for all: what it imports for one is there for the next, and PyTorch never is.

    Seconds of the processor are counted, which other processes do not change.
    """
    (tmp_path / "blind.jsonl").write_text('{"question": "q?", "answer": "a"}\n')
    (tmp_path / "bad.jsonl").write_text('{"question": 3}\n')
    program = """
import json, sys, time
from typer.testing import CliRunner
from cmai_fast.cli import app
for line in sys.stdin.read().splitlines():
    start = time.process_time()
    done = CliRunner().invoke(app, line.split())
    heavy = [name for name in ("torch", "transformers") if name in sys.modules]
    print(json.dumps([done.exit_code, done.stderr, done.stdout, heavy, time.process_time() - start]))
"""
    typed = "\n".join(line for line, _ in BAD_NAMES)
    done = subprocess.run(
        [sys.executable, "-c", program], input=typed, capture_output=True, text=True, cwd=tmp_path, check=True
    )
    for (line, message), answer in zip(BAD_NAMES, map(json.loads, done.stdout.splitlines()), strict=True):
        code, said, printed, heavy, seconds = answer
        assert (code, printed, heavy) == (2, "", []) and message in said and said.count("\n") == 1, (line, answer)
        assert seconds < 2, line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "error, said",
    [
        ("max_new_tokens is 4, and the threshold of x", "--max-new-tokens is 4, and the threshold of x"),
        ("leave max_new_tokens out", "leave --max-new-tokens out"),
        ("limit is 0; the limit is too low", "--limit is 0; the limit is too low"),
        ("a/max_new_tokens/b", "a/max_new_tokens/b"),
        ("unknown seed", "unknown seed"),
    ],
)
def test_messages_name_options(run, replace_workflow, error, said):
    replace_workflow("evaluate", ValueError(error))
    assert evaluate(run).stderr == f"error: {said}\n"


def test_a_users_own_setting_of_openmp_stands(monkeypatch):
    from cmai_fast.cli.main import _share_the_machine

    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    for own in (None, *names):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        if own is not None:
            monkeypatch.setenv(own, "1")
        _share_the_machine()
        assert {n: os.environ[n] for n in names if n in os.environ} == ({own: "1"} if own else {names[0]: "PASSIVE"})


def test_immunize_leaves_the_folder_of_another_run_alone(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = run("immunize", "--out", tmp_path)
    assert done.exit_code == 2 and str(tmp_path) in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_report_without_results(run, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"settings": {}}))
    for given, message in (("nowhere", "nowhere does not exist"), (".", "settings.data is missing")):
        done = run("report", given)
        assert done.exit_code == 2 and message in done.stderr
    assert not (tmp_path / "report.html").exists()

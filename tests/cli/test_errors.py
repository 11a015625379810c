"""What goes wrong is one line on stderr and an exit code."""

from __future__ import annotations

import errno
import json
import logging

import pytest
from safetensors import SafetensorError


def evaluate(run, *options):
    return run("evaluate", "--model", "m", "--out", "e", *options)


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
def test_a_wrong_eps_is_refused_with_the_reason(run, replace_experiment, results, command, eps, message):
    called = replace_experiment(command, results)
    done = run(command, "--model", "m", f"--eps={eps}", "--out", "x")
    assert done.exit_code == 2 and not called.calls
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_an_l2_radius_may_exceed_1_but_must_be_a_number(run, replace_experiment, results):
    called = replace_experiment("evaluate", results)
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
        (RuntimeError("CMAI_FAST_BACKEND=cuda cannot be had"), 1, "error: CMAI_FAST_BACKEND=cuda cannot be had"),
        (FloatingPointError("the loss is [not] finite"), 1, "error: the loss is [not] finite"),
        (SafetensorError("header too large"), 1, "error: header too large"),
        (MemoryError(), 1, "error: MemoryError"),
        (ValueError("long " * 100), 2, "error: " + "long " * 99 + "long"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(run, replace_experiment, error, code, line):
    replace_experiment("evaluate", error)
    done = evaluate(run)
    assert (done.exit_code, done.stderr, done.stdout) == (code, line + "\n", "")


@pytest.mark.parametrize("own, heard", [(logging.NOTSET, []), (logging.WARNING, ["no such kernel"])])
def test_bitsandbytes_does_not_speak_between_our_lines(run, results, monkeypatch, caplog, own, heard):
    """Where PEFT is installed transformers imports it, and it warns as it is imported; a user's own level stands."""
    logger = logging.getLogger("bitsandbytes")
    monkeypatch.setattr(
        "cmai_fast.evaluation.experiment.evaluate",
        lambda *_, **__: logging.getLogger("bitsandbytes.backends.cpu.ops").warning("no such kernel") or results,
    )
    before = logger.level
    try:
        logger.setLevel(own)
        assert evaluate(run, "--eps", "8/255").exit_code == 0
    finally:
        logger.setLevel(before)
    assert caplog.messages == heard


def test_the_traceback_is_there_on_request(run, replace_experiment, monkeypatch):
    replace_experiment("evaluate", ValueError("wrong"))
    monkeypatch.setenv("CMAI_FAST_TRACEBACK", "1")
    done = evaluate(run)
    assert done.exit_code == 2
    assert "Traceback (most recent call last)" in done.stderr and done.stderr.endswith("\nerror: wrong\n")


def test_a_bug_keeps_its_traceback(run, replace_experiment):
    replace_experiment("evaluate", KeyError("a bug"))
    assert isinstance(evaluate(run).exception, KeyError)


def test_ctrl_c_says_how_to_go_on(run, replace_experiment):
    replace_experiment("immunize", KeyboardInterrupt())
    typed = ("immunize", "--eps", "4/255", "--out", "a folder")
    done = run(*typed)
    assert done.exit_code == 130
    assert done.stderr == "interrupted; go on with: cmai-fast immunize --eps 4/255 --out 'a folder' --resume\n"
    again = run(*typed, "--resume")
    assert again.stderr == done.stderr, "the second time --resume is there already"
    demo = run("demo", "--out", "d")
    assert (demo.exit_code, demo.stderr) == (130, "interrupted; go on with: cmai-fast demo --out d\n")
    replace_experiment("evaluate", KeyboardInterrupt())
    assert (evaluate(run).exit_code, evaluate(run).stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["immunize"],
        ["immunize", "--out", "x", "--inner", "newton"],
        ["immunize", "--out", "x", "--steps", "0"],
        ["evaluate", "--model", "m", "--out", "x", "--norm", "l3"],
        ["attack", "--model", "m", "--out", "x", "--limit", "0"],
        ["guard", "--model", "m"],
        ["immunise", "--out", "x"],
    ],
)
def test_wrong_usage_exits_2(run, replace_experiment, results, arguments):
    called = [replace_experiment(name, results) for name in ("immunize", "evaluate", "attack")]
    done = run(*arguments)
    assert done.exit_code == 2 and not done.stdout and "Usage:" in done.stderr
    assert not any(recorder.calls for recorder in called)


def test_real_experiments_name_what_they_do_not_know(run, tmp_path):
    for arguments, message in (
        (["attack", "--model", "m", "--attack", "cw", "--out", "x"], "unknown attack 'cw'"),
        (["attack", "--model", "no-such-model", "--out", "x"], "unknown model 'no-such-model'"),
        (["evaluate", "--model", "no-such-model", "--out", "x"], "unknown model 'no-such-model'"),
        (["immunize", "--model", "no-such-model", "--out", "x"], "unknown model 'no-such-model'"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.output
    assert not (tmp_path / "x").is_file()


def test_immunize_leaves_the_folder_of_another_run_alone(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = run("immunize", "--out", tmp_path)
    assert done.exit_code == 2 and str(tmp_path) in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_report_without_results(run, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"settings": {}}))
    for given, message in (("nowhere", "nowhere does not exist"), (".", "settings.model is missing")):
        done = run("report", given)
        assert done.exit_code == 2 and message in done.stderr
    assert not (tmp_path / "report.html").exists()

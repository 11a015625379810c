"""A run that is killed at any moment resumes: nothing is lost, nothing done twice, and the numbers are the same."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
from pathlib import Path

import pytest

from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation import state
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.state import Journal, State
from cmai_fast.files import plain
from cmai_fast.threat import ThreatModel
from cmai_fast.workflows import evaluate as workflow
from cmai_fast.workflows.attack import attack
from cmai_fast.workflows.evaluate import evaluate
from forked import together
from shortened import shorten

THREAT, DATA = ThreatModel("linf", 32 / 255), DataSource("easyvqa")
TIMINGS = ("seconds", "command")

pytestmark = pytest.mark.usefixtures("few")


def run(fitted_folder, model_folder, out, **changes):
    arguments = {
        "against": [str(fitted_folder)], "out": out, "steps": 2, "restarts": 1, "batch_size": 4, "progress": False,
    } | changes  # fmt: skip
    return evaluate(str(model_folder.parent), DATA, THREAT, **arguments)


def untimed(value, but=TIMINGS):
    if isinstance(value, dict):
        return {k: untimed(v, but) for k, v in value.items() if k not in but}
    return [untimed(v, but) for v in value] if isinstance(value, list) else value


def of_any_batches(results):
    """Results without the number of passes, counted by batch, and with scores as alike as float32 sums are."""
    rounded = json.loads(json.dumps(results), parse_float=lambda text: round(float(text), 4))
    return untimed(rounded, (*TIMINGS, "passes"))


class Appends:
    """Counts finished batches, and calls `at(journal)` in place of the one numbered `last`."""

    def __init__(self, monkeypatch, last=None, at=None):
        self.count, append = 0, Journal.append

        def counted(journal, *args, **kwargs):
            if self.count == last:
                at(journal)
            self.count += 1
            append(journal, *args, **kwargs)

        monkeypatch.setattr(Journal, "append", counted)


def killed(work) -> None:
    """`work()` in a process of its own, which kills itself."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def kill(journal=None):
    os.kill(os.getpid(), signal.SIGKILL)


def torn(journal):
    """The machine stops while a line is written, and its images are half there."""
    journal.folder.mkdir(parents=True, exist_ok=True)
    (journal.folder / f".{len(journal.entries)}.safetensors.123.tmp").write_bytes(b"half")
    (journal.folder / f"{len(journal.entries)}.safetensors").write_bytes(b"of an earlier attempt")
    with open(journal.folder / "parts.jsonl", "ab") as file:
        file.write(b'{"rows": [0, 1')
    kill()


@pytest.fixture(scope="module")
def whole(fitted_folder, model_folder, tmp_path_factory):
    """The results of a run never interrupted, and how many batches it took."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)  # module fixtures come before those of a test
        appends = Appends(patch)
        out = tmp_path_factory.mktemp("runs") / "whole"
        results = run(fitted_folder, model_folder, out)
    assert {p.name for p in out.iterdir()} == {"results.json", "report.html"}
    return results, appends.count


def test_kill_9_at_several_points(whole, fitted_folder, model_folder, tmp_path, monkeypatch):
    """One run, killed in its first attack, in a torn line, in the second model, and before its report."""
    expected, batches = whole
    done = 0
    for stop, at in ((3, kill), (batches // 3, torn), (batches - 4 - batches // 3, kill)):
        with monkeypatch.context() as patch:
            Appends(patch, stop, at)
            killed(lambda: run(fitted_folder, model_folder, tmp_path / "out", resume=True))
        done += stop
        assert sum(len(State(f.parent).journal(".").entries) for f in lines(tmp_path / "out")) == done
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "report", kill)
        killed(lambda: run(fitted_folder, model_folder, tmp_path / "out", resume=True))
    appends = Appends(monkeypatch)
    results = run(fitted_folder, model_folder, tmp_path / "out", resume=True)
    assert appends.count == 0  # nothing was left to do but the report
    assert untimed(results) == untimed(expected)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"results.json", "report.html"}


def lines(out: Path):
    return sorted(out.rglob("parts.jsonl"))


def test_two_processes_share_a_run_that_was_killed(whole, fitted_folder, model_folder, tmp_path, monkeypatch):
    """They give the numbers of one, with each sample attacked once; the second is killed, and the first with it."""
    expected, batches = whole
    work = lambda: run(fitted_folder, model_folder, tmp_path / "out", resume=True)  # noqa: E731
    with monkeypatch.context() as patch:
        Appends(patch, batches // 2, lambda _: os.environ["RANK"] == "1" and kill())
        assert sorted(together(work, 2)) == [-signal.SIGKILL] * 2
    before = lines(tmp_path / "out")
    assert before and not (tmp_path / "out" / "results.json").exists()
    assert together(work, 2) == [0, 0]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"results.json", "report.html"}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert of_any_batches(results) == of_any_batches(plain(expected))


def test_each_process_attacks_its_share(fitted_folder, tmp_path, monkeypatch):
    seen, attacked = tmp_path / "seen", Runner._attacked

    def noted(runner, spec, threat, rows, *args):
        with open(seen, "a") as file:
            file.write(f"{os.environ['RANK']} {len(rows)}\n")
        return attacked(runner, spec, threat, rows, *args)

    monkeypatch.setattr(Runner, "_attacked", noted)
    args = (str(fitted_folder), DATA, "pgd", THREAT)
    work = lambda: attack(*args, steps=2, batch_size=4, progress=False, out=tmp_path / "a.json")  # noqa: E731
    assert together(work, 2) == [0, 0]
    shares = [line.split() for line in seen.read_text().splitlines()]
    counts = [sum(int(n) for rank, n in shares if rank == r) for r in "01"]
    record = json.loads((tmp_path / "a.json").read_text())
    assert sum(counts) == sum(s["attacked"] for s in record["per_sample"]) > 0
    assert abs(counts[0] - counts[1]) <= len(shares) // 2
    assert together(work, 2) == [1, 1]  # a.json exists: both say so, and none waits


def test_resuming_a_finished_run_gives_its_results(whole, fitted_folder, model_folder, tmp_path, monkeypatch):
    expected, _ = whole
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text(json.dumps(expected))
    (out / "report.html").write_text("as it was")
    appends = Appends(monkeypatch)
    assert run(fitted_folder, model_folder, out, resume=True) == expected
    assert appends.count == 0 and (out / "report.html").read_text() == "as it was"
    with pytest.raises(ValueError, match="holds a finished run"):
        run(fitted_folder, model_folder, out)
    with pytest.raises(ValueError, match=r"started with other settings \(seed was 0, now 1\)"):
        run(fitted_folder, model_folder, out, resume=True, seed=1)


def test_an_unfinished_run_is_resumed_only_on_request_and_with_its_settings(
    fitted_folder, model_folder, tmp_path, monkeypatch
):
    out = tmp_path / "out"

    def stop(journal):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        Appends(patch, 2, stop)
        with pytest.raises(KeyboardInterrupt):
            run(fitted_folder, model_folder, out)
    with pytest.raises(ValueError, match="unfinished run; continue it with --resume"):
        run(fitted_folder, model_folder, out)
    with pytest.raises(ValueError, match=r"other settings \(batch_size was 4, now 5\)"):
        run(fitted_folder, model_folder, out, resume=True, batch_size=5)
    with open(out / "state" / "lock", "r+") as lock:  # as another process would
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ValueError, match=rf"being written by another process \(id {os.getpid()}\)"):
            run(fitted_folder, model_folder, out, resume=True)


def test_a_run_that_did_nothing_leaves_nothing(fitted_folder, model_folder, tmp_path, monkeypatch):
    def fail(journal):
        raise RuntimeError("at once")

    Appends(monkeypatch, 0, fail)
    with pytest.raises(RuntimeError, match="at once"):
        run(fitted_folder, model_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named_and_the_run_resumes(fitted_folder, tmp_path, monkeypatch):
    def go(**how):
        return attack(
            str(fitted_folder), DATA, "fgsm", THREAT, batch_size=2, out=tmp_path / "a.json", progress=False, **how
        )  # fmt: skip

    with monkeypatch.context() as patch:
        save, calls = state.write_bytes, []

        def full(data, path):
            calls.append(path)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return save(data, path)

        patch.setattr(state, "write_bytes", full)
        with pytest.raises(OSError, match=r"could not write to .*a\.json\.state.*No space left.*--resume") as caught:
            go()
    assert caught.value.errno == errno.ENOSPC
    appends = Appends(monkeypatch)
    assert go(resume=True)["attacked"] == 6 and appends.count == 2  # of three clean batches and three attacked ones


def test_an_attack_resumes(fitted_folder, tmp_path, monkeypatch):
    def go(out, **how):
        return attack(
            str(fitted_folder), DATA, "pgd", THREAT, steps=2, batch_size=2, out=out, save_images=out.parent / "png",
            progress=False, **how,
        )  # fmt: skip

    expected, out = go(tmp_path / "whole" / "a.json"), tmp_path / "cut" / "a.json"
    with monkeypatch.context() as patch:
        Appends(patch, 4, kill)
        killed(lambda: go(out))
    assert not out.exists() and not (tmp_path / "cut" / "png").exists()
    with pytest.raises(ValueError, match=r"a\.json holds an unfinished run; continue it with --resume"):
        go(out)
    found = go(out, resume=True)
    # But where the images are.
    assert untimed(found) | {"settings": 0} == untimed(expected) | {"settings": 0}
    assert sorted(p.name for p in out.parent.iterdir()) == ["a.json", "png"]
    for name in ("manifest.jsonl", "000000.png"):
        assert (out.parent / "png" / name).read_bytes() == (tmp_path / "whole" / "png" / name).read_bytes()
    assert go(out, resume=True) == json.loads(out.read_text())
    with pytest.raises(ValueError, match=r"a\.json exists"):
        go(out)


def test_a_damaged_line_is_named(tmp_path):
    journal = State(tmp_path).journal("clean")
    journal.append({"rows": [0]})
    with open(journal.folder / "parts.jsonl", "ab") as file:
        file.write(b"zeros\n")
    with pytest.raises(ValueError, match=r"line 2 of .*parts\.jsonl is damaged; delete"):
        State(tmp_path).journal("clean")

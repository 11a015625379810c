"""What `cmai-fast info` prints can be copied: advice with its brackets, paths to their end."""

from __future__ import annotations

import re
import subprocess
import sys


def test_info_keeps_brackets_and_paths_whole(run, monkeypatch):
    from cmai_fast import ops

    path = "/a/rather/long/path/" + "/".join(f"folder-{i}" for i in range(20)) + "/model"
    advice = "Triton is not installed: pip install cmai-fast[triton]"
    monkeypatch.setattr(ops, "backend_report", lambda: {"cpu": "ready", "triton": advice, "path": path})
    monkeypatch.setenv("COLUMNS", "70")
    shown = re.sub(r"[\s│]", "", run("info").stdout)
    assert re.sub(r"\s", "", advice) in shown and path in shown


def test_the_module_is_the_command():
    run = subprocess.run([sys.executable, "-m", "cmai_fast", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("cmai-fast ")

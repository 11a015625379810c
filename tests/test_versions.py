"""Versions outside the tested range are warned of, once, by name; what pyproject.toml accepts is no narrower."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from pathlib import Path

import pytest

import cmai_fast.bridge
from cmai_fast.versions import TESTED, warn_about_untested

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("version", ["5.21.0", "5.21.1", "5.22.2", "5.24.0", "5.24.9+local", "5.23.0.dev0"])
def test_a_tested_version_passes_in_silence(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_untested({"transformers": version, "torch": TESTED["torch"][1] + ".0+cpu"})


@pytest.mark.parametrize("version", ["5.25.0", "6.0.0", "5.100.0", "5.20.2", "4.57.6"])
def test_another_one_is_named_with_the_range_and_what_to_do(version):
    first, last = TESTED["transformers"]
    said = rf"transformers {re.escape(version)} is outside .* \({first} to {last}\).*pip install \"transformers=={last}"
    with pytest.warns(RuntimeWarning, match=said) as found:
        warn_about_untested({"transformers": version, "torch": TESTED["torch"][0]})
    assert len(found) == 1


def test_importing_the_bridge_without_which_no_model_runs_warns_once(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "99.0.0")  # it replaces itself at import
    with pytest.warns(RuntimeWarning, match=r"transformers 99\.0\.0 is outside") as found:
        importlib.reload(cmai_fast.bridge)
    assert len(found) == 1


def test_what_may_be_installed_starts_at_the_first_tested_version_and_does_not_end_at_the_last():
    text = (ROOT / "pyproject.toml").read_text()
    for package, (first, last) in TESTED.items():
        (low, high) = re.search(rf'"{package}>=([\d.]+),<(\d+)"', text).groups()
        assert low == first and int(high) > int(last.split(".")[0])


def test_the_document_names_the_range():
    text = (ROOT / "docs" / "versions.md").read_text()
    for package, (first, last) in TESTED.items():
        assert re.search(rf"\| {package} \| {re.escape(first)} \| {re.escape(last)} \|", text), package

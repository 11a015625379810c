"""The registry of defences: each is a set of values that `MBATConfig` takes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cmai_fast.defences import DEFENCES, defence
from cmai_fast.mbat import MBATConfig


def test_each_is_a_valid_config(tmp_path):
    assert DEFENCES.names() == ["clean", "cmai", "fare", "fgsm-rs", "mbat", "pgd-at", "sim-clip"]
    for name, thing in DEFENCES.items():
        config = MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **thing.values)
        assert all(getattr(config, field) == value for field, value in thing.values.items())
        assert thing.name == name and thing.label
        with pytest.raises(TypeError):
            thing.values["eps"] = 0.1


def test_those_to_compare_with_have_nothing_of_mbat(tmp_path):
    """No heads, no consistency, the whole loss on adversarial images (or none)."""
    for name in ("clean", "fare", "fgsm-rs", "pgd-at", "sim-clip"):
        values = DEFENCES[name].values
        assert values["beta"] == values["gamma"] == 0 and not values["arm"]
        assert name == "clean" or values["lam"] == 1.0
    assert DEFENCES["pgd-at"].values["trainable"] == "vision"
    assert DEFENCES["mbat"].values["inner"] == "bridge" and DEFENCES["clean"].values["inner"] == "none"


def test_a_name_is_checked_without_pytorch():
    code = (
        "import sys\nfrom cmai_fast.defences import DEFENCES\nDEFENCES.check('pgd-at')\n"
        "try:\n    DEFENCES.check('pgd_at')\nexcept ValueError as e:\n    print(e)\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "unknown defence 'pgd_at'; did you mean pgd-at?" in done.stdout
    assert done.stdout.endswith("False\n")


def test_a_plugin_adds_one(monkeypatch):
    monkeypatch.setattr(DEFENCES, "_things", dict(DEFENCES._things))
    mine = defence("mine", "My own", inner="pgd", lam=0.7)
    assert DEFENCES["mine"] is mine and "mine" in DEFENCES
    with pytest.raises(ValueError, match="two defences called 'mine'"):
        defence("mine", "again")

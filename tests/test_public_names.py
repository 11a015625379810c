"""`import cmai_fast` gives every public name, and is quick because it gives them late."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cmai_fast


def test_every_public_name_is_there():
    for name in cmai_fast.__all__:
        assert getattr(cmai_fast, name) is not None
    assert set(cmai_fast.__all__) <= set(dir(cmai_fast))
    assert cmai_fast.Guard.__name__ == "Guard" and cmai_fast.parse_eps("8/255") == 8 / 255


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'cmai_fast' has no attribute 'Gard'"):
        _ = cmai_fast.Gard


@pytest.mark.parametrize(
    "code",
    [
        "import cmai_fast; cmai_fast.__version__",
        "import sys; sys.argv = ['cmai-fast', 'immunize', '--help']\n"
        "from cmai_fast.cli import app\ntry: app()\nexcept SystemExit as end: assert end.code == 0",
    ],
    ids=["import", "help"],
)
def test_neither_the_import_nor_help_waits_for_pytorch(code):
    heavy = "import sys; loaded = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", f"{code}\n{heavy}"], check=True, stdout=subprocess.DEVNULL)

"""The commands of `cmai-fast`, one module each. Heavy imports stay inside the commands, so that --help is quick."""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer

from cmai_fast import __version__
from cmai_fast.cli import attack, calibrate, demo, evaluate, guard, immunize, info, plan, report, transfer
from cmai_fast.cli.command import ExampleCommand, FaultyGroup

app = typer.Typer(
    name="cmai-fast",
    cls=FaultyGroup,
    help="Measure how easily a multimodal model is broken, immunise it, guard it in use, and report what was gained.",
    epilog="An error is one line; CMAI_FAST_TRACEBACK=1 shows where it comes from.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for module in (demo, plan, immunize, attack, transfer, evaluate, calibrate, guard, report, info):
    name = module.__name__.rsplit(".", 1)[1]
    app.command(name, cls=ExampleCommand, epilog=module.EXAMPLE)(getattr(module, name))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cmai-fast {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    _share_the_machine()
    # Loading bars and advice of transformers would hide our own output. The user's own setting takes precedence.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # With PEFT installed, transformers imports bitsandbytes, which warns of kernels that no command needs.
    quantizer = logging.getLogger("bitsandbytes")
    if quantizer.level == logging.NOTSET:
        quantizer.setLevel(logging.ERROR)


def _share_the_machine() -> None:
    """Lets idle OpenMP threads sleep instead of spinning, which would take the core from other processes.

    PyTorch reads it when it is loaded, later. The user's own setting takes precedence.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

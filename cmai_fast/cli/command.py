"""What all commands share: help ends with an example, and an error is one line and an exit code."""

from __future__ import annotations

import os
import re
import shlex
import traceback
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError
from typer.core import TyperCommand, TyperGroup

# Its module depends on the version of typer, which has its own copy of click.
UsageError: Any = typer.BadParameter.__base__
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

_BAD_INPUT = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
_EXPECTED = (*_BAD_INPUT, OSError, RuntimeError, ArithmeticError, MemoryError, SafetensorError)


class ExampleCommand(TyperCommand):
    """Prints its epilog, an example, last and unwrapped, so that it can be copied from a terminal of any width."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        example, self.epilog = self.epilog, None
        try:
            super().format_help(ctx, formatter)
        finally:
            self.epilog = example
        typer.echo(f" Example:\n\n   {example}\n")


class FaultyGroup(TyperGroup):
    """Turns expected errors into one line on stderr: exit code 2 for bad input, 1 for a failure, 130 for Ctrl-C.

    Anything else is a bug, and keeps its traceback. `ctx.obj` is the command line as typed.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.obj, bare = shlex.join(["cmai-fast", *args]), not args
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            if bare:  # help is not an error
                raise
            raise _misused(error) from error

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise _misused(error) from error
        except (typer.Exit, typer.Abort, BrokenPipeError):  # RuntimeErrors and an OSError that are not errors here
            raise
        except KeyboardInterrupt as error:
            how = str(error) or _resumption(ctx.obj, self.commands.get(ctx.invoked_subcommand or ""))
            _say(f"interrupted{how and f'; {how}'}")
            raise typer.Exit(INTERRUPTED) from error
        except _EXPECTED as error:
            if os.environ.get("CMAI_FAST_TRACEBACK") == "1":
                traceback.print_exception(error)
            command = self.commands.get(ctx.invoked_subcommand or "")
            _say(f"error: {_with_options(_one_line(error), command)}")
            raise typer.Exit(BAD_INPUT if isinstance(error, _BAD_INPUT) else FAILED) from error


def _misused(error: Any) -> typer.Exit:
    where = error.ctx.command_path.split()[1:] if error.ctx is not None else []
    text = " ".join(error.format_message().split()).rstrip(".")
    _say(f"error: {text}; {' '.join(['cmai-fast', *where, '--help'])} shows the options")
    return typer.Exit(BAD_INPUT)


def _resumption(typed: str, command: Any) -> str:
    """How to continue a run of a command that can; empty for others."""
    given = shlex.split(typed)
    if "resume" not in {p.name for p in getattr(command, "params", ())} or "-" in given or "--out=-" in given:
        return ""
    return f"resume with: {typed if '--resume' in given else f'{typed} --resume'}"


def _with_options(text: str, command: Any) -> str:
    """A library message with the command's options in place of the function's arguments.

    A name without an underscore may be an ordinary word; it counts as an argument only where the message, or a part
    of it, begins with `NAME is`.
    """
    for parameter in getattr(command, "params", ()):
        name, option = parameter.name or "", next((o for o in parameter.opts if o.startswith("--")), None)
        if option is None:
            continue
        text = re.sub(rf"({option}(?: [A-Z]+)?) \({name}\)", r"\1", text)  # the library named both
        if "_" in name:
            text = re.sub(rf"(?<![\w.=/-]){name}(?![\w/])(?!\.\w)", option, text)
        text = re.sub(rf"(^|; | and ){name} is\b", rf"\g<1>{option} is", text)
    return text


def _say(line: str) -> None:
    Console(stderr=True).print(Text(line, style="red"), soft_wrap=True)


def _one_line(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # str() would start with the number
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(text.split()) or type(error).__name__

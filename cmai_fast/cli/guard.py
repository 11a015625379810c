"""`cmai-fast guard`: one decision per question, as JSON lines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from cmai_fast.cli import lists, options
from cmai_fast.cli.summary import print_path

EXAMPLE = 'cmai-fast guard --model runs/a/model --image x.png --text "what color is the shape?"'


def guard(
    *,
    show: Annotated[bool, options.lister(lists.policies, "Show the policies and their settings.")] = False,
    model: options.Model,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image file of any size; may be given several times.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="The question, or @FILE to read it from a file (@@ for one that starts with @).")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Many cases instead: a file, a folder, or a named data set; needs no answers.")
    ] = None,
    fields: options.Map = None,
    split_seed: options.SplitSeed = None,
    split: options.Split = None,
    missing: options.Missing = 0,
    task: options.Task = "vqa",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Cases to use, drawn with the seed.", show_default="all")
    ] = None,
    heads: options.Heads = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="What happens below the threshold, in this order if given several times; --list shows them.",
            show_default="reject",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="POLICY.NAME=VALUE",
            help="A setting of a policy, such as smooth.draws=32; may be given several times.",
        ),
    ] = None,
    certify: Annotated[
        bool,
        typer.Option(
            "--certify", help="Add a certified radius to accepted answers; settings: --set certify.sigma=0.1."
        ),
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(help="Scores below it go to the policies.", show_default="the one saved with the heads"),
    ] = None,
    batch_size: options.BatchSize = 16,
    max_new_tokens: options.MaxNewTokens = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the cases that --limit draws.")] = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    attention: options.Attention = None,
    out: Annotated[
        Path, typer.Option(help="File of JSON lines, written when all cases are decided. - is standard output.")
    ] = options.STDOUT,
    progress: options.Progress = True,
) -> None:
    """Answer or withhold the answer: one line of JSON per question.

    Answers that score below the threshold go to the policies, which answer in another way, store the case, or withhold
    the answer; the exit code is 0 either way. The model needs consistency heads, as calibrate or immunize writes them.
    """
    if (data is None) == (not image and text is None):
        raise ValueError("expected --image and --text, or --data")
    if data is None and (not image or text is None):
        raise ValueError("--image and --text go together; add --text" if image else "add the --image of this --text")
    source = None if data is None else options.read_data(data, fields, split_seed, split, missing)
    question = None if text is None else read_text(text)
    if question is not None and not question.strip():
        raise ValueError(f"--text is {question!r}; expected a question")
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"--threshold is {threshold}; expected a finite number")

    from cmai_fast.arm.policies.policy import check_settings

    own = options.pairs(settings or (), "--set")
    check_settings([*(policy or ("reject",)), *(["certify"] if certify else [])], own)
    options.check([model], source, task=task, answers=False)
    for path in image or ():
        if not path.is_file():
            raise ValueError(f"--image {path} is not a file; expected the path of an image")
    if heads is not None and not heads.is_dir():
        raise ValueError(f"--heads {heads} is not a folder; expected one that calibrate or immunize wrote")

    from cmai_fast.workflows import guard as workflow

    count = workflow.guard(
        model, source,
        images=image or (), text=question, out=None if options.is_stdout(out) else out, write=typer.echo, heads=heads,
        policies=policy or ("reject",), settings=own, certify=certify, threshold=threshold, task=task, limit=limit,
        batch_size=batch_size, max_new_tokens=max_new_tokens, seed=seed, device=device, dtype=dtype,
        attention=attention, progress=progress and source is not None,
    )  # fmt: skip
    if not options.is_stdout(out):
        print_path(f"{count} decisions", out)


def read_text(text: str) -> str:
    """The text; `@FILE` is the content of a file, without its last line break, and `@@...` is `@...`."""
    if not text.startswith("@"):
        return text
    if text.startswith("@@"):
        return text[1:]
    try:
        return Path(text[1:]).read_text(encoding="utf-8-sig").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {text} cannot be read: {getattr(error, 'strerror', None) or error}") from error

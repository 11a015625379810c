"""`cmai-fast guard`: one image, one question, one decision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmai_fast.cli import options

EXAMPLE = 'cmai-fast guard --model runs/a/model --image x.png --text "what color is the shape?"'


def guard(
    *,
    model: options.Model,
    image: Annotated[Path, typer.Option(help="Image file.")],
    text: Annotated[str, typer.Option(help="The question.")],
    threshold: Annotated[
        float | None, typer.Option(help="Reject below this score.", show_default="the one saved with the model")
    ] = None,
    resize: Annotated[
        bool,
        typer.Option("--resize", help="Resize an image of another size than the model's, in place of refusing it."),
    ] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    attention: options.Attention = None,
) -> None:
    """Answer or reject: prints one decision as one line of JSON.

    Rejected is what scores below the threshold; the exit code is 0 either way. The model needs consistency heads, in
    cmcv/ in its folder or beside it, as immunize writes them.
    """
    from cmai_fast.arm import Guard

    guarded = Guard.from_pretrained(model, threshold=threshold, device=device, dtype=dtype, attention=attention)
    typer.echo(guarded.decide(image, text, resize=resize).to_json())

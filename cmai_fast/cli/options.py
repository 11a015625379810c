"""Options that several commands share, and how a threat model is read from them."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from cmai_fast.threat import ThreatModel

EPS = "8/255"

Model = Annotated[str, typer.Option(help="A bundled model, a model or run folder, or an id of the Hugging Face hub.")]
Data = Annotated[str, typer.Option(help="Dataset.")]
Eps = Annotated[str, typer.Option(help="Radius of the ball in the [0, 1] pixel range: 8/255, 0.03.")]
Norm = Annotated[Literal["linf", "l2"], typer.Option(help="Norm of the ball.")]
AttackSteps = Annotated[int, typer.Option(min=1, help="Steps of the attack.")]
Restarts = Annotated[int, typer.Option(min=1, help="Random starts of the attack; the worst result of each counts.")]
Limit = Annotated[int, typer.Option(min=1, help="Test questions to use, drawn with the seed.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples at a time; results do not depend on it.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress bars.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, or cuda:1.", show_default="cuda where torch sees one, else cpu")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Precision of the model's weights.", show_default="the checkpoint's"),
]
Attention = Annotated[
    Literal["sdpa", "flash_attention_2"] | None,
    typer.Option(
        help="Kernels of attention; flash_attention_2 needs flash-attn, CUDA and 16 bits.",
        show_default="sdpa where the model has it",
    ),
]


def read_threat(norm: Literal["linf", "l2"], eps: str) -> ThreatModel:
    """The threat model of `--norm` and `--eps`.

    Raises:
        ValueError: eps is not a number or, unless the norm is l2, above 1.
    """
    from cmai_fast.threat import ThreatModel, parse_eps

    return ThreatModel(norm, _l2_radius(eps) if norm == "l2" else parse_eps(eps))


def _l2_radius(text: str) -> float:
    """An l2 radius sums over all pixels, so it may exceed 1, which `parse_eps` refuses."""
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"eps is {text!r}; expected a number such as 1.5, or a fraction such as 128/255") from None

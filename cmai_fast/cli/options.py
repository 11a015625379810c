"""Options shared by several commands, and their parsing. Nothing here imports PyTorch, so bad names fail at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cmai_fast.threat import Surface, ThreatModel

if TYPE_CHECKING:
    from cmai_fast.data.sources import DataSource

STDOUT = Path("-")

Model = Annotated[str, typer.Option(help="A bundled model, a model or run folder, or an id of the Hugging Face hub.")]
Data = Annotated[
    str,
    typer.Option(
        help="A named data set (easyvqa), a file (.jsonl, .json, .csv, .parquet), a folder, NAME:FOLDER for official "
        "files (vqav2:FOLDER; evaluate --list shows the names), or hf:REPO."
    ),
]
Map = Annotated[
    list[str] | None,
    typer.Option(
        "--map", metavar="KEY=NAME,...", help="Other names of a record's keys, ours first: question=text,answer=label."
    ),
]
SplitSeed = Annotated[
    int | None,
    typer.Option(min=0, help="Seed that divides one file into train, calibration and test, which share no picture."),
]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="One of the data set's own splits, such as val2017, which then is the one set of records."
    ),
]
Missing = Annotated[
    int, typer.Option(min=0, help="How many picture files may be missing; samples that need them are left out.")
]
Task = Annotated[str, typer.Option(help="What is asked and when an answer is right; evaluate --list shows them.")]
Metric = Annotated[
    list[str] | None, typer.Option(help="A metric to report beside the task's own; may be given several times.")
]
Eps = Annotated[
    str | None,
    typer.Option(
        help="Radius of the ball, for pixels in [0, 1]: 8/255, 0.03. With --norm l2, the Euclidean norm over all "
        "pixels and channels; required then, such as 1 for 64 x 64 pixels.",
        show_default="8/255 for linf; with --threat patch 1, blank 128/255; 1 for attacks without a bound",
    ),
]
Threat = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:KEY=VALUE,...]",
        help="What the attacker changes: input, the pixels that the processor has made; upload, the 8-bit picture, of "
        "any size, before the processor; patch, a square of it (patch:size=0.3,x=0.5,y=0.5); blank, a grey picture in "
        "its place. With upload:jpeg=75 pictures go through JPEG.",
    ),
]
Norm = Annotated[Literal["linf", "l2"], typer.Option(help="Norm of the ball.")]
AttackSteps = Annotated[int, typer.Option(min=1, help="Steps of the attack.")]
Restarts = Annotated[int, typer.Option(min=1, help="Random starts of the attack; the worst result per sample counts.")]
Limit = Annotated[int, typer.Option(min=1, help="Test samples to use, drawn with the seed.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples at a time; results do not depend on it.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Length of an answer in tokens.", show_default="as the model was calibrated, else 16"),
]
# NumPy's own generator, which training seeds too, takes no larger seed.
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.")]
Heads = Annotated[
    Path | None,
    typer.Option(help="Folder of consistency heads.", show_default="cmcv/ in the model's folder or beside it"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run with the same settings.")]
Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress, on standard error.")]


def _read_device(device: str | None) -> str | None:
    if device is not None and re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise typer.BadParameter(f"{device!r} is not cpu, cuda or cuda:1")
    return device


Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, or cuda:1.", show_default="cuda if torch finds one, else cpu", callback=_read_device),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Precision of the model's weights.", show_default="the checkpoint's"),
]
Attention = Annotated[
    Literal["sdpa", "flash_attention_2"] | None,
    typer.Option(
        help="Attention kernels; flash_attention_2 needs flash-attn, CUDA and a 16-bit dtype.",
        show_default="sdpa if the model supports it",
    ),
]


def lister(show: Callable[[], None], help: str) -> Any:
    """A flag `--list` that needs no other option: it prints a list and exits."""

    def listed(wanted: bool) -> None:
        if wanted:
            show()
            raise typer.Exit

    return typer.Option("--list", callback=listed, is_eager=True, help=help)


def read_data(
    data: str, fields: Sequence[str] | None, split_seed: int | None, split: str | None, missing: int
) -> DataSource:
    """The data source of `--data`, `--map`, `--split-seed`, `--split` and `--missing`."""
    from cmai_fast.data.sources import DataSource

    return DataSource(data, pairs(",".join(fields or ()).split(","), "--map"), split_seed, split, missing)


def read_threat(norm: Literal["linf", "l2"], eps: str | None, threat: str | None = None) -> ThreatModel:
    """The threat model of `--norm`, `--eps` and `--threat`; None: the pixels that the processor has made.

    Raises:
        ValueError: eps is not a radius, or is missing for `l2`; an unknown threat or option of it.
    """
    return ThreatModel.parse(norm, eps, Surface.parse(threat or "input"))


def pairs(texts: Iterable[str], option: str) -> dict[str, str]:
    """`name=value` texts as a dict; empty ones are left out.

    Raises:
        ValueError: not of this form, or a name given twice.
    """
    found: dict[str, str] = {}
    for text in filter(None, (t.strip() for t in texts)):
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name or not value:
            raise ValueError(f"{option} {text}: expected NAME=VALUE")
        if name in found:
            raise ValueError(f"{option} {text}: {name} is given twice")
        found[name] = value
    return found


def check(
    models: Iterable[str] = (),
    data: DataSource | None = None,
    splits: Sequence[str] = ("test",),
    task: str | None = None,
    metrics: Iterable[str] | None = None,
    answers: bool = True,
    attacks: Iterable[str] | None = None,
) -> None:
    """Raises ValueError for wrong names and records, before PyTorch is loaded."""
    from cmai_fast.models import resolve

    for model in models:
        resolve(model)
    if task is not None:
        from cmai_fast.tasks import TASKS

        TASKS.check(task)
    for attack in attacks or ():
        from cmai_fast.attacks import ATTACKS

        ATTACKS.check(attack.partition(":")[0])
    for metric in metrics or ():
        from cmai_fast.metrics import METRICS

        METRICS.check(metric)
    if data is not None:
        data.check(*splits, answers=answers, images="train" not in splits)


def is_first() -> bool:
    """Whether this process prints the results: alone, or the first of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def is_stdout(out: Path | None, folder: str = "") -> bool:
    """Whether `--out` is `-`, standard output.

    Raises:
        ValueError: it is, and the command writes a folder (`folder` says what).
    """
    if out is not None and out == STDOUT and folder:
        raise ValueError(f"--out - is standard output, and this command writes a folder ({folder}); name one")
    return out == STDOUT

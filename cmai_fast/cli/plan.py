"""`cmai-fast plan`: predicted time and memory of a training step, from a model's config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cmai_fast.cli import options
from cmai_fast.cli.summary import print_path

EXAMPLE = "cmai-fast plan --model llava-hf/llava-1.5-7b-hf --gpu h200 --bits 4 --batch 8 --steps 2000 --price 3.50"


def plan(
    *,
    model: Annotated[
        str,
        typer.Option(help="A config.json, a bundled model, a model or run folder, or an id of the Hugging Face hub."),
    ],
    gpu: Annotated[
        Literal["h100", "h200", "a100", "4090", "cpu"], typer.Option(help="Kind of card; cpu is one thread.")
    ] = "h100",
    inner_steps: Annotated[int, typer.Option(min=1, help="K, steps of the inner problem.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Samples per card and step.")] = 8,
    bits: Annotated[Literal["none", "8", "4"], typer.Option(help="Quantisation of the language model.")] = "none",
    recompute: Annotated[
        Literal["none", "encoder", "selective", "full"], typer.Option(help="Activations that are recomputed.")
    ] = "none",
    trainable: Annotated[
        Literal["all", "vision"], typer.Option(help="Weights to train; with --bits the vision side's.")
    ] = "all",
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Precision.")] = "bfloat16",
    muon: Annotated[bool, typer.Option("--muon/--no-muon", help="Muon for matrices, not AdamW.")] = False,
    prompt: Annotated[int, typer.Option(min=0, help="Tokens of a prompt beside its image's.")] = 32,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 8,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of a side.", show_default="the config's, else 448")
    ] = None,
    tiles: Annotated[int, typer.Option(min=1, help="Tiles of that size that a picture is cut into.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="Cards, each with its own batch.")] = 1,
    sharded: Annotated[
        bool, typer.Option("--sharded", help="Shard the model over the cards (FSDP2); else each has a copy.")
    ] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="The inner problem's vision side as CUDA graphs.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of the training.")] = 1000,
    price: Annotated[float | None, typer.Option(help="Price of a card per hour, in any currency.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for the whole record; - is standard output.")] = None,
) -> None:
    """Predict seconds per step, peak memory and hours of a training; nothing is trained, and no weights are read."""
    if not Path(model).is_file():
        options.check([model])

    from cmai_fast.workflows import plan as workflow

    settings = workflow.PlanSettings(
        model=model, gpu=gpu, inner_steps=inner_steps, batch=batch, bits=None if bits == "none" else int(bits),
        recompute=recompute, trainable=trainable, dtype=dtype, muon=muon, prompt=prompt, answer=answer,
        image_size=image_size, tiles=tiles, gpus=gpus, sharded=sharded, cuda_graphs=cuda_graphs,
        steps=steps, price=price,
    )  # fmt: skip
    record = workflow.plan(settings)
    if not options.is_stdout(json):
        _show(record)
    if json is not None:
        from cmai_fast.evaluation.results import put_results

        put_results(record, json)
        if not options.is_stdout(json):
            print_path("Record", json)


def _show(record: dict[str, Any]) -> None:
    """The steps as they were asked for, then the memory and time of one of them in all other ways."""
    console, settings, model = Console(highlight=False), record["settings"], record["model"]
    millions = (model["vision_parameters"] / 1e6, model["language_parameters"] / 1e6)
    console.print(
        f"{millions[0]:,.1f} + {millions[1]:,.1f} million parameters (vision, language), {model['image_tokens']} of "
        f"{model['tokens']} tokens are an image's; {settings['gpus']} x {record['device']['name']}, predicted:"
    )
    costs = ("price",) if settings["price"] is not None else ()
    table = Table("step", *("full", "vision", "seconds", "x clean", "GiB"), "hours", *costs, box=box.SIMPLE_HEAD)
    for row in record["rows"]:
        if (row["bits"], row["recompute"]) == (settings["bits"], settings["recompute"]):
            money = () if row["price"] is None else (f"{row['price']:.2f}",)
            table.add_row(
                row["step"], f"{row['passes']['full_forward']:.3g}", f"{row['passes']['vision_forward']:.3g}",
                f"{row['seconds']:.3g}", f"{row['over_clean']:.2f}", _memory(row), f"{row['hours']:.3g}", *money,
            )  # fmt: skip
    console.print(table)
    others = [row for row in record["rows"] if row["step"] == "bridge R=0"]
    modes = list(dict.fromkeys(row["recompute"] for row in others))
    table = Table("bridge R=0, bits", *(f"recompute {mode}" for mode in modes), box=box.SIMPLE_HEAD)
    for bits in dict.fromkeys(row["bits"] for row in others):
        cells = [f"{row['seconds']:.3g} s, {_memory(row)}" for row in others if row["bits"] == bits]
        table.add_row(str(bits or "none"), *cells)
    console.print(table)
    key = "full, vision: forward passes of the whole model and of its vision side; !: more than the card has"
    if any(row["step"] == "cmai" for row in record["rows"]):
        key += "; cmai: what immunize does by default, the mean over a full step and those on S_c alone"
    console.print(key)
    for note in record["notes"]:
        console.print(f"Note: {note}.", markup=False)


def _memory(row: dict[str, Any]) -> str:
    return f"{row['peak_bytes'] / 2**30:.3g}{'' if row['fits'] else '!'}"

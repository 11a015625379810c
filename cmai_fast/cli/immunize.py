"""`cmai-fast immunize`: adversarial fine-tuning, and an evaluation before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cmai_fast.cli import lists, options
from cmai_fast.cli.summary import print_summary
from cmai_fast.threat import parse_eps

EXAMPLE = "cmai-fast immunize --model easyvqa-llava --data easyvqa --eps 8/255 --max-steps 500 --out runs/a"

_INNER, _ARM, _LOSS, _TRAINING, _EVALUATION = "Inner problem", "ARM", "Loss", "Training", "Evaluation"


def _step(name: str) -> Any:
    """The option for the step of a setting that ARM moves."""
    return typer.Option(
        help=f"Rise of {name} per optimiser step.", show_default="a twentieth of its range", rich_help_panel=_ARM
    )


def _of_defence(text: str, panel: str, *names: str, **settings: Any) -> Any:
    """An option whose default is the defence's."""
    return typer.Option(*names, help=text, show_default="that of the defence", rich_help_panel=panel, **settings)


def immunize(
    ctx: typer.Context,
    *,
    show: Annotated[bool, options.lister(lists.defences, "Show the defences.")] = False,
    model: options.Model = "easyvqa-llava",
    data: options.Data = "easyvqa",
    fields: options.Map = None,
    split_seed: options.SplitSeed = None,
    split: options.Split = None,
    missing: options.Missing = 0,
    task: options.Task = "vqa",
    defence: Annotated[
        str | None,
        typer.Option(
            help="What is trained; --list shows them.", show_default="cmai, or mbat for a dual encoder, as CLIP is"
        ),
    ] = None,
    eps: options.Eps = None,
    norm: options.Norm = "linf",
    out: Annotated[Path, typer.Option(help="Folder of the run: new or empty, or one to --resume.")],
    resume: options.Resume = False,
    inner: Annotated[
        Literal["bridge", "pgd", "fgsm", "none"] | None,
        _of_defence("Solver of the inner problem; none: L_task of clean images alone.", _INNER),
    ] = None,
    inner_steps: Annotated[int | None, _of_defence("K, steps of the inner problem.", _INNER, "--steps", min=1)] = None,
    refreshes: Annotated[
        int | None, _of_defence("R, refreshes of the bridge gradient, at most K.", _INNER, min=0)
    ] = None,
    alpha: Annotated[float, typer.Option(help="Weight of the task loss in the attack.", rich_help_panel=_INNER)] = 1.0,
    beta: Annotated[float | None, _of_defence("Weight of consistency in the attack, where ARM starts.", _INNER)] = None,
    consistency_steps: Annotated[
        int | None,
        _of_defence("Steps on S_c alone after each full step; they run the vision side only.", _INNER, min=0),
    ] = None,
    anchor: Annotated[
        float | None,
        _of_defence("Weight, in steps on S_c alone, of how far features are from those before training.", _LOSS),
    ] = None,
    arm: Annotated[
        bool | None,
        _of_defence("Let ARM raise beta, eps and lam while S_c of adversarial images is low.", _ARM, "--arm/--no-arm"),
    ] = None,
    tau_train: Annotated[
        float | None,
        typer.Option(
            help="Mean S_c of adversarial images below which ARM acts.",
            show_default="clean mean - 0.5 standard deviations",
            rich_help_panel=_ARM,
        ),
    ] = None,
    variance_max: Annotated[
        float | None,
        typer.Option(
            help="Variance of S_c of adversarial images above which ARM acts; 1: none.",
            show_default="1.5 times the clean variance",
            rich_help_panel=_ARM,
        ),
    ] = None,
    beta_max: Annotated[
        float, typer.Option(help="Bound of beta; at most beta: it is not moved.", rich_help_panel=_ARM)
    ] = 1.0,
    beta_step: Annotated[float | None, _step("beta")] = None,
    eps_max: Annotated[
        str | None,
        typer.Option(help="Bound of eps, such as 12/255.", show_default="eps is not moved", rich_help_panel=_ARM),
    ] = None,
    eps_step: Annotated[str | None, _step("eps")] = None,
    lam_max: Annotated[
        float | None, typer.Option(help="Bound of lam.", show_default="lam is not moved", rich_help_panel=_ARM)
    ] = None,
    lam_step: Annotated[float | None, _step("lam")] = None,
    lam: Annotated[float | None, _of_defence("Weight of the adversarial branch, 0 to 1.", _LOSS)] = None,
    gamma: Annotated[float | None, _of_defence("Weight of the contrastive loss.", _LOSS)] = None,
    trainable: Annotated[Literal["all", "vision"] | None, _of_defence("Weights to train.", _TRAINING)] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.", rich_help_panel=_TRAINING)] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per step.", rich_help_panel=_TRAINING)] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=_TRAINING)] = 5e-4,
    muon: Annotated[
        bool,
        typer.Option("--muon/--no-muon", help="Train matrices by Muon, not AdamW.", rich_help_panel=_TRAINING),
    ] = False,
    recompute: Annotated[
        Literal["none", "encoder", "selective", "full"],
        typer.Option(help="Activations that are recomputed, not stored: less memory.", rich_help_panel=_TRAINING),
    ] = "none",
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="Launch the vision side of the inner problem as CUDA graphs.",
            show_default="where that is possible: a GPU, recompute none",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    eps_warmup: Annotated[
        float, typer.Option(help="Share of training over which eps rises from 0.", rich_help_panel=_TRAINING)
    ] = 0.2,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=_TRAINING)] = 100,
    attack_steps: Annotated[int, typer.Option(min=1, help="Steps of PGD.", rich_help_panel=_EVALUATION)] = 50,
    restarts: Annotated[int, typer.Option(min=1, help="Random starts of PGD.", rich_help_panel=_EVALUATION)] = 2,
    limit: Annotated[int, typer.Option(min=1, help="Test samples.", rich_help_panel=_EVALUATION)] = 500,
    max_new_tokens: options.MaxNewTokens = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    attention: options.Attention = None,
    progress: options.Progress = True,
) -> None:
    """Train a model against attacks, then attack it before and after.

    Writes model/ (a plain transformers folder), cmcv/ (verifier and threshold), results.json and report.html.
    """
    threat = options.read_threat(norm, eps)
    largest = None if eps_max is None else parse_eps(eps_max, norm, "--eps-max")
    rise = None if eps_step is None else parse_eps(eps_step, norm, "--eps-step")
    options.is_stdout(out, "model, results and report")
    source = options.read_data(data, fields, split_seed, split, missing)

    from cmai_fast.defences import DEFENCES

    if defence is not None:
        DEFENCES.check(defence)
    options.check([model], source, ("train", "calibration", "test"), task)

    from cmai_fast.workflows import immunize as workflow

    settings = workflow.ImmunizeSettings(
        model=model, data=data, fields=dict(source.fields), split_seed=split_seed, split=split, missing=missing,
        task=task, defence=defence, eps=threat.eps, norm=norm, inner=inner, inner_steps=inner_steps,
        refreshes=refreshes, alpha=alpha, beta=beta, consistency_steps=consistency_steps, anchor=anchor, lam=lam,
        gamma=gamma, arm=arm, tau_train=tau_train, variance_max=variance_max, beta_max=beta_max, beta_step=beta_step,
        eps_max=largest, eps_step=rise, lam_max=lam_max, lam_step=lam_step, trainable=trainable, max_steps=max_steps,
        batch_size=batch_size, learning_rate=learning_rate, muon=muon, recompute=recompute, cuda_graphs=cuda_graphs,
        eps_warmup=eps_warmup, seed=seed, attack_steps=attack_steps, restarts=restarts, limit=limit,
        max_new_tokens=max_new_tokens, save_steps=save_steps, device=device, dtype=dtype, attention=attention,
        command=ctx.obj,
    )  # fmt: skip
    results = workflow.immunize(settings, out, resume=resume, progress=progress)
    print_summary(results, out)

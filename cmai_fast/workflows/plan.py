"""What a training step of a model would take: time, memory and money, before anyone spends them.

PyTorch is imported once the settings are known to be right.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cmai_fast.evaluation.devices import DEVICES

CMAI = "cmai"  # the defence
BITS = (None, 8, 4)
DTYPES = {"bfloat16": 2, "float32": 4}
RECOMPUTE = ("none", "encoder", "selective", "full")
TRAINABLE = ("all", "vision")
_LEAST = dict.fromkeys(("inner_steps", "batch", "answer", "image_size", "tiles", "gpus", "steps"), 1) | {"prompt": 0}


@dataclass
class PlanSettings:
    """`model`: as for `resolve`, or a `config.json`; its weights are not read. `batch` samples per card, with `prompt`
    and `answer` tokens each beside those of the image (`image_size`, `tiles`: as of `model_sizes`).

    `bits`, `recompute`, `trainable`, `muon`, `cuda_graphs` and `inner_steps` are as in training; the record has all
    `bits` and `recompute`. `steps` of training and the `price` per card and hour give hours and money.
    """

    model: str
    gpu: str = "h100"
    inner_steps: int = 10
    batch: int = 8
    bits: int | None = None
    recompute: str = "none"
    trainable: str = "all"
    dtype: str = "bfloat16"
    muon: bool = False
    prompt: int = 32
    answer: int = 8
    image_size: int | None = None
    tiles: int = 1
    gpus: int = 1
    sharded: bool = False
    cuda_graphs: bool = False
    steps: int = 1000
    price: float | None = None

    def __post_init__(self) -> None:
        choices = {"gpu": DEVICES, "bits": BITS, "dtype": DTYPES, "recompute": RECOMPUTE, "trainable": TRAINABLE}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, known))}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise ValueError(f"price is {self.price}; expected the price of one card for an hour, at least 0")
        if self.sharded and (self.bits or self.muon or self.gpus < 2):
            what = "gpus is 1" if self.gpus < 2 else f"bits is {self.bits}" if self.bits else "muon is set"
            raise ValueError(
                f"sharded is set and {what}; FSDP2 here shards 16- or 32-bit weights over several cards, with AdamW"
            )
        if self.cuda_graphs and (self.gpu == "cpu" or self.recompute != "none"):
            what = "gpu is 'cpu'" if self.gpu == "cpu" else f"recompute is {self.recompute!r}"
            raise ValueError(f"cuda_graphs is set and {what}; expected a card, and recompute 'none'")


def plan(settings: PlanSettings) -> dict[str, Any]:
    """The record of `cmai-fast plan`: `rows` of (bits, recompute, step), predicted.

    Raises:
        ValueError: no such model, or one whose cost is not known (`model_sizes`).
    """
    from cmai_fast.evaluation.sizes import model_sizes
    from cmai_fast.evaluation.versions import versions

    device = DEVICES[settings.gpu]
    sizes = model_sizes(
        _config(settings.model),
        prompt=settings.prompt,
        answer=settings.answer,
        image_size=settings.image_size,
        tiles=settings.tiles,
    )
    notes = [
        "steps but cmai and consistency are without S_c (beta and gamma 0); with heads, the default of MBATTrainer, "
        "they also read the texts, and keep the clean images' activations to their end",
        *sizes.notes,
    ]
    if not device.measured:
        notes.append(
            f"no step was ever measured on {settings.gpu} ({device.name}): its data sheet, at the shares that an H200 "
            "reached"
        )
    if settings.gpus > 1:
        notes.append("several cards were never measured")
    if settings.bits and settings.trainable == "all":
        notes.append("a quantised language model does not learn: the vision side alone is trained")
    return {
        "settings": asdict(settings),
        "device": {"name": device.name, "measured": device.measured, "memory_bytes": device.memory},
        "model": {
            "vision_parameters": sizes.vision.weights,
            "language_parameters": sizes.language.weights,
            "vision_forward_flops": sizes.vision.flops,
            "language_forward_flops": sizes.language.flops,
            "image_tokens": sizes.image_tokens,
            "tokens": sizes.tokens,
        },
        "rows": _rows(sizes, settings),
        "notes": notes,
        "versions": versions(),
    }


def _rows(sizes: Any, settings: PlanSettings) -> list[dict[str, Any]]:
    from cmai_fast.defences import DEFENCES
    from cmai_fast.evaluation.cost import SOLVERS, STATEMENTS, Training, mean_cost, step_cost
    from cmai_fast.mbat.passes import StepSettings

    rows, cmai = [], DEFENCES[CMAI].values
    scored = not settings.sharded and sizes.tokens  # a verifier, which neither FSDP2 nor a dual encoder has
    for bits in BITS[:1] if settings.sharded else BITS:
        for recompute in RECOMPUTE[:1] if settings.cuda_graphs else RECOMPUTE:
            how = Training(
                DEVICES[settings.gpu], settings.batch, DTYPES[settings.dtype], bits, settings.trainable, recompute,
                settings.muon, settings.gpus, settings.sharded, settings.cuda_graphs,
            )  # fmt: skip
            costs = {}
            for name, fields in SOLVERS.items():
                if fields is None or (settings.sharded and "objective" in fields):  # training refuses it
                    continue
                if fields.get("refreshes", 0) <= settings.inner_steps:
                    step = StepSettings(inner_steps=settings.inner_steps, gamma=0.0, **fields)
                    costs[name] = step_cost(sizes, how, step), 1
            if scored:
                step, count = StepSettings.of(cmai), cmai["consistency_steps"]
                full, alone = (step_cost(sizes, how, step, statements=STATEMENTS, alone=a) for a in (False, True))
                costs["consistency"] = alone, 1
                costs[CMAI] = mean_cost(full, alone, count), 1 + count
            clean = costs["clean"][0].seconds
            for name, (cost, steps) in costs.items():
                hours = cost.seconds * settings.steps / 3600
                rows.append(
                    {
                        "bits": bits, "recompute": recompute, "step": name,
                        "passes": {k: v / steps for k, v in vars(cost.passes.total).items()},
                        "seconds": cost.seconds, "over_clean": cost.seconds / clean, "peak_bytes": cost.peak,
                        "fits": cost.peak <= DEVICES[settings.gpu].memory, "hours": hours,
                        "price": None if settings.price is None else hours * settings.gpus * settings.price,
                    }
                )  # fmt: skip
    return rows


def _config(model: str) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from cmai_fast.models.loading import read_config

    if not Path(model).is_file():
        return read_config(model)[1]
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:  # the last: a field has a value of another type
        raise ValueError(f"{model} is not the config of a model that transformers knows: {error}") from error

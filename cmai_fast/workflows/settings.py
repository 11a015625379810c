"""The settings of an immunisation. PyTorch is not imported here, so that a command checks them first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cmai_fast.data.sources import DataSource

OF_DEFENCE = (
    "inner", "inner_steps", "refreshes", "beta", "consistency_steps", "anchor", "lam", "gamma", "arm", "trainable",
)  # fmt: skip


@dataclass
class ImmunizeSettings:
    """One immunisation. `eps` in the [0, 1] pixel range; `max_steps` are optimiser steps of `batch_size` samples.

    `data`, `fields`, `split_seed`, `split` and `missing` are those of a `DataSource`. `defence` is a name of
    `DEFENCES`; None: `cmai`, or `mbat` for a dual encoder, which has no verifier. The fields of `OF_DEFENCE` that are
    None are those of the defence, else of `MBATConfig`; another field that a defence sets is its own if it is left at
    its default. `max_new_tokens` None: that of the threshold's calibration, else 16. `tau_train` and what follows it
    are those of `MBATConfig`. `cuda_graphs` None: where they can be used.
    """

    model: str = "easyvqa-llava"
    data: str = "easyvqa"
    fields: Mapping[str, str] = field(default_factory=dict)
    split_seed: int | None = None
    split: str | None = None
    missing: int = 0
    task: str = "vqa"
    defence: str | None = None
    eps: float = 8 / 255
    norm: str = "linf"
    inner: str | None = None
    inner_steps: int | None = None
    refreshes: int | None = None
    alpha: float = 1.0
    beta: float | None = None
    consistency_steps: int | None = None
    anchor: float | None = None
    lam: float | None = None
    gamma: float | None = None
    arm: bool | None = None
    tau_train: float | None = None
    variance_max: float | None = None
    beta_max: float | None = 1.0
    beta_step: float | None = None
    eps_max: float | None = None
    eps_step: float | None = None
    lam_max: float | None = None
    lam_step: float | None = None
    trainable: str | None = None
    max_steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 5e-4
    muon: bool = False
    recompute: str = "none"
    cuda_graphs: bool | None = None
    eps_warmup: float = 0.2
    seed: int = 0
    attack_steps: int = 50
    restarts: int = 2
    limit: int = 500
    max_new_tokens: int | None = None
    save_steps: int = 100
    calibration_samples: int = 1000
    device: str | None = None
    dtype: str | None = None
    attention: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        for name, kind in self.__annotations__.items():
            value: Any = getattr(self, name)
            if not kind.startswith("int") or (value is None and kind == "int | None"):
                continue
            least = 0 if name in ("refreshes", "consistency_steps", "seed", "split_seed", "missing") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected above 0, finite")

    @property
    def source(self) -> DataSource:
        return DataSource(self.data, self.fields, self.split_seed, self.split, self.missing)

"""The operators of `torch.ops.cmai_fast`, with documented signatures, and the choice of the backend."""

from cmai_fast.ops.backend import backend_report, chosen_backend
from cmai_fast.ops.cpu import build_report
from cmai_fast.ops.operators import (
    apgd_l2_step_,
    apgd_linf_step_,
    cosine_heads,
    gated_activation,
    info_nce,
    pgd_l2_step_,
    pgd_linf_step_,
    random_start_,
)

__all__ = [
    "apgd_l2_step_",
    "apgd_linf_step_",
    "backend_report",
    "build_report",
    "chosen_backend",
    "cosine_heads",
    "gated_activation",
    "info_nce",
    "pgd_l2_step_",
    "pgd_linf_step_",
    "random_start_",
]

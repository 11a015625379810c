"""Models sharded over processes by FSDP2 (`torch.distributed.fsdp.fully_shard`).

FSDP2 gathers parameters at the start of a module's `forward`, and reduces gradients at the end of a backward pass. A
step of MBAT also runs parts of the model outside `forward` and has two backward passes, and attacks backpropagate to
the pixels only. The functions here make this work; for a model that is not sharded they do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from cmai_fast.bridge import ModelBridge
from cmai_fast.mbat.parts import REMEDIES

T = TypeVar("T")


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def run_through_root(bridge: ModelBridge) -> None:
    """Makes `bridge` run E_v and E_t as methods of the sharded model, which gather its parameters as `forward` does."""
    model = bridge.model
    if not is_sharded(model) or hasattr(model, "mbat_encode_image"):
        return
    for name in ("encode_image", "encode_text"):
        setattr(model, f"mbat_{name}", getattr(bridge, name))
        register_fsdp_forward_method(model, f"mbat_{name}")
        setattr(bridge, name, getattr(model, f"mbat_{name}"))


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Inside, backward passes reduce no gradients; those of earlier micro-batches wait for a training pass."""
    if not isinstance(model, FSDPModule):
        yield
        return
    reshard(model)  # else `frozen` would freeze gathered parameters, and later ones would not be frozen
    groups = [g for m in _units(model) for g in m._get_fsdp_state()._fsdp_param_groups]
    before = [(g.reduce_grads, g.all_reduce_grads) for g in groups]
    try:
        model.set_requires_gradient_sync(False)
        yield
    finally:
        for group, (reduce, all_reduce) in zip(groups, before, strict=True):
            group.reduce_grads, group.all_reduce_grads = reduce, all_reduce


def reshard(model: nn.Module) -> None:
    """Frees gathered parameters: those of the root outlive a forward pass, and would outlive the optimizer's step."""
    for unit in _units(model):
        unit.reshard()


def whole_or_not(run: Callable[[], T], what: str = "A sharded model's step") -> T:
    """The result of `run`, a step that cannot be split: processes that share a model synchronise at every layer.

    Raises:
        torch.OutOfMemoryError: the message says what to do.
    """
    try:
        return run()
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{str(error).splitlines()[0]} {what} cannot be split: halve per_device_train_batch_size and double "
            f"gradient_accumulation_steps, {REMEDIES}"
        ) from error


def load(model: nn.Module, state: dict[str, Any], *, strict: bool) -> None:
    """`load_state_dict` of whole tensors, from the first process."""
    if is_sharded(model):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
        set_model_state_dict(model, state, options=options)
    else:
        model.load_state_dict(state, strict=strict)


def fill(parameter: Tensor, values: Tensor) -> None:
    """`parameter.copy_(values)`; each process copies its shard. All processes have the values."""
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values.to(parameter), parameter.device_mesh, parameter.placements)
    parameter.copy_(values)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Loads the optimizer state of a sharded model, as accelerate saved it; the first process reads it.

    Accelerate's own loading refuses parameters without state, which never had a gradient, such as the
    last norm of LLaVA's vision tower.
    """
    state = torch.load(file, map_location="cpu", weights_only=True) if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True, strict=False)
    set_optimizer_state_dict(model, optimizer, state, options=options)


def plain_class(model: nn.Module) -> Any:
    """The class of the model before `fully_shard` added `FSDPModule`."""
    return type(model).__mro__[2] if is_sharded(model) else type(model)


def whole(parameters: list[Tensor]) -> list[Tensor]:
    """The parameters that are not sharded; FSDP2 does not average their gradients."""
    return [p for p in parameters if not isinstance(p, DTensor)]


def _units(model: nn.Module) -> list[FSDPModule]:
    return [m for m in model.modules() if isinstance(m, FSDPModule)]

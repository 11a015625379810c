"""PEFT adapters (LoRA) in training: which parameters are theirs, and how they are loaded from a checkpoint.

There are two ways to add them: `model.add_adapter(config)` puts them into the layers; `get_peft_model(model, config)`
also puts a wrapper around the model. In both cases `save_pretrained` writes only the adapters and `modules_to_save`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cmai_fast.mbat.shards import fill

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def has_adapters(model: Any) -> bool:
    """Whether the model is a `PeftModel`, or one of `transformers` with adapters in it."""
    return bool(getattr(model, "peft_config", None))


def train_only(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Makes only `parameters` trainable; with adapters, only those of them that already were."""
    keep = set(parameters)
    if has_adapters(model):
        keep = {p for p in keep if p.requires_grad}
    for p in model.parameters():
        p.requires_grad_(p in keep)


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that `save_pretrained` writes: all of the adapters, and the copies of `modules_to_save`."""
    if not has_adapters(model):
        return set()
    places = {tensor.data_ptr() for tensors in _saved(model).values() for tensor in tensors.values()}
    return {p for p in model.parameters() if p.data_ptr() in places}


def low_rank_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that adapters add beside a layer's own weight, without the whole layers of `modules_to_save`."""
    if not has_adapters(model):
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    parts = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names if hasattr(layer, name)]
    return {p for part in parts if isinstance(part, nn.Module) for p in part.parameters()}


def check_adapters_learn(model: nn.Module) -> None:
    """Raises ValueError if adapters are frozen but the copies of `modules_to_save` learn. `from_pretrained` loads a
    folder of adapters in this state, and a run would train only a fraction of the intended parameters."""
    low_rank = low_rank_parameters(model)
    if low_rank and not any(p.requires_grad for p in low_rank) and any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "the model's adapters are frozen, and only other parameters would learn. To continue with loaded adapters, "
            "load them with PeftModel.from_pretrained(base, folder, is_trainable=True), or base.load_adapter(folder, "
            "is_trainable=True)"
        )


def check_saving(model: Any, folder: Path) -> None:
    """Raises ValueError if `from_pretrained(folder)` would not restore `model` after it is saved there.

    Either a trainable parameter is not saved with the adapters; or the folder holds an older model, which would be
    taken for the adapters' base, or older adapters, which would be put into the model.
    """
    if not has_adapters(model):
        if (folder / CONFIG).is_file():
            raise ValueError(
                f"{folder} holds adapters, which from_pretrained would put into the model that is saved there; choose "
                f"another folder, or remove {CONFIG} and {WEIGHTS}"
            )
        return
    base = next(iter(model.peft_config.values())).base_model_name_or_path
    if (folder / "config.json").is_file() and not (base and Path(base).resolve() == folder.resolve()):
        raise ValueError(
            f"{folder} holds a whole model, which from_pretrained would take for that of the adapters ({base}) when "
            "they are saved there; choose another folder"
        )
    saved = adapter_parameters(model)
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p not in saved]
    if lost:
        raise ValueError(
            f"{len(lost)} trainable parameters are not part of the saved adapter ({lost[0]}, ...): {WEIGHTS} "
            "would not hold them. Name their modules in modules_to_save of the adapter's config, or freeze them by "
            "requires_grad_(False)"
        )


@torch.no_grad()
def load_adapters(folder: Path, model: nn.Module) -> None:
    """Gives the adapters of `model` the values that were saved in `folder`.

    Raises:
        ValueError: no adapters there, or those of another model or config.
    """
    for name, tensors in _saved(model).items():
        path = folder / name / WEIGHTS
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist, and the model has adapters; resume from a checkpoint of a model with the same "
                "adapters"
            )
        found = load_file(path)
        wrong = sorted(
            key
            for key in tensors.keys() | found.keys()
            if key not in tensors or key not in found or tensors[key].shape != found[key].shape
        )
        if wrong:
            raise ValueError(
                f"the adapters in {path} do not fit those of the model: {len(wrong)} tensors are missing, unknown or "
                f"of another shape ({wrong[0]}, ...); resume with the same adapter config"
            )
        for key, tensor in tensors.items():
            fill(tensor, found[key])


def _saved(model: Any) -> dict[str, dict[str, Tensor]]:
    """What `save_pretrained` writes, by folder and name in the file; the tensors share the parameters' memory."""
    from peft import PeftModel, get_peft_model_state_dict

    wrapped = isinstance(model, PeftModel)
    files = {}
    for name in model.peft_config if wrapped else model.active_adapters()[:1]:  # transformers saves one, the active
        state = get_peft_model_state_dict(model, adapter_name=name)
        folder = name if wrapped and name != "default" else ""
        prefix = "" if wrapped else "base_model.model."
        files[folder] = {f"{prefix}{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    return files

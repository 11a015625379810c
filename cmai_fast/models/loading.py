"""Loads a model and its processor, on the device and in the precision that the user chooses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    TrOCRProcessor,
    VisionEncoderDecoderConfig,
)

from cmai_fast.models import photos as photos  # registers a model for the Auto classes
from cmai_fast.models import resolve

ATTENTIONS = ("sdpa", "flash_attention_2")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load_model(
    name: str | Path, *, device: str | None = None, dtype: Any = None, attention: str | None = None, **kwargs: Any
) -> tuple[Any, Any]:
    """(model, processor), the model in evaluation mode; by `from_pretrained`, so older parameter names and sharded
    weights work.

    Args:
        name: as for `resolve`.
        device: None: cuda if torch finds one, else cpu.
        dtype: None: that of the checkpoint.
        attention: None: SDPA if the model supports it. "flash_attention_2" needs flash-attn, CUDA and a 16-bit dtype.
        kwargs: for the model's `from_pretrained`, such as `device_map` or `quantization_config`, which override
            `device`.

    Raises:
        ValueError: no such model, not an image-text model, weights that are incomplete, damaged or not safetensors, or
            an unavailable device or attention.
    """
    where, config = read_config(name)
    kinds = (AutoModelForImageTextToText, AutoModelForZeroShotImageClassification)
    kind = next((kind for kind in kinds if type(config) in kind._model_mapping), None)
    if kind is None:
        raise ValueError(
            f"cannot load the model {str(name)!r}: its config is a {type(config).__name__} (model_type "
            f"{config.model_type!r}), which is not an image-text model of transformers (expected one of "
            f"{' or '.join(k.__name__ for k in kinds)})"
        )
    target = chosen_device(device)
    if attention is not None:
        _check_attention(attention, target, dtype or config.dtype or torch.float32)
        kwargs["attn_implementation"] = attention
    try:
        processor = _processor(where, config)
        model, report = kind.from_pretrained(
            where, **{**kwargs, "dtype": dtype or "auto", "use_safetensors": True, "output_loading_info": True}
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ValueError(f"cannot load the model {str(name)!r}: {reason(where, error)}") from error
    if report["missing_keys"]:  # they would be random numbers
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"cannot load the model {str(name)!r}: it lacks the weights {missing[:3]}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        )
    if not {"device_map", "quantization_config"} & set(kwargs):
        model.to(target)
    return model.eval(), processor


def _processor(where: str | Path, config: Any) -> Any:
    """The processor; of an encoder-decoder, whose folder has none of its own, image processor and tokenizer in one."""
    if not isinstance(config, VisionEncoderDecoderConfig):
        return AutoProcessor.from_pretrained(where, trust_remote_code=False)
    images = AutoImageProcessor.from_pretrained(where, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    if tokenizer.pad_token is None:  # GPT-2's
        tokenizer.pad_token = tokenizer.eos_token
    return TrOCRProcessor(images, tokenizer)


def read_config(name: str | Path) -> tuple[str | Path, Any]:
    """(location, config) of a model, of any kind that `transformers` knows.

    Raises:
        ValueError: no such model.
    """
    where = resolve(name)
    try:
        return where, AutoConfig.from_pretrained(_base(where), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {str(name)!r}: {reason(where, error)}") from error


def is_dual_encoder(name: str | Path) -> bool:
    """Whether a model chooses its answers among texts, by its config; another writes them.

    Raises:
        ValueError: no such model.
    """
    _, config = read_config(name)
    return type(config) not in AutoModelForImageTextToText._model_mapping


def _base(where: str | Path) -> str | Path:
    """The base model of a folder of adapters; else `where` itself."""
    folder = Path(where)
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return where
    base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder / 'adapter_config.json'} names no base_model_name_or_path; add the base model")
    return base


def find_heads(name: str | Path) -> Path | None:
    """The folder `cmcv` of consistency heads that belongs to a model: in its folder or repository, or beside it.

    Raises:
        ValueError: no such model.
    """
    where = resolve(name)
    if not Path(where).is_dir():
        try:
            where = snapshot_download(str(where), allow_patterns=["cmcv/*"])
        except (OSError, HfHubHTTPError) as error:
            raise ValueError(f"cannot load the model {str(name)!r}: {reason(where, error)}") from error
    places = (Path(where) / "cmcv", Path(where).parent / "cmcv")
    return next((place for place in places if place.is_dir()), None)


def chosen_device(device: str | None) -> torch.device:
    """`device`, or cuda if torch finds one, else the CPU.

    Raises:
        ValueError: not the name of a device, or the device is unavailable.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; expected cpu, cuda or cuda:1") from None
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= seen:
        raise ValueError(f"device is {device!r}, and torch {torch.__version__} sees {seen} CUDA devices; name another")
    return found


def _check_attention(attention: str, device: torch.device, dtype: Any) -> None:
    if attention not in ATTENTIONS:
        raise ValueError(f"attention is {attention!r}; expected one of {', '.join(ATTENTIONS)}")
    if attention != "flash_attention_2":
        return
    if device.type != "cuda":
        raise ValueError(f"flash_attention_2 runs on CUDA devices only, and the device is {device}; use sdpa")
    if str(dtype).removeprefix("torch.") not in ("float16", "bfloat16"):
        raise ValueError(
            f"flash_attention_2 takes float16 and bfloat16, and the model is in {dtype}; set dtype, or use sdpa"
        )
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "flash_attention_2 needs the package flash-attn, which is not installed: pip install 'cmai-fast[flash]', "
            "or use sdpa"
        )


def reason(where: str | Path, error: BaseException) -> str:
    """The cause of a failed load in one sentence."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    found = {type(c) for c in causes}
    if GatedRepoError in found:
        return f"access to {where} is restricted; accept its terms on the hub, then log in (hf auth login)"
    if RepositoryNotFoundError in found:
        return f"the hub has no model {where}, or it is private; check the spelling, or log in (hf auth login)"
    if isinstance(where, str) and any(issubclass(kind, (LocalEntryNotFoundError, ConnectionError)) for kind in found):
        return f"the hub cannot be reached, and {where} is not in the cache; check the connection, or name a folder"
    if "model.safetensors" in str(error):
        files = sorted({path.name for pattern in _PICKLES for path in Path(where).glob(pattern)})
        return (
            f"it holds no *.safetensors{f', only {files}' if files else ''}: a pickle (*.bin) runs code when it is "
            "read and is refused. Save the model with save_pretrained, which writes safetensors"
        )
    if isinstance(error, SafetensorError):
        return f"its weights are damaged ({error}); copy or save them again"
    return " ".join(str(error).split()).partition(". ")[0]  # the rest is advice for other cases

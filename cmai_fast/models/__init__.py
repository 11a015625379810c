"""The bundled models, each an ordinary `transformers` folder, and how a model is named."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

_HERE = Path(__file__).parent
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

BUNDLED = tuple(
    sorted(file.parent.name for file in _HERE.glob("[!.]*/config.json") if file.parent.suffix != ".partial")
)


def resolve(name_or_path: str | Path) -> str | Path:
    """The location of a model, as `from_pretrained` takes it.

    Args:
        name_or_path: a bundled model's name, the folder of a `transformers` model or of adapters (LoRA), the folder of
            a run (its `model/` is used), or a model id of the Hugging Face hub (`owner/name`).

    Returns:
        A folder; or the id, unchanged, if it has the form of one and no such folder exists. A bundled name takes
        precedence over a folder of the same name: write `./name` for the folder.

    Raises:
        ValueError: a name that is none of these (the bundled models are listed), a folder without a model, or
            adapters while PEFT is not installed.
    """
    name = str(name_or_path)
    if name in BUNDLED:
        return _HERE / name
    folder = Path(name_or_path)
    if name and folder.is_dir():
        for candidate in (folder, folder / "model"):
            if is_model(candidate):
                return candidate
        raise ValueError(f"no config.json in {folder} or in {folder / 'model'}; name the folder of a model or of a run")
    if isinstance(name_or_path, str) and _HUB_ID.fullmatch(name):
        return name
    raise ValueError(
        f"unknown model {name!r}: it is not a bundled model ({', '.join(BUNDLED) or 'none is installed'}), an existing "
        "folder or an id of the Hugging Face hub (owner/name). Check the spelling, or name a local folder or hub id"
    )


def is_model(folder: Path) -> bool:
    """Whether the folder holds a model, or adapters (which name their base model).

    Raises:
        ValueError: adapters alone, and PEFT is not installed.
    """
    if (folder / "config.json").is_file():
        return True
    if not (folder / "adapter_config.json").is_file():
        return False
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"{folder} holds adapters, which need PEFT; pip install 'cmai-fast[lora]'")
    return True

"""The models that come with the library, each an ordinary `transformers` folder, and how a model is named."""

from __future__ import annotations

import re
from pathlib import Path

_HERE = Path(__file__).parent
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

BUNDLED = tuple(
    sorted(file.parent.name for file in _HERE.glob("[!.]*/config.json") if file.parent.suffix != ".partial")
)


def resolve(name_or_path: str | Path) -> str | Path:
    """Where a model is: what `from_pretrained` takes.

    Args:
        name_or_path: a bundled model's name, the folder of a `transformers` model, the folder of a run (its `model/` is
            meant), or a model id of the Hugging Face hub (`owner/name`).

    Returns:
        A folder; or the id, unchanged, where it has the form of one and no such folder exists. Bundled names come
        before folders of the same name: write `./name` for the folder.

    Raises:
        ValueError: a name that is none of these, or a folder without a model; names what is known.
    """
    name = str(name_or_path)
    if name in BUNDLED:
        return _HERE / name
    folder = Path(name_or_path)
    if name and folder.is_dir():
        for candidate in (folder, folder / "model"):
            if (candidate / "config.json").is_file():
                return candidate
        raise ValueError(f"no config.json in {folder} or in {folder / 'model'}; name the folder of a model or of a run")
    if isinstance(name_or_path, str) and _HUB_ID.fullmatch(name):
        return name
    raise ValueError(
        f"unknown model {name!r}: it is no bundled model ({', '.join(BUNDLED) or 'none is installed'}), no folder that "
        "exists, and no id of the Hugging Face hub (owner/name). Check the spelling, or name a local folder or hub id"
    )

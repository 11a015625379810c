"""Photo-like scenes with captions: cut-out photos on photos of landscapes, from Debian packages.

    apt-get download tuxpaint-stamps-default lomiri-wallpapers-16.04 mate-backgrounds
    for f in *.deb; do dpkg-deb --extract $f debs; done
    python benchmarks/recipes/scenes.py --share debs/usr/share --out runs/scenes

Writes `runs/scenes/metadata.jsonl` and PNG files of 160 x 160, an `imagefolder`: `--data runs/scenes --split-seed 0`.
Each scene is a crop of a background with one to three stamps of Tux Paint (GPL-2; animals, food, plants, tools,
vehicles and the like; no cartoons, letters or signs) of different sizes and places; its caption names them. Backgrounds
are the photos of both wallpaper packages (CC-BY, CC-BY-SA, CC0, GPL-2+). Nothing of these is in cmai_fast. Scene number
i depends on (seed, i) only, so an interrupted run resumes when it is repeated.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps
from rich.progress import track

from cmai_fast.files import write_bytes, write_text

SIZE = 160
WITHOUT = ("cartoon", "symbols", "flags", "roadsigns", "naturalforces", "space", "maps")
PHOTOS = ("*.jpg", "mate/nature/*.jpg")


def stamps(share: Path) -> dict[Path, str]:
    """The cut-out photos, with their names in English."""
    found = {}
    for picture in sorted((share / "tuxpaint" / "stamps").rglob("*.png")):
        said = picture.with_suffix(".txt")
        if said.is_file() and not any(part in WITHOUT for part in picture.parts):
            first = said.read_text(encoding="utf-8", errors="replace").splitlines()[0]
            name = re.sub(r"\s*\(.*?\)", "", first).strip(" .!").lower()
            if name and "=" not in name:
                found[picture] = name
    return found


def scene(number: int, seed: int, cutouts: dict[Path, str], photos: list[Path]) -> tuple[Image.Image, str]:
    """A scene (SIZE x SIZE) and its caption."""
    draw = random.Random(f"{seed}-{number}")
    with Image.open(draw.choice(photos)) as file:
        file.draft("RGB", (4 * SIZE, 4 * SIZE))  # JPEG decodes small at once
        back = file.convert("RGB")
    side = round(min(back.size) * draw.uniform(0.3, 1.0))
    left, top = (draw.randint(0, length - side) for length in back.size)
    back = back.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    back = ImageEnhance.Brightness(back).enhance(draw.uniform(0.6, 1.2))
    names = []
    for picture in draw.sample(list(cutouts), draw.choice((1, 1, 2, 3))):
        with Image.open(picture) as file:
            stamp = file.convert("RGBA")
        stamp = stamp.crop(stamp.getchannel("A").getbbox())
        share = draw.uniform(0.35, 0.95) if not names else draw.uniform(0.2, 0.5)
        scale = share * SIZE / max(stamp.size)
        stamp = stamp.resize([max(1, round(length * scale)) for length in stamp.size], Image.Resampling.BICUBIC)
        stamp = ImageOps.mirror(stamp) if draw.random() < 0.5 else stamp
        place = [draw.randint(0, SIZE - length) for length in stamp.size]
        back.paste(stamp, (place[0], place[1]), stamp)
        names.append(cutouts[picture])
    return ImageOps.mirror(back) if draw.random() < 0.5 else back, " and ".join(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=Path, required=True, help="usr/share of the extracted packages")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cutouts = stamps(args.share)
    photos = sorted(photo for pattern in PHOTOS for photo in (args.share / "backgrounds").glob(pattern))
    if not cutouts or not photos:
        raise SystemExit(
            f"{args.share} has {len(cutouts)} stamps and {len(photos)} photos; expected usr/share of the extracted "
            "packages tuxpaint-stamps-default, lomiri-wallpapers-16.04 and mate-backgrounds"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in track(range(args.scenes), f"{len(cutouts)} stamps on {len(photos)} photos"):
        picture, caption = scene(number, args.seed, cutouts, photos)
        file = args.out / f"{number:05}.png"
        if not file.is_file():
            stored = io.BytesIO()
            picture.save(stored, "PNG")
            write_bytes(stored.getvalue(), file)
        lines.append(json.dumps({"file_name": file.name, "caption": caption}, ensure_ascii=False))
    write_text("\n".join(lines) + "\n", args.out / "metadata.jsonl")


if __name__ == "__main__":
    main()

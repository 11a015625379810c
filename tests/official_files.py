"""Small folders in the official layouts of known data sets, written as their owners write them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

TEN = ["red", "red", "dark red", "red", "maroon", "maroon", "maroon", "maroon", "red", "maroon"]


def picture(path: Path, color: Any = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), color).save(path)
    return path


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def changed(path: Path, change: Any) -> None:
    """The JSON file after `change(value)`."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    write(path, value)


def vqav2(folder: Path, split: str = "val2014", under: str = "", version: str = "v2_", answers: bool = True) -> Path:
    """Three questions about two images."""
    pictures = split.replace("test-dev", "test")
    asked = [(42, 42000, "What color is it?"), (42, 42001, "Is it red?"), (73, 73000, "How many?")]
    for image in (42, 73):
        picture(folder / pictures / f"COCO_{pictures}_{image:012d}.jpg", (image, 0, 0))
    head = {"info": {"version": "2.0"}, "license": {}, "data_subtype": split, "data_type": "mscoco"}
    questions = [{"image_id": image, "question": text, "question_id": own} for image, own, text in asked]
    write(
        folder / under / f"{version}OpenEnded_mscoco_{split}_questions.json",
        head | {"task_type": "Open-Ended", "questions": questions},
    )
    said = {42000: TEN, 42001: ["yes"] * 9 + ["no"], 73000: ["2"] * 10}
    chosen = {42000: "maroon", 42001: "yes", 73000: "2"}
    annotations = [
        {
            "question_type": "what color is the",
            "multiple_choice_answer": chosen[own],
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": k} for k, a in enumerate(said[own], 1)],
            "image_id": image,
            "answer_type": "other",
            "question_id": own,
        }
        for image, own, _ in reversed(asked)
    ]
    if answers:
        write(folder / under / f"{version}mscoco_{split}_annotations.json", head | {"annotations": annotations})
    return folder


def coco_captions(folder: Path, split: str = "val2017", under: str = "annotations", pictures: str = "{}") -> Path:
    """Two images with two captions each; the captions are not in the order of their ids."""
    names = {285: "000000000285.jpg", 139: "000000000139.jpg"}
    if split.endswith("2014"):
        names = {image: f"COCO_{split}_{name}" for image, name in names.items()}
    for image, name in names.items():
        picture(folder / pictures.format(split) / name, (image % 256, 0, 0))
    said = [(30, 285, "A bear sits."), (12, 139, "A room."), (11, 285, "A brown bear."), (40, 139, "A table ")]
    write(
        folder / under / f"captions_{split}.json",
        {
            "info": {"year": 2017},
            "images": [{"license": 4, "file_name": name, "id": image} for image, name in names.items()],
            "licenses": [],
            "annotations": [{"image_id": image, "id": own, "caption": text} for own, image, text in said],
        },
    )
    return folder


def karpathy(file: Path, records: Iterable[Mapping[str, Any]], dataset: str) -> Path:
    """Records of `split` and names, each with two sentences."""
    images = []
    for i, record in enumerate(records):
        sentences = [
            {"tokens": ["a", "picture"], "raw": f"A picture {i} {k}.", "imgid": i, "sentid": 2 * i + k}
            for k in range(2)
        ]
        images.append({"sentids": [2 * i, 2 * i + 1], "imgid": i, "sentences": sentences, **record})
    return write(file, {"images": images, "dataset": dataset})


def flickr30k(folder: Path, name: str = "results_20130124.token", pictures: str = "flickr30k-images") -> Path:
    """Two images with two captions each."""
    for image in ("1000092795", "10002456"):
        picture(folder / pictures / f"{image}.jpg", (int(image) % 256, 0, 0))
    said = [("1000092795", 1, "Two men ."), ("1000092795", 0, "Two # young guys | hair ."),
            ("10002456", 0, "Several men ."), ("10002456", 1, "A crane .")]  # fmt: skip
    if name.endswith(".csv"):
        rows = ["image_name| comment_number| comment", *(f"{i}.jpg| {k}| {text}" for i, k, text in said)]
    else:
        rows = [f"{i}.jpg#{k}\t{text}" for i, k, text in said]
    write(folder / name, "\n".join(rows) + "\n")
    return folder


def nlvr2(folder: Path, split: str = "dev", pictures: str = "{}", under: str = "") -> Path:
    """Three statements about two pairs of photos."""
    rows = []
    for pair, sentence, label in ((0, 0, "True"), (1, 0, "False"), (1, 1, "True")):
        row = {"sentence": f"There are {pair + sentence} dogs.", "label": label, "writer": "61", "synset": "dog"}
        row["identifier"] = f"{split}-850-{pair}-{sentence}"
        if split == "train":
            row["directory"] = 38
        rows.append(json.dumps(row))
        for side in (0, 1):
            place = folder / pictures.format(split) / ("38" if split == "train" else "")
            picture(place / f"{split}-850-{pair}-img{side}.png", (pair * 2 + side, 0, 0))
    write(folder / under / f"{split}.json", "\n".join(rows) + "\n")
    return folder


def nlvr(folder: Path, split: str = "dev", pictures: str = "images/{}") -> Path:
    """Two statements about two drawn pictures."""
    rows = []
    for own, directory, label in (("1572-0", "2", "true"), ("1373-1", "0", "false")):
        rows.append(
            json.dumps(
                {"sentence": f"There is a box, {own}.", "label": label, "identifier": own, "directory": directory}
                | {"evals": {"r1": label}, "structured_rep": [[{"y_loc": 80, "type": "triangle"}]]}
            )
        )
        picture(folder / pictures.format(directory) / f"{split}-{own}-0.png", (int(own[0]), len(rows), 0))
    write(folder / f"{split}.json", "\n".join(rows) + "\n")
    return folder


def pope(folder: Path, split: str = "random", under: str = "", pictures: str = "val2014") -> Path:
    """Four questions about two images."""
    rows = []
    for image, what, label in ((42, "dog", "yes"), (42, "car", "no"), (73, "bus", "yes"), (73, "cup", "no")):
        name = f"COCO_val2014_{image:012d}.jpg"
        rows.append({"question_id": len(rows) + 1, "image": name, "text": f"Is there a {what} in the image?"})
        rows[-1]["label"] = label
        picture(folder / pictures / name, (image, 0, 0))
    write(folder / under / f"coco_pope_{split}.json", "".join(json.dumps(row) + "\n" for row in rows))
    return folder

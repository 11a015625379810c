"""Writes what the original tokenizer answers into ptb_golden.json, for the inputs in that file.

It needs Java and pycocoevalcap 1.2: python tests/metrics/make_ptb_golden.py. To add cases, write them into the file
with null in the place of the answer. The inputs of a part are the lines of one file, as in the caption evaluation, so
their order matters.
"""

from __future__ import annotations

import json
from pathlib import Path

from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

FILE = Path(__file__).with_name("ptb_golden.json")


def main() -> None:
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    for part in golden["parts"]:
        captions = [caption for caption, _ in part["cases"]]
        answers = PTBTokenizer().tokenize({"all": [{"caption": c} for c in captions]})["all"]
        part["cases"] = list(zip(captions, answers, strict=True))
    write(golden)


def write(golden: dict) -> None:
    """One case per line, so that a change shows what changed."""
    parts = []
    for part in golden["parts"]:
        cases = ",\n".join(json.dumps(case, ensure_ascii=False) for case in part["cases"])
        name, source = json.dumps(part["name"]), json.dumps(part["source"])
        parts.append(f'{{"name": {name}, "source": {source}, "cases": [\n{cases}\n]}}')
    text = f'{{"made_by": {json.dumps(golden["made_by"])}, "parts": [\n' + ",\n".join(parts) + "\n]}\n"
    FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""A data format: a line per sample, of picture, question and answers, separated by semicolons."""

from pathlib import Path

from cmai_fast.data import Sample
from cmai_fast.data.formats import data_format


@data_format("semicolons", suffixes=(".semi",))
def read(place, split, fields):
    for number, line in enumerate(Path(place).read_text().splitlines()):
        picture, question, answer, *others = line.split(";")
        yield Sample(f"line {number + 1}", (Path(place).parent / picture,), question, (answer,), (answer, *others))

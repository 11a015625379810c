"""JSON, JSON lines and CSV: the same records from each, and real bad input."""

from __future__ import annotations

import csv
import json

import pytest

from cmai_fast.data.sources import DataSource

RECORDS = [
    {"id": "a", "question": "first?", "answer": "red", "choices": ["red", "blue"]},
    {
        "id": "b",
        "question": 'line \u2028 break, "quotes" and\nnew lines?',
        "answer": "größe",
        "choices": ["größe", "no"],
    },
    {"id": "c", "question": "third?", "answer": "3", "choices": ["3", "4"]},
]


def source(path, content: str | bytes) -> DataSource:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return DataSource(str(path))


def table(records, separator=","):
    def cell(value):
        return "|".join(value) if isinstance(value, list) else value

    import io

    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator)
    writer.writerows([list(records[0]), *([cell(v) for v in r.values()] for r in records)])
    return text.getvalue()


def jsonl(records):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


FORMS = {
    "x.jsonl": jsonl(RECORDS),
    "x.ndjson": "\n" + jsonl(RECORDS).rstrip("\n"),
    "x.json": json.dumps(RECORDS),
    "y.json": json.dumps({"info": {"data": [1]}, "n": 1, "data": RECORDS}, indent=2, ensure_ascii=False),
    "x.csv": table(RECORDS),
    "x.TSV": table(RECORDS, "\t"),
}


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("name", FORMS)
def test_the_same_records_from_each(name, bom, tmp_path):
    samples = source(tmp_path / name, bom + FORMS[name].encode()).load("test")
    assert [s.id for s in samples] == ["a", "b", "c"]
    assert [s.prompt for s in samples] == [r["question"] for r in RECORDS]
    assert [s.references for s in samples] == [(r["answer"],) for r in RECORDS]
    assert [s.choices for s in samples] == [tuple(r["choices"]) for r in RECORDS]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_one_record_and_windows_line_ends(name, tmp_path):
    content = {"x.jsonl": '{"prompt": "a?"}', "x.json": '[\r\n{"prompt": "a?"}\r\n]\r\n', "x.csv": "prompt\r\na?"}[name]
    samples = source(tmp_path / name, content).load("test")
    assert [s.prompt for s in samples] == ["a?"]
    assert samples[0].where.endswith("line 1" if name == "x.jsonl" else "line 2")


def test_lines_of_json_and_csv_are_those_of_the_file(tmp_path):
    text = '{"data": [\n {"question":\n  "a?"},\n\n {"question": "b?"}, {"question": "c?"}\n]}'
    wheres = [s.where.rpartition(" line ")[2] for s in source(tmp_path / "x.json", text).load("test")]
    assert wheres == ["2", "5", "5"]
    text = 'question\n"a\nb\nc?"\n\nd?\n'
    assert [s.where.rpartition(" line ")[2] for s in source(tmp_path / "x.csv", text).load("test")] == ["2", "6"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "x.jsonl",
            '{"question": "a?"}\n{"question": "b',
            r"x\.jsonl line 2 is not a complete JSON object \(Unterminated",
        ),
        ("x.jsonl", '[\n{"question": "a?"}\n]', r"x\.jsonl line 1 .* one JSON list has the suffix \.json"),
        ("x.jsonl", '{"question": "a?"}\n["a"]', r"x\.jsonl line 2 is \['a'\] \(list\); expected a record"),
        ("x.jsonl", b'{"question": "a?"}\n{"question": "gr\xfc\xdfe"}', r"x\.jsonl line 2: byte 0xfc is not UTF-8"),
        ("x.jsonl", '{"question": "a?"}\n'.encode("utf-16"), r"line 1: byte 0xff is not UTF-8; save"),
        ("x.jsonl", "", "holds no records"),
        ("x.jsonl", "\n \n", "holds no records"),
        ("x.json", '[{"question": "a?"},\n{"question": ', r"x\.json line 2 is not complete JSON"),
        ("x.json", '{"question": "a?"}\n{"question": "b?"}', r"line 2 .* one record per line has the suffix \.jsonl"),
        ("x.json", "", r"x\.json line 1 is not complete JSON \(it is empty\)"),
        ("x.json", "[]", "holds no records"),
        ("x.json", '{"records": [{"question": "a?"}]}', r"x\.json has no list of records; expected \[\{"),
        ("x.json", '"text"', "has no list of records"),
        ("x.json", '[{"question": "a?"},\n\n 3]', r"x\.json line 3 is 3; expected a record"),
        ("x.json", b'[{"question": "\xff"}]', r"line 1: byte 0xff"),
        ("x.csv", "question,answer\na?,red\nb?\n", r"x\.csv line 3 has 1 cells; the header has 2: question, answer"),
        ("x.csv", "question,answer\na?, red, blue\n", r"line 2 has 3 cells.*double quotes"),
        ("x.csv", "question,answer\na?,\n", r"x\.csv line 2: answer is None"),
        ("x.csv", "text,answer\na?,red\n", r"x\.csv line 2: no question; .*its keys are text, answer"),
        ("x.csv", "question;answer\na?;red\n", r"line 1 is one column 'question;answer'; .* commas"),
        ("x.csv", "question,question\na?,b?\n", "line 1 has two columns 'question'"),
        ("x.csv", "question,\na?,b?\n", "line 1 has a column without a name"),
        ("x.csv", 'question,answer\n"a?,red\nb?,blue\n', r"x\.csv line 2: .*is a closing quote missing"),
        ("x.csv", 'question,choices\na?,"[""a"",]"\n', r"line 2: choices is not a valid JSON list"),
        ("x.csv", b"question\ngr\xf6n?\n", r"x\.csv line 2: byte 0xf6"),
        ("x.csv", "", "holds no records"),
        ("x.csv", "question,answer\n", "holds no records"),
    ],
)
def test_bad_input_is_named_with_file_and_line(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        source(tmp_path / name, content).check()


def test_cells_hold_lists_chats_and_long_base64(tmp_path):
    limit = csv.field_size_limit()
    picture = "iVBORw0KGgo" + "A" * 200_001
    chat = [{"from": "human", "value": "<image>a?"}, {"from": "gpt", "value": "b"}]
    rows = [["conversations", "image", "id"], [json.dumps(chat), picture, "1"]]
    with open(tmp_path / "x.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    (sample,) = DataSource(str(tmp_path / "x.csv")).load("test")
    assert (sample.prompt, sample.references, len(sample.images[0]["bytes"])) == ("a?", ("b",), 150_009)
    assert csv.field_size_limit() == limit
    text = 'ask,right\na?,"[""x|y"", ""z""]"\nb?,x|y\n'
    (tmp_path / "x.csv").write_text(text)
    fields = {"question": "ask", "answers": "right"}
    samples = DataSource(str(tmp_path / "x.csv"), fields).load("test")
    assert [s.references for s in samples] == [("x|y", "z"), ("x", "y")]

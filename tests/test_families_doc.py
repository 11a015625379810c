"""docs/families.md agrees with the code: the table is made from the models, promises name tests over all families."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cmai_fast.attacks import Victim
from cmai_fast.bridge import bridge_of
from cmai_fast.data import format_prompt
from cmai_fast.pixels import PixelSpace
from families import FAMILIES, Family
from processors import GENERATIVE, processor_of

ROOT = Path(__file__).parent.parent
DOC = ROOT / "docs" / "families.md"
UNITS = {2: "patch", 4: "image", 5: "tile"}


def row(family: Family) -> str:
    model, samples = family.model(), family.samples()
    batch = family.batch(model, samples)
    values = batch["pixel_values"]
    victim = Victim(bridge_of(model), PixelSpace.from_processor(family.processor), batch)
    keys = sorted(set(batch) - {"pixel_values", "input_ids", "attention_mask", "labels"})
    assert set(victim.inputs(victim.pixels())) == set(batch)
    several = max(len(s.pictures) for s in samples) > 1
    sizes = len({p.shape for s in samples for p in s.pictures}) > 1
    cells = [
        family.name,
        f"`{type(model).__name__}`",
        family.kind,
        ", ".join(f"`{k}`" for k in keys) or "-",
        "several" if several else "one",
        "different" if sizes else "one",
        UNITS[values.dim()],
        *collated(family),
    ]
    return "| " + " | ".join(cells) + " |"


def collated(family: Family) -> tuple[str, str]:
    """How the collator asks, and what the processor cannot be loaded without."""
    if family not in GENERATIVE:
        return "-", "-"
    processor = processor_of(family)
    prompt = "chat template" if processor.chat_template else f"`{format_prompt(processor, 'QUESTION')}`"
    return prompt, "torchvision" if "video_processor" in processor.get_attributes() else "-"


def table() -> str:
    head = "| family | model | adapter | more keys of a batch | images per sample | sizes | attacked unit | \
prompt | processor needs |"
    return "\n".join([head, "|---" * 9 + "|", *map(row, FAMILIES)])


def test_the_table_is_what_the_tests_build():
    found = re.search(r"<!-- table -->\n(.*)\n<!-- /table -->", DOC.read_text(), re.DOTALL)
    assert found is not None
    assert found[1] == table(), f"docs/families.md should hold:\n{table()}"


def test_the_example_runs():
    family = next(f for f in FAMILIES if f.name == "Qwen2-VL")
    code = re.search(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {"model": family.model(), "processor": family.processor}
    names["batch"] = family.batch(names["model"], family.samples())
    exec(code[1], names)
    assert [len(own) for own in names["pictures"]] == [1, 2, 1]
    assert (names["result"].adv - names["clean"]).abs().max() > 0


def parts(doc: str) -> tuple[str, str]:
    """The document without what it says of the collator, and that."""
    before, collator, after = re.split(r"^## (?=The collator)|^## (?=What the attacker)", doc, flags=re.MULTILINE)
    return before + after, collator


def test_each_promise_names_a_test_that_runs_over_every_family():
    promises = re.findall(r"`(test_\w+)`", parts(DOC.read_text())[0])
    assert len(promises) > 10
    sources = [
        ROOT / "tests" / name
        for name in ("bridge/test_families.py", "test_layout.py", "mbat/test_families.py", "attacks/test_upload.py")
    ]
    for name in promises:
        assert any(re.search(rf"@every_family\ndef {name}\(", s.read_text()) for s in sources), name
    for source in sources:
        assert 'every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)' in source.read_text()


def test_each_promise_of_the_collator_names_a_test_that_runs_over_every_generative_family():
    source = (ROOT / "tests" / "data" / "test_collated_families.py").read_text()
    assert 'every_family = pytest.mark.parametrize("family", GENERATIVE, ids=lambda f: f.name)' in source
    assert {f.name for f in GENERATIVE} == {f.name for f in FAMILIES if f.kind == "generative"}
    promises = re.findall(r"`(test_\w+)`", parts(DOC.read_text())[1])
    assert len(promises) >= 5
    for name in promises:
        assert re.search(rf"@every_family\ndef {name}\(", source), name

"""Zero-shot classification by a dual encoder: the class whose prompt is nearest to the image (Radford et al., 2021)."""

from __future__ import annotations

from dataclasses import replace

from cmai_fast.data.sample import Sample
from cmai_fast.tasks.task import task
from cmai_fast.tasks.vqa import VQA

TEMPLATE = "a photo of a {}."


@task
class ZeroShot(VQA):
    """The right answer is the prompt of the class; the texts to choose from are those of `TEMPLATE`, one per class."""

    name = "zero-shot"
    label = "Zero-shot classification"

    def prompt(self, sample: Sample) -> str:
        return ""

    def posed(self, sample: Sample) -> Sample:
        return replace(
            sample,
            prompt="",
            references=tuple(TEMPLATE.format(name) for name in sample.references),
            choices=tuple(TEMPLATE.format(name) for name in sample.choices),
        )

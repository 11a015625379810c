"""Retrieval between images and texts, for dual encoders: which of all captions belongs to an image, and the reverse."""

from __future__ import annotations

from collections.abc import Sequence

from cmai_fast.data.sample import Sample, differing
from cmai_fast.tasks.perturbed import perturbed
from cmai_fast.tasks.task import task
from cmai_fast.tasks.vqa import VQA


@task
class Retrieval(VQA):
    """An image is right if the nearest of all texts is one of its own captions, which is R@1 from image to text.

    R@1, 5 and 10 both ways need the similarities of all images and texts; `evaluation.recall` adds them.
    """

    name = "retrieval"
    label = "Retrieval"
    metric_names: tuple[str, ...] = ()
    ranks = True

    def prompt(self, sample: Sample) -> str:
        return ""

    def wrong_answers(self, sample: Sample, others: Sequence[Sample] = ()) -> tuple[str, ...]:
        return wrong_captions(sample, others)


def wrong_captions(sample: Sample, others: Sequence[Sample] = ()) -> tuple[str, ...]:
    """Captions that are wrong for a sample: its choices, else those of other samples and its own, perturbed."""
    if sample.choices:
        return sample.wrong_choices
    elsewhere = (text for other in others for text in other.references[:1])
    return differing((*elsewhere, *perturbed(sample.answer)), sample.references)

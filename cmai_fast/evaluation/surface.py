"""What attacks of an evaluation change: the victim, and what the model is shown of the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cmai_fast.attacks import Victim
from cmai_fast.attacks.state import random_start
from cmai_fast.attacks.upload import UploadVictim, uploaded
from cmai_fast.bridge import BatchImages
from cmai_fast.data import Sample
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import Surface, ThreatModel


def victim_of(
    pipeline: Pipeline, batch: Mapping[str, Tensor], samples: Sequence[Sample] = (), surface: Surface | None = None
) -> Victim:
    """The victim of a batch that `pipeline.collate` made of `samples`, on the model's device; the texts of a dual
    encoder are encoded once, not at every step. `surface`: None, the model's input."""
    batch = pipeline.with_texts(pipeline.on_device(batch))
    if surface is None or not surface.uploads:
        return Victim(pipeline.bridge, pipeline.space, batch, pipeline.heads)
    return UploadVictim(
        pipeline.bridge, pipeline.space, pipeline.collate, samples, pipeline.heads, surface=surface, batch=batch
    )


def images_of(pipeline: Pipeline, samples: Sequence[Sample], surface: Surface) -> BatchImages:
    """The images of these samples, one batch, as attacks on this surface take them."""
    if not surface.uploads:
        return pipeline.images(samples)
    return victim_of(pipeline, pipeline.collate(samples), samples, surface)


def shown(
    samples: Sequence[Sample], images: Sequence[Tensor], surface: Surface
) -> tuple[list[Sample], Sequence[Tensor] | None]:
    """The samples with images of an attack on this surface, as `split` gives them, for `Pipeline.generate`.

    An uploaded picture goes the whole way of a file: as the sample's own, through the processor itself.
    """
    if not surface.uploads:
        return list(samples), images
    return [uploaded(s, image, surface) for s, image in zip(samples, images, strict=True)], None


def noisy(pipeline: Pipeline, samples: Sequence[Sample], threat: ThreatModel, seed: int) -> list[Tensor]:
    """The samples' images with random noise in the ball, as `split` gives them."""
    batch = pipeline.collate(samples)
    victim = victim_of(pipeline, batch, samples, threat.surface)
    clean, ids = victim.pixels(), batch["sample_ids"]
    found, places = torch.empty_like(clean), torch.arange(len(clean), device=clean.device)
    eps = torch.full((len(clean),), threat.eps, device=clean.device)
    random_start(victim, found, clean, eps, ids.to(clean.device), places, seed, threat.norm)
    return [image.detach().cpu() for image in victim.split(found)]

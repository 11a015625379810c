"""Divides one set of records into train, calibration and test, which never share a picture."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from cmai_fast.data.formats import digest_of
from cmai_fast.data.sample import Sample
from cmai_fast.data.zipped import ZippedPicture

SPLITS = ("train", "calibration", "test")
SHARE = 0.1  # of the pictures for calibration, and the same for test


def divide(samples: Sequence[Sample], seed: int) -> dict[str, list[int]]:
    """The indices of the samples of each split, in order.

    The pictures are divided 80 / 10 / 10. Samples that share a picture (the same bytes, whatever the file is called)
    are in the same split, also indirectly: a sample with two pictures keeps all samples of both together. Samples
    without a picture are divided by their prompt. The split of a sample depends on the pictures and on `seed`, not on
    the order of the records or the location of the files.

    Raises:
        ValueError: fewer than three groups of samples that share no picture.
    """
    files: dict[str, str] = {}
    groups = _linked([_pictures(sample, files) for sample in samples])
    if len(groups) < len(SPLITS):
        raise ValueError(
            f"{len(samples)} records have {len(groups)} pictures (or groups linked by a record of several), and each "
            f"of {', '.join(SPLITS)} needs one of its own; give more pictures, or a folder with a file for each split"
        )
    waiting = sorted(groups, key=lambda group: _digest(f"{seed} {min(group.pictures)}".encode()))
    target = max(1, round(SHARE * sum(len(group.pictures) for group in groups)))
    places: dict[str, list[int]] = {}
    for split, others in (("test", 2), ("calibration", 1)):
        taken: list[_Group] = []
        room = target
        for group in waiting:
            if len(group.pictures) <= room and len(taken) < len(waiting) - others:  # the others need a group each
                taken.append(group)
                room -= len(group.pictures)
        taken = taken or [min(waiting, key=lambda group: len(group.pictures))]  # every group is larger than a tenth
        waiting = [group for group in waiting if group not in taken]
        places[split] = sorted(place for group in taken for place in group.places)
    return {"train": sorted(place for group in waiting for place in group.places), **places}


def picture_key(image: Any) -> str:
    """A digest of the picture's content: of the bytes of a file, or of the values of an array."""
    if isinstance(image, (str, os.PathLike)):
        stat = os.stat(image)
        return _file_digest(os.fspath(image), stat.st_size, stat.st_mtime_ns)
    if isinstance(image, dict):
        if image["bytes"] is None:
            return picture_key(image["path"])
        return _digest(image["bytes"])
    if isinstance(image, ZippedPicture):
        return _digest(image.read())
    if hasattr(image, "mode"):  # a PIL picture
        return _digest(
            f"{image.mode} {image.size} {image.getpalette() if image.mode == 'P' else ''}".encode(), image.tobytes()
        )
    import numpy as np

    array = np.asarray(image)
    return _digest(f"{array.dtype.str} {array.shape}".encode(), array.tobytes())


class _Group:
    """Samples that share pictures, with their pictures."""

    def __init__(self, pictures: set[str], places: list[int]) -> None:
        self.pictures, self.places = pictures, places


def _pictures(sample: Sample, files: dict[str, str]) -> set[str]:
    """The digests of a sample's pictures; `files` caches those of files."""
    for image in sample.images:
        if isinstance(image, str) and image not in files:
            files[image] = picture_key(image)
    if sample.images:
        return {files[image] if isinstance(image, str) else picture_key(image) for image in sample.images}
    return {_digest(b"text", sample.prompt.encode())}


def _linked(pictures: Sequence[set[str]]) -> list[_Group]:
    """The connected groups of samples; two samples are linked if they have a picture in common."""
    group_of: dict[str, _Group] = {}
    groups: dict[int, _Group] = {}
    for place, own in enumerate(pictures):
        met = {id(group_of[key]): group_of[key] for key in own if key in group_of}
        largest = max(met.values(), key=lambda group: len(group.pictures), default=_Group(set(), []))
        groups[id(largest)] = largest
        largest.places.append(place)
        for key in own - largest.pictures:
            group_of[key] = largest
        largest.pictures |= own
        for other in met.values():
            if other is not largest:
                del groups[id(other)]
                largest.places += other.places
                largest.pictures |= other.pictures
                group_of.update(dict.fromkeys(other.pictures, largest))
    return list(groups.values())


def _digest(*parts: bytes) -> str:
    value = hashlib.blake2b(digest_size=16)
    for part in parts:
        value.update(part)
    return value.hexdigest()


@lru_cache(maxsize=1 << 20)
def _file_digest(path: str, size: int, changed: int) -> str:
    """The digest of a file's bytes, computed again when its size or time changes."""
    return digest_of(path)

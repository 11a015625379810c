"""easy-VQA: 64 x 64 pictures of one coloured shape and questions about it (MIT, victorzhou/easy-VQA).

The package `easy-vqa` ships 4,000 training and 1,000 test pictures. Its training pictures are divided here into
`train` (95%) and `calibration` (every twentieth picture), so that a detector's threshold is set neither on training
pictures of the model nor on the test split.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from cmai_fast.data.sample import Sample, SampleList

if TYPE_CHECKING:
    import numpy as np
    import torch

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
YES_NO = ("no", "yes")
SPLITS = ("train", "calibration", "test")
_CALIBRATION_EVERY = 20


def answer_choices(answer: str) -> tuple[str, ...]:
    """The answers of the same kind as `answer`: the colours, the shapes, or yes and no."""
    for choices in (COLORS, SHAPES, YES_NO):
        if answer in choices:
            return choices
    raise ValueError(f"{answer!r} is not an easy-VQA answer; expected one of {COLORS + SHAPES + YES_NO}")


@cache
def _questions(official_split: str) -> tuple[list[str], list[str], list[int]]:
    """Questions, answers and picture ids of an official split."""
    import easy_vqa

    return getattr(easy_vqa, f"get_{official_split}_questions")()


@cache
def _paths(official_split: str) -> dict[int, str]:
    import easy_vqa

    return getattr(easy_vqa, f"get_{official_split}_image_paths")()


@cache  # 12 KB each, and most runs see a few hundred of the 5,000
def _picture(official_split: str, picture: int) -> np.ndarray:
    import numpy as np
    from PIL import Image

    with Image.open(_paths(official_split)[picture]) as file:
        return np.array(file.convert("RGB"))


class EasyVQA(SampleList):
    """Questions about easy-VQA pictures, one sample per question.

    Args:
        split: `train`, `calibration` (both from the package's training part) or `test`.
        limit: number of questions, drawn with `seed`; None keeps all (38,575 in train and calibration together,
            9,673 in test).
        seed: for drawing; the same seed and limit give the same questions.

    The `id` of a `Sample` is its index in the official question list, so that results can be traced. It has one image
    (uint8 array, 64 x 64 x 3), and its `choices` are the answers of the same kind.
    """

    name = "easyvqa"

    def __init__(self, split: str = "train", limit: int | None = None, seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; easyvqa has {', '.join(SPLITS)}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}; expected at least 1 question, or None for all")
        import numpy as np

        self.split = split
        self._official = "test" if split == "test" else "train"
        self.questions, self.answers, self.image_ids = _questions(self._official)
        ids = np.arange(len(self.questions))
        if split != "test":
            held_out = np.asarray(self.image_ids) % _CALIBRATION_EVERY == 0
            ids = ids[held_out if split == "calibration" else ~held_out]
        if limit is not None and limit < len(ids):
            ids = np.sort(np.random.default_rng(seed).choice(ids, size=limit, replace=False))
        self.sample_ids: list[int] = ids.tolist()

    def __len__(self) -> int:
        return len(self.sample_ids)

    def at(self, place: int) -> Sample:
        i = self.sample_ids[place]
        return Sample(
            id=i,
            images=(_picture(self._official, self.image_ids[i]),),
            prompt=self.questions[i],
            references=(self.answers[i],),
            choices=answer_choices(self.answers[i]),
        )

    def facts(self) -> dict[int, tuple[int | None, int | None]]:
        """By picture id: colour and shape, as indices of `COLORS` and `SHAPES`, that this split's questions reveal.

        Only facts stated by an answer are used ("what color ...?" or a "yes" to a question without a negation).
        """
        found: dict[int, list[int | None]] = {self.image_ids[i]: [None, None] for i in self.sample_ids}
        for i in self.sample_ids:
            answer, words = self.answers[i], self.questions[i].rstrip("?").split()
            told = [answer]
            if answer == "yes" and not {"no", "not"} & set(words):
                told = words
            for word in told:
                for which, kind in enumerate((COLORS, SHAPES)):
                    if word in kind:
                        found[self.image_ids[i]][which] = kind.index(word)
        return {picture: (colour, shape) for picture, (colour, shape) in sorted(found.items())}

    def picture(self, picture: int) -> np.ndarray:
        """A picture of this split by its id, uint8 (64, 64, 3)."""
        return _picture(self._official, picture)

    def picture_labels(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures with the colour and shape of `facts`.

        Returns uint8 (n, 3, 64, 64), colour index (n,), shape index (n,), int64; -1 if no question reveals it.
        """
        import numpy as np
        import torch

        facts = self.facts()
        pixels = torch.from_numpy(np.stack([self.picture(i) for i in facts])).permute(0, 3, 1, 2).contiguous()
        labels = [[-1 if value is None else value for value in pair] for pair in facts.values()]
        colours, shapes = torch.tensor(labels).unbind(1)
        return pixels, colours, shapes

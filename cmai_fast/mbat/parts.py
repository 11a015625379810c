"""A training step in parts: what does not fit into memory at once is done a few samples at a time, to the same end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from cmai_fast.bridge import BatchImages
from cmai_fast.mbat import ranks

T = TypeVar("T")
WEIGHTS = "loss_weights"  # of a batch's samples in its loss


class DoesNotFitError(Exception):
    """Memory ran out, in this process or in another that trains with it."""


def agreed(run: Callable[[], T]) -> T:
    """What `run` returns; every process calls it, and no communication between them may happen inside.

    Raises:
        DoesNotFitError: memory ran out in one of them; raised in all, so that none waits for another.
    """
    failed: RuntimeError | None = None
    try:
        result = run()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        failed = error
    if ranks.any_of(failed is not None):
        raise DoesNotFitError("in another process" if failed is None else str(failed).splitlines()[0]) from failed
    return result


def take(images: BatchImages, inputs: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """These rows of the batch of `images`, which was made of `inputs` (with `sample_ids`).

    What belongs to no sample, such as the fixed texts of a dual encoder, stays whole.
    """
    image, text = images.bridge.inputs(inputs)
    part = {**images.rows(image, rows), **images.rows(text, rows), "sample_ids": inputs["sample_ids"][rows]}
    if "pixel_values" in inputs:
        values, layout = inputs["pixel_values"], images.layout
        part["pixel_values"] = values[rows] if layout is None else layout.pack(layout.unpack(values)[rows], rows)
    return part | {
        name: value[rows] for name, value in inputs.items() if name.startswith("negative_") or name == WEIGHTS
    }


def cut(images: BatchImages, inputs: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """The batch of `images` in batches of at most `size` samples; see `take`."""
    count = len(images)
    if size >= count:
        return [dict(inputs)]
    return [take(images, inputs, rows) for rows in torch.arange(count).split(size)]


class Draws:
    """The state of PyTorch's random generators, to which `again` sets them back."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cpu = device, torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def again(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


@dataclass
class View:
    """Images of a part, clean or adversarial, at the bridge.

    `leaf` (n, T, D) is h_v cut off from the vision side: what reads it leaves its gradient there.
    """

    encode: Callable[[], Tensor]
    leaf: Tensor
    features: Tensor | None  # h_v with its graph, or None: too much to keep
    draws: Draws | None

    @classmethod
    def of(cls, encode: Callable[[], Tensor], device: torch.device, *, keep: bool) -> View:
        draws = None if keep else Draws(device)
        with torch.set_grad_enabled(keep):
            features = encode()
        return cls(encode, features.detach().requires_grad_(), features if keep else None, draws)

    def pulled_back(self) -> Tensor:
        """0-d: its gradient is what `leaf` has gathered, carried on through the vision side."""
        if self.leaf.grad is None:
            return self.leaf.new_zeros(())
        features = self.features
        if features is None:
            assert self.draws is not None
            # The same dropout as before; the generators' own state is not touched.
            with torch.random.fork_rng([self.draws.device] if self.draws.cuda is not None else []):
                self.draws.again()
                features = self.encode()
        return (features * self.leaf.grad).sum()


@dataclass
class Part:
    """A part of the batch behind the language side.

    `texts` are inputs of `fuse`, `own` h_t (n, text_dim) of its texts and `wrong` of their wrong answers, where
    something asks for them. `sums` of all parts add up to what a step logs.
    """

    texts: dict[str, Any]
    views: list[View]
    own: Tensor | None
    wrong: Tensor | None
    sums: dict[str, Tensor]


@contextmanager
def gradients_aside(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside, `.grad` is that of this step alone, so that a failed attempt can be dropped; on leaving, what earlier
    micro-batches left is added, and after an exception it is all that is left."""
    earlier = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    except BaseException:
        for p, grad in zip(parameters, earlier, strict=True):
            p.grad = grad
        raise
    for p, grad in zip(parameters, earlier, strict=True):
        if grad is not None:
            p.grad = grad if p.grad is None else grad.add_(p.grad)

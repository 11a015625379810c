"""A training step in parts: a batch too large for memory runs a few samples at a time, with the same result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from cmai_fast.bridge import BatchImages
from cmai_fast.cmcv.verifier import Texts
from cmai_fast.mbat import ranks
from cmai_fast.pipeline import out_of_memory

T = TypeVar("T")
OF_SAMPLES = ("negative_", "statement_")  # keys that the model does not take
WEIGHTS = "loss_weights"  # of the samples in the loss of a batch
REMEDIES = "set recompute='full', let the processor make smaller images (its max_pixels or size)"
_IN_4_BITS = "or load the language model in 4 bits (quantized_language_model); cmai-fast plan predicts what each saves"


class DoesNotFitError(Exception):
    """Memory ran out, in this or another process of the run."""


def agreed(run: Callable[[], T]) -> T:
    """The result of `run`; every process calls it, and `run` must not communicate.

    Raises:
        DoesNotFitError: memory ran out in one process; raised in all, so that none waits for another.
    """
    failed: RuntimeError | None = None
    try:
        result = run()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        failed = error
    if ranks.any_of(failed is not None):
        raise DoesNotFitError("in another process" if failed is None else str(failed).splitlines()[0]) from failed
    return result


def take(images: BatchImages, inputs: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """These rows of the batch of `images`, made from `inputs` (with `sample_ids`).

    Inputs shared by all samples, such as the texts of a dual encoder, are kept whole.
    """
    image, text = images.bridge.inputs(inputs)
    part = {**images.rows(image, rows), **images.rows(text, rows), "sample_ids": inputs["sample_ids"][rows]}
    if "pixel_values" in inputs:
        values, layout = inputs["pixel_values"], images.layout
        part["pixel_values"] = values[rows] if layout is None else layout.pack(layout.unpack(values)[rows], rows)
    return part | {
        name: value[rows] for name, value in inputs.items() if name.startswith(OF_SAMPLES) or name == WEIGHTS
    }


def cut(images: BatchImages, inputs: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """The batch of `images`, split into batches of at most `size` samples; see `take`."""
    count = len(images)
    if size >= count:
        return [dict(inputs)]
    return [take(images, inputs, rows) for rows in torch.arange(count).split(size)]


class RNGState:
    """The state of PyTorch's random generators, which `restore` sets again."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cpu = device, torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


@dataclass
class View:
    """Images of a part, clean or adversarial, at the bridge.

    `leaf` (n, T, D) is the detached h_v; backward passes of the language side leave their gradient there.
    """

    encode: Callable[[], Tensor]
    leaf: Tensor
    features: Tensor | None  # h_v with its graph; None if that is too large to keep
    rng: RNGState | None

    @classmethod
    def of(cls, encode: Callable[[], Tensor], device: torch.device, *, keep: bool) -> View:
        rng = None if keep else RNGState(device)
        with torch.set_grad_enabled(keep):
            features = encode()
        return cls(encode, features.detach().requires_grad_(), features if keep else None, rng)

    def pulled_back(self) -> Tensor:
        """0-d; its backward pass propagates the gradient of `leaf` through the vision side."""
        features = self.features
        assert self.leaf.grad is not None
        if features is None:
            assert self.rng is not None
            # The same dropout as before; the generators' own state is not changed.
            with torch.random.fork_rng([self.rng.device] if self.rng.cuda is not None else []):
                self.rng.restore()
                features = self.encode()
        return (features * self.leaf.grad).sum()


@dataclass
class Part:
    """A part of the batch after the language side.

    `texts` are inputs of `fuse`; `own` is h_t (n, text_dim) of its texts and `wrong` that of their wrong answers, if
    they are needed, `stated` what the verifier reads, `before` h_v of the images before training, where features are to
    stay near it. The `sums` of all parts add up to the logged values of a step.
    """

    texts: dict[str, Any]
    views: list[View]
    own: Tensor | None
    wrong: Tensor | None
    sums: dict[str, Tensor]
    stated: Texts | None = None
    before: Tensor | None = None


@contextmanager
def gradients_aside(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside, `.grad` holds the gradients of this step alone, so that a failed attempt can be dropped. At the end the
    gradients of earlier micro-batches are added; after an exception only those are left."""
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


def halved(size: int, error: DoesNotFitError, what: str, so: str = "") -> int:
    """How many samples are tried at once after `size` were too many."""
    if size == 1:
        raise torch.OutOfMemoryError(
            f"a single sample does not fit into memory ({error}). To need less, {REMEDIES}, {_IN_4_BITS}"
        ) from error
    half = (size + 1) // 2
    warnings.warn(
        f"{size} samples at once do not fit into memory ({error}). From now on {what} takes at most {half} at once{so}"
        f". To need less, {REMEDIES}, {_IN_4_BITS}",
        RuntimeWarning,
        stacklevel=3,
    )
    return half

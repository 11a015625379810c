"""An attack on the words of a prompt: a perturbation of their input embeddings, each in a ball of its own.

Perturbed word embeddings in training are those of Miyato et al. (2017); a ball relative to each word's own length makes
one radius fit embeddings of any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cmai_fast.bridge import Bridge, ModelBridge
from cmai_fast.bridge.backward import differentiate
from cmai_fast.bridge.labels import IGNORE
from cmai_fast.threat import WordBall

NO_WORDS = "the loss does not depend on the words of the prompt, which are under attack; choose another loss"


class Words:
    """The prompts of a batch under attack.

    What is added to the embeddings changes the language side alone, so the gradient at the words comes with the one at
    the bridge, from the same backward pass. A full pass inside `said` leaves it here, and `climb` takes a step along
    it: the maximum of the linearised loss is at a corner of the ball that is known in closed form. FGSM, PGD, MI-FGSM
    and the inner solvers of MBAT do both.

    Args:
        bridge: of a model that reads prompt and response as one sequence.
        texts: inputs of `Bridge.fuse`.
        ball: of each word.
        place: (N, L) bool, the tokens under attack; None: those of the prompts.

    Attributes:
        delta: (N, L, text_dim) float32, 0 at image tokens, responses and padding.
        best: like `delta`, what was there when a row last was the best (`note`).

    Raises:
        ValueError: a dual encoder or an encoder-decoder.
    """

    def __init__(
        self, bridge: ModelBridge, texts: Mapping[str, Tensor], ball: WordBall, place: Tensor | None = None
    ) -> None:
        check_words(bridge)
        self.bridge, self.texts, self.ball = bridge, dict(texts), ball
        ids, image = texts["input_ids"], texts["input_ids"] == bridge.model.config.image_token_id
        prompt = (texts["labels"] == IGNORE) & texts["attention_mask"].bool() & ~image
        if place is not None:
            prompt = prompt & place.to(prompt.device)
        with torch.no_grad():
            own = bridge.model.get_input_embeddings()(ids.masked_fill(image, 0)).detach().float()
            length = own.norm(dim=-1, keepdim=True) * prompt[..., None]
            self._radius = ball.eps * (length if ball.norm == "l2" else length / own.shape[-1] ** 0.5)
        self.delta, self.best = torch.zeros_like(own), torch.zeros_like(own)
        self._slope, self._fresh = torch.zeros_like(own), prompt.new_zeros(len(ids))
        self._moved = False
        self._leaf: Tensor | None = None

    @property
    def known(self) -> Tensor:
        """(N,) bool: rows with a gradient that no step was taken along yet."""
        return self._fresh

    def restart(self, rows: Tensor) -> None:
        """Puts the words of `rows` back."""
        self.delta[rows] = 0.0
        self._fresh.zero_()

    def note(self, rows: Tensor) -> None:
        """Keeps the words of `rows` (n,) as their best."""
        self.best[rows] = self.delta[rows]

    def flat(self, rows: Tensor) -> Tensor:
        """(n,) bool: whether the words of `rows` have a new gradient that is 0 everywhere."""
        slope = self._slope[rows] * (self._radius[rows] > 0)
        return self._fresh[rows] & ~slope.flatten(1).any(1)

    @contextmanager
    def said(self, rows: Tensor | None = None, *, alone: bool = False) -> Iterator[None]:
        """Inside, the language side reads the perturbed words of `rows` (n,) of the batch (None: all), and backward
        passes through it leave their gradients. `alone`: nothing else is differentiated; for `slope_of`."""
        place = slice(None) if rows is None else rows

        def perturbed(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            words, delta = kwargs.get("inputs_embeds"), self.delta[place]
            if words is None or words.shape != delta.shape:
                found = None if words is None else tuple(words.shape)
                raise ValueError(
                    f"{type(self.bridge.model).__name__} calls its language model with inputs_embeds of shape {found}, "
                    f"and the words under attack have {tuple(delta.shape)}; text attacks do not support this model"
                )
            if alone or (torch.is_grad_enabled() and not words.requires_grad):
                # Under gradient checkpointing of adapters, what the embedding gives is a leaf, which leads nowhere.
                self._leaf = delta.to(words.dtype, copy=True).requires_grad_()
                words = words.detach() + self._leaf
            elif self._moved:
                words = words + delta.to(words.dtype)
            if words.requires_grad:
                words.register_hook(lambda gradient: self._keep(gradient, place))
            return args, {**kwargs, "inputs_embeds": words}

        handle = self.bridge.model.get_decoder().register_forward_pre_hook(perturbed, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def slope_of(self, losses: Tensor) -> None:
        """Leaves the gradients of losses (n,) that were computed inside `said(alone=True)`, or of fixed images.

        Raises:
            ValueError: the losses do not depend on the words.
        """
        leaf, self._leaf = self._leaf, None
        if leaf is None or not losses.requires_grad:
            raise ValueError(NO_WORDS)
        differentiate(self.bridge.model, losses, leaf)

    def _keep(self, gradient: Tensor, place: slice | Tensor) -> None:
        # In float16 a loss is differentiated several times, scaled less and less: the first finite gradient counts.
        gradient = gradient.detach().float()
        new = gradient.flatten(1).isfinite().all(1) & ~self._fresh[place]
        self._slope[place] = torch.where(new[:, None, None], gradient, self._slope[place])
        self._fresh[place] |= new

    def climb(self, share: float, rows: Tensor | None = None) -> None:
        """Moves the words of `rows` (None: all) by `share` of their radius along their new gradients, inside the ball.
        Rows without a new gradient stay; the gradients are used up."""
        move = self._fresh.clone()
        if rows is not None:
            move &= torch.zeros_like(move).index_fill_(0, rows, True)
        self._fresh.zero_()
        if not move.any():
            return
        slope, delta = self._slope[move], self.delta[move]
        radius = self._radius[move]
        if self.ball.norm == "linf":
            delta = delta + share * radius * slope.sign()
            self.delta[move] = torch.minimum(torch.maximum(delta, -radius), radius)
        else:
            tiny = torch.finfo(slope.dtype).tiny
            delta = delta + share * radius * slope / slope.norm(dim=-1, keepdim=True).clamp_min(tiny)
            self.delta[move] = delta * (radius / delta.norm(dim=-1, keepdim=True).clamp_min(tiny)).clamp_max(1.0)
        self._moved = True


@contextmanager
def at_words(embedding: nn.Module, shape: torch.Size) -> Iterator[list[Tensor]]:
    """Inside, what `embedding` gives for ids of this shape (n, L) is a leaf; the leaves come in the list."""
    leaves: list[Tensor] = []

    def leaf(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        if output.shape[:-1] != shape:
            return output
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = embedding.register_forward_hook(leaf)
    try:
        yield leaves
    finally:
        handle.remove()


@contextmanager
def spoken(bridge: ModelBridge, deltas: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the next pass of the language model reads prompts, padded on the left, with `deltas` added: of each row
    (l, text_dim), for its last l words. For `generate`."""
    left = [tuple(deltas)]

    def perturbed(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not left:
            return None
        words = kwargs["inputs_embeds"].clone()
        for row, delta in zip(words, left.pop(), strict=True):
            if len(delta):
                row[-len(delta) :] += delta.to(row)
        return args, {**kwargs, "inputs_embeds": words}

    handle = bridge.model.get_decoder().register_forward_pre_hook(perturbed, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def said(words: Words | None) -> AbstractContextManager[None]:
    """`words.said()`, if there are any."""
    return nullcontext() if words is None else words.said()


def check_words(bridge: ModelBridge) -> None:
    """Raises ValueError for a model whose prompt cannot be attacked."""
    if not isinstance(bridge, Bridge):
        raise ValueError(
            f"{type(bridge.model).__name__} has no prompt and response in one sequence, which attacks on words need; "
            "attack the image alone (in training, set modality to 'image')"
        )

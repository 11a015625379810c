"""What Co-Attack and SGA share: captions and image of a dual encoder are attacked in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cmai_fast.attacks.captions import Captions
from cmai_fast.attacks.gradients import Gradient
from cmai_fast.attacks.hotflip import steepest
from cmai_fast.attacks.losses import Loss
from cmai_fast.attacks.pgd import pgd
from cmai_fast.attacks.state import AttackResult, prepare
from cmai_fast.attacks.substitution import Rules, Search, check_rules
from cmai_fast.attacks.victim import Victim
from cmai_fast.threat import ThreatModel

# (features of each caption's image (m, 1, D), the captions' rows (m,), h_t (m, D)) -> (m,), which is maximised.
TextLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def check_joint(name: str, **given: object) -> None:
    """Raises ValueError for settings that mean nothing."""
    alpha = given.pop("alpha", 0.0)
    if not (isinstance(alpha, (int, float)) and 0 <= alpha < float("inf")):
        raise ValueError(f"{name}: alpha is {alpha}; expected a finite number of at least 0")
    check_rules(name, **given)  # type: ignore[arg-type]


def captions_of(victim: Victim) -> Captions:
    """The victim's captions.

    Raises:
        ValueError: there are none.
    """
    if not isinstance(victim.prompts, Captions):
        raise ValueError(
            f"{type(victim.bridge.model).__name__}: the attack changes captions and images of a dual encoder (CLIP, "
            "SigLIP); set victim.prompts = Captions(pipeline, samples), or choose another attack (embedding-pgd with "
            "image=yes attacks prompt and image of a generative model)"
        )
    return victim.prompts


class Joint:
    """An attack in progress. Inside `running`, `reword` and `move` are called in turn, and `result` at the end.

    Attributes:
        typed: h_t (M, D) of the captions as they were typed. now: of the changed ones.
    """

    def __init__(self, victim: Victim, captions: Captions, rules: Rules, seed: int) -> None:
        captions.check(victim)
        self.victim, self.captions, self._rules, self._seed = victim, captions, rules, seed

    @contextmanager
    def running(self, clean: Tensor, sample_ids: Tensor | None) -> Iterator[None]:
        """The victim's model is restored afterwards, and its `passes` grow by those of the attack."""
        victim = self.victim
        exact = victim.exact
        try:
            # A sample that an image alone has broken is moved on: its captions change as well.
            victim.exact = False
            with victim.counted(), victim.attack_mode():
                self.clean, _, self.sample_ids = prepare(victim, clean, ThreatModel("linf", 0.0), sample_ids)
                self._image: AttackResult | None = None
                self._texts = self.captions.read()
                self._tokens = self._texts.inputs["input_ids"]
                self._spelled = list(self.captions.captions)
                self.typed = self.now = self._embedded()
                self._see(victim.space.to_model(self.clean))
                yield
        finally:
            victim.exact = exact

    def _embedded(self) -> Tensor:
        rows = torch.arange(len(self._tokens), device=self._tokens.device)
        with torch.no_grad():
            return self.captions.embed(self.victim, self._texts, rows, self._tokens)

    def _see(self, model_input: Tensor) -> None:
        self._model_input = model_input
        with torch.no_grad():
            self._features = self.victim.encode(model_input)
        self.victim.passes.vision_forward += 1

    def reword(self, loss: TextLoss) -> None:
        """Substitutes words of the captions as they were typed, a step per edit."""

        def judge(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            text = self.captions.embed(self.victim, self._texts, rows, ids)
            losses = loss(self._features[self.captions.owner[rows]], rows, text)
            return losses, torch.ones_like(rows, dtype=torch.bool)

        ids = self.captions.ids(self.sample_ids)
        search = Search(self.victim, self._texts, judge, ids, self._rules, whole=False)
        search.run(self._rules.edits, steepest, self._seed)
        self._spelled = search.best()
        self._tokens = torch.stack([self._texts.ids(line.row, line.best) for line in search.lines])
        self.now = self._embedded()

    def move(
        self, threat: ThreatModel, loss: Loss, *, steps: int, restarts: int, gradient: Gradient | None = None
    ) -> None:
        """PGD of the images."""
        self._image = pgd(
            self.victim, self.clean, threat, steps=steps, restarts=restarts, seed=self._seed,
            sample_ids=self.sample_ids, loss=loss, gradient=gradient,
        )  # fmt: skip
        assert self._image.model_input is not None
        self._see(self._image.model_input)

    def mean(self, of: Callable[[Tensor, Tensor], Tensor], image: Tensor, rows: Tensor | None) -> Tensor:
        """The mean (n,) over the captions of samples `rows` (None: all) of a function of image (n, D) and h_t."""
        rows = torch.arange(len(image), device=image.device) if rows is None else rows
        place, caption = (rows[:, None] == self.captions.owner[None, :]).nonzero(as_tuple=True)
        values = of(image[place], self.now[caption])
        count = torch.bincount(place, minlength=len(rows))
        return values.new_zeros(len(rows)).index_add(0, place, values) / count

    def result(self) -> AttackResult:
        """The images and captions, and which of them are wrong together."""
        rows = torch.arange(len(self._tokens), device=self._tokens.device)
        with torch.no_grad():
            ranked = self.captions.rank(self.victim, self._features[self.captions.owner], rows, self.now)
        adv = self.clean if self._image is None else self._image.adv
        found = self.captions.result(
            self.victim, self._spelled, (~ranked.right).tolist(), ranked.losses.tolist(), adv, self._model_input
        )
        if self._image is not None:
            found.nonfinite, found.zero_gradients = self._image.nonfinite, self._image.zero_gradients
        return found

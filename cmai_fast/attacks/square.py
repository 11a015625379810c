"""The Square Attack (Andriushchenko et al., 2020): random squares, kept where they raise the loss; no gradients."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from cmai_fast import ops
from cmai_fast.attacks.attack import attack
from cmai_fast.attacks.canvas import Canvas
from cmai_fast.attacks.losses import Loss
from cmai_fast.attacks.restarts import Restart, restarted
from cmai_fast.attacks.state import AttackResult
from cmai_fast.attacks.victim import Victim
from cmai_fast.threat import ThreatModel

_TINY = 1e-12
_BLOCK = 64  # queries for which random numbers are drawn at once
# After these queries of 10,000 the share of pixels in a square is halved (section 5).
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def share_of(query: int, queries: int, p_init: float) -> float:
    """p, the share of pixels that a square covers, at `query` (0, 1, ...) of `queries`."""
    return p_init / 2 ** sum(query * 10_000 // queries > after for after in _HALVED_AFTER)


def _refuse(p_init: float = 0.8) -> None:
    if not 0 < p_init <= 1:
        raise ValueError(f"square: p_init is {p_init}; expected a share of the pixels, above 0 and at most 1")


@attack("square", label="Square", steps=5000, refuse=_refuse)
def square(
    victim: Victim,
    clean: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    restarts: int,
    seed: int,
    sample_ids: Tensor | None,
    loss: str | Loss | None = None,
    p_init: float = 0.8,
) -> AttackResult:
    """Square Attack (Andriushchenko et al., 2020, algorithms 1 to 3), on the margin unless `loss` says otherwise.

    Each query changes the best image so far in one square per sample, at a random place; in a model that reads tiles or
    patches, in one of its pictures. Fooled samples leave the batch. Random numbers depend on (seed, sample id, query).

    Args:
        steps: queries per restart, the first of which is the random start. The clean image costs one more.
        p_init: the share of pixels that a square covers at first; it is halved nine times on the way.
    """
    return restarted(
        lambda run: _Run(run, p_init).search(steps),
        victim, clean, threat, restarts=restarts, seed=seed, sample_ids=sample_ids,
        loss="margin" if loss is None else loss, gradient=None, early_stop=True,
    )  # fmt: skip


class _Run:
    """One restart: the state of each row that is still in the batch, as pictures (n, C, K * H, W)."""

    def __init__(self, run: Restart, p_init: float) -> None:
        self.run, self.p_init, self.norm = run, p_init, run.threat.norm
        self.canvas = Canvas(run.victim, run.clean)
        self.rows, self.eps = run.rows, run.eps[run.rows].view(-1, 1, 1, 1)
        self.clean = self.canvas.pictures(run.clean[run.rows], run.rows)
        self.channels = self.clean.shape[1]
        self.best = self.clean.clone()
        self.loss = torch.full_like(run.eps[run.rows], float("-inf"))

    def search(self, queries: int) -> None:
        self.accept(self.start(), everywhere=True)
        for query in range(1, queries):
            if not len(self.rows):
                return
            if query == 1 or query % _BLOCK == 0:
                self.draws = self.uniform(_BLOCK * (6 + self.channels), 1 + query // _BLOCK)
            place = query % _BLOCK * (6 + self.channels)
            draw = self.draws[:, place : place + 6 + self.channels]
            self.accept((self.linf if self.norm == "linf" else self.l2)(draw, share_of(query, queries, self.p_init)))

    def accept(self, tried: Tensor, everywhere: bool = False) -> None:
        """Asks the model about `tried` (n, C, K * H, W), keeps it where it raises the loss, and drops fooled rows."""
        victim, run = self.run.victim, self.run
        adv = self.canvas.images(tried, self.rows, run.clean)
        model_input = victim.space.to_model(adv)
        with torch.no_grad():
            at = victim(model_input, self.rows, run.loss)
        run.best.offer(adv, model_input, at, self.rows)
        loss = at.loss.to(self.loss)
        better = (loss > self.loss) | everywhere
        self.loss = torch.where(better, loss, self.loss)
        self.best = torch.where(better.view(-1, 1, 1, 1), tried, self.best)
        if not at.right.all():
            for name, value in list(vars(self).items()):
                if isinstance(value, Tensor):
                    setattr(self, name, value[at.right])

    def uniform(self, count: int, number: int) -> Tensor:
        """(n, count) in [0, 1), a hash of (seed, sample id, number, place)."""
        noise = torch.empty(len(self.rows), count, dtype=torch.float32, device=self.rows.device)
        one, ids = noise.new_ones(len(noise)), self.run.sample_ids[self.rows]
        seed = self.run.seed + 7_368_787 * number
        ops.random_start_(noise, torch.zeros_like(noise), one, ids, seed, "linf", -1.0, 1.0)
        return ((noise + 1) / 2).clamp(0, 1 - 2**-24)

    def signs(self, draw: Tensor) -> Tensor:
        """(n, C, ...) of -1 and 1 from uniform numbers."""
        return torch.where(draw < 0.5, -1.0, 1.0).to(self.clean)

    def start(self) -> Tensor:
        """L_inf: vertical stripes of width 1 (section 4.2). L2: a grid of 5 x 5 bumps (section 4.3)."""
        n, channels, _, width = self.clean.shape
        if self.norm == "linf":
            stripes = self.signs(self.uniform(channels * width, 0).view(n, channels, 1, width))
            return (self.clean + self.eps * stripes).clamp(0, 1)
        signs = self.signs(self.uniform(channels * 25 + 25, 0))
        delta = torch.zeros_like(self.clean)
        sizes = self.canvas.sizes[self.rows]
        for place in range(25):
            for k in range(sizes.shape[1]):
                side = (sizes[:, k].amin(1) // 5).clamp_min(1)
                for s in side.unique().tolist():
                    inside = (1 + max(place // 5, place % 5)) * s <= sizes[:, k].amin(1)
                    own = torch.nonzero((side == s) & inside).squeeze(1)
                    y = k * self.canvas.height + place // 5 * side[own]
                    rows, columns = self.window(y, place % 5 * side[own], s)
                    sign = signs[own, place * channels : (place + 1) * channels, None, None]
                    delta[own[:, None, None, None], self.every(), rows, columns] = sign * self.bump(
                        s, signs[own, -1 - place]
                    )
        return self.at_radius(delta)

    def linf(self, draw: Tensor, share: float) -> Tensor:
        """A square in which each channel is at the upper or lower end of the ball."""
        y, x, side = self.place(draw[:, 0], draw[:, 1], draw[:, 2], share)
        rows = torch.arange(self.clean.shape[2], device=self.rows.device)[:, None]
        columns = torch.arange(self.clean.shape[3], device=self.rows.device)
        y, x, side = (v.view(-1, 1, 1) for v in (y, x, side))
        inside = ((rows >= y) & (rows < y + side) & (columns >= x) & (columns < x + side))[:, None]
        signs = self.signs(draw[:, 6:, None, None])
        return torch.where(inside, (self.clean + self.eps * signs).clamp(0, 1), self.best)

    def l2(self, draw: Tensor, share: float) -> Tensor:
        """Algorithm 3: the norm of a second square, and what the ball still allows, moves to a bump in the first."""
        tried = self.best - self.clean
        y, x, side = self.place(draw[:, 0], draw[:, 1], draw[:, 2], share, least=3)
        second = self.place(draw[:, 0], draw[:, 3], draw[:, 4], share, least=3)
        for s in side.unique().tolist():  # one, if all pictures have the same size
            own = torch.nonzero(side == s).squeeze(1)
            delta, at = tried[own], torch.arange(len(own), device=own.device)[:, None, None, None]
            spare = (self.eps[own] ** 2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0)
            one = (at, self.every(), *self.window(y[own], x[own], s))
            two = (at, self.every(), *self.window(second[0][own], second[1][own], s))
            both = delta.square().sum((2, 3), keepdim=True)
            window = delta[one]
            delta[two] = 0.0
            rest = delta.clone()
            rest[one] = 0.0
            both = both - rest.square().sum((2, 3), keepdim=True)  # the norm in the union of the two squares
            signs = self.signs(draw[own, 6:, None, None])
            new = signs * self.bump(s, self.signs(draw[own, 5])) + _unit(window)
            delta[one] = _unit(new) * (spare / self.channels + both.clamp_min(0)).sqrt()
            tried[own] = delta
        return self.at_radius(tried)

    def place(
        self, picture: Tensor, row: Tensor, column: Tensor, share: float, least: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """First row, first column and side (n,) of a square inside one picture, from uniform numbers (n,).

        A picture is drawn by its share of the pixels. `least`: sides are at least this, and then odd.
        """
        sizes = self.canvas.sizes[self.rows]
        area = sizes.prod(-1).cumsum(1)
        k = (picture[:, None] * area[:, -1:] >= area).sum(1).clamp_max(sizes.shape[1] - 1)
        height, width = sizes[torch.arange(len(k), device=k.device), k].unbind(1)
        side = (share * (height * width).double()).sqrt().round().long().clamp_min(least)
        if least > 1:
            side = side + (side % 2 == 0)
        side = torch.minimum(side, torch.minimum(height, width)).clamp_min(1)
        y = (row.double() * (height - side + 1)).long().clamp_min(0)
        x = (column.double() * (width - side + 1)).long().clamp_min(0)
        return k * self.canvas.height + y, x, side

    def every(self) -> Tensor:
        return torch.arange(self.channels, device=self.rows.device)[:, None, None]

    def window(self, y: Tensor, x: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Indices of the rows (n, 1, side, 1) and columns (n, 1, 1, side) of squares."""
        along = torch.arange(side, device=y.device)
        return (y[:, None] + along)[:, None, :, None], (x[:, None] + along)[:, None, None, :]

    def bump(self, side: int, turned: Tensor) -> Tensor:
        """`bump(side)` (n, 1, side, side), transposed where `turned` (n,) is above 0."""
        pattern = bump(side).to(self.clean)
        return torch.where(turned.view(-1, 1, 1, 1) > 0, pattern.t(), pattern)

    def at_radius(self, delta: Tensor) -> Tensor:
        """Scaled to the surface of the L2 ball, inside the box."""
        norm = delta.double().square().sum((1, 2, 3), keepdim=True).sqrt() + _TINY
        return (self.clean + delta * (self.eps.double() / norm).to(delta)).clamp(0, 1)


@lru_cache(maxsize=64)
def bump(side: int) -> Tensor:
    """eta of section 4.3 (side, side), of norm 1: a peak in the upper half, its negative in the lower one.

    At the Chebyshev distance d from the centre of a half, a peak is the sum of 1 / k^2 over k > d.
    """
    whole = torch.zeros(side, side, dtype=torch.float64)
    for rows, sign in ((slice(0, side // 2), 1.0), (slice(side // 2, side), -1.0)):
        height = len(range(side)[rows])
        if not height:
            continue
        away = torch.maximum(
            (torch.arange(height) - height // 2).abs()[:, None], (torch.arange(side) - side // 2).abs()[None]
        )
        rings = 1 / torch.arange(1, max(height, side) // 2 + 2, dtype=torch.float64) ** 2
        whole[rows] = sign * rings.flip(0).cumsum(0).flip(0)[away]
    return whole / whole.norm()


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum((2, 3), keepdim=True).sqrt() + _TINY)

"""The other answers that a sample may give: where each parts from its label, and how far it leads there.

Greedy generation follows the label until another token beats it, so what decides between two answers is the first token
at which they differ, and all such leads come from the one pass that has the label as its response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cmai_fast.attacks.victim import Outputs
from cmai_fast.bridge.labels import IGNORE


@dataclass
class OtherAnswers:
    """Other answers of the N samples of a batch, at most K each.

    Attributes:
        place: (N, K) int64, which of the label's response tokens is the first that differs; -1: there is no such
            answer.
        token: (N, K) int64, the other answer's token there.
        aim: (N,) int64, the column of the answer that the attack moves to; if the victim is `targeted`, of the sample's
            own answer, which it moves away from. None: there is none.

    Answers that part from the label with the same token count once: up to there, they are the same.
    """

    place: Tensor
    token: Tensor
    aim: Tensor | None = None

    @classmethod
    def parting(cls, labels: Tensor, others: Sequence[Tensor]) -> OtherAnswers:
        """From `labels` (N, L) and K others (N, L_k), -100 outside a response. A row that repeats the label is none."""
        place = torch.full((len(labels), len(others)), -1)
        token = torch.zeros_like(place)
        responses = [[row[row != IGNORE].tolist() for row in answers.cpu()] for answers in (labels, *others)]
        for i, own in enumerate(responses[0]):
            seen = set()
            for k, answers in enumerate(responses[1:]):
                parts = [(j, b) for j, (a, b) in enumerate(zip(own, answers[i], strict=False)) if a != b][:1]
                if parts and parts[0] not in seen:
                    seen.add(parts[0])
                    place[i, k], token[i, k] = parts[0]
        return cls(place.to(labels.device), token.to(labels.device))

    @classmethod
    def classes(cls, labels: Tensor, count: int) -> OtherAnswers:
        """From the labels (N,) of a dual encoder or classifier with `count` classes; column k is class k."""
        token = torch.arange(count, device=labels.device).expand(len(labels), count)
        return cls(torch.where(token == labels[:, None], -1, 0), token)

    @property
    def counts(self) -> Tensor:
        """(N,) how many other answers each sample has."""
        return (self.place >= 0).sum(1)

    @cached_property
    def least(self) -> int:
        """The smallest of `counts`."""
        return int(self.counts.min()) if len(self.place) else 0

    def leads(self, outputs: Outputs, rows: Tensor | None) -> Tensor:
        """(n, K) log p(other token) - log p(label's token) where the two part; -inf where there is no such answer.

        For a classifier these are its logits, less that of the label.
        """
        logits, targets = outputs.logits, outputs.targets
        place, token = (x if rows is None else x[rows] for x in (self.place, self.token))
        there = place >= 0
        columns = (targets == IGNORE).to(torch.int8).sort(dim=1, stable=True).indices  # a label's tokens first
        column = columns.gather(1, place.clamp_min(0))
        row = torch.arange(len(logits), device=logits.device)[:, None]
        own = targets.gather(1, column).masked_fill(~there, 0)
        wide = torch.promote_types(logits.dtype, torch.float32)
        lead = logits[row, column, token].to(wide) - logits[row, column, own].to(wide)
        return lead.masked_fill(~there, float("-inf"))

    def toward(self, leads: Tensor, rows: Tensor | None) -> Tensor:
        """(n,) the lead of the answer aimed at."""
        assert self.aim is not None
        aim = self.aim if rows is None else self.aim[rows]
        return leads.gather(1, aim[:, None]).squeeze(1)

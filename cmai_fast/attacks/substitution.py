"""Substitution of tokens of a prompt: the search that HotFlip and GCG share.

A step computes the gradient at the input embeddings of the current prompt, proposes substitutions by the first-order
estimate of what each adds to the loss, <E[v] - E[x_p], dL/dE[x_p]> (Ebrahimi et al. 2018, equation 1), evaluates them
by forward passes, and goes on from the best of them. The best prompt seen is the result. Images stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cmai_fast.attacks.captions import Captions
from cmai_fast.attacks.losses import Loss, loss_of
from cmai_fast.attacks.prompts import Changes, Judge, Texts, is_word, prompts_of
from cmai_fast.attacks.state import AttackResult, prepare
from cmai_fast.attacks.victim import Victim
from cmai_fast.attacks.words import NO_WORDS, at_words
from cmai_fast.bridge.backward import differentiate
from cmai_fast.threat import ThreatModel

# (estimated gains (t, C), of which impossible ones are -inf; a random generator of this sample and step) -> (place,
# number of the candidate) of substitutions to try, in this order.
Propose = Callable[[Tensor, np.random.Generator], Iterable[tuple[int, int]]]


@dataclass(frozen=True)
class Rules:
    """What may be substituted.

    edits: the largest number of tokens that differ from what was typed. readable: whole words are replaced by whole
    words. kept: words that stay and are never put in, in lower case. tries: substitutions to evaluate per step.
    """

    edits: int
    readable: bool
    kept: frozenset[str]
    tries: int


def check_rules(name: str, edits: int = 1, candidates: int = 1, **others: object) -> None:
    """Raises ValueError for settings that mean nothing."""
    for key, value in (("edits", edits), ("candidates", candidates), *others.items()):
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ValueError(f"{name}: {key} is {value}; expected at least 1")


def rules(edits: int, readable: bool, keep: str, candidates: int) -> Rules:
    """`keep`: words with commas between them."""
    return Rules(edits, readable, frozenset(w.strip().lower() for w in keep.split(",") if w.strip()), candidates)


@dataclass
class Line:
    """One sample's search. `open`: the numbers of its tokens that may be replaced."""

    row: int
    sample_id: int
    open: list[int]
    budget: int
    now: dict[int, int]
    best: dict[int, int]
    loss: float = float("-inf")
    fooled: bool = False
    seen: set[tuple[tuple[int, int], ...]] = field(default_factory=set)

    def new(self, many: Iterable[dict[int, int]], most: int) -> list[dict[int, int]]:
        """The first `most` that differ from each other and from those that were dealt with (`seen`)."""
        found: dict[tuple[tuple[int, int], ...], dict[int, int]] = {}
        for changes in many:
            key = _key(changes)
            if key not in self.seen and key not in found:
                found[key] = changes
                if len(found) == most:
                    break
        return list(found.values())

    def offer(self, changes: Changes, loss: float, right: bool) -> None:
        """Keeps what fools before what does not, then the highest loss."""
        if (not right, loss) > (self.fooled, self.loss):
            self.best, self.loss, self.fooled = dict(changes), loss, not right


def _key(changes: Changes) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(changes.items()))


class Search:
    """The search on the texts of a batch.

    Args:
        victim: in attack mode; its passes are counted.
        texts: those to start from.
        judge: of the loss, which is maximised.
        sample_ids: (N,) of each text, for random draws.
        whole: whether `judge` runs the whole model, or its text side alone; for the count of backward passes.
        last: how many tokens at the end of each text may be replaced, all of them and no others; 0: what `rules` say.
    """

    def __init__(
        self,
        victim: Victim,
        texts: Texts,
        judge: Judge,
        sample_ids: Sequence[int],
        rules: Rules,
        whole: bool = True,
        last: int = 0,
    ) -> None:
        self.victim, self.texts, self.judge, self.rules, self._whole = victim, texts, judge, rules, whole
        vocabulary, known = texts.vocabulary, len(texts.embedding.weight)  # type: ignore[arg-type]
        self.candidates = [v for v in vocabulary.allowed(rules.readable, rules.kept) if v < known]
        self._capital = torch.tensor([vocabulary.spelled[v][0].isupper() for v in self.candidates], dtype=torch.bool)
        self._table = self._embed(self.candidates)
        self.zero = torch.zeros(len(texts.own), dtype=torch.int64, device=self._table.device)
        self.lines = [Line(i, s, self._open(i, last), last or rules.edits, {}, {}) for i, s in enumerate(sample_ids)]

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        ids = self.texts.inputs["input_ids"]
        with torch.no_grad():
            return self.texts.embedding(torch.tensor(tokens, dtype=ids.dtype, device=ids.device)).detach()

    def _open(self, row: int, last: int) -> list[int]:
        own, rules, found = self.texts.own[row], self.rules, []
        if last:
            return list(range(len(own.spans)))[-last:]
        for k, (start, end) in enumerate(own.spans):
            word = own.text[start:end]
            around = own.text[max(start - 1, 0) : start] + own.text[end : end + 1]
            whole = is_word(word) and not any(c.isalnum() for c in around)
            if word.lower() not in rules.kept and (whole or not rules.readable):
                found.append(k)
        return found

    def evaluate(self, tries: Sequence[tuple[Line, Changes]]) -> list[tuple[float, bool]]:
        """Loss, and whether the answer is right, of each; also offered as the best of its sample."""
        found: list[tuple[float, bool]] = []
        size = max(len(self.lines), 1)  # as many at once as there are texts
        for start in range(0, len(tries), size):
            part = tries[start : start + size]
            rows = torch.tensor([line.row for line, _ in part], device=self.zero.device)
            with torch.no_grad():
                losses, right = self.judge(rows, torch.stack([self.texts.ids(line.row, c) for line, c in part]))
            found += zip(losses.tolist(), right.tolist(), strict=True)
        for (line, changes), (loss, correct) in zip(tries, found, strict=True):
            line.offer(changes, loss, correct)
        return found

    def step(self, lines: Sequence[Line], propose: Propose, seed: int) -> None:
        """One step of each of these samples; one without a substitution that reads back stays where it is."""
        gains = self._gains(lines)
        wanted: list[tuple[Line, dict[int, int]]] = []
        for line, (gain, back) in zip(lines, gains, strict=True):
            rng = np.random.default_rng((seed, line.sample_id % 2**64))
            proposed = propose(gain, rng) if gain.numel() else ()
            changed = (self._changed(line, line.open[p], self.candidates[v], back) for p, v in proposed)
            wanted += [(line, c) for c in line.new(changed, 2 * self.rules.tries)]  # some do not read back
        good = self.texts.read_back([(line.row, changes) for line, changes in wanted])
        left: dict[int, list[dict[int, int]]] = {}
        for (line, changes), same in zip(wanted, good, strict=True):
            own = left.setdefault(line.row, [])
            if not same or len(own) < self.rules.tries:
                line.seen.add(_key(changes))
            if same and len(own) < self.rules.tries:
                own.append(changes)
        tries = [(line, c) for line in lines for c in left.get(line.row, ())]
        found = self.evaluate(tries)
        best: dict[int, tuple[bool, float]] = {}
        for (line, changes), (loss, right) in zip(tries, found, strict=True):
            if line.row not in best or (not right, loss) > best[line.row]:
                best[line.row], line.now = (not right, loss), changes

    def _changed(self, line: Line, k: int, token: int, back: int | None) -> dict[int, int]:
        changes = dict(line.now)
        if k not in changes and len(changes) >= line.budget and back is not None:
            del changes[back]
        changes[k] = token
        if token == self.texts.typed(line.row, k):
            del changes[k]
        return changes

    def _gains(self, lines: Sequence[Line]) -> list[tuple[Tensor, int | None]]:
        """Of each sample, the estimated gains (t, C) of a candidate in each open place, and the token that is put back
        where the budget is used up: the one whose return costs least by the same estimate."""
        rows = torch.tensor([line.row for line in lines], device=self.zero.device)
        ids = torch.stack([self.texts.ids(line.row, line.now) for line in lines])
        with torch.enable_grad(), at_words(self.texts.embedding, ids.shape) as leaf:
            losses, _ = self.judge(rows, ids)
            if not leaf or not losses.requires_grad:
                raise ValueError(NO_WORDS)
            slope = differentiate(self.victim.bridge.model, losses, leaf[0])
        if self._whole:
            self.victim.ran(rows, backward=True)
        else:
            self.victim.passes.text_backward += 1
        slope, at = slope.float(), leaf[0].detach().float()
        found = []
        for n, line in enumerate(lines):
            columns = self.texts.columns[line.row]
            places = [columns[k] for k in line.open]
            g, x = slope[n, places], at[n, places]
            gain = g @ self._table.float().t() - (g * x).sum(1, keepdim=True)
            if not g.any():
                self.zero[line.row] += 1
            back = None
            if len(line.now) >= line.budget and line.now:
                changed = list(line.now)
                spots = [columns[k] for k in changed]
                typed = self._embed([self.texts.typed(line.row, k) for k in changed]).float()
                returns = (slope[n, spots] * (typed - at[n, spots])).sum(1)
                back = changed[int(returns.argmax())]
                gain += returns.max() * torch.tensor([[k not in line.now] for k in line.open], device=gain.device)
            self._forbid(gain, line, ids[n, places])
            found.append((gain, back))
        return found

    def _forbid(self, gain: Tensor, line: Line, now: Tensor) -> None:
        tokens = torch.tensor(self.candidates, device=gain.device)
        gain[tokens[None, :] == now[:, None]] = float("-inf")
        if self.rules.readable:
            own = self.texts.own[line.row]
            capital = torch.tensor([own.text[own.spans[k][0]].isupper() for k in line.open], dtype=torch.bool)
            gain[(capital[:, None] != self._capital[None, :]).to(gain.device)] = float("-inf")

    def scatter(self, lines: Sequence[Line], seed: int) -> None:
        """Puts random substitutions within the budget into these samples, where some read back."""
        wanted = []
        for line in lines:
            rng = np.random.default_rng((seed, line.sample_id % 2**64))
            for _ in range(16):
                places = rng.permutation(line.open)[: line.budget].tolist()
                tokens = rng.choice(self.candidates, len(places)).tolist() if self.candidates else []
                changes = {k: t for k, t in zip(places, tokens, strict=False) if t != self.texts.typed(line.row, k)}
                wanted.append((line, changes))
            line.now = {}
        good = self.texts.read_back([(line.row, changes) for line, changes in wanted])
        for (line, changes), same in zip(wanted, good, strict=True):
            if same and not line.now:
                line.now = changes

    def run(self, steps: int, propose: Propose, seed: int, restarts: int = 1) -> None:
        """Steps of every text until its answer is wrong; restarts after the first begin at random substitutions. What
        was typed is a candidate too."""
        self.evaluate([(line, {}) for line in self.lines])
        for number in range(restarts):
            own = seed + 1_000_003 * number
            if number:
                lines = [line for line in self.lines if not line.fooled]
                self.scatter(lines, own)
                self.evaluate([(line, line.now) for line in lines])
            for step in range(steps):
                lines = [line for line in self.lines if not line.fooled]
                if not lines:
                    return
                self.step(lines, propose, own + 7_368_787 * (step + 1))

    def best(self) -> list[str]:
        """The best text of each."""
        return [self.texts.spell(line.row, line.best) for line in self.lines]


def substituted(
    victim: Victim,
    clean: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    restarts: int,
    seed: int,
    sample_ids: Tensor | None,
    loss: str | Loss | None,
    rules: Rules,
    propose: Propose,
) -> AttackResult:
    """Searches the victim's prompts, or the captions of a dual encoder, and returns its own images with the best texts.

    The victim's model is restored, and its `passes` grow by those of the attack.
    """
    prompts = victim.prompts if isinstance(victim.prompts, Captions) else prompts_of(victim)
    with victim.counted(), victim.attack_mode():
        clean, _, sample_ids = prepare(victim, clean, threat, sample_ids)
        model_input = victim.space.to_model(clean)
        with torch.no_grad():
            features = victim.encode(model_input)
        victim.passes.vision_forward += 1
        texts = prompts.read()
        judge = prompts.judge(victim, features, texts, loss_of(loss))
        if isinstance(prompts, Captions):
            prompts.check(victim)
            search = Search(victim, texts, judge, prompts.ids(sample_ids), rules, whole=False)
            search.run(steps, propose, seed, restarts)
            wrong, losses = [line.fooled for line in search.lines], [line.loss for line in search.lines]
            return prompts.result(victim, search.best(), wrong, losses, clean, model_input)
        search = Search(victim, texts, judge, sample_ids.tolist(), rules)
        search.run(steps, propose, seed, restarts)
        return AttackResult(
            adv=clean,
            fooled=torch.tensor([line.fooled for line in search.lines], dtype=torch.bool, device=clean.device),
            loss=torch.tensor([line.loss for line in search.lines], dtype=clean.dtype, device=clean.device),
            passes=victim.passes,
            nonfinite=torch.zeros_like(search.zero),
            zero_gradients=search.zero,
            model_input=model_input,
            prompts=search.best(),
        )

"""Statements about pictures, each a question with an answer, as tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cmai_fast.data.sample import Sample

PADDING = -1  # after a statement's tokens
STATEMENT_IDS, STATEMENT_ANSWERS = "statement_ids", "statement_answers"  # keys of a batch

# A question, and answers to it: the right one, then wrong ones.
Statement = tuple[str, Sequence[str]]
Told = Callable[[Sample], Sequence[Statement]]  # what is said of the picture of a sample


def encode(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Tokens (M, L) of questions each followed by its answer, then -1, and the number of the answer's tokens (M,).

    Control tokens that a text spells are read as text. An empty answer is one token of padding.
    """
    questions, answers = (
        tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for texts in zip(*pairs, strict=True)
    )
    rows = [(q, a or [tokenizer.pad_token_id]) for q, a in zip(questions, answers, strict=True)]
    ids = torch.full((len(rows), max(len(q) + len(a) for q, a in rows)), PADDING)
    for i, (q, a) in enumerate(rows):
        ids[i, : len(q) + len(a)] = torch.tensor([*q, *a])
    return ids, torch.tensor([len(a) for _, a in rows])


def told(tokenizer: Any, samples: Sequence[Sample], statements: Told) -> dict[str, Tensor]:
    """What `statements` say of each sample, as a batch holds it (`stacked`).

    Raises:
        ValueError: a sample without a statement, or one without a right and a wrong answer.
    """
    said = [statements(s) for s in samples]
    for s, own in zip(samples, said, strict=True):
        if not own or any(len(answers) < 2 for _, answers in own):
            raise ValueError(
                f"sample {s.id!r} has the statements {own!r:.200}; expected at least one, each with a right answer and "
                "a wrong one"
            )
    return stacked(tokenizer, said)


def stacked(tokenizer: Any, rows: Sequence[Sequence[Statement]]) -> dict[str, Tensor]:
    """Statements about N samples as a batch holds them: `statement_ids` (N, S, K, L) and `statement_answers` (N, S, K),
    the number of the answer's tokens, 0 where a sample has fewer than S statements or a statement fewer than K answers.

    The first of K is the right answer.
    """
    places = {
        (i, j, k): (question, answer)
        for i, row in enumerate(rows)
        for j, (question, answers) in enumerate(row)
        for k, answer in enumerate(answers)
    }
    each = {pair: n for n, pair in enumerate(dict.fromkeys(places.values()))}  # many images have the same
    ids, counts = encode(tokenizer, list(each))
    own = torch.tensor([each[pair] for pair in places.values()])
    i, j, k = torch.tensor(list(places)).T
    shape = len(rows), int(j.max()) + 1, int(k.max()) + 1
    found = torch.full((*shape, ids.shape[1]), PADDING), torch.zeros(shape, dtype=torch.long)
    found[0][i, j, k], found[1][i, j, k] = ids[own], counts[own]
    return dict(zip((STATEMENT_IDS, STATEMENT_ANSWERS), found, strict=True))

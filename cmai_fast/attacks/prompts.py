"""The texts of a victim's batch, for attacks on text: the tokens that users typed, and what may replace them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cmai_fast.attacks.losses import Loss
from cmai_fast.attacks.victim import Outputs, Victim
from cmai_fast.attacks.words import check_words
from cmai_fast.bridge.labels import IGNORE
from cmai_fast.data import Sample
from cmai_fast.data.collate import VQACollator
from cmai_fast.data.user_tokens import UserTokens
from cmai_fast.pipeline import Pipeline

Changes = Mapping[int, int]  # number of a user's token in its text -> the token that replaces it
# (rows of the texts (n,), their tokens (n, L)) -> the loss (n,) and whether the answer is right (n,).
Judge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Prompts:
    """What the users of a batch typed: one prompt per sample.

    Args:
        pipeline: of a model that reads prompt and response as one sequence.
        samples: of the victim's batch, in its order.

    Raises:
        ValueError: a dual encoder or an encoder-decoder.
    """

    def __init__(self, pipeline: Pipeline, samples: Sequence[Sample]) -> None:
        check_words(pipeline.bridge)
        assert isinstance(pipeline.collate, VQACollator)
        self.pipeline, self.collate, self.samples = pipeline, pipeline.collate, list(samples)
        self.vocabulary = Vocabulary.of(pipeline.processor.tokenizer)

    def read(self, texts: Sequence[str] | None = None) -> Texts:
        """The prompts with these texts (None: those that were typed), followed by the samples' answers."""
        samples, bridge = self.samples, self.pipeline.bridge
        if texts is not None:
            samples = [replace(s, prompt=text) for s, text in zip(samples, texts, strict=True)]
        inputs = bridge.inputs(self.pipeline.on_device(self.collate(samples)))[1]
        own, columns = self.collate.user_tokens(samples), []
        for tokens, ids, mask, labels in zip(
            own, inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True
        ):
            prompt = (mask.bool() & (labels == IGNORE)).nonzero().squeeze(1)
            columns.append([int(prompt[c]) for c in tokens.columns(ids[prompt].tolist())])
        return Texts(inputs, own, columns, self.vocabulary, bridge.model.get_input_embeddings(), self.collate.read)

    def judge(self, victim: Victim, features: Tensor, texts: Texts, loss: Loss) -> Judge:
        """By the response to images with features (N, T, D), as `Victim` judges."""

        def judged(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            own = {**victim.rows(texts.inputs, rows), "input_ids": ids}
            outputs = Outputs(victim, features[rows], rows, own, chosen=True)
            return loss(features[rows], outputs, victim, rows), outputs.right

        return judged


@dataclass
class Texts:
    """Typed texts inside what a model reads.

    inputs: `input_ids` (N, L) and what belongs to them. own: of each text. columns: of each text, where its tokens are
    in `inputs` (t,). embedding: the module that reads them. read: whole prompts to tokens, as `UserTokens.whole`.
    """

    inputs: dict[str, Tensor]
    own: list[UserTokens]
    columns: list[list[int]]
    vocabulary: Vocabulary
    embedding: nn.Module
    read: Callable[[Sequence[str]], list[list[int]]]

    @property
    def mask(self) -> Tensor:
        """(N, L) bool: the tokens that users typed."""
        mask = torch.zeros_like(self.inputs["input_ids"], dtype=torch.bool)
        for row, columns in zip(mask, self.columns, strict=True):
            row[columns] = True
        return mask

    def typed(self, row: int, k: int) -> int:
        """The `k`-th token of a text."""
        return self.own[row].whole[self.own[row].places[k]]

    def ids(self, row: int, changes: Changes) -> Tensor:
        """`input_ids` (L,) of a text with these tokens replaced."""
        ids = self.inputs["input_ids"][row].clone()
        for k, token in changes.items():
            ids[self.columns[row][k]] = token
        return ids

    def spell(self, row: int, changes: Changes) -> str:
        """The text with these tokens replaced."""
        return self.own[row].spell({k: self.vocabulary.spelled[token] for k, token in changes.items()})

    def read_back(self, tries: Sequence[tuple[int, Changes]]) -> list[bool]:
        """Whether the tokenizer reads each text (a row and its changes) as exactly these tokens, when it is typed."""
        if not tries:
            return []
        found, same = self.read([self.own[row].prompt(self.spell(row, changes)) for row, changes in tries]), []
        for (row, changes), ids in zip(tries, found, strict=True):
            expected = list(self.own[row].whole)
            for k, token in changes.items():
                expected[self.own[row].places[k]] = token
            same.append(list(ids) == expected)
        return same


_vocabularies: weakref.WeakKeyDictionary[Any, Vocabulary] = weakref.WeakKeyDictionary()


class Vocabulary:
    """How each token of a tokenizer is typed: `spelled`, without white space around it."""

    def __init__(self, tokenizer: Any) -> None:
        alone = [[token] for token in range(len(tokenizer))]
        self.spelled = [tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() for ids in alone]
        self._never = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """Made once per tokenizer."""
        known = _vocabularies.get(tokenizer)
        if known is None or len(known.spelled) != len(tokenizer):
            known = _vocabularies[tokenizer] = cls(tokenizer)
        return known

    def allowed(self, readable: bool, kept: frozenset[str]) -> list[int]:
        """Tokens that may be put into a text: no control tokens, no parts of characters, no `kept` words, and if
        `readable`, only words (letters alone, at least two unless it is a or I)."""
        found = []
        for token, text in enumerate(self.spelled):
            if not text or not text.isprintable() or "\ufffd" in text or token in self._never:
                continue
            if text.lower() in kept or (readable and not is_word(text)):
                continue
            found.append(token)
        return found


def is_word(text: str) -> bool:
    return text.isalpha() and (len(text) > 1 or text in ("a", "A", "I"))


def prompts_of(victim: Victim) -> Prompts:
    """The victim's prompts.

    Raises:
        ValueError: there are none.
    """
    if not isinstance(victim.prompts, Prompts):
        check_words(victim.bridge)
        raise ValueError(
            "the attack changes what users typed, and the victim has only tokens; set victim.prompts = "
            "Prompts(pipeline, samples), with the samples of its batch"
        )
    return victim.prompts

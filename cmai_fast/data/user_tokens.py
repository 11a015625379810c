"""Where a user's own text lies among the tokens of a prompt, so that attacks on words leave the template alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmai_fast.data.prompt import PromptForm


@dataclass(frozen=True)
class UserTokens:
    """The user's own text in one prompt.

    text: as typed. before, after: the prompt around it. whole: the tokens of the prompt; placeholders of images are not
    repeated. places: (t,) indices in `whole` of the tokens that lie in the text, none if the text spells control
    tokens. spans: (t,) start and end of each in `text`, without white space.
    """

    text: str
    before: str
    after: str
    whole: tuple[int, ...]
    places: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    def columns(self, row: Sequence[int]) -> list[int]:
        """The indices (t,) of the same tokens in `row`, the prompt with placeholders of images repeated.

        Raises:
            ValueError: they are not there.
        """
        if not self.places:
            return []
        first, row = self.places[0], list(row)
        tail = list(self.whole[first:])
        for start in range(len(row) - len(tail), -1, -1):  # images come first, so the text is near the end
            if row[start : start + len(tail)] == tail:
                return [start + place - first for place in self.places]
        raise ValueError(f"the tokens of {self.text!r:.80} are not in the prompt that the processor makes of it")

    def spell(self, words: Mapping[int, str]) -> str:
        """The text with these words in place of some of its tokens, which are numbered as in `places`."""
        text = self.text
        for k in sorted(words, reverse=True):
            start, end = self.spans[k]
            text = text[:start] + words[k] + text[end:]
        return text

    def prompt(self, text: str) -> str:
        """The prompt with another text in its place."""
        return self.before + text.strip() + self.after


def user_tokens(form: PromptForm, text: str, images: int) -> UserTokens:
    """Finds the tokens of `text` in the prompt about `images` images.

    Raises:
        ValueError: a tokenizer that does not say which characters its tokens stand for.
    """
    prompt = form.prompt(text, images, "the prompt")
    return _found(form.control.tokenizer(), text, prompt, add_special_tokens=form.add_special_tokens)


def plain_tokens(tokenizer: Any, text: str) -> UserTokens:
    """The tokens of a text without a template, such as a caption; otherwise as `user_tokens`."""
    return _found(tokenizer, text, text, truncation=True)


def _found(tokenizer: Any, text: str, prompt: str, **how: Any) -> UserTokens:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for, which attacks on words "
            "need; load the fast version of the tokenizer (use_fast=True)"
        )
    core = text.strip()
    lead, start = len(text) - len(text.lstrip()), prompt.rfind(core)
    if start < 0 or not core:  # control tokens in a text are kept apart
        return UserTokens(text, "", "", (), (), ())
    end = start + len(core)
    made = tokenizer(prompt, return_offsets_mapping=True, **how)
    places, spans = [], []
    for place, (s, e) in enumerate(made["offset_mapping"]):
        s += len(prompt[s:e]) - len(prompt[s:e].lstrip())
        if start <= s < e <= end:
            places.append(place)
            spans.append((s - start + lead, e - start + lead))
    return UserTokens(text, prompt[:start], prompt[end:], tuple(made["input_ids"]), tuple(places), tuple(spans))

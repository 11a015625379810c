"""Control tokens (`</s>`, `<image>`, `<|im_start|>`, ...): user text must never become one.

A tokenizer reads such a string as one token wherever it occurs, in the template or in a user's question. If user text
contains one, the two are therefore written differently: `BREAK` separates the characters of the user text, and a copy
of the tokenizer recognises control tokens only after `GENUINE`. The processor works on the text as usual. Text without
such strings goes to the processor's own tokenizer.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import BatchEncoding, PreTrainedTokenizerFast

# Noncharacters: Unicode reserves them for internal use, so no text contains them.
BREAK, GENUINE = "\ufdd0", "\ufdd1"


class ControlTokens:
    """The control tokens of a processor's tokenizers.

    These are the special tokens, those named by the processor (`image_token`, ...) and the added tokens in its chat
    template (`<think>`, `<tool_call>`), but never white space.
    """

    def __init__(self, processor: Any) -> None:
        self._own = {k: t for k, t in vars(processor).items() if k.endswith("tokenizer") and hasattr(t, "init_kwargs")}
        named = {
            str(v) for k, v in vars(processor).items() if k.endswith("_token") and isinstance(v, (str, AddedToken))
        }
        template = str(getattr(processor, "chat_template", None) or "")
        self.by_tokenizer = {k: _tokens_of(t, named, template) for k, t in self._own.items()}
        self._pattern = _any_of(named.union(*self.by_tokenizer.values()))
        self._read_as_text: dict[str, ReadAsText] = {
            k: ReadAsText(t, self.by_tokenizer[k]) for k, t in self._own.items()
        }

    def find(self, text: str) -> list[str]:
        """The control tokens in a text, in order."""
        return self._pattern.findall(text)

    def tokenizer(self, name: str = "tokenizer") -> ReadAsText:
        """The tokenizer for texts with `kept_apart` parts."""
        return self._read_as_text[name]

    def into(self, processor: Any) -> None:
        """Replaces the processor's tokenizers by those for such texts."""
        for name, own in self._read_as_text.items():
            setattr(processor, name, own)


def kept_apart(text: str) -> str:
    """The text with `BREAK` between its characters. White space at its ends is kept, for templates that strip it."""
    core = text.strip()
    start = text.index(core)
    return text[:start] + BREAK.join(core) + text[start + len(core) :]


class ReadAsText:
    """Replaces a tokenizer: characters that are `kept_apart` are read as text, whatever they spell.

    Raises (when called):
        ValueError: a tokenizer that is not from the `tokenizers` library, or that makes a control token from text.
    """

    def __init__(self, tokenizer: Any, tokens: Iterable[str]) -> None:
        self._own, self._tokens = tokenizer, frozenset(tokens)
        self._pattern = _any_of(self._tokens)
        self._marked: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_own":  # while it is copied or pickled, before __init__ has run
            raise AttributeError(name)
        return getattr(self._own, name)

    def __call__(self, text: str | Sequence[str], **kwargs: Any) -> Any:
        if not any(BREAK in t for t in text):  # a list of texts, or the characters of one text
            return self._own(text, **kwargs)
        if isinstance(text, str):
            return BatchEncoding({k: v[0] for k, v in self([text], **kwargs).items()})
        if self._marked is None:
            self._marked = _marked(self._own, self._tokens)
        spelt = [self._pattern.sub(GENUINE + r"\g<0>", t).replace(BREAK, "") for t in text]
        made = self._marked(spelt, **{**kwargs, "return_attention_mask": True})
        self._check(spelt, made, kwargs.get("add_special_tokens", True))
        return made

    def _check(self, spelt: Sequence[str], made: Any, adds: bool) -> None:
        """Each text has exactly the marked control tokens and those that the tokenizer adds."""
        unknown = self._own.unk_token  # the token of unknown characters
        tokens = {t: i for t in self._tokens if t != unknown and (i := self._own.convert_tokens_to_ids(t)) is not None}
        ids, added = set(tokens.values()), self._own.num_special_tokens_to_add() if adds else 0
        for text, row, mask in zip(spelt, made["input_ids"], made["attention_mask"], strict=True):
            expected = added + sum(t[len(GENUINE) :] in tokens for t in re.findall(_marks(self._pattern), text))
            found = sum(int(i) in ids for i, own in zip(row, mask, strict=True) if own)
            if found != expected:
                raise ValueError(
                    f"{type(self._own).__name__} makes {found} control tokens from a text that has {expected} "
                    f"({text.replace(GENUINE, '')[-80:]!r}), so it cannot read them as text; take them out of the text"
                )


def _marks(pattern: re.Pattern[str]) -> str:
    return f"{GENUINE}(?:{pattern.pattern})"


def _tokens_of(tokenizer: Any, named: set[str], template: str) -> set[str]:
    added = tokenizer.added_tokens_decoder.values()
    written = {t.content for t in added if t.special or t.content in named or t.content in template}
    return {t for t in {*written, *tokenizer.all_special_tokens} if t and not t.isspace()}


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Any of the tokens, the longest first, as tokenizers match them."""
    longest = sorted(filter(None, tokens), key=len, reverse=True)
    if not longest:
        return re.compile("(?!)")
    first = re.escape("".join(sorted({t[0] for t in longest})))  # hundreds of tokens are tried only after a "<"
    return re.compile(f"(?=[{first}])(?:{'|'.join(map(re.escape, longest))})")


def _marked(tokenizer: Any, tokens: frozenset[str]) -> Any:
    """A tokenizer with the same ids, in which these tokens are written `GENUINE` + name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"{type(tokenizer).__name__} is not of the tokenizers library, and cannot read control tokens as text; "
            "take them out of the text"
        )
    spec = json.loads(backend.to_str())
    spec["padding"] = spec["truncation"] = None  # set in each call
    for token in spec["added_tokens"]:
        if token["content"] in tokens:
            token["content"] = GENUINE + token["content"]
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {GENUINE + k if k in tokens else k: i for k, i in model["vocab"].items()}
    else:
        model["vocab"] = [[GENUINE + k if k in tokens else k, score] for k, score in model["vocab"]]
    if model.get("unk_token") in tokens:
        model["unk_token"] = GENUINE + model["unk_token"]
    renamed = Tokenizer.from_str(json.dumps(spec))
    for token in tokens:
        if renamed.token_to_id(GENUINE + token) != backend.token_to_id(token):
            raise ValueError(
                f"{type(tokenizer).__name__} cannot be copied with another name for {token!r}, so it cannot read "
                "control tokens as text; take them out of the text"
            )
    special = {k: GENUINE + t for k in ("pad_token", "unk_token") if (t := getattr(tokenizer, k)) in tokens}
    marked = PreTrainedTokenizerFast(
        tokenizer_object=renamed,
        padding_side=tokenizer.padding_side,
        model_input_names=list(tokenizer.model_input_names),
        model_max_length=tokenizer.model_max_length,
        **special,
    )
    marked.backend_tokenizer.post_processor = copy.copy(renamed.post_processor)  # the class may have changed it
    return marked

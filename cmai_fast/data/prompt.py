"""How a processor's family asks a question about an image, and how it closes an answer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from cmai_fast.data.control import BREAK, GENUINE, ControlTokens, kept_apart

_PROBE = "zebra"  # a word that no template holds


def format_prompt(processor: Any, question: str, images: int = 1) -> str:
    """The prompt for a question about so many images, up to where the model answers: what `processor(text=...)` takes.

    That of the processor's chat template, images first. Without one: `answer en QUESTION` where the processor takes the
    response as `suffix` (PaliGemma, Beyer et al., 2024, section 3), `Question: QUESTION Answer:` where it puts the image
    before any text (BLIP-2, Li et al., 2023, appendix; InstructBLIP).

    Raises:
        ValueError: the processor has no chat template and no known form, or its family does not take that number of
            images.
    """
    if getattr(processor, "chat_template", None):
        prompt = processor.apply_chat_template([_asked(question, images)], add_generation_prompt=True)
        token = getattr(processor, "image_token", None)
        if isinstance(token, str) and images != 1:
            _check_placeholders(processor, token, images)
        return prompt
    if takes_suffix(processor):
        if not images:
            raise ValueError(f"{type(processor).__name__} takes no prompt without an image; expected at least one")
        return f"{processor.image_token * images}answer en {question}"
    if hasattr(processor, "num_query_tokens"):
        if images != 1:
            raise ValueError(f"{type(processor).__name__} takes one image per prompt, not {images}")
        return f"Question: {question} Answer:"
    raise ValueError(
        f"{type(processor).__name__} has no chat template, so it is not known how to ask; set processor.chat_template "
        "to that of the model's documentation"
    )


def _check_placeholders(processor: Any, token: str, images: int) -> None:
    """The template writes a place for each image (some are made for one, and write it whatever they are given)."""
    one, found = (
        processor.apply_chat_template([_asked(_PROBE, n)], add_generation_prompt=True).count(token) for n in (1, images)
    )
    if one == 1 and found != images:
        raise ValueError(
            f"the chat template of {type(processor).__name__} writes {token!r} {found} times for {images} images; set "
            "processor.chat_template to one that takes this number of images"
        )


def takes_suffix(processor: Any) -> bool:
    """Whether the processor is given the response apart from the prompt, which alone is read in both directions."""
    return "suffix" in inspect.signature(processor.__call__).parameters


class PromptForm:
    """Prompts and responses of one processor.

    Args:
        control_tokens: what becomes of control tokens (`</s>`, `<image>`) in a text of the user's: "text" reads them
            as text, "refuse" raises a ValueError.

    Raises:
        ValueError: a template that does not continue its own prompt with an answer, no end or padding token, or no
            number of query tokens.
    """

    def __init__(self, processor: Any, control_tokens: Literal["text", "refuse"] = "text") -> None:
        if control_tokens not in ("text", "refuse"):
            raise ValueError(f"control_tokens is {control_tokens!r}; expected 'text' or 'refuse'")
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.control, self._refuse = ControlTokens(processor), control_tokens == "refuse"
        self.takes_suffix = takes_suffix(processor)
        for name in ("pad_token", "eos_token"):
            if getattr(self.tokenizer, name, None) is None:
                raise ValueError(f"{type(self.tokenizer).__name__} has no {name}; set it to one that the model knows")
        if getattr(processor, "num_query_tokens", 0) is None:
            raise ValueError(
                f"{type(processor).__name__}.num_query_tokens is None, so the image has no place in the text; set it "
                "to the num_query_tokens of the model's config"
            )
        asked = format_prompt(processor, _PROBE)
        self.lead, self.end = self._closing(asked)
        # As apply_chat_template does it: templates that write the first token themselves would get it twice.
        bos = self.tokenizer.bos_token
        self.add_special_tokens = not (bos is not None and asked.startswith(bos))
        self._own_control: dict[Any, list[str]] = {}  # control tokens that the form itself writes

    def _closing(self, prompt: str) -> tuple[str, str]:
        """What stands between prompt and answer, and the token that ends the answer."""
        if self.takes_suffix:
            return "", self.tokenizer.eos_token
        if not getattr(self.processor, "chat_template", None):
            return " ", self.tokenizer.eos_token
        answered = {"role": "assistant", "content": [{"type": "text", "text": _PROBE * 2}]}
        whole = self.processor.apply_chat_template([_asked(_PROBE), answered])
        before, _, after = whole.rpartition(_PROBE * 2)
        if before.startswith(prompt):
            lead = before[len(prompt) :]
        elif before.split() == prompt.split():  # LLaVA-OneVision's own template differs from itself by a space
            lead = "" if prompt[-1:].isspace() else before[len(before.rstrip()) :]
        else:
            raise ValueError(
                f"the chat template asks with {prompt[-40:]!r} and answers after {before[-40:]!r}; these must be the "
                "same, or a model would be trained on what it is never asked. Set processor.chat_template to another"
            )
        special = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        ends = [token for token in special if after.lstrip().startswith(token)]
        return lead, max(ends, key=len, default=self.tokenizer.eos_token)

    def prompt(self, question: str, images: int, name: str) -> str:
        """`format_prompt`, with the control tokens of the question read as text. Errors call the question `name`."""
        return self._filled(lambda text: format_prompt(self.processor, text, images), images, question, name)

    def closing(self, answer: str, name: str) -> str:
        """What follows a prompt: the answer and its end, with the control tokens of the answer read as text."""
        return self._filled(lambda text: f"{self.lead}{text}{self.end}", "closing", answer, name)

    def _filled(self, form: Callable[[str], str], kind: Any, text: Any, name: str) -> str:
        _check_text(text, name)
        if kind not in self._own_control:
            self._own_control[kind] = self.control.find(form(_PROBE))
        filled = form(text)
        if self.control.find(filled) == self._own_control[kind]:
            return filled
        if self._refuse:
            raise ValueError(
                f"{name} is {text!r:.200} and makes the control tokens {', '.join(self.control.find(text)) or filled!r}; "
                "take them out, or pass control_tokens='text' to have them read as text"
            )
        return form(kept_apart(text))

    def responses(self, prompts: Sequence[str], closings: Sequence[str]) -> list[list[int]]:
        """Tokens of each closing, as they follow the tokens of its prompt.

        Raises:
            ValueError: the tokens of a prompt change when its answer follows.
        """
        tokenizer = self.control.tokenizer()
        if self.takes_suffix:
            return tokenizer(list(closings), add_special_tokens=False)["input_ids"]
        own, whole = (
            tokenizer(texts, add_special_tokens=self.add_special_tokens)["input_ids"]
            for texts in (list(prompts), [p + c for p, c in zip(prompts, closings, strict=True)])
        )
        for prompt, text, start, row in zip(prompts, closings, own, whole, strict=True):
            if row[: len(start)] != start:
                prompt, text = (t.replace(BREAK, "") for t in (prompt, text))
                raise ValueError(
                    f"the tokens of the prompt {prompt[-40:]!r} change when {text!r} follows, so it is not what the "
                    "model goes on from when it is asked; use a template that ends in a token of its own"
                )
        return [row[len(start) :] for start, row in zip(own, whole, strict=True)]


def _check_text(text: Any, name: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} is {text!r:.80} ({type(text).__name__}); expected a text")
    bad = re.search(f"[\ud800-\udfff{BREAK}{GENUINE}]", text)
    if bad:
        raise ValueError(
            f"{name} holds U+{ord(bad[0]):04X} at character {bad.start()}, which is no character of a text; take it out"
        )


def _asked(question: str, images: int = 1) -> dict[str, Any]:
    return {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": question}]}

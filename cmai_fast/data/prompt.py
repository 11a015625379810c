"""The prompt format of each processor family, and how an answer ends."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from cmai_fast.data.control import BREAK, GENUINE, ControlTokens, kept_apart

_PROBE = "zebra"  # a word that no template contains


def format_prompt(processor: Any, question: str, images: int = 1) -> str:
    """The prompt for a question about `images` images, up to the answer, as `processor(text=...)` takes it.

    It is made by the processor's chat template, images first. Without one: `answer en QUESTION` if the processor takes
    the response as `suffix` (PaliGemma, Beyer et al., 2024, section 3), `Question: QUESTION Answer:` if it puts the
    image before any text (BLIP-2, Li et al., 2023, appendix; InstructBLIP).

    Raises:
        ValueError: the processor has no chat template and no known form, or does not take this number of images.
    """
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template([_asked(question, images)], add_generation_prompt=True)
    if takes_suffix(processor):
        if not images:
            raise ValueError(f"{type(processor).__name__} takes no prompt without an image; expected at least one")
        return f"{processor.image_token * images}answer en {question}"
    if hasattr(processor, "num_query_tokens"):
        if images != 1:
            raise ValueError(f"{type(processor).__name__} takes one image per prompt, not {images}")
        return f"Question: {question} Answer:"
    raise ValueError(
        f"{type(processor).__name__} has no chat template, so the prompt format is unknown; set "
        "processor.chat_template to that of the model's documentation"
    )


def takes_suffix(processor: Any) -> bool:
    """Whether the processor takes the response separately; only the prompt is read in both directions."""
    if "suffix" in inspect.signature(processor.__call__).parameters:
        return True
    kinds = getattr(getattr(processor, "valid_processor_kwargs", None), "__annotations__", {})
    return "suffix" in getattr(kinds.get("text_kwargs"), "__annotations__", {})  # transformers before 5.23


class PromptForm:
    """Prompts and responses of one processor.

    Args:
        control_tokens: how control tokens (`</s>`, `<image>`) in user text are treated: "text" reads them as text,
            "refuse" raises a ValueError.

    Raises:
        ValueError: a template whose prompt does not match the text before an answer, or no end token, padding token or
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
                f"{type(processor).__name__}.num_query_tokens is None, so the text has no placeholder for the image; "
                "set it to the num_query_tokens of the model's config"
            )
        asked = format_prompt(processor, _PROBE)
        self.lead, self.end = self._closing(asked)
        # As in apply_chat_template: a template that writes the first token itself would get it twice.
        bos = self.tokenizer.bos_token
        self.add_special_tokens = not (bos is not None and asked.startswith(bos))
        self._own_control: dict[Any, list[str]] = {}  # control tokens of the form itself

    def _closing(self, prompt: str) -> tuple[str, str]:
        """The text between prompt and answer, and the token that ends the answer."""
        if self.takes_suffix:
            return "", self.tokenizer.eos_token
        if not getattr(self.processor, "chat_template", None):
            return " ", self.tokenizer.eos_token
        answered = {"role": "assistant", "content": [{"type": "text", "text": _PROBE * 2}]}
        whole = self.processor.apply_chat_template([_asked(_PROBE), answered])
        before, _, after = whole.rpartition(_PROBE * 2)
        if before.startswith(prompt):
            lead = before[len(prompt) :]
        elif before.split() == prompt.split():  # LLaVA-OneVision's template differs by a space between the two
            lead = "" if prompt[-1:].isspace() else before[len(before.rstrip()) :]
        else:
            raise ValueError(
                f"the prompt of the chat template ends with {prompt[-40:]!r}, but its answers follow {before[-40:]!r}; "
                "expected the same, or training and use would differ. Set processor.chat_template to another"
            )
        special = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        ends = [token for token in special if after.lstrip().startswith(token)]
        return lead, max(ends, key=len, default=self.tokenizer.eos_token)

    def prompt(self, question: str, images: int, name: str) -> str:
        """`format_prompt`, with control tokens in the question read as text. `name`: the question's name in errors."""
        if images not in self._own_control and getattr(self.processor, "chat_template", None):
            self._check_places(images)
        return self._filled(lambda text: format_prompt(self.processor, text, images), images, question, name)

    def _check_places(self, images: int) -> None:
        """Checks that the template writes a placeholder per image (some always write one)."""
        token = str(getattr(self.processor, "image_token", None))
        one, found = (format_prompt(self.processor, _PROBE, n).count(token) for n in (1, images))
        if one == 1 and found != images:
            raise ValueError(
                f"the chat template of {type(self.processor).__name__} writes {token!r} {found} times for {images} "
                "images; set processor.chat_template to one that takes this number of images"
            )

    def closing(self, answer: str, name: str) -> str:
        """The text after a prompt: answer and end token, with the control tokens of the answer read as text."""
        return self._filled(lambda text: f"{self.lead}{text}{self.end}", "closing", answer, name)

    def _filled(self, form: Callable[[str], str], kind: Any, text: Any, name: str) -> str:
        check_text(text, name)
        if kind not in self._own_control:
            self._own_control[kind] = self.control.find(form(_PROBE))
        filled = form(text)
        if self.control.find(filled) == self._own_control[kind]:
            return filled
        if self._refuse:
            found = ", ".join(self.control.find(text)) or filled
            raise ValueError(
                f"{name} is {text!r:.200} and holds the control tokens {found}; remove them, or pass "
                "control_tokens='text' to have them read as text"
            )
        return form(kept_apart(text))

    def responses(self, prompts: Sequence[str], closings: Sequence[str]) -> list[list[int]]:
        """Tokens of each closing after the tokens of its prompt.

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
                    f"the tokens of the prompt {prompt[-40:]!r} change when {text!r} follows, so training and use "
                    "would differ; use a template whose prompt ends in a special token"
                )
        return [row[len(start) :] for start, row in zip(own, whole, strict=True)]


def check_text(text: Any, name: str) -> None:
    """Raises ValueError where this is no text that a tokenizer takes; `name` is what the error calls it."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is {text!r:.80} ({type(text).__name__}); expected a text")
    bad = re.search(f"[\ud800-\udfff{BREAK}{GENUINE}]", text)
    if bad:
        raise ValueError(
            f"{name} holds U+{ord(bad[0]):04X} at character {bad.start()}, which is not a text character; remove it"
        )


def _asked(question: str, images: int = 1) -> dict[str, Any]:
    return {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": question}]}

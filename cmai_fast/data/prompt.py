"""How a processor's family asks a question about an image, and how it closes an answer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

_PROBE = "zebra"  # a word that no template holds


def format_prompt(processor: Any, question: str) -> str:
    """The prompt for one image and one question, up to where the model answers: what `processor(text=...)` takes.

    That of the processor's chat template. Without one: `answer en QUESTION` where the processor takes the response as
    `suffix` (PaliGemma, Beyer et al., 2024, section 3), `Question: QUESTION Answer:` where it puts the image before any
    text (BLIP-2, Li et al., 2023, appendix; InstructBLIP).

    Raises:
        ValueError: the processor has no chat template, and no known form.
    """
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template([_asked(question)], add_generation_prompt=True)
    if takes_suffix(processor):
        return f"{processor.image_token}answer en {question}"
    if hasattr(processor, "num_query_tokens"):
        return f"Question: {question} Answer:"
    raise ValueError(
        f"{type(processor).__name__} has no chat template, so it is not known how to ask; set processor.chat_template "
        "to that of the model's documentation"
    )


def takes_suffix(processor: Any) -> bool:
    """Whether the processor is given the response apart from the prompt, which alone is read in both directions."""
    if "suffix" in inspect.signature(processor.__call__).parameters:
        return True
    kinds = getattr(getattr(processor, "valid_processor_kwargs", None), "__annotations__", {})
    return "suffix" in getattr(kinds.get("text_kwargs"), "__annotations__", {})  # transformers before 5.23


class PromptForm:
    """Prompts and responses of one processor.

    Raises:
        ValueError: a template that does not continue its own prompt with an answer, no end or padding token, or no
            number of query tokens.
    """

    def __init__(self, processor: Any) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
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

    def responses(self, prompts: Sequence[str], answers: Sequence[str]) -> list[list[int]]:
        """Tokens of each answer and its end, as they follow the tokens of its prompt.

        Raises:
            ValueError: the tokens of a prompt change when its answer follows.
        """
        closed = [f"{self.lead}{a}{self.end}" for a in answers]
        if self.takes_suffix:
            return self.tokenizer(closed, add_special_tokens=False)["input_ids"]
        own, whole = (
            self.tokenizer(texts, add_special_tokens=self.add_special_tokens)["input_ids"]
            for texts in (list(prompts), [p + c for p, c in zip(prompts, closed, strict=True)])
        )
        for prompt, text, start, row in zip(prompts, closed, own, whole, strict=True):
            if row[: len(start)] != start:
                raise ValueError(
                    f"the tokens of the prompt {prompt[-40:]!r} change when {text!r} follows, so it is not what the "
                    "model goes on from when it is asked; use a template that ends in a token of its own"
                )
        return [row[len(start) :] for start, row in zip(own, whole, strict=True)]


def _asked(question: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}

"""Chat records: `messages` (TRL, OpenAI) and `conversations` (LLaVA), as one question and its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PLACEHOLDER = "<image>"
_ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip


@dataclass(frozen=True)
class Chat:
    """A question with its instructions, the answer (None if the chat ends with the question), and the pictures.

    `images` are those inside the messages; `places` counts the placeholders of pictures stored elsewhere.
    """

    prompt: str
    answer: str | None
    images: tuple[Any, ...]
    places: int
    name: str

    def join(self, inside: list[Any], record: list[Any]) -> list[Any]:
        """The pictures of the question: those inside its messages, or the record's own.

        Raises:
            ValueError: pictures in both, or their number differs from the number of placeholders.
        """
        if inside and (record or self.places):
            raise ValueError(
                f"{self.name} holds pictures, and the record has others beside it; expected them in one place"
            )
        if self.places and self.places != len(record):
            raise ValueError(
                f"{self.name} has {self.places} image placeholder(s) ({PLACEHOLDER} or a part of type image), and the "
                f"record has {len(record)} images; expected the same number"
            )
        return inside or record


def chat_of(turns: Any, name: str) -> Chat:
    """One question, with system messages before it and at most one answer.

    Pictures come first, wherever their placeholders are, as in LLaVA's own code. System messages are put before the
    question, each on its own line.

    Raises:
        ValueError: any other form of chat; names what was found.
    """
    if not isinstance(turns, (list, tuple)) or not turns:
        raise ValueError(f"{name} is {turns!r:.60}; expected a list of messages")
    read = [_turn(turn, f"{name}[{i}]") for i, turn in enumerate(turns)]
    roles = [role for role, *_ in read]
    asked = [role for role in roles if role != "system"]
    if asked not in (["user"], ["user", "assistant"]) or "system" in roles[roles.index(asked[0]) :]:
        raise ValueError(
            f"{name} has the roles {', '.join(roles)}; expected one question and at most one answer: (system,) user, "
            "assistant. Write a record for each question"
        )
    prompt = "\n".join(text for role, text, *_ in read if role != "assistant")
    question = next(turn for turn in read if turn[0] == "user")
    answer = read[-1][1] if roles[-1] == "assistant" else None
    return Chat(prompt, answer, question[2], question[3], name)


def _turn(turn: Any, name: str) -> tuple[str, str, tuple[Any, ...], int]:
    """Role, text, pictures, and the number of image placeholders."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"{name} is {turn!r:.60}; expected a message with role and content (or from and value)")
    keys = ("role", "content") if "role" in turn else ("from", "value")
    if not set(keys) <= set(turn):
        raise ValueError(
            f"{name} has the keys {', '.join(map(str, turn))}; expected role and content, or from and value"
        )
    role, content = (turn[key] for key in keys)
    if role not in _ROLES:
        raise ValueError(f"{name} has the {keys[0]} {role!r}; expected one of {', '.join(_ROLES)}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)):
        raise ValueError(f"{name} has the {keys[1]} {content!r:.60}; expected a text or a list of parts")
    texts: list[str] = []
    images: list[Any] = []
    places = 0
    for i, part in enumerate(parts):
        kind, value = _part(part, f"{name}.{keys[1]}[{i}]")
        if kind == "text":
            # Only if the content is one text: otherwise pictures are parts of their own.
            marks = value.count(PLACEHOLDER) if isinstance(content, str) and _ROLES[role] == "user" else 0
            texts.append(value.replace(PLACEHOLDER, "").strip() if marks else value)
            places += marks
        elif value is None:
            places += 1
        else:
            images.append(value)
    text = "\n".join(texts)
    if not text.strip():
        raise ValueError(f"{name} ({role}) has no text; expected one that is not empty")
    if (images or places) and _ROLES[role] != "user":
        raise ValueError(f"{name} ({role}) has an image; expected images in the question only")
    return _ROLES[role], text, tuple(images), places


def _part(part: Any, name: str) -> tuple[str, Any]:
    """("text", the text) or ("image", the picture, or None if it is stored elsewhere)."""
    if not isinstance(part, Mapping):
        raise ValueError(f"{name} is {part!r:.60}; expected a part with a type")
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return "text", part["text"]
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if isinstance(url, str):
            return "image", url
    elif kind == "image":
        if isinstance(part.get("base64"), str):
            return "image", f"data:image;base64,{part['base64']}"
        return "image", next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
    shown = ", ".join(f"{key}: {value!r:.40}" for key, value in part.items())
    raise ValueError(
        f"{name} is {{{shown}}}; expected a part of type text (with text), image, or image_url (with a url)"
    )

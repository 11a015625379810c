"""Chat records: TRL, OpenAI, LLaVA."""

from __future__ import annotations

import pytest
from PIL import Image

from cmai_fast.data import Sample

PICTURE = Image.new("RGB", (4, 4))
URL = "data:image/png;base64,iVBORw0KGgo="
INLINE = {"bytes": b"\x89PNG\r\n\x1a\n", "path": None}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TEXT = {"type": "text", "text": "what?"}


@pytest.mark.parametrize(
    "record, images",
    [
        # TRL: parts with marks; as rows of a table, each part has all keys
        ({"messages": [user([{"type": "image", "text": None}, TEXT]), assistant([{"type": "text", "text": "red"}])],
          "images": [PICTURE]}, (PICTURE,)),
        ({"messages": [user([{"type": "image"}, TEXT, {"type": "image"}]), assistant("red")],
          "images": [PICTURE, "a.png"]}, (PICTURE, "a.png")),
        ({"messages": [user("what?"), assistant("red")], "image": PICTURE}, (PICTURE,)),
        ({"messages": [user("what?"), assistant("red")]}, ()),
        ({"prompt": [user("what?")], "completion": [assistant("red")], "images": [PICTURE]}, (PICTURE,)),
        ({"prompt": [user("what?")], "completion": "red", "images": []}, ()),
        # OpenAI
        ({"messages": [user([TEXT, {"type": "image_url", "image_url": {"url": URL}}]), assistant("red")]}, (INLINE,)),
        ({"messages": [user([{"type": "image_url", "image_url": "a.png"}, TEXT]), assistant("red")]}, ("a.png",)),
        # transformers
        ({"messages": [user([{"type": "image", "path": "a.png"}, TEXT]), assistant("red")]}, ("a.png",)),
        ({"messages": [user([{"type": "image", "image": PICTURE}, TEXT]), assistant("red")]}, (PICTURE,)),
        ({"messages": [user([{"type": "image", "base64": URL[22:]}, TEXT]), assistant("red")]}, (INLINE,)),
        # LLaVA
        ({"conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}],
          "image": "a.png"}, ("a.png",)),
        ({"conversations": [{"from": "human", "value": "what?\n<image>"}, {"from": "gpt", "value": "red"}],
          "image": "a.png"}, ("a.png",)),
        ({"messages": [user("<image><image>what?"), assistant("red")], "images": ["a.png", "b.png"]},
         ("a.png", "b.png")),
    ],
)  # fmt: skip
def test_chats_of_every_form(record, images):
    assert Sample.of(record, 3) == Sample(3, images, "what?", ("red",))


def test_a_chat_that_ends_with_the_question_and_system_messages():
    record = {"messages": [{"role": "system", "content": "Be brief."}, user("what?")]}
    assert Sample.of(record) == Sample(0, (), "Be brief.\nwhat?")
    assert Sample.of(record | {"answer": "red"}).references == ("red",)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": []}, r"record 0: messages is \[\]"),
        ({"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
         "roles user, assistant, user, assistant; expected one question"),
        ({"messages": [assistant("a")]}, "roles assistant; expected"),
        ({"messages": [user("a"), {"role": "system", "content": "b"}]}, "roles user, system"),
        ({"messages": [user("a"), {"role": "tool", "content": "b"}]}, r"messages\[1\] has the role 'tool'"),
        ({"messages": [user("a"), assistant(None)]}, r"messages\[1\] has the content None"),
        ({"messages": [user("a"), assistant("")]}, r"messages\[1\] \(assistant\) has no text"),
        ({"messages": [{"text": "a"}]}, r"messages\[0\] has the keys text; expected role and content"),
        ({"messages": ["a"]}, r"messages\[0\] is 'a'"),
        ({"messages": [user([{"type": "audio", "audio": "a.wav"}])]}, "type: 'audio', audio: 'a.wav'}; expected a p"),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": "http://x.org/a.png"}}, TEXT])]},
         "image is the URL 'http://x.org/a.png'"),
        ({"messages": [user([{"type": "image"}, TEXT])]}, "1 image placeholder\\(s\\) .* record has 0 images"),
        ({"messages": [user("<image>what?")], "images": ["a.png", "b.png"]}, "1 image placeholder.* has 2 images"),
        ({"messages": [user([{"type": "image", "path": "a.png"}, TEXT])], "image": "b.png"}, "holds pictures, and"),
        ({"messages": [user("a"), assistant([{"type": "image"}, TEXT])]}, r"\(assistant\) has an image"),
        ({"messages": [user("a"), assistant("b")], "answer": "c"}, "ends with an answer, and there is also answer"),
        ({"messages": [user("a")], "conversations": [user("a")]}, "both messages and conversations"),
    ],
)  # fmt: skip
def test_what_is_no_single_question_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        Sample.of(record)

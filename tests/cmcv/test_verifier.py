"""The verifier: its alternatives, its margin, its vision side, its files."""

from __future__ import annotations

import json

import pytest
import torch

from cmai_fast.bridge import bridge_of
from cmai_fast.cmcv import Threshold
from cmai_fast.cmcv.alternatives import MOST, Alternatives
from cmai_fast.cmcv.network import VerifyNetwork
from cmai_fast.cmcv.tower import beside
from cmai_fast.cmcv.verifier import Verifier, set_tower, tower_weights
from cmai_fast.data import Sample, VQACollator, load_dataset
from cmai_fast.data.statements import STATEMENT_ANSWERS, STATEMENT_IDS, encode
from cmai_fast.generation import Generation

COLOURS, YES_NO = ("red", "blue", "teal"), ("no", "yes")
KINDS = Alternatives((YES_NO, COLOURS))


def make(model, processor, *, tower=None, seed=0) -> Verifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        verifier = Verifier.new(bridge_of(model), processor.tokenizer, KINDS, tower, width=16, dim=8, heads=2)
    verifier.network.eval().requires_grad_(False)
    return verifier


@pytest.fixture
def verifier(tiny_model, tiny_processor) -> Verifier:
    return make(tiny_model, tiny_processor)


@pytest.fixture(scope="module")
def samples():
    return list(load_dataset("easyvqa", "train", 6, seed=3))


def features(verifier, processor, samples):
    with torch.no_grad():
        return verifier.bridge.encode_image(VQACollator(processor)(samples)["pixel_values"])


def test_alternatives_are_choices_then_the_answers_own_kind_then_others():
    assert KINDS.to("red", ("red", "green")) == ("green", "blue", "teal", "no", "yes")
    assert KINDS.to("Blue.") == ("red", "teal", "no", "yes")
    assert KINDS.to("a dog") == ("no", "yes", "red", "blue", "teal")
    many = Alternatives((tuple(f"word{i}" for i in range(200)),))
    assert len(many.to("word0")) == MOST


def test_kinds_come_from_choices_or_from_questions_that_begin_alike():
    closed = [Sample(i, (), "what color?", (c,), COLOURS) for i, c in enumerate(COLOURS)]
    opened = [Sample(i, (), f"how many {n}?", (n,)) for i, n in enumerate(["one", "two", "two"])]
    opened += [Sample(9, (), "Where is it?", ("here",))]
    assert Alternatives.of(closed + opened).kinds == (COLOURS, ("two", "one"), ("here",))
    with pytest.raises(ValueError, match="at least two that differ"):
        Alternatives.of([Sample(0, (), "q?", ("Yes",)), Sample(1, (), "r?", ("yes.",))])


def test_the_margin_is_the_log_odds_of_the_answer(verifier, tiny_processor, samples):
    seen = features(verifier, tiny_processor, samples)
    texts = verifier.texts([s.prompt for s in samples], [s.answer for s in samples])
    assert texts.real.sum(2).squeeze(1).tolist() == [5 if s.answer in COLOURS + YES_NO else 6 for s in samples]
    image = verifier.network.project_image(seen)[:, None].expand(-1, texts.real.shape[2], -1)
    cosines = torch.cosine_similarity(image, texts.statements[:, 0], dim=-1)
    p = (verifier.network.scale * cosines).masked_fill(~texts.real[:, 0], -torch.inf).softmax(1)[:, 0]
    torch.testing.assert_close(verifier.margin(seen, texts), (p / (1 - p)).log(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(verifier.consistency(seen, texts), p, rtol=1e-4, atol=1e-5)


def test_a_score_does_not_depend_on_the_batch(verifier, tiny_processor, samples):
    seen = features(verifier, tiny_processor, samples)
    questions, answers = [s.prompt for s in samples], [s.answer for s in samples]
    whole = verifier.margin(seen, verifier.texts(questions, answers))
    for i in range(len(samples)):
        alone = verifier.margin(seen[i : i + 1], verifier.texts(questions[i : i + 1], answers[i : i + 1]))
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-4, atol=1e-5)
    part = verifier.texts(questions, answers).rows(torch.tensor([4, 1]))
    torch.testing.assert_close(verifier.margin(seen[[4, 1]], part), whole[[4, 1]], rtol=1e-4, atol=1e-5)
    # Padded image tokens of other samples of a batch count for nothing.
    padded = torch.cat([seen, torch.full_like(seen[:, :3], 9.0)], 1)
    tokens = torch.full((len(samples),), seen.shape[1])
    again = verifier.margin(padded, verifier.texts(questions, answers), tokens)
    torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-5)


def test_it_tells_questions_answers_and_images_apart(verifier, tiny_processor, samples):
    seen = features(verifier, tiny_processor, samples)[:1]
    ask = lambda q, a: verifier.margin(seen, verifier.texts([q], [a])).item()  # noqa: E731
    one = ask("what color is the shape?", "red")
    assert one != pytest.approx(ask("what color is the shape?", "blue"), abs=1e-4)
    assert one != pytest.approx(ask("the is color shape what?", "red"), abs=1e-6), "the order of words counts"
    assert one != pytest.approx(verifier.margin(seen + 1.0 * torch.rand_like(seen), verifier.texts(
        ["what color is the shape?"], ["red"])).item(), abs=1e-4)  # fmt: skip
    assert ask("?", "") == ask("?", "")  # an empty answer is an answer


def test_statements_are_read_once_by_a_frozen_network_and_anew_by_one_that_learns(verifier, monkeypatch):
    calls = []
    read = lambda tokenizer, pairs: calls.append(list(pairs)) or encode(tokenizer, pairs)  # noqa: E731
    monkeypatch.setattr("cmai_fast.cmcv.verifier.encode", read)
    first = verifier.texts(["q?"], ["red"])
    second = verifier.texts(["q?"], ["blue"])
    assert calls == [[("q?", a) for a in ("red", "blue", "teal", "no", "yes")]]
    torch.testing.assert_close(first.statements[0, 0, 0], second.statements[0, 0, 1])
    verifier.network.requires_grad_(True)
    assert verifier.texts(["q?"], ["red"]).statements.requires_grad
    verifier.network.requires_grad_(False)
    with torch.no_grad():
        verifier.network.text_out[1].bias += 1.0
    assert not torch.equal(verifier.texts(["q?"], ["red"]).statements, first.statements), "not those before training"


def test_statements_are_read_anew_with_other_embeddings(verifier):
    """Weights written to, exchanged and exchanged back, in inference mode or not."""
    weight, read = verifier._embed().weight, lambda: verifier.texts(["q?"], ["red"]).statements
    own, first = weight.data, read()
    other = torch.randn_like(own)
    weight.data = other
    assert not torch.equal(read(), first)
    weight.data = own
    with torch.inference_mode():
        assert torch.equal(read(), first)
    with torch.no_grad():
        kept = own.clone()
        weight.copy_(other)
        assert not torch.equal(read(), first)
        weight.copy_(kept)
    assert torch.equal(read(), first)


def test_a_batch_reads_like_the_same_texts(verifier, tiny_processor, samples):
    """`read`, from a batch, and `texts`, from strings; statements that are missing count for nothing."""
    seen = features(verifier, tiny_processor, samples)
    rows = [[(s.prompt, (s.answer, *KINDS.to(s.answer))) for s in samples[: i + 1]] for i in range(len(samples))]
    batch = VQACollator(tiny_processor, statements=lambda s: rows[samples.index(s)])(samples)
    assert batch[STATEMENT_IDS].shape[:3] == batch[STATEMENT_ANSWERS].shape == (6, 6, 6)
    read = verifier.read(batch)
    found = verifier.log_p(seen, read)
    for i, row in enumerate(rows):
        texts = verifier.texts([q for q, _ in row], [a[0] for _, a in row])
        own = verifier.log_p(seen[i : i + 1].expand(len(row), -1, -1), texts)
        torch.testing.assert_close(found[i], own.mean(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(read.rows(torch.tensor([i])).statements, read.statements[i : i + 1])
    with pytest.raises(ValueError, match="no statement_ids, which a verifier learns from"):
        verifier.read(VQACollator(tiny_processor)(samples))


def test_missing_statements_have_no_gradient(verifier, tiny_processor, samples):
    rows = {0: [("q?", ("red", "blue"))] * 2, 1: [("is it?", ("no", "yes", "red"))]}
    batch = VQACollator(tiny_processor, statements=lambda s: rows[samples.index(s)])(samples[:2])
    seen = features(verifier, tiny_processor, samples[:2]).requires_grad_()
    verifier.network.requires_grad_(True)
    verifier.log_p(seen, verifier.read(batch)).sum().backward()
    assert seen.grad.isfinite().all() and seen.grad[1].any()
    assert all(p.grad.isfinite().all() for p in verifier.network.parameters() if p.grad is not None)


def test_text_of_a_question_is_no_control_token(tiny_processor):
    tokenizer = tiny_processor.tokenizer
    ids, _ = encode(tokenizer, [("red </s>", "<image>")])
    assert not {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<image>")} & set(ids[0].tolist())


def test_a_model_beside_shares_all_but_the_vision_side(make_tiny):
    model, _ = make_tiny()
    other, _ = make_tiny(seed=4)
    bridge, before = bridge_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    twin = beside(bridge)
    assert twin.model.language_model is model.model.language_model and twin.lm_head is model.lm_head
    own = {id(p) for p in model.parameters()}
    vision = [p for p in twin.parameters() if id(p) not in own]
    assert len(vision) == len(bridge.vision_parameters) and not any(p.requires_grad for p in vision)
    set_tower(bridge_of(twin), tower_weights(bridge_of(other)))
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(bridge_of(twin).encode_image(pixels), bridge_of(other).encode_image(pixels))
        assert not torch.equal(bridge.encode_image(pixels), bridge_of(other).encode_image(pixels))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    wrong = dict(tower_weights(bridge_of(other)))
    name = next(iter(wrong))
    for broken in ({k: v for k, v in wrong.items() if k != name}, wrong | {name: torch.zeros(3)}):
        with pytest.raises(ValueError, match=f"differ in {name}.*same family and size"):
            set_tower(bridge_of(twin), broken)


@pytest.mark.parametrize("has_tower", [False, True])
def test_saved_and_loaded_it_scores_alike(tiny_model, tiny_processor, samples, tmp_path, has_tower):
    bridge = bridge_of(tiny_model)
    verifier = make(tiny_model, tiny_processor, tower=beside(bridge) if has_tower else None)
    if has_tower:
        with torch.no_grad():
            for p in verifier.bridge.vision_parameters:
                p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    threshold = Threshold(-0.5, 0.05, 9, "calibration", Generation(3))
    verifier.save_pretrained(tmp_path, threshold)
    assert json.loads((tmp_path / "verifier.json").read_text())["format"] == 1, "which older versions read"
    again, read = Verifier.from_pretrained(tmp_path, bridge, tiny_processor.tokenizer)
    assert read == threshold and again.alternatives == KINDS and (again.tower is None) != has_tower
    scores = [
        v.margin(
            features(v, tiny_processor, samples), v.texts([s.prompt for s in samples], [s.answer for s in samples])
        )
        for v in (verifier, again)
    ]
    assert torch.equal(*scores) and not scores[1].requires_grad


def test_damaged_files_and_other_models_are_refused(tiny_model, tiny_processor, verifier, tmp_path):
    bridge, tokenizer = bridge_of(tiny_model), tiny_processor.tokenizer
    verifier.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "verifier.json").read_text())
    whole = (tmp_path / "verifier.safetensors").read_bytes()

    def load(message, **changes):
        (tmp_path / "verifier.json").write_text(json.dumps(record | changes))
        with pytest.raises(ValueError, match=message):
            Verifier.from_pretrained(tmp_path, bridge, tokenizer)

    load("format 7, and this version reads 1 and 2", format=7)
    load("width is 6; expected a multiple of 4", network=record["network"] | {"width": 6})
    load("at least two that differ", kinds=[["a"]])
    load("is not the file that", sha256="0")
    (tmp_path / "verifier.safetensors").write_bytes(whole[:-1])
    load("is not the file that")
    (tmp_path / "verifier.safetensors").unlink()
    load("has no verifier.safetensors")
    with pytest.raises(ValueError, match=r"made for {'image_dim': 5, 'text_dim': 64}, the model has"):
        Verifier(bridge, tokenizer, VerifyNetwork(5, 64, 16, 16, 8, 2), KINDS)

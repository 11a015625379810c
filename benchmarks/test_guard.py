"""Latency of an accepted answer, one question at a time: the answer alone, and with the verifier's score."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from cmai_fast.bridge import bridge_of
from cmai_fast.bridge.encoded_once import images_encoded_once
from cmai_fast.cmcv.network import VerifyNetwork
from cmai_fast.cmcv.tower import beside
from cmai_fast.data.sources import DataSource
from cmai_fast.pipeline import Pipeline
from cmai_fast.workflows.samples import asked

# Of both bundled models: the verifier of the one has a tower of its own, that of the other reads the model's features.
MOST = {"easyvqa-llava": 1.3, "easyvqa-llava-immune": 1.05}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("name", MOST)
def test_accepted_answer(side_by_side, device: torch.device, name: str) -> None:
    pipeline = Pipeline.load(name, device=str(device))
    samples = asked(DataSource("easyvqa"), "test", "vqa", 64)
    guarded, plain = cycle(samples), cycle(samples)  # both answer the same questions in turn
    side_by_side(
        f"an accepted answer, {name}, batch 1",
        {
            "answer and score": lambda: pipeline.answer([next(guarded)]),
            "answer": lambda: pipeline.generate([next(plain)]),
        },
        device=device,
        targets={"answer": ("at most", MOST[name])},
        rounds=64,
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("tower", [False, True], ids=["own features", "a second tower"])
def test_accepted_answer_of_143_million_parameters(side_by_side, recipes, device: torch.device, tower: bool) -> None:
    """Random weights: four tokens answered, then eight statements of 16 tokens read and compared with the image."""
    _, sized_models = recipes
    sized = sized_models.MODELS["llava-100m"]()
    model = sized_models.build(sized, None, device, torch.float32).eval().requires_grad_(False)
    bridge = bridge_of(model)
    eyes = bridge_of(beside(bridge)) if tower else bridge
    words = model.get_input_embeddings()
    network = VerifyNetwork(bridge.image_dim, words.weight.shape[1]).to(device).eval().requires_grad_(False)
    batch = {k: v.to(device) for k, v in sized.batch(1, 24, 2).items()}
    image, _ = bridge.inputs(batch)
    prompt = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    ids = torch.randint(10, 1000, (8, 16), device=device)
    mask, answer = torch.ones_like(ids, dtype=torch.bool), torch.arange(16, device=device).ge(14).expand(8, 16)

    @torch.no_grad()
    def plain() -> None:
        model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)

    @torch.no_grad()
    def guarded() -> None:
        with images_encoded_once(model):
            plain()
            statements = network.statements(words(ids), mask, answer)[None]
            seen = eyes.encode_image(batch["pixel_values"], **image)
            network.cosine(network.project_image(seen, None), statements)

    side_by_side(
        f"an accepted answer, LLaVA of 143M parameters, {'a second tower' if tower else 'own features'}, batch 1",
        {"answer and score": guarded, "answer": plain},
        device=device,
        targets={"answer": ("at most", 1.3 if tower else 1.05)},
    )

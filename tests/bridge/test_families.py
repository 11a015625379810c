"""What the bridge promises, for every family: docs/families.md holds the table of these tests."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from cmai_fast.attacks import ATTACKS, Victim, exact_gradient, weighted
from cmai_fast.bridge import Bridge, DualBridge, EncoderDecoderBridge, bridge_of, is_right, task_loss
from cmai_fast.cmcv import ConsistencyHeads, packed_text, text_groups
from cmai_fast.mbat import maximise
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel
from families import FAMILIES, IMAGE, Family

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
generative = pytest.mark.parametrize("family", [f for f in FAMILIES if f.kind == "generative"], ids=lambda f: f.name)
LINF, L2 = ThreatModel("linf", 8 / 255), ThreatModel("l2", 1.0)


def by_name(name: str) -> Family:
    return next(f for f in FAMILIES if f.name == name)


def objective_of(family: Family, rows: list[int] | None = None, model: Any = None, **settings: Any) -> Victim:
    """Of these samples alone, collated by themselves."""
    model = family.model() if model is None else model
    samples = family.samples()
    batch = family.batch(model, samples if rows is None else [samples[i] for i in rows])
    if rows is not None and family.kind == "dual":  # the set of texts is the same for all
        whole = family.batch(model, samples)
        batch = {**whole, "pixel_values": batch["pixel_values"], "labels": whole["labels"][rows]}
    return Victim(bridge_of(model), PixelSpace.from_processor(family.processor), batch, **settings)


def double(family: Family) -> Any:
    return copy.deepcopy(family.model()).double()


def own(objective: Victim, units: Tensor, row: int) -> Tensor:
    """The pixels of one row, as one vector without padding."""
    if objective.layout is None:
        return units[row].flatten()
    return units[row][objective.layout.free(row).expand_as(units[row])]


@pytest.mark.parametrize("side", ["left", "right"])
@every_family
def test_image_side_and_fusion_together_are_the_models_own_forward(family, side):
    model = family.model()
    batch = family.batch(model, family.samples(), side)
    bridge = bridge_of(model)
    image, text = bridge.inputs(batch)
    with torch.no_grad():
        logits, targets = bridge.fuse(bridge.encode_image(batch["pixel_values"], **image), **text)
        if family.kind == "encoder-decoder":  # its own forward reads padding on the left as text
            batch["labels"] = family.batch(model, family.samples(), "right")["labels"]
        whole, labels = family.own_forward(model, batch)
    wanted, here = labels != -100, targets != -100
    assert wanted.sum() == here.sum() > 0
    assert torch.equal(targets[here], labels[wanted])
    torch.testing.assert_close(logits[here], whole[wanted], rtol=1e-4, atol=1e-4)
    assert is_right(logits, targets).all()  # the responses are the model's own


@every_family
def test_a_sample_has_the_result_it_has_alone(family):
    whole = objective_of(family)
    model_input = whole.space.to_model(whole.pixels())
    with torch.no_grad():
        together = whole(model_input)
        for i in range(3):
            alone = objective_of(family, [i])
            single = alone(alone.space.to_model(alone.pixels()))
            chosen = whole(model_input[[i]], torch.tensor([i]))
            for one in (single, chosen):
                torch.testing.assert_close(one.loss[0], together.loss[i], rtol=1e-4, atol=1e-5)
                assert one.right.tolist() == [True]
        swapped = whole(model_input[[2, 0]], torch.tensor([2, 0]))
    torch.testing.assert_close(swapped.loss, together.loss[[2, 0]], rtol=1e-4, atol=1e-5)


@every_family
def test_gradients_are_those_of_the_models_own_forward_and_reach_every_image(family):
    objective = objective_of(family)
    leaf = objective.space.to_model(objective.pixels()).requires_grad_()
    packed = leaf if objective.layout is None else objective.layout.pack(leaf)
    batch = family.batch(family.model(), family.samples(), "right" if family.kind == "encoder-decoder" else "left")
    whole, labels = family.own_forward(family.model(), {**batch, "pixel_values": packed})
    losses = nn.functional.cross_entropy(whole.transpose(1, 2), labels, reduction="none").sum(1)
    (expected,) = torch.autograd.grad((losses / (labels != -100).sum(1)).sum(), leaf)
    grad, _ = exact_gradient(objective, leaf)
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    if objective.layout is None:
        assert (grad.flatten(1).abs().sum(1) > 0).all()
        return
    moved = grad.flatten(2).abs().sum(2) > 0
    assert torch.equal(moved, objective.layout.real)  # every image, tile and patch, and no padding


@every_family
def test_a_samples_loss_has_no_gradient_at_the_images_of_others(family):
    objective = objective_of(family)
    leaf = objective.space.to_model(objective.pixels()).requires_grad_()
    (grad,) = torch.autograd.grad(objective(leaf).loss[1], leaf)
    assert grad[1].abs().sum() > 0 and grad[[0, 2]].abs().sum() == 0


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
@every_family
def test_bridge_that_refreshes_at_every_step_is_pgd(family, threat):
    objective = objective_of(family)
    clean = objective.pixels()
    exact = maximise(objective, clean, threat, "pgd", steps=3, seed=5)
    bridge = maximise(objective, clean, threat, "bridge", steps=3, refreshes=3, seed=5)
    assert torch.equal(bridge.adv, exact.adv) and not torch.equal(exact.adv, clean)
    stale = maximise(objective, clean, threat, "bridge", steps=3, seed=5)
    assert stale.passes.vision_forward == 3 and stale.passes.full_forward == 1
    before, after = (objective(objective.space.to_model(x)).loss.sum() for x in (clean, stale.adv))
    assert after > before


# An attack sees of a family its form of images, by `objective.layout`: two of the six on every family, and the other
# four on one family of each form and kind.
ON_ALL = [("pgd", L2), ("apgd", LINF)]
ON_FORMS = [("pgd", LINF), ("apgd", L2), ("mi-fgsm", LINF), ("mi-fgsm", L2)]
FORMS = ("LLaVA", "LLaVA-NeXT", "Qwen2-VL", "SmolVLM", "BLIP-2", "ViT-GPT2", "CLIP")


@pytest.mark.parametrize("name, threat", ON_ALL)
@every_family
def test_attacks_stay_in_ball_and_box_and_do_not_depend_on_the_batch(family, name, threat):
    check_attack(family, name, threat)


@pytest.mark.parametrize("name, threat", ON_FORMS)
@pytest.mark.parametrize("form", FORMS)
def test_every_attack_and_norm_on_every_form_of_images(form, name, threat):
    check_attack(by_name(form), name, threat)


def check_attack(family: Family, name: str, threat: ThreatModel) -> None:
    model = double(family)
    objective = objective_of(family, model=model)
    clean = objective.pixels().double()
    settings = {"steps": 3, "restarts": 2, "seed": 4}
    together = ATTACKS[name](objective, clean, threat, sample_ids=torch.tensor([7, 8, 9]), **settings)
    assert (threat.distance(together.adv - clean) <= threat.eps * (1 + 1e-5)).all()
    assert together.adv.min() >= 0 and together.adv.max() <= 1
    before, after = (objective(objective.space.to_model(x)).loss for x in (clean, together.adv))
    assert ((after > before) | together.fooled).all() and (after > before).any()
    for i in range(3):
        alone = objective_of(family, [i], model=model)
        single = ATTACKS[name](alone, alone.pixels().double(), threat, sample_ids=torch.tensor([7 + i]), **settings)
        assert single.fooled[0] == together.fooled[i]
        differ = (own(alone, single.adv, 0) - own(objective, together.adv, i)).abs() > 1e-5
        assert differ.double().mean() < 2e-3  # signs of gradients that are zero but for rounding


@generative
def test_text_side_is_that_of_each_row_alone_and_runs_no_vision(family):
    objective, alone = objective_of(family), [objective_of(family, [i]) for i in range(3)]
    bridge = objective.bridge

    def fail(*_: Any) -> None:
        raise AssertionError("the text side ran the vision side")

    hooks = [m.register_forward_hook(fail) for m in bridge.vision_side]
    try:
        with torch.no_grad():
            together = bridge.encode_text(**objective.batch)
            assert together.shape == (3, bridge.text_dim)
            for i in range(3):
                torch.testing.assert_close(bridge.encode_text(**alone[i].batch)[0], together[i], rtol=1e-4, atol=1e-5)
    finally:
        for hook in hooks:
            hook.remove()


@every_family
def test_vision_side_and_the_rest_are_the_whole_model(family):
    """A gradient at h_v alone reaches E_v's parameters and no others."""
    model = family.model()
    bridge = bridge_of(model)
    batch = family.batch(model, family.samples())
    image, _ = bridge.inputs(batch)
    features = bridge.encode_image(batch["pixel_values"], **image)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(features.square().sum(), list(named.values()), allow_unused=True)
    reached = {n for n, g in zip(named, grads, strict=True) if g is not None}
    inside = {n for n, p in named.items() if any(p is q for q in bridge.vision_parameters)}
    assert reached and reached <= inside
    text = model.text_model if family.kind == "dual" else bridge.text_model
    assert not {id(p) for p in text.parameters()} & {id(p) for p in bridge.vision_parameters}


@every_family
def test_consistency_of_a_row_does_not_depend_on_its_neighbours(family):
    bridge = bridge_of(family.model())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = ConsistencyHeads(bridge.image_dim, bridge.text_dim, dim=8, hidden=16)
    whole = objective_of(family, heads=heads)
    with torch.no_grad():
        together = whole.score(whole.encode(whole.space.to_model(whole.pixels())))
        for i in range(3):
            one = objective_of(family, [i], heads=heads)
            alone = one.score(one.encode(one.space.to_model(one.pixels())))
            torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    assert together.unique().numel() == 3


@every_family
def test_an_attack_leaves_the_model_as_it_was(family):
    model = copy.deepcopy(family.model()).train()
    body = getattr(model, "model", model)
    if hasattr(body, "rope_deltas"):
        body.rope_deltas = torch.tensor([[3]])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    objective = objective_of(family, model=model)
    maximise(objective, objective.pixels(), LINF, "bridge", steps=2, refreshes=1)
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    if hasattr(body, "rope_deltas"):
        assert torch.equal(body.rope_deltas, torch.tensor([[3]]))


@generative
def test_an_image_token_too_few_or_too_many_is_named(family):
    objective = objective_of(family)
    batch = {**objective.inputs(objective.pixels())}
    bridge = objective.bridge
    image, text = bridge.inputs(batch)
    features = bridge.encode_image(batch["pixel_values"], **image)
    for change in (+1, -1):
        ids = batch["input_ids"].clone()
        images = ids[1] == IMAGE
        words = ~images & batch["attention_mask"][1].bool()
        ids[1, (images if change < 0 else words).nonzero()[0]] = 20 if change < 0 else IMAGE
        with pytest.raises(ValueError, match=r"the images take \d+ tokens .* input_ids hold \d+ image tokens"):
            bridge.encode_image(batch["pixel_values"], **{**image, "input_ids": ids})
        with pytest.raises(ValueError, match="expected as many tokens as features"):
            bridge.fuse(features, **{**text, "input_ids": ids})


def test_features_may_be_blanked():
    objective = objective_of(by_name("Gemma 3"))
    with torch.no_grad():
        features = objective.encode(objective.space.to_model(objective.pixels()))
        plain = task_loss(*objective.bridge.fuse(features, **objective.batch))
        features[0] = 0
        features[1, -1] = 0
        blanked = task_loss(*objective.bridge.fuse(features, **objective.batch))
    assert ((blanked - plain).abs() > 1e-4).tolist() == [True, True, False]


@every_family
def test_a_sample_without_a_target_is_named(family):
    objective = objective_of(family)
    features = objective.encode(objective.space.to_model(objective.pixels()))
    objective.batch["labels"][1] = -100
    said = "row 1 of labels is -100" if family.kind == "dual" else "row 1 of labels holds only -100"
    with pytest.raises(ValueError, match=said):
        objective.bridge.fuse(features, **objective.batch)


@every_family
def test_normalised_pixels_are_refused_where_pixels_are_expected(family):
    objective = objective_of(family)
    clean = objective.pixels()
    with pytest.raises(ValueError, match=r"expected \[0, 1\]. Normalised pixel_values go through"):
        maximise(objective, objective.space.to_model(clean), LINF, "pgd", steps=1)


@every_family
def test_a_processor_without_mean_and_std_is_named(family):
    processor = copy.copy(family.processor)
    processor.image_mean = None
    with pytest.raises(ValueError, match=rf"{type(processor).__name__} has no image_mean and image_std"):
        PixelSpace.from_processor(processor)


def test_pixels_of_another_form_are_refused():
    objective = objective_of(by_name("Qwen2-VL"))
    with pytest.raises(ValueError, match=r"Take them from Victim.pixels\(\)"):
        maximise(objective, torch.rand(3, 3, 32, 32), LINF, "pgd", steps=1)
    with pytest.raises(ValueError, match=r"images have shape \(2, 48, 3, 8, 8\); .* \(3, 48, C, h, w\)"):
        objective.inputs(objective.pixels()[:2])
    for name in ("LLaVA", "CLIP"):
        family = by_name(name)
        batch = {**family.batch(family.model(), family.samples()), "pixel_values": torch.zeros(3, 32, 32)}
        with pytest.raises(ValueError, match="expected images, tiles or flattened patches"):
            Victim(bridge_of(family.model()), objective.space, batch).pixels()


@pytest.mark.parametrize(
    "name, key",
    [("LLaVA-NeXT", "image_sizes"), ("Qwen3-VL", "image_grid_thw"), ("InstructBLIP", "qformer_input_ids")],
)
def test_a_key_that_the_processor_made_and_the_batch_lost_is_named(name, key):
    family = by_name(name)
    batch = family.batch(family.model(), family.samples())
    del batch[key]
    objective = Victim(bridge_of(family.model()), PixelSpace.from_processor(family.processor), batch)
    with pytest.raises(ValueError, match=f"the batch has no {key}, which {type(family.model()).__name__} needs"):
        maximise(objective, objective.pixels(), LINF, "pgd", steps=1)


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "Qwen2-VL", "SmolVLM", "CLIP"])
def test_pixel_values_that_are_no_images_are_named(name):
    family = by_name(name)
    batch = family.batch(family.model(), family.samples())
    for values, said in (
        (batch["pixel_values"] * torch.nan, "holds NaN or infinite pixels"),
        (batch["pixel_values"] * 255, "not normalised by this mean and std"),
    ):
        bad = Victim(
            bridge_of(family.model()), PixelSpace.from_processor(family.processor), {**batch, "pixel_values": values}
        )
        with pytest.raises(ValueError, match=said):
            bad.pixels()


@every_family
def test_half_precision_models_are_attacked_in_float32(family):
    objective = objective_of(family, model=copy.deepcopy(family.model()).bfloat16())
    clean = objective.pixels()
    for solver in ("pgd", "bridge"):
        adv = maximise(objective, clean, LINF, solver, steps=2, refreshes=1).adv
        assert adv.dtype == torch.float32 and 0 < (adv - clean).abs().max() <= LINF.eps * (1 + 1e-6)


def test_images_that_cannot_be_shared_out_are_named():
    family = by_name("Gemma 3")
    batch = family.batch(family.model(), family.samples())
    batch["input_ids"][2][batch["input_ids"][2] == IMAGE] = 20
    batch["input_ids"][0][batch["attention_mask"][0] == 0] = IMAGE
    objective = Victim(bridge_of(family.model()), PixelSpace.from_processor(family.processor), batch)
    with pytest.raises(ValueError, match="cannot be assigned in order"):
        objective.pixels()


def test_a_model_that_reads_both_ways_must_be_told_what_the_response_is():
    objective = objective_of(by_name("PaliGemma"))
    features = objective.encode(objective.space.to_model(objective.pixels()))
    kinds = objective.batch.pop("token_type_ids")
    with pytest.raises(ValueError, match="has labels where token_type_ids is 0"):
        objective.bridge.fuse(features, **objective.batch, token_type_ids=0 * kinds)
    with pytest.raises(ValueError, match="the batch has no token_type_ids"):
        objective.bridge.fuse(features, **objective.batch)


def test_dual_encoders_read_a_fixed_set_of_texts_once():
    objective = objective_of(by_name("CLIP"))
    bridge, batch = objective.bridge, objective.batch
    assert isinstance(bridge, DualBridge)
    values = objective.space.to_model(objective.pixels())
    plain = objective(values)
    with torch.no_grad():
        embeds = bridge.encode_texts(batch["input_ids"], batch["attention_mask"])
    once = Victim(bridge, objective.space, {"text_embeds": embeds, "labels": batch["labels"]})
    torch.testing.assert_close(once(values).loss, plain.loss)
    own_text = bridge.encode_text(**batch)
    assert torch.equal(own_text, bridge.encode_text(text_embeds=own_text, labels=torch.arange(3)))


@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_dual_loss_is_the_cross_entropy_of_the_models_own_logits(name):
    family = by_name(name)
    model = family.model()
    batch = family.batch(model, family.samples())
    labels = torch.tensor([2, 0, 0])
    objective = Victim(bridge_of(model), PixelSpace.from_processor(family.processor), {**batch, "labels": labels})
    with torch.no_grad():
        at = objective(batch["pixel_values"])
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits_per_image
    torch.testing.assert_close(at.loss, nn.functional.cross_entropy(logits, labels, reduction="none"))
    assert torch.equal(at.right, logits.argmax(1) == labels)


def test_dual_encoders_name_what_is_wrong_with_labels_and_texts():
    objective = objective_of(by_name("CLIP"))
    features = objective.encode(objective.space.to_model(objective.pixels()))
    fuse, batch = objective.bridge.fuse, objective.batch
    for labels, said in (
        (torch.tensor([0, 3, 1]), "row 1 of labels is 3; expected an index of one of the 3 texts"),
        (torch.zeros(3, 4, dtype=torch.long), r"labels have shape \(3, 4\); .* needs \(N,\)"),
        (torch.tensor([0, 1]), "3 images and 2 labels"),
    ):
        with pytest.raises(ValueError, match=said):
            fuse(features, **{**batch, "labels": labels})
    with pytest.raises(ValueError, match="neither input_ids nor text_embeds"):
        fuse(features, labels=batch["labels"])
    with pytest.raises(ValueError, match="the batch has no labels"):
        Victim(objective.bridge, objective.space, {"input_ids": batch["input_ids"]})


def test_right_of_an_encoder_decoder_is_what_greedy_generation_gives():
    family = by_name("ViT-GPT2")
    model, objective = family.model(), objective_of(family)
    bridge = objective.bridge
    assert isinstance(bridge, EncoderDecoderBridge)
    labels = family.batch(model, family.samples(), "right")["labels"]
    values = objective.space.to_model(objective.pixels())
    new = int((labels != -100).sum(1).max())
    output = model.generate(values, max_new_tokens=new, min_new_tokens=new, do_sample=False)[:, 1:]
    assert torch.equal(output[labels != -100], labels[labels != -100])
    wrong = labels.clone()
    wrong[1, 2] = 11 if wrong[1, 2] != 11 else 12
    right = is_right(*bridge.fuse(bridge.encode_image(values), labels=wrong))
    assert right.tolist() == [True, False, True]


def test_a_model_is_refused_by_the_piece_it_lacks():
    said = r"Linear cannot be bridged.*no get_image_features.*mm_encoder_outputs.*transformers 5\.21 to .*LLaVA.*SigLIP"
    with pytest.raises(ValueError, match=said):
        bridge_of(nn.Linear(2, 2))
    model = copy.deepcopy(by_name("ViT-GPT2").model())
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="its config has no decoder_start_token_id"):
        bridge_of(model)
    with torch.device("meta"):
        small = {"num_hidden_layers": 1, "cross_attention_layers": [0]}
        mllama = tf.MllamaForConditionalGeneration(
            tf.MllamaConfig(text_config=tf.models.mllama.MllamaTextConfig(**small))
        )
    with pytest.raises(ValueError, match=r"no get_image_features, no forward\(mm_encoder_outputs=\.\.\.\)"):
        bridge_of(mllama)
    blip = copy.deepcopy(by_name("BLIP-2").model())
    blip.config.use_decoder_only_language_model = False
    with pytest.raises(ValueError, match="its language model is an encoder-decoder"):
        bridge_of(blip)


def test_the_adapter_is_chosen_by_what_a_model_offers():
    kinds = {"generative": Bridge, "dual": DualBridge, "encoder-decoder": EncoderDecoderBridge}
    assert {f.name: type(bridge_of(f.model())) for f in FAMILIES} == {f.name: kinds[f.kind] for f in FAMILIES}


@pytest.mark.parametrize("name", ["LLaVA", "LLaVA-NeXT", "Qwen3-VL", "SmolVLM", "Gemma 3"])
def test_a_sample_without_an_image_stays_as_it_is(name):
    family = by_name(name)
    model, samples = family.model(), family.samples()
    batch = family.batch(model, [samples[0], dataclasses.replace(samples[1], pictures=()), samples[2]])
    objective = Victim(bridge_of(model), PixelSpace.from_processor(family.processor), batch)
    clean = objective.pixels()
    result = ATTACKS["pgd"](objective, clean, L2, steps=3)
    with torch.no_grad():
        text_only = objective(objective.space.to_model(clean)).loss[1]
    assert torch.equal(result.adv[1], clean[1]) and not torch.equal(result.adv[2], clean[2])
    torch.testing.assert_close(result.loss[1], text_only, rtol=1e-4, atol=1e-5)
    again = objective.from_pictures(objective.pictures(clean))
    assert torch.equal(again, clean)


def test_losses_are_summed_and_never_averaged():
    """Twice the same samples: each has the gradient that it has in a batch of its own."""
    for name in ("Qwen3-VL", "CLIP"):
        family = by_name(name)
        model, samples = family.model(), family.samples()
        space = PixelSpace.from_processor(family.processor)
        small = Victim(bridge_of(model), space, family.batch(model, samples))
        large = Victim(bridge_of(model), space, family.batch(model, samples * 2))
        if name == "CLIP":
            large.batch = {**small.batch, "labels": small.batch["labels"].repeat(2)}
        one, _ = exact_gradient(small, space.to_model(small.pixels()))
        two, _ = exact_gradient(large, space.to_model(large.pixels()))
        torch.testing.assert_close(two[3:], one, rtol=1e-3, atol=1e-5)


def test_families_are_what_they_claim():
    """Ragged prompts in all, several images a sample and different sizes in those that take them."""
    for family in FAMILIES:
        batch = family.batch(family.model(), family.samples())
        if family.kind == "generative":
            assert batch["attention_mask"].sum(1).unique().numel() == 3, family.name
        pictures = [len(s.pictures) for s in family.samples()]
        assert pictures == ([1, 1, 1] if family.single else [1, 2, 1]), family.name
    assert {f.name for f in FAMILIES if len({s for own in f.sizes for s in own}) > 1} == {
        "LLaVA-NeXT", "LLaVA-OneVision", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "SmolVLM", "Idefics3",
    }  # fmt: skip


def test_the_loss_is_that_of_the_bridge():
    objective = objective_of(by_name("Qwen2-VL"))
    x = objective.space.to_model(objective.pixels())
    with torch.no_grad():
        loss = task_loss(*objective.bridge.fuse(objective.encode(x), **objective.batch))
        torch.testing.assert_close(objective(x).loss, loss)
        again = Victim(objective.bridge, objective.space, objective.inputs(objective.pixels()))
        torch.testing.assert_close(again(x, None, weighted(2.0)).loss, 2 * loss)


def test_texts_of_a_dual_encoder_are_the_same_by_their_words_and_not_by_their_places():
    bridge = DualBridge.__new__(DualBridge)
    ids, mask = torch.tensor([[5, 6, 0], [7, 8, 9], [5, 6, 0]]), torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0]])
    batch = {"labels": torch.tensor([2, 1, 0]), "input_ids": ids, "attention_mask": mask}
    first, second, third = text_groups(packed_text(*bridge.own_texts(batch))).tolist()
    assert first == third != second
    fixed = {"labels": torch.tensor([2, 1, 2]), "text_embeds": torch.zeros(3, 4)}
    first, second, third = text_groups(packed_text(*bridge.own_texts(fixed))).tolist()
    assert first == third != second

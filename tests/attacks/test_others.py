"""Losses over the answers to choose from, and targeted attacks: formulas by hand, optima in closed form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cmai_fast.attacks import ATTACKS, LOSSES, OtherAnswers, exact_gradient
from cmai_fast.threat import ThreatModel
from linear_bridge import SHAPE, SPACE
from linear_classes import ClassesBridge

INNER = 0.4 + 0.2 * torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LINF = ThreatModel("linf", 16 / 255)
UNAIMED = ("text", "unbounded", "fit")
AIMED = [name for name, a in ATTACKS.items() if a.losses and not any(getattr(a, kind) for kind in UNAIMED)]


def padded(*responses: list[int]) -> torch.Tensor:
    length = 1 + max(map(len, responses))
    return torch.tensor([[-100] * (length - len(r)) + r for r in responses])


def test_answers_part_at_their_first_other_token():
    labels = padded([7, 2], [4, 5, 2])
    others = OtherAnswers.parting(
        labels,
        [padded([8, 2], [4, 6, 2]), padded([7, 3, 2], [4, 2]), padded([8, 9, 2], [4, 5, 2]), padded([2], [1])],
    )
    # "8 9" parts from "7" where "8" does, with the same token; "4 5" is the label itself; "4" ends where "4 5" goes on.
    assert others.place.tolist() == [[0, 1, -1, 0], [1, 1, -1, 0]]
    assert others.token[0, [0, 1, 3]].tolist() == [8, 3, 2] and others.token[1, [0, 1, 3]].tolist() == [6, 2, 1]
    assert others.counts.tolist() == [3, 3] and others.least == 3


def test_a_lead_is_that_of_the_token_where_two_answers_part(case64):
    """On sequences of one and two tokens, in any part of the batch."""
    batch, victim = case64.batch(), case64.victim()
    one, two = sorted(set(range(30)) - {token for row in case64.rows for token in row})[:2]
    first, last = torch.where(batch["labels"] == -100, -100, one), batch["labels"].clone()
    last[:, -1] = two
    others = OtherAnswers.parting(batch["labels"], [first, last])
    values = case64.space.to_model(case64.clean)
    with torch.no_grad():
        found = others.leads(victim.outputs(victim.encode(values)), None)
        rows = torch.tensor([3, 0])
        some = others.leads(victim.outputs(victim.encode(values[rows]), rows), rows)
    torch.testing.assert_close(some, found[rows], rtol=0, atol=1e-9)
    for i, (row, n) in enumerate(zip(case64.rows, case64.answers, strict=True)):
        with torch.no_grad():
            logits = case64.model(input_ids=torch.tensor([row]), pixel_values=values[i : i + 1]).logits[0]
        assert found[i, 0].item() == pytest.approx(float(logits[-n - 1, one] - logits[-n - 1, row[-n]]), abs=1e-9)
        assert found[i, 1].item() == pytest.approx(float(logits[-2, two] - logits[-2, row[-1]]), abs=1e-9)


def by_hand(z: torch.Tensor, y: int, t: int | None = None) -> torch.Tensor:
    """Croce and Hein (2020), equations 6 and 7."""
    top = z.sort(descending=True).values
    if t is None:
        return -(z[y] - torch.cat([z[:y], z[y + 1 :]]).max()) / (top[0] - top[2])
    return -(z[y] - z[t]) / (top[0] - (top[2] + top[3]) / 2)


@pytest.mark.parametrize("lead", [8.0, -8.0])
def test_dlr_is_the_published_ratio(lead):
    bridge = ClassesBridge(lead=lead)
    z, x = bridge.logits(INNER).detach(), SPACE.to_model(INNER)
    dlr = LOSSES["dlr"]
    victim = bridge.of_class([0, 2])
    expected = torch.stack([by_hand(z[0], 0), by_hand(z[1], 2)])
    torch.testing.assert_close(victim(x, None, dlr).loss, expected)
    assert torch.equal(victim(x, None, dlr).right, expected < 0)
    victim.others.aim = torch.tensor([3, 4])
    expected = torch.stack([by_hand(z[0], 0, 3), by_hand(z[1], 2, 4)])
    torch.testing.assert_close(victim(x, None, dlr).loss, expected)
    # The same two, where 3 and 4 are what the attacker wants, and 0 and 2 are right.
    wanted = bridge.of_class([3, 4], targeted=True)
    wanted.others.aim = torch.tensor([0, 2])
    torch.testing.assert_close(wanted(x, None, dlr).loss, expected)
    assert torch.equal(wanted(x, None, dlr).right, z.argmax(1) != torch.tensor([3, 4]))


def test_dlr_does_not_change_with_the_scale_of_the_logits():
    """Nor does its gradient vanish, as that of the cross-entropy does in float32."""
    grads = []
    for scale in (1.0, 1000.0):
        bridge = ClassesBridge(dtype=torch.float32)
        with torch.no_grad():
            bridge.model.weight.mul_(scale)
            bridge.model.bias.mul_(scale)
        victim, x = bridge.of_class([0, 0]), SPACE.to_model(INNER.float())
        grads.append(exact_gradient(victim, x, None, LOSSES["dlr"])[0])
        if scale > 1:
            assert not exact_gradient(victim, x)[0].any()
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-6)


def test_dlr_is_refused_by_name():
    pgd = ATTACKS["pgd"]
    with pytest.raises(ValueError, match="row 0 has 3 answers to choose from, and dlr compares at least 4; use margin"):
        pgd(ClassesBridge(3).of_class([0, 0]), INNER, LINF, loss="dlr")
    with pytest.raises(ValueError, match="which the victim does not know; set its `others`, or use margin"):
        pgd(ClassesBridge().of_class([0, 0], others=None), INNER, LINF, loss="dlr")


@pytest.mark.parametrize("norm, eps", [("linf", 16 / 255), ("l2", 0.3)])
def test_towards_one_other_class_the_optimum_is_known(norm, eps):
    """z_t - z_y is linear, so that its maximum over a ball inside the box is one step along its gradient."""
    bridge, threat = ClassesBridge(lead=80.0), ThreatModel(norm, eps)
    for t in (1, 4):
        victim = bridge.of_class([0, 0])
        victim.others.aim = torch.tensor([t, t])
        g = (bridge.model.weight[t] - bridge.model.weight[0]).detach().view(SHAPE) / SPACE.std.double()[:, None, None]
        best = threat.eps * (g.sign() if norm == "linf" else g / g.norm())
        for name, settings in (("pgd", {"random_start": False}), ("apgd", {"steps": 50})):
            result = ATTACKS[name](victim, INNER, threat, loss="margin", **settings)
            torch.testing.assert_close(result.adv - INNER, best.expand_as(INNER), rtol=0, atol=1e-5)
            z = bridge.logits(result.adv)
            torch.testing.assert_close(result.loss, (z[:, t] - z[:, 0]).detach())
            assert not result.fooled.any()


@pytest.mark.parametrize("loss", ["cross-entropy", "margin", "dlr"])
@pytest.mark.parametrize("name", AIMED)
def test_every_attack_gives_the_class_that_is_wanted(name, loss):
    """Also class 0, which is not "untargeted"; `fooled` says that the class was given, not that another one was."""
    bridge = ClassesBridge(lead=0.0)
    clean = INNER
    said = bridge.logits(clean).argmax(1)
    wanted = [int((said[0] + 1) % 5), 0 if said[1] else 1]
    victim = bridge.of_class(wanted, targeted=True)
    victim.others.aim = said
    before = victim(SPACE.to_model(clean), None, LOSSES[loss])
    assert before.right.all()
    result = ATTACKS[name](victim, clean, ThreatModel("linf", 0.3), loss=loss)
    assert (result.loss > before.loss).all()
    given = bridge.logits(result.adv).argmax(1)
    assert torch.equal(result.fooled, given == torch.tensor(wanted))
    assert result.fooled.all() or name == "fgsm"
    small = ATTACKS[name](
        victim, clean, ThreatModel("linf", 1e-4), loss=loss, **({"steps": 9} if name != "fgsm" else {})
    )
    assert not small.fooled.any() and torch.equal(bridge.logits(small.adv).argmax(1), said)


def test_what_an_attacker_wants_of_a_sequence(case64):
    """The labels are an answer that the model does not give; the loss is its log-probability."""
    victim = case64.victim()
    for i, n in enumerate(case64.answers):
        victim.batch["labels"][i, -n:] = victim.batch["input_ids"][i, -n:] = 11 + i
    own = victim(case64.space.to_model(case64.clean)).loss
    victim.targeted = True
    at = victim(case64.space.to_model(case64.clean), None, LOSSES["cross-entropy"])
    torch.testing.assert_close(at.loss, -own)
    margin = victim(case64.space.to_model(case64.clean), None, LOSSES["margin"]).loss
    assert at.right.all() and (margin < 0).all()
    result = ATTACKS["apgd"](victim, case64.clean, ThreatModel("linf", 24 / 255), steps=20, loss="margin")
    assert result.fooled.any() and torch.equal(result.fooled, result.loss > 0)
    with torch.no_grad():
        logits = victim.outputs(victim.encode(case64.space.to_model(result.adv))).logits
    given = [bool((logits[i, -n:].argmax(-1) == 11 + i).all()) for i, n in enumerate(case64.answers)]
    assert given == result.fooled.tolist()


def test_passes_are_counted_per_sample():
    """A sample that is broken early leaves the batch, and costs no more."""
    bridge = ClassesBridge(lead=0.0)
    said = bridge.logits(INNER).argmax(1).tolist()
    victim = bridge.of_class([said[0], (said[1] + 1) % 5])  # the second is wrong before
    result = ATTACKS["pgd"](victim, INNER, ThreatModel("linf", 1e-5), steps=4)
    assert result.fooled.tolist() == [False, True]
    assert victim.forwards.tolist() == [6, 1] and victim.backwards.tolist() == [4, 0]
    assert (victim.passes.full_forward, victim.passes.full_backward) == (6, 4)


def test_an_attack_begins_where_the_victim_says():
    victim = ClassesBridge().of_class([0, 0])
    victim.origin = INNER + torch.linspace(-0.01, 0.01, 48, dtype=torch.float64).view(SHAPE)
    result = ATTACKS["pgd"](victim, INNER, LINF, steps=0, early_stop=False)
    assert torch.equal(result.adv, victim.origin)
    assert F.cross_entropy(ClassesBridge().logits(victim.origin), torch.zeros(2, dtype=torch.int64)) > 0

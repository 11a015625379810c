"""What an attack says of itself: its names, budget and settings, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cmai_fast.attacks import ATTACKS, GRADIENTS, LOSSES, attack, weighted
from cmai_fast.attacks.attack import Attack
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.evaluation.suites import SUITES
from cmai_fast.threat import ThreatModel
from unguarded import UNGUARDED

PAGE = Path(__file__).parents[2] / "docs" / "attacks.md"
NAMES = ATTACKS.names()


@pytest.fixture
def toy():
    """An attack of somebody else, which remembers what it was run with."""
    seen = {}

    def toy(
        victim, clean, threat, *, steps, restarts, seed, sample_ids, loss=None, gradient=None, rate: float = 0.5,
        queries: int = 7, grey: bool = False, word: str = "a", cap: int | None = None,
    ):  # fmt: skip
        seen.update(locals())
        return "ran"

    yield attack("toy", label="Toy", steps=3, restarts=2, threats=("l2",))(toy), seen
    del ATTACKS._things["toy"]


def test_names_are_known_and_misspelt_ones_refused_without_pytorch():
    code = (
        "import sys\nfrom cmai_fast.attacks import ATTACKS\n"
        f"assert ATTACKS.names() == {NAMES}, ATTACKS.names()\n"
        "ATTACKS.check('mi-fgsm')\n"
        "try: ATTACKS.check('pgdd')\n"
        "except ValueError as error: assert 'did you mean pgd?' in str(error), error\n"
        "else: raise SystemExit('accepted')\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_attack_is_registered_under_the_name_of_its_file():
    assert {"apgd", "fgsm", "mi-fgsm", "pgd"} <= set(NAMES)
    for name, found in ATTACKS.items():
        assert isinstance(found, Attack) and found.name == name and found.label
        assert found.run.__module__ == f"cmai_fast.attacks.{name.replace('-', '_')}"
        assert set(found.threats) <= {"linf", "l2"} and found.steps >= found.least and found.restarts >= 1
    with pytest.raises(ValueError, match="there are two attacks called 'pgd'"):
        ATTACKS.add("pgd", ATTACKS["pgd"])


def test_settings_come_from_the_signature(toy):
    assert dict(ATTACKS["pgd"].settings) == {
        "step_size": None, "random_start": True, "decay": 0.0, "early_stop": True
    }  # fmt: skip
    assert dict(ATTACKS["fgsm"].settings) == {}
    assert toy[0].describe() == {
        "rate": "float, default 0.5", "queries": "int, default 7", "grey": "bool, default False",
        "word": "str, default a", "cap": "none or int, default None",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text, value",
    [
        ({"rate": "2/255"}, 2 / 255), ({"rate": "1e-3"}, 1e-3), ({"rate": 1}, 1.0), ({"queries": "12"}, 12),
        ({"grey": "true"}, True), ({"grey": "No"}, False), ({"word": "none"}, "none"), ({"cap": "none"}, None),
        ({"cap": "4"}, 4), ({"loss": "margin"}, "margin"), ({"gradient": "bridge"}, "bridge"),
    ],
)  # fmt: skip
def test_settings_are_read_from_text(toy, text, value):
    (found,) = toy[0].read(text).values()
    assert found == value and type(found) is type(value)
    toy[0](None, None, ThreatModel("l2", 1.0), **text)
    assert toy[1][next(iter(text))] == value and (toy[1]["steps"], toy[1]["restarts"]) == (3, 2)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"rates": 1.0}, r"toy has no setting 'rates'; its settings are rate \(float, default 0.5\), queries"),
        ({"rate": "fast"}, r"toy: rate is 'fast'; its settings are rate \(float"),
        ({"rate": "1/0"}, "toy: rate is '1/0'"),
        ({"rate": True}, "toy: rate is True"),
        ({"queries": "2.5"}, "toy: queries is '2.5'"),
        ({"queries": True}, "toy: queries is True"),
        ({"grey": "maybe"}, "toy: grey is 'maybe'"),
        ({"grey": 1}, "toy: grey is 1"),
        ({"cap": "few"}, r"toy: cap is 'few'; .*cap \(none or int, default None\)"),
        ({"loss": "magrin"}, r"unknown loss 'magrin'; did you mean margin\?"),
        ({"gradient": "exakt"}, r"unknown gradient 'exakt'; did you mean exact\?"),
    ],
)
def test_unknown_and_mistyped_settings_are_refused(toy, settings, said):
    with pytest.raises(ValueError, match=said):
        toy[0](None, None, ThreatModel("l2", 1.0), **settings)
    assert not toy[1]


@pytest.mark.parametrize(
    "name, settings, said",
    [
        ("pgd", {"step_size": "-1"}, "pgd: step_size is -1.0; expected a finite number of at least 0"),
        ("pgd", {"step_size": "nan"}, "pgd: step_size is nan"),
        ("pgd", {"decay": "inf"}, "pgd: decay is inf"),
        ("mi-fgsm", {"decay": "0"}, "mi-fgsm: decay is 0.0; expected a finite number above 0"),
    ],
)
def test_values_that_mean_nothing_are_refused_without_a_model(name, settings, said):
    with pytest.raises(ValueError, match=said):
        AttackSpec(name, settings=settings)


def test_norms_and_budgets_are_refused_with_the_name_of_the_attack(toy):
    with pytest.raises(ValueError, match="toy does not support the norm 'linf'; expected l2"):
        toy[0](None, None, ThreatModel("linf", 0.1))
    for name, steps, restarts, said in (
        ("toy", 0, 1, "toy: steps is 0 and restarts is 1; expected at least 1"),
        ("apgd", 5, 0, "apgd: steps is 5 and restarts is 0"),
        ("pgd", -1, 1, "pgd: steps is -1 .*at least 0"),
        ("fgsm", 3, 1, "fgsm takes one step"),
    ):
        with pytest.raises(ValueError, match=said):
            ATTACKS[name].check("l2", steps, restarts)
    ATTACKS["pgd"].check("linf", 0, 1)


def test_an_attack_that_cannot_be_called_as_the_others_is_refused():
    with pytest.raises(TypeError, match="attack 'odd' does not take restarts, seed"):
        attack("odd", label="Odd", steps=1)(lambda victim, clean, threat, *, steps, sample_ids: None)

    def bare(victim, clean, threat, *, steps, restarts, seed, sample_ids, queries: int):
        pass

    with pytest.raises(TypeError, match="settings without a default: queries"):
        attack("bare", label="Bare", steps=1)(bare)

    def nested(victim, clean, threat, *, steps, restarts, seed, sample_ids, sizes: list = ()):  # type: ignore[assignment]
        pass

    with pytest.raises(TypeError, match="a setting of an attack is a bool, int, float, str or None"):
        attack("nested", label="Nested", steps=1)(nested)
    assert list(ATTACKS) == NAMES


@pytest.mark.parametrize("name", UNGUARDED)
def test_what_is_handed_on_is_the_adversarial_image_as_the_model_reads_it(name, case64):
    result = ATTACKS[name](case64.victim(), case64.clean, ThreatModel("linf", 1.5 / 255), steps=1)
    torch.testing.assert_close(result.model_input, case64.space.to_model(result.adv), rtol=0, atol=1e-12)
    assert torch.equal(case64.victim().right(result.adv), ~result.fooled)


@pytest.mark.parametrize("name", [n for n in NAMES if "gradient" in ATTACKS[n].named and not ATTACKS[n].text])
def test_every_gradient_attack_takes_any_loss(name, case64):
    """A loss of the user's own: it is what is maximised, and what the result reports."""
    target = torch.randn(1, 16, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def towards(features, outputs, victim, rows):
        assert len(features) == (len(victim) if rows is None else len(rows))
        return (features * target).flatten(1).sum(1)

    victim, threat = case64.victim(), ThreatModel("linf", 1.5 / 255)
    steps = 1 if name == "fgsm" else 4
    result = ATTACKS[name](victim, case64.clean, threat, steps=steps, loss=towards)
    values = [(victim.encode(case64.space.to_model(x)) * target).flatten(1).sum(1) for x in (case64.clean, result.adv)]
    assert (values[1] > values[0]).all()
    torch.testing.assert_close(result.loss, values[1])
    assert result.passes.full_backward == 0 and result.passes.vision_backward > 0  # the language side is not asked


def test_the_page_lists_every_attack_loss_and_gradient_as_it_is():
    text = PAGE.read_text()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    listed = {row[0].strip("`"): row[1:] for row in rows}
    for name, found in ATTACKS.items():
        budget = "1, fixed" if found.single else str(found.steps)
        own = ", ".join(f"`{key}` ({said})" for key, said in found.describe().items()) or "none"
        assert listed[name] == [found.label, ", ".join(found.threats), budget, own], name
    assert set(listed) == {*ATTACKS, *LOSSES, *GRADIENTS, *SUITES}
    assert not re.search(r"[^\x00-\x7f]", text)


def test_weights_may_go_with_any_loss(case64):
    victim, values = case64.victim(), case64.space.to_model(case64.clean)
    double = victim(values, None, weighted(2.0, loss=LOSSES["margin"])).loss
    torch.testing.assert_close(double, 2 * victim(values, None, LOSSES["margin"]).loss)

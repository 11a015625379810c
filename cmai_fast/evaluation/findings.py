"""What the numbers say, in sentences: the finding, what it costs, and what a reader must know before believing it.

Nothing here is chosen to please: each sentence is computed, and a model that did not gain is said not to have gained.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from .results import MODELS, is_number

HEADLINE_SAMPLES = 500  # fewer make no headline (the evaluation protocol)
CLEAN_LOSS = 0.01  # a loss of clean accuracy over one point is named
NOT_MEASURED = "not measured"

_ATTACKS = {
    "fgsm": "FGSM",
    "pgd": "PGD",
    "mi-fgsm": "MI-FGSM",
    "apgd": "APGD-CE",
    "n-fgsm": "N-FGSM",
    "square": "Square",
}
_NORMS = {"linf": "L\N{INFINITY}", "l2": "L2"}


def percent(value: Any, digits: int = 1) -> str:
    """A share as percent ("91.2%"), or that it was not measured."""
    return f"{100 * value:.{digits}f}%" if is_number(value) else NOT_MEASURED


def short_percent(value: float) -> str:
    """A share for a sentence: whole percent, one decimal where rounding would turn a little into none or all."""
    value = 100 * value
    return f"{value:.0f}%" if 9.5 <= value <= 99 or value in (0, 100) else f"{value:.1f}%"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign."""
    text = f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}")
    return f"{'0.0' if float(f'{100 * difference:.1f}') == 0 else text} points"


def decimal(value: Any, digits: int = 3) -> str:
    """A plain number with a true minus sign, or that it was not measured."""
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}") if is_number(value) else NOT_MEASURED


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def eps_number(eps: Any) -> float:
    """eps in [0, 1] pixel units from a number or a text such as "16/255"."""
    return float(Fraction(eps.replace(" ", ""))) if isinstance(eps, str) else float(eps)


def eps_text(eps: Any) -> str:
    """eps as people write it: n/255 where n is whole, else the number."""
    levels = eps_number(eps) * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-3 and levels > 0.5 else f"{eps_number(eps):.4g}"


def norm_text(norm: Any) -> str:
    return _NORMS.get(str(norm).lower(), str(norm))


def threat_text(settings: dict[str, Any]) -> str:
    """ "16/255 in L∞"."""
    norm = settings.get("norm")
    return eps_text(settings["eps"]) + (f" in {norm_text(norm)}" if norm else "")


def model_name(results: dict[str, Any], key: str) -> str:
    """What the report calls a model: its role, or "this model" where one alone was evaluated."""
    return key if key == "undefended" or results.get("undefended") is not None else "this model"


def measured(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The models that have results: (key, R), undefended first."""
    return [(key, results[key]) for key in MODELS if results.get(key) is not None]


def attack_text(key: str, attack: dict[str, Any], *, with_restarts: bool = True) -> str:
    """An attack as the literature names it: "PGD-50 (2 restarts)"."""
    base = re.sub(r"-\d+(x\d+)?$", "", str(attack.get("name") or key))
    if base.lower() not in _ATTACKS:
        return str(attack.get("name") or key)
    steps, restarts = attack.get("steps"), attack.get("restarts")
    name = _ATTACKS[base.lower()] + (f"-{steps}" if is_number(steps) and base.lower() != "fgsm" else "")
    return name + (f" ({restarts} restarts)" if with_restarts and is_number(restarts) and restarts > 1 else "")


def suite_text(results: dict[str, Any]) -> str:
    """All attacks behind Acc_robust and ASR as the subject of a sentence."""
    names: dict[str, None] = {}
    for _, model in measured(results):
        names.update({attack_text(key, attack): None for key, attack in (model.get("attacks") or {}).items()})
    listed = list(names)
    if not listed:
        return "The attack"
    if len(listed) == 1:
        return listed[0]
    if len(listed) <= 3:
        return f"The worst of {', '.join(listed[:-1])} and {listed[-1]}"
    return f"The worst of {len(listed)} attacks"


def finding(results: dict[str, Any]) -> str:
    """The headline: what the attacks do to the right answers of each model."""
    subject = f"{suite_text(results)} at {threat_text(results['settings'])}"
    models = measured(results)
    if not all(is_number(model.get("asr")) for _, model in models):
        left = " and ".join(
            f"{short_percent(model['acc_robust'])} for {_article(results, key)}" for key, model in models
        )
        return f"{subject} leaves a robust accuracy of {left}."
    if len(models) == 1:
        key, model = models[0]
        return f"{subject} breaks {short_percent(model['asr'])} of the right answers of {_article(results, key)}."
    before, after = models[0][1]["asr"], models[1][1]["asr"]
    return (
        f"{subject} breaks {short_percent(before)} of the right answers of the undefended model, "
        f"{short_percent(after)} of those of the immunised one."
    )


def consequence(results: dict[str, Any]) -> str:
    """The second sentence: relative gain, clean accuracy, cost of a training step."""
    models = dict(measured(results))
    said = []
    if len(models) == 2:
        old, new = models["undefended"], models["immunised"]
        if is_number(old.get("asr")) and is_number(new.get("asr")):
            said.append(_gain(old["asr"], new["asr"]))
        change = new["acc_clean"] - old["acc_clean"]
        said.append(
            f"Clean accuracy goes from {percent(old['acc_clean'])} to {percent(new['acc_clean'])} ({points(change)})."
        )
    else:
        (model,) = models.values()
        said.append(f"Clean accuracy is {percent(model['acc_clean'])}, robust accuracy {percent(model['acc_robust'])}.")
    ratio = (results.get("overhead") or {}).get("time_ratio")
    if is_number(ratio):
        said.append(f"A training step takes {ratio:.2g} times as long as a clean one.")
    return " ".join(said)


def caveats(results: dict[str, Any]) -> list[str]:
    """What speaks against trusting the headline: small samples, overlapping intervals, failed checks, a weak threat."""
    said = []
    for key, model in measured(results):
        name = _article(results, key)
        failed = [check for check in model.get("sanity") or [] if check.get("passed") is False]
        if failed:
            which = "; ".join(str(check.get("check")) for check in failed)
            said.append(f"{len(failed)} of {len(model['sanity'])} sanity checks failed for {name}: {which}.")
        if not model.get("sanity"):
            said.append(f"No sanity checks were run for {name}.")
    models = dict(measured(results))
    fewest = min(model["n"] for model in models.values())
    if fewest < HEADLINE_SAMPLES:
        said.append(f"Only {fewest:,} samples; a headline needs {HEADLINE_SAMPLES} or more.")
    if len(models) < 2:
        return said
    old, new = models["undefended"], models["immunised"]
    if _overlap(old.get("acc_robust_interval"), new.get("acc_robust_interval")):
        said.append("The intervals of the two robust accuracies overlap: the difference may be chance.")
    if is_number(old.get("asr")) and old["asr"] < 0.5:
        said.append("The undefended model withstands most of this attack, so there was little to gain at this eps.")
    if old["acc_clean"] - new["acc_clean"] > CLEAN_LOSS + 1e-9:
        said.append(f"The immunised model lost {points(old['acc_clean'] - new['acc_clean'])[1:]} of clean accuracy.")
    # Images made on the undefended model are one attack more for the immunised one, which can only look worse by it.
    if set(old.get("attacks") or {}) != set(new.get("attacks") or {}) - {"transfer"}:
        said.append("The two models were not given the same attacks.")
    return said


def _gain(before: float, after: float) -> str:
    if before == 0:
        return "There was nothing to gain: no attack broke the undefended model."
    if after >= before:
        return "Immunisation did not help against this attack."
    return f"Attack success falls by {short_percent(1 - after / before)} relative to undefended."


def _article(results: dict[str, Any], key: str) -> str:
    name = model_name(results, key)
    return "the model" if name == "this model" else f"the {name} model"


def _overlap(first: Any, second: Any) -> bool:
    if not (is_interval(first) and is_interval(second)):
        return False
    return first[0] <= second[1] and second[0] <= first[1]


def is_interval(value: Any) -> bool:
    """True for a [low, high] pair of numbers."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(is_number(end) for end in value)

"""What the numbers say, in sentences: the finding, what it costs, and what a reader must know before believing it.

Nothing here is chosen to please: each sentence is computed, and a model that gained nothing is described as such.
"""

from __future__ import annotations

from collections.abc import Sequence

from cmai_fast.evaluation.results import Results, is_number

from .models import Shown, compared, ranked, shown
from .words import attack_text, is_interval, listed, percent, points, short_percent, threat_text

HEADLINE_SAMPLES = 500  # fewer make no headline (the evaluation protocol)
CLEAN_LOSS = 0.01  # a loss of clean accuracy over one point is named


def suite_text(models: Sequence[Shown]) -> str:
    """All attacks behind Acc_robust and ASR as the subject of a sentence."""
    names: dict[str, None] = {}
    for model in models:
        attacks = model.record.get("attacks") or {}
        names.update({attack_text(key, attack): None for key, attack in attacks.items()})
    if not names:
        return "The attack"
    if len(names) == 1:
        return next(iter(names))
    return f"The worst of {listed(list(names)) if len(names) <= 3 else f'{len(names)} attacks'}"


def finding(results: Results) -> str:
    """The headline: what the attacks do to the right answers of the models that are compared."""
    models = shown(results)
    pair = compared(models)
    about = models if pair is None else list(pair)
    subject = f"{suite_text(about)} at {threat_text(results['settings'])}"
    broken = [asr for model in about if is_number(asr := model.record.get("asr"))]
    if pair is None:
        (model,) = models
        if broken:
            return f"{subject} breaks {short_percent(broken[0])} of the right answers of {model.phrase}."
        return f"{subject} leaves {model.phrase} a robust accuracy of {short_percent(model.record['acc_robust'])}."
    worse, better = pair
    second = better.introduced + _field(models)
    if len(broken) == 2:
        if (worse.name, better.name) == ("undefended", "immunised"):
            second = second.replace("the immunised model", "the immunised one")
        return (
            f"{subject} breaks {short_percent(broken[0])} of the right answers of {worse.introduced}, "
            f"{short_percent(broken[1])} of those of {second}."
        )
    left = [short_percent(model.record["acc_robust"]) for model in pair]
    return f"{subject} leaves a robust accuracy of {left[0]} for {worse.introduced} and {left[1]} for {second}."


def consequence(results: Results) -> str:
    """The second sentence: relative gain, clean accuracy, cost of a training step."""
    models = shown(results)
    pair = compared(models)
    said = []
    if pair is None:
        record = models[0].record
        clean, robust = percent(record["acc_clean"]), percent(record["acc_robust"])
        said.append(f"Clean accuracy is {clean}, robust accuracy {robust}.")
    else:
        worse, better = pair
        before, after = worse.record.get("asr"), better.record.get("asr")
        defended = worse.role == "undefended" and better.role != "undefended"
        if is_number(before) and is_number(after) and defended:
            said.append(_gain(before, after, worse, better))
        old, new = worse.record["acc_clean"], better.record["acc_clean"]
        verb = "goes from" if defended else "differs:"
        to = "to" if defended else "and"
        said.append(f"Clean accuracy {verb} {percent(old)} {to} {percent(new)} ({points(new - old)}).")
        said += _beaten(models, better)
    ratio = (results.get("overhead") or {}).get("time_ratio")
    if is_number(ratio):
        said.append(f"A training step takes {ratio:.2g} times as long as a clean one.")
    return " ".join(said)


def caveats(results: Results) -> list[str]:
    """What speaks against trusting the headline: small samples, overlapping intervals, failed checks, a weak threat."""
    models = shown(results)
    said = _unchecked(models) + _samples(models)
    pair = compared(models)
    if pair is None:
        return said
    worse, better = pair
    if _overlap(worse, better):
        which = "the two robust accuracies" if len(models) == 2 else f"robust accuracy of {_both(worse, better)}"
        said.append(f"The intervals of {which} overlap: the difference may be chance.")
    rivals = [model for model in ranked(models) if model is not better and model is not worse]
    if rivals and _overlap(rivals[0], better):
        said.append(
            f"The intervals of robust accuracy of {better.phrase} and {rivals[0].phrase}, the next, overlap: "
            "their order may be chance."
        )
    asr = worse.record.get("asr")
    if worse.role == "undefended" and is_number(asr) and asr < 0.5:
        said.append(f"{_capital(worse)} withstands most of this attack, so there was little to gain at this eps.")
    loss = worse.record["acc_clean"] - better.record["acc_clean"]
    if loss > CLEAN_LOSS + 1e-9 and worse.role == "undefended":
        said.append(f"{_capital(better)} lost {points(loss)[1:]} of clean accuracy.")
    # Transferred images are one attack more for the model that was not attacked, which can only look worse by it.
    suites = {frozenset(key for key in model.record.get("attacks") or {} if not _transferred(key)) for model in models}
    if len(suites) > 1:
        said.append(f"The {'two ' if len(models) == 2 else ''}models were not given the same attacks.")
    return said


def _unchecked(models: Sequence[Shown]) -> list[str]:
    said = []
    for model in models:
        checks = model.record.get("sanity") or []
        failed = [str(check.get("check")) for check in checks if check.get("passed") is False]
        if failed:
            which = f"{len(failed)} of {len(checks)} sanity checks failed for {model.phrase}"
            said.append(f"{which}: {'; '.join(failed)}.")
    missing = [model.phrase for model in models if not model.record.get("sanity")]
    if missing:
        said.append(f"No sanity checks were run for {listed(missing)}.")
    return said


def _samples(models: Sequence[Shown]) -> list[str]:
    said = []
    counts = [model.record["n"] for model in models]
    if min(counts) < HEADLINE_SAMPLES:
        said.append(f"Only {min(counts):,} samples; a headline needs {HEADLINE_SAMPLES} or more.")
    if min(counts) != max(counts):
        said.append(f"The models were measured on different numbers of samples, {min(counts):,} to {max(counts):,}.")
    return said


def _gain(before: float, after: float, worse: Shown, better: Shown) -> str:
    if before == 0:
        return f"There was nothing to gain: no attack broke {worse.phrase}."
    if after >= before:
        what = "Immunisation" if better.role == "immunised" else "The defence"
        return f"{what} did not help against this attack."
    than = "undefended" if worse.name == worse.role else worse.name
    return f"Attack success falls by {short_percent(1 - after / before)} relative to {than}."


def _beaten(models: Sequence[Shown], better: Shown) -> list[str]:
    """That the best model is a baseline, where something immunised stands beside it."""
    immunised = [model for model in ranked(models) if model.role == "immunised"]
    if better.role != "baseline" or not immunised:
        return []
    first = immunised[0]
    return [
        f"The best immunised model, {first.name}, stays behind this baseline: robust accuracy "
        f"{percent(first.record['acc_robust'])} against {percent(better.record['acc_robust'])}."
    ]


def _field(models: Sequence[Shown]) -> str:
    """What the best was chosen from: ", the best of 11 defended models"; nothing where there was no choice."""
    defended = [model for model in models if model.role != "undefended"]
    if 0 < len(defended) < len(models):
        return f", the best of {len(defended)} defended models" if len(defended) > 1 else ""
    return f", the best of {len(models)} models" if len(models) > 2 else ""


def _both(first: Shown, second: Shown) -> str:
    return f"{first.phrase} and {second.phrase}"


def _capital(model: Shown) -> str:
    return f"The {model.name} model" if model.name == model.role else model.name


def _transferred(key: str) -> bool:
    return key.startswith("transfer")


def _overlap(one: Shown, other: Shown) -> bool:
    first, second = one.record.get("acc_robust_interval"), other.record.get("acc_robust_interval")
    if first is None or second is None or not (is_interval(first) and is_interval(second)):
        return False
    return first[0] <= second[1] and second[0] <= first[1]

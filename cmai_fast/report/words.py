"""Numbers and names as people write them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cmai_fast.evaluation.results import AttackResults, eps_number, is_number

NOT_MEASURED = "not measured"
NOTHING = "\N{EN DASH}"  # where nothing could be measured

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


def change(old: Any, new: Any) -> str:
    """`points` of new over old, or that it is unknown."""
    return points(new - old) if is_number(old) and is_number(new) else NOT_MEASURED


def decimal(value: Any, digits: int = 3) -> str:
    """A plain number with a true minus sign, or that it was not measured."""
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}") if is_number(value) else NOT_MEASURED


def count(value: Any) -> str:
    """A whole number with its thousands apart, or a dash."""
    return f"{value:,}" if is_number(value) else NOTHING


def duration(seconds: Any) -> str:
    """Seconds as a person says them, or that they were not measured."""
    if not is_number(seconds):
        return NOT_MEASURED
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def listed(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def is_interval(value: Any) -> bool:
    """True for a [low, high] pair of numbers."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(is_number(end) for end in value)


def interval(value: Any) -> str:
    """ "91.0 to 95.6%", or nothing."""
    return f"{100 * value[0]:.1f} to {100 * value[1]:.1f}%" if is_interval(value) else ""


def eps_text(eps: Any) -> str:
    """eps as people write it: n/255 where n is whole, else the number."""
    levels = eps_number(eps) * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-3 and levels > 0.5 else f"{eps_number(eps):.4g}"


def norm_text(norm: Any) -> str:
    return _NORMS.get(str(norm).lower(), str(norm))


def threat_text(settings: Mapping[str, Any]) -> str:
    """ "16/255 in L∞", or "16/255 in L∞ (upload)"."""
    norm, surface = settings.get("norm"), settings.get("threat", "input")
    text = eps_text(settings["eps"]) + (f" in {norm_text(norm)}" if norm else "")
    return text if surface == "input" else f"{text} ({surface})"


def attack_text(key: str, attack: AttackResults, *, with_restarts: bool = True) -> str:
    """An attack as the literature names it: "PGD-50 (2 restarts)", "APGD-100 [margin, other 1]"."""
    written = str(attack.get("name") or key)
    base = re.sub(r"-\d+(x\d+)?$", "", written).lower()
    label = attack.get("label") or _ATTACKS.get(base)
    if not label:
        return written
    steps, restarts = attack.get("steps"), attack.get("restarts")
    name = str(label) + (f"-{steps}" if is_number(steps) and base != "fgsm" else "") + _aim(attack)
    return name + (f" ({restarts} restarts)" if with_restarts and is_number(restarts) and restarts > 1 else "")


def _aim(attack: AttackResults) -> str:
    """What an attack of a standard set maximises and aims at, if that is not the usual."""
    parts = [str(loss)] if (loss := (attack.get("settings") or {}).get("loss")) else []
    if attack.get("target") is not None:
        parts.append(f"target {attack['target']!r}")
    parts += [f"{name} {int(k) + 1}" for name in ("other", "reference") if is_number(k := attack.get(name))]
    parts += ["from the worst image"] if attack.get("again") else []
    return f" [{', '.join(parts)}]" if parts else ""


def worst_attack(attacks: Mapping[str, AttackResults] | None) -> str:
    """The attack that leaves the least robust accuracy, or a dash."""
    left = [(share, key) for key, attack in (attacks or {}).items() if is_number(share := attack.get("acc_robust"))]
    if not left:
        return NOTHING
    _, key = min(left, key=lambda pair: pair[0])
    return attack_text(key, (attacks or {})[key])

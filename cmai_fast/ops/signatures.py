"""The signatures of the operators on adversarial images: names, order, types, defaults, and mutated arguments.

Each is defined once. The schemas of `torch.ops.cmai_fast`, the public functions (`operators.py`), the checks, the
reference and the planners of every backend are derived from these types or take their instances.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, ParamSpec, get_type_hints

from torch import Tensor

P = ParamSpec("P")
Written = Annotated[Tensor, "written"]


class PgdStep(NamedTuple):
    """One step of PGD; see `pgd_linf_step_`."""

    adv: Written
    grad: Tensor
    clean: Tensor
    eps: Tensor
    step: Tensor
    active: Tensor | None = None
    model_input: Written | None = None
    velocity: Written | None = None
    decay: float = 1.0
    nonfinite: Written | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    patches: int = 1
    lower: float = 0.0
    upper: float = 1.0


class ApgdStep(NamedTuple):
    """One iteration of Auto-PGD; see `apgd_linf_step_`."""

    adv: Written
    previous: Written
    grad: Tensor
    top_adv: Written
    top_grad: Written
    clean: Tensor
    eps: Tensor
    step: Tensor
    improved: Tensor
    restart: Tensor
    momentum: float
    model_input: Written | None = None
    nonfinite: Written | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    patches: int = 1
    lower: float = 0.0
    upper: float = 1.0


class RandomStart(NamedTuple):
    """A random point of the ball; see `random_start_`."""

    adv: Written
    clean: Tensor
    eps: Tensor
    sample_ids: Tensor
    seed: int
    norm: str
    lower: float = 0.0
    upper: float = 1.0


Arguments = PgdStep | ApgdStep | RandomStart
STEPS: dict[str, type[Arguments]] = {
    "pgd_linf_step_": PgdStep,
    "pgd_l2_step_": PgdStep,
    "apgd_linf_step_": ApgdStep,
    "apgd_l2_step_": ApgdStep,
    "random_start_": RandomStart,
}
# From this argument on, the public functions take keywords only.
_KEYWORDS_FROM = "model_input"


def schema_of(arguments: type[Arguments]) -> str:
    """The schema for `torch.library`.

    No argument is keyword-only here, unlike in the public functions: that would cost 3 microseconds per call.
    """
    parts, written = [], 0
    for name, hint in get_type_hints(arguments, include_extras=True).items():
        optional = type(None) in getattr(hint, "__args__", ())
        kind = next(a for a in hint.__args__ if a is not type(None)) if optional else hint
        text = {Tensor: "Tensor", float: "float", int: "int", str: "str"}[getattr(kind, "__origin__", kind)]
        if kind == Written:
            text, written = f"Tensor({chr(ord('a') + written)}!)", written + 1
        default = arguments._field_defaults.get(name, inspect.Parameter.empty)
        end = "" if default is inspect.Parameter.empty else f"={default}"
        parts.append(f"{text}{'?' if optional else ''} {name}{end}")
    return f"({', '.join(parts)}) -> ()"


def public(name: str, arguments: Callable[P, Any], run: Callable[..., None]) -> Callable[P, None]:
    """A function with these arguments that passes them to `run` in order.

    It is compiled from generated source, as in named tuples and dataclasses, since binding the arguments in Python
    would take one of the seven microseconds of a call.
    """
    assert isinstance(arguments, type)
    fields, defaults = arguments._fields, arguments._field_defaults  # type: ignore[attr-defined]
    declared = [f"{field}=defaults[{field!r}]" if field in defaults else field for field in fields]
    if _KEYWORDS_FROM in fields:
        declared.insert(fields.index(_KEYWORDS_FROM), "*")
    source = f"def {name}({', '.join(declared)}):\n    return run({', '.join(fields)})\n"
    namespace: dict[str, Any] = {"run": run, "defaults": defaults}
    exec(compile(source, f"<signature of {name}>", "exec"), namespace)
    function = namespace[name]
    hints = get_type_hints(arguments)
    function.__annotations__ = {**{field: hints[field] for field in fields}, "return": None}
    return function

"""The threat model. Importing it does not load PyTorch, so that a command can refuse a wrong radius at once."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

NORMS = ("linf", "l2")


def parse_eps(value: str | float, norm: str = "linf", name: str = "eps") -> float:
    """A radius in the [0, 1] pixel range from `8/255`, `0.03` or a number.

    Raises:
        ValueError: not a number, negative, not finite, or above 1 where the norm is `linf`.
    """
    try:
        number = Fraction("/".join(part.strip() for part in value.split("/"))) if isinstance(value, str) else value
        eps = float(number)
    except (ValueError, ZeroDivisionError, OverflowError):
        example = "128/255 or a number such as 1.5" if norm == "l2" else "8/255 or a number such as 0.03"
        raise ValueError(f"{name} is {value!r}; expected a fraction such as {example}") from None
    if norm == "l2":
        if not 0.0 <= eps < float("inf"):
            raise ValueError(f"{name} is {value}; an l2 radius is a finite number of at least 0")
    elif not 0.0 <= eps <= 1.0:  # also refuses NaN
        hint = f"; did you mean {eps:g}/255?" if 1.0 < eps <= 255.0 else ""
        raise ValueError(
            f"{name} is {value}; it is measured in the [0, 1] pixel range, so it lies between 0 and 1{hint}"
        )
    return eps


# What an attacker may change.
SURFACES = {
    "input": "the pixels that the processor has made: resized, in tiles or patches",
    "upload": "the 8-bit picture that a person uploads, of any size, before the processor",
    "patch": "a square of the uploaded picture",
    "blank": "a grey picture in the place of the uploaded one",
}
_EPS = {"input": 8 / 255, "upload": 8 / 255, "patch": 1.0, "blank": 128 / 255}  # of an `linf` ball
_OPTIONS = {"upload": ("jpeg",), "patch": ("size", "x", "y", "jpeg"), "blank": ("jpeg",)}


@dataclass(frozen=True)
class Surface:
    """What an attacker may change.

    Args:
        name: `input`, the pixels that the processor has made; `upload`, the 8-bit picture before the processor;
            `patch`, a square of that picture; `blank`, a grey picture of its size in its place.
        jpeg: from 1 to 95, the quality at which uploaded pictures are saved as JPEG before the processor reads them;
            None: they are not.
        size: of a patch, as a share of the picture's shorter side.
        x, y: where the patch is: 0 at the left and the top, 1 at the right and the bottom edge.
    """

    name: str = "input"
    jpeg: int | None = None
    size: float = 0.3
    x: float = 0.5
    y: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in SURFACES:
            raise ValueError(f"the threat is {self.name!r}; expected one of {', '.join(SURFACES)}")
        if self.jpeg is not None and (self.name == "input" or not 1 <= self.jpeg <= 95):
            raise ValueError(
                f"jpeg is {self.jpeg} in the threat {self.name}; expected 1 to 95, and a picture that is uploaded"
            )
        if not 0 < self.size <= 1:
            raise ValueError(
                f"the patch has size {self.size}; expected a share of the shorter side, above 0 and up to 1"
            )
        if not (0 <= self.x <= 1 and 0 <= self.y <= 1):
            raise ValueError(f"the patch is at x={self.x}, y={self.y}; expected 0 (left, top) to 1 (right, bottom)")

    @classmethod
    def parse(cls, text: str) -> Surface:
        """From `upload`, `upload:jpeg=75`, `patch:size=0.2,x=0,y=1`, `blank`, or `input`.

        Raises:
            ValueError: an unknown name or option, or a value that is no number.
        """
        name, _, rest = text.partition(":")
        cls(name)  # raises for an unknown name
        known, options = _OPTIONS.get(name, ()), {}
        for part in filter(None, rest.split(",")):
            key, equals, value = (p.strip() for p in part.partition("="))
            try:
                if not equals or key not in known:
                    raise ValueError
                options[key] = int(value) if key == "jpeg" else float(value)
            except ValueError:
                takes = f"takes {', '.join(f'{k}=NUMBER' for k in known)}" if known else "has no options"
                raise ValueError(f"threat {text!r}: cannot read {part.strip()!r}; {name} {takes}") from None
        return cls(name, **options)  # type: ignore[arg-type]  # by key

    def __str__(self) -> str:
        default = Surface(self.name)
        keys = _OPTIONS.get(self.name, ())
        own = [f"{k}={getattr(self, k):g}" for k in keys if getattr(self, k) != getattr(default, k)]
        return ":".join([self.name, *([",".join(own)] if own else [])])

    def described(self) -> tuple[str, str, str]:
        """What is changed, the options with their defaults, and the default radius of an `linf` ball, as text."""
        options = [f"{key}={getattr(self, key)}" for key in _OPTIONS.get(self.name, ())]
        eps = _EPS[self.name]
        return SURFACES[self.name], ", ".join(options), "1" if eps == 1 else f"{round(255 * eps)}/255"

    @property
    def uploads(self) -> bool:
        """Whether the attacker's picture is one that a person uploads."""
        return self.name != "input"


@dataclass(frozen=True)
class ThreatModel:
    """A ball of perturbations of the image.

    Args:
        norm: `linf` or `l2`.
        eps: radius in the [0, 1] pixel range (for `l2`: the Euclidean norm over all pixels and channels, so it may
            exceed 1).
        surface: what the ball is around.
    """

    norm: Literal["linf", "l2"] = "linf"
    eps: float = 8 / 255
    surface: Surface = Surface()

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm is {self.norm!r}; expected one of {', '.join(NORMS)}")
        if isinstance(self.eps, str):
            raise ValueError(f"eps is {self.eps!r}; expected a number (parse_eps reads text such as 8/255)")
        parse_eps(self.eps, self.norm)

    @classmethod
    def parse(
        cls, norm: Literal["linf", "l2"], eps: str | float | None = None, surface: Surface | None = None
    ) -> ThreatModel:
        """From a norm and a radius as text or number; by default, for `linf`, the one of its surface.

        Raises:
            ValueError: `l2` without a radius. A visible change depends on the image size, so there is no good default:
                8/255 would be a small change of a single pixel.
        """
        if eps is None and norm == "l2":
            raise ValueError(
                "eps is missing: an l2 ball needs its radius, the Euclidean norm over all pixels and channels, such as "
                "0.5 for 32 x 32 pixels, 1 for 64 x 64 and 3 for 224 x 224"
            )
        surface = surface or Surface()
        return cls(norm, parse_eps(_EPS[surface.name] if eps is None else eps, norm), surface)

    @property
    def ball(self) -> str:
        """Norm and radius as text: `linf 8/255`, `l2 1`."""
        return f"linf {self.eps * 255:.3g}/255" if self.norm == "linf" else f"l2 {self.eps:.3g}"

    def distance(self, delta: Tensor) -> Tensor:
        """The norm of each row of `delta` (N, ...), shape (N,)."""
        flat = delta.flatten(1)
        if flat.shape[1] == 0:
            return flat.new_zeros(len(flat))
        return flat.abs().amax(1) if self.norm == "linf" else flat.norm(dim=1)


@dataclass(frozen=True)
class WordBall:
    """A ball around the input embedding of each word of a prompt, relative to the embedding's own length.

    Args:
        norm: `l2`: the Euclidean norm of what is added to a word is at most `eps` times the word's; `linf`: each of its
            elements is at most `eps` times the word's root mean square.
        eps: at 1 a word can be replaced by nothing at all.
    """

    norm: Literal["linf", "l2"] = "l2"
    eps: float = 0.1

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"text_norm is {self.norm!r}; expected one of {', '.join(NORMS)}")
        if not 0.0 <= self.eps < float("inf"):
            raise ValueError(f"text_eps is {self.eps}; expected a finite share of a word's length, at least 0")

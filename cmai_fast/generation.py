"""Generation settings: ours alone, regardless of the checkpoint's generation config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class Generation:
    """Greedy answers of at most `max_new_tokens` tokens.

    From the checkpoint's generation config only the token ids are used, including several end-of-sequence ids.
    """

    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        number = self.max_new_tokens
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"max_new_tokens is {number!r}; expected a whole number of at least 1")

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Generation:
        """The reverse of `to_dict`.

        Raises:
            ValueError: an unknown setting.
        """
        if set(record) != {"max_new_tokens"}:
            raise ValueError(f"generation settings are {dict(record)}; expected max_new_tokens alone")
        return cls(**record)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def config(self) -> GenerationConfig:
        """For `model.generate` inside `own_settings`, which hides the checkpoint's settings."""
        from transformers import GenerationConfig

        return GenerationConfig(max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)


@contextmanager
def own_settings(model: Any) -> Iterator[None]:
    """Inside, the generation configs of the model and of its submodels hold their token ids and nothing else.

    Passing a config to `generate` is not enough: it fills unset values (penalties, lengths, suppressed tokens, stop
    strings) from the model's own config, and the language model inside BLIP-2 has another.
    """
    from transformers import GenerationConfig

    theirs = {m: m.generation_config for m in model.modules() if m.__dict__.get("generation_config") is not None}
    try:
        for module, config in theirs.items():
            module.generation_config = GenerationConfig(**{k: getattr(config, k, None) for k in _IDS})
        yield
    finally:
        for module, config in theirs.items():
            module.generation_config = config

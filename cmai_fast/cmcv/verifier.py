"""The verifier: how much better an answer agrees with the image than its alternatives do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmai_fast.bridge import ModelBridge, bridge_of
from cmai_fast.cmcv.alternatives import Alternatives
from cmai_fast.cmcv.calibration import Threshold
from cmai_fast.cmcv.network import VerifyNetwork
from cmai_fast.cmcv.saved import AGAIN, read_record, read_weights, write_pair
from cmai_fast.cmcv.tower import beside

FORMAT = 1
WEIGHTS, RECORD = "verifier.safetensors", "verifier.json"
_NETWORK, _TOWER = "network.", "tower."
_REMEMBERED = 4096  # statements


@dataclass
class Texts:
    """Questions with their answers as the verifier reads them; nothing of it depends on an image.

    statements: (N, K, dim): first that of the answer, then those of its alternatives. real: (N, K), which are no
    padding.
    """

    statements: Tensor
    real: Tensor

    def rows(self, rows: Tensor | None) -> Texts:
        return self if rows is None else Texts(*(value[rows] for value in vars(self).values()))


class Verifier:
    """Scores an answer by its margin: the log-odds of the answer against its alternatives, given image and question.

    The raw cosine S_c varies mostly between questions; among answers to one question it does not. The score of an
    attacked input says little if it is read from features that the attack moves together with the answer, so the
    verifier may have a vision side of its own (`tower`).

    Args:
        bridge: of the model.
        tokenizer: of the model.
        network: made for the widths of this model.
        alternatives: what answers are compared with.
        tower: a model beside this one, from `cmcv.tower.beside`; None: the verifier reads the model's own h_v.
    """

    def __init__(
        self, bridge: ModelBridge, tokenizer: Any, network: VerifyNetwork, alternatives: Alternatives, tower: Any = None
    ) -> None:
        self.tokenizer, self.network, self.alternatives, self.tower = tokenizer, network, alternatives, tower
        self.bridge = bridge if tower is None else bridge_of(tower)
        self._embed = bridge.model.get_input_embeddings()
        self._known: dict[tuple[str, str], Tensor] = {}  # statements that the network has read since it was frozen
        theirs = {"image_dim": bridge.image_dim, "text_dim": self._embed.weight.shape[1]}
        made_for = {name: network.settings[name] for name in theirs}
        if made_for != theirs:
            raise ValueError(
                f"the verifier was made for {made_for}, the model has {theirs}; use one calibrated for this model "
                "(cmai-fast calibrate)"
            )

    @classmethod
    def new(
        cls, bridge: ModelBridge, tokenizer: Any, alternatives: Alternatives, tower: Any = None, **sizes: int
    ) -> Verifier:
        """With an untrained network; `sizes` as of `VerifyNetwork`."""
        text_dim = bridge.model.get_input_embeddings().weight.shape[1]
        network = VerifyNetwork(bridge.image_dim, text_dim, **sizes).to(bridge.model.device)
        return cls(bridge, tokenizer, network, alternatives, tower)

    def texts(
        self, questions: Sequence[str], answers: Sequence[str], choices: Sequence[Sequence[str]] | None = None
    ) -> Texts:
        """Reads the questions with these answers; `choices` are those of each question, if known."""
        given = [()] * len(answers) if choices is None else choices
        rows = [
            [(q, a), *((q, other) for other in self.alternatives.to(a, own))]
            for q, a, own in zip(questions, answers, given, strict=True)
        ]
        place = {pair: i for i, pair in enumerate(dict.fromkeys(pair for row in rows for pair in row))}
        longest = max(map(len, rows))
        index = torch.zeros(len(rows), longest, dtype=torch.long)
        real = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            index[i, : len(row)] = torch.tensor([place[pair] for pair in row])
            real[i, : len(row)] = True
        every = self._statements(list(place))
        return Texts(every[index.to(every.device)], real.to(every.device))

    def _statements(self, pairs: list[tuple[str, str]]) -> Tensor:
        """(M, dim); those of a network that does not learn are read once."""
        if any(p.requires_grad for p in self.network.parameters()):
            self._known.clear()
            return self.network.statements(*self._read(pairs))
        if new := [pair for pair in pairs if pair not in self._known]:
            if len(self._known) > _REMEMBERED:
                self._known.clear()
                new = pairs
            with torch.no_grad():
                self._known |= dict(zip(new, self.network.statements(*self._read(new)), strict=True))
        return torch.stack([self._known[pair] for pair in pairs])

    def cosines(self, features: Tensor, texts: Texts, tokens: Tensor | None = None) -> Tensor:
        """S_c (N, K) of features (N, T, image_dim) of `self.bridge` with each answer."""
        return self.network.cosine(self.network.project_image(features, tokens), texts.statements)

    def logits(self, features: Tensor, texts: Texts, tokens: Tensor | None = None) -> Tensor:
        """(N, K), differentiable: S_c over the temperature; -inf where a row has no answer."""
        logits = self.network.scale * self.cosines(features, texts, tokens)
        return logits.masked_fill(~texts.real, float("-inf"))

    def margin(self, features: Tensor, texts: Texts, tokens: Tensor | None = None) -> Tensor:
        """(N,), differentiable: log p / (1 - p) of the answer among its alternatives."""
        logits = self.logits(features, texts, tokens)
        return logits[:, 0] - logits[:, 1:].logsumexp(1)

    def _read(self, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
        """Input embeddings (M, L, text_dim) of questions with answers, which are no padding and which are the answer's
        (M, L); an empty answer has one token, that of padding."""
        questions, answers = (
            self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] for texts in zip(*pairs, strict=True)
        )
        filling = self.tokenizer.pad_token_id
        answers = [answer or [filling] for answer in answers]
        longest = max(len(q) + len(a) for q, a in zip(questions, answers, strict=True))
        ids = torch.full((len(pairs), longest), filling)
        answer, mask = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        for i, (q, a) in enumerate(zip(questions, answers, strict=True)):
            end = len(q) + len(a)
            ids[i, :end] = torch.tensor([*q, *a])
            answer[i, len(q) : end], mask[i, :end] = True, True
        device = self._embed.weight.device
        with torch.no_grad():
            return self._embed(ids.to(device)), mask.to(device), answer.to(device)

    def save_pretrained(self, folder: str | Path, threshold: Threshold | None = None) -> None:
        """Writes verifier.safetensors (network, tower) and verifier.json (settings, threshold); see `cmcv.saved`."""
        tensors = {_NETWORK + k: v for k, v in self.network.state_dict().items()}
        if self.tower is not None:
            tensors |= {_TOWER + k: v for k, v in tower_weights(self.bridge).items()}
        record = {
            "format": FORMAT,
            "network": self.network.settings,
            "kinds": self.alternatives.kinds,
            "tower": self.tower is not None,
            "threshold": threshold.to_dict() if threshold else None,
        }
        write_pair(folder, WEIGHTS, RECORD, tensors, record)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, bridge: ModelBridge, tokenizer: Any
    ) -> tuple[Verifier, Threshold | None]:
        """The verifier of `folder` for this model, frozen, and its threshold if one was saved.

        Raises:
            ValueError: files are missing, damaged or do not belong together, or are of a model of another size.
        """
        place = Path(folder) / RECORD
        record = read_record(folder, WEIGHTS, RECORD, "cmai-fast calibrate")
        try:
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']!r}, and this version reads {FORMAT}")
            network = VerifyNetwork(**record["network"])
            alternatives = Alternatives(tuple(tuple(kind) for kind in record["kinds"]))
            has_tower, digest = bool(record["tower"]), record["sha256"]
            threshold = Threshold.from_dict(record["threshold"]) if record["threshold"] else None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{place} cannot be read ({error}); {AGAIN}") from error
        tensors = read_weights(folder, WEIGHTS, RECORD, digest)
        try:
            own = {k.removeprefix(_NETWORK): v for k, v in tensors.items() if k.startswith(_NETWORK)}
            network.load_state_dict(own, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{Path(folder) / WEIGHTS} does not fit {RECORD} ({error}); {AGAIN}") from error
        network = network.to(bridge.model.device).eval().requires_grad_(False)
        tower = None
        if has_tower:
            tower = beside(bridge)
            set_tower(bridge_of(tower), {k.removeprefix(_TOWER): v for k, v in tensors.items() if k.startswith(_TOWER)})
        return cls(bridge, tokenizer, network, alternatives, tower), threshold


def tower_weights(bridge: ModelBridge) -> dict[str, Tensor]:
    """The parameters and buffers of the vision side, by their names in the model."""
    owned = {id(p) for p in bridge.vision_parameters}
    owned |= {id(b) for side in bridge.vision_side for b in side.buffers()}
    named = [*bridge.model.named_parameters(), *bridge.model.named_buffers()]
    return {name: value.detach() for name, value in named if id(value) in owned}


def set_tower(bridge: ModelBridge, weights: Mapping[str, Tensor]) -> None:
    """Copies weights from `tower_weights` of a model of the same family and size into this vision side.

    Raises:
        ValueError: other names or shapes.
    """
    own = tower_weights(bridge)
    wrong = sorted(own.keys() ^ weights.keys()) or [k for k, v in own.items() if v.shape != weights[k].shape]
    if wrong:
        raise ValueError(
            f"the vision side of {type(bridge.model).__name__} and the tower differ in {', '.join(wrong[:3])}; "
            "expected a tower of a model of the same family and size"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(weights[name])

"""The verifier: how much better an answer agrees with the image than its alternatives do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmai_fast.bridge import ModelBridge, bridge_of
from cmai_fast.cmcv.alternatives import Alternatives
from cmai_fast.cmcv.calibration import Threshold
from cmai_fast.cmcv.encoder import Encoder
from cmai_fast.cmcv.network import VerifyNetwork
from cmai_fast.cmcv.saved import AGAIN, read_record, read_weights, write_pair
from cmai_fast.cmcv.statements import Statements
from cmai_fast.cmcv.tower import beside, seen_with
from cmai_fast.data.sample import Sample
from cmai_fast.data.statements import PADDING, STATEMENT_ANSWERS, STATEMENT_IDS, Told, encode

FORMAT, ENCODER_FORMAT = 1, 2  # the second with an encoder as tower, which older versions cannot read
WEIGHTS, RECORD = "verifier.safetensors", "verifier.json"
_NETWORK, _TOWER = "network.", "tower."
_REMEMBERED = 4096  # statements


@dataclass
class Texts:
    """Statements as the verifier reads them, S per image with K answers each; nothing of it depends on an image.

    statements: (N, S, K, dim), K being the answer and its alternatives. real: (N, S, K), which are no padding.
    """

    statements: Tensor
    real: Tensor

    def rows(self, rows: Tensor | None) -> Texts:
        return self if rows is None else Texts(*(value[rows] for value in vars(self).values()))

    def detached(self) -> Texts:
        return Texts(self.statements.detach(), self.real)


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
        tower: a model beside this one, from `cmcv.tower.beside`, or an `Encoder`; None: the verifier reads the model's
            own h_v.

    `statements` gives what it learns from, per sample; by default each sample's own question.
    """

    def __init__(
        self, bridge: ModelBridge, tokenizer: Any, network: VerifyNetwork, alternatives: Alternatives, tower: Any = None
    ) -> None:
        self.tokenizer, self.network, self.alternatives, self.tower = tokenizer, network, alternatives, tower
        self.bridge = seen_with(bridge, tower)
        self.statements: Told = Statements((), alternatives)
        self._embed = bridge.model.get_input_embeddings
        self._known: dict[tuple[str, str], Tensor] = {}  # statements that the network has read since it was frozen
        self._known_with: tuple[Tensor, int] | None = None  # the input embeddings that they were read with
        theirs = {"image_dim": self.bridge.image_dim, "text_dim": self._embed().weight.shape[1]}
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
        network = VerifyNetwork(seen_with(bridge, tower).image_dim, text_dim, **sizes).to(bridge.model.device)
        return cls(bridge, tokenizer, network, alternatives, tower)

    @classmethod
    def for_data(cls, model: Any, processor: Any, samples: Sequence[Any], seed: int = 0, **sizes: int) -> Verifier:
        """An untrained verifier for MBAT, which learns all that these samples (or records) say of each picture.

        Raises:
            ValueError: a sample without an answer, or all with the same.
        """
        read = [Sample.of(sample, i) for i, sample in enumerate(samples)]
        statements = Statements(read, seed=seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            verifier = cls.new(bridge_of(model), processor.tokenizer, statements.alternatives, **sizes)
        verifier.statements = statements
        return verifier

    def __deepcopy__(self, memo: dict[int, Any]) -> Verifier:
        """With a network of its own; model, tower and statements are shared."""
        found = copy.copy(self)
        found.network, found._known = copy.deepcopy(self.network, memo), {}
        return found

    def of(self, bridge: ModelBridge) -> Verifier:
        """This verifier, reading the features of `bridge`.

        Raises:
            ValueError: it has a tower of its own, or is of a model of another size.
        """
        if self.tower is not None:
            raise ValueError(
                "the verifier sees with a tower of its own, which training would not change; expected one that reads "
                "the model's features (Verifier.for_data, or calibrate --tower own)"
            )
        found = Verifier(bridge, self.tokenizer, self.network, self.alternatives)
        found.statements = self.statements
        return found

    def texts(
        self, questions: Sequence[str], answers: Sequence[str], choices: Sequence[Sequence[str]] | None = None
    ) -> Texts:
        """One question per image with this answer and its alternatives: (N, 1, K). `choices` are those of each
        question, if known."""
        given = [()] * len(answers) if choices is None else choices
        rows = [
            [(q, a), *((q, other) for other in self.alternatives.to(a, own))]
            for q, a, own in zip(questions, answers, given, strict=True)
        ]
        place = {pair: i for i, pair in enumerate(dict.fromkeys(pair for row in rows for pair in row))}
        longest = max(map(len, rows))
        index = torch.zeros(len(rows), 1, longest, dtype=torch.long)
        real = torch.zeros(len(rows), 1, longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            index[i, 0, : len(row)] = torch.tensor([place[pair] for pair in row])
            real[i, 0, : len(row)] = True
        every = self._statements(list(place))
        return Texts(every[index.to(every.device)], real.to(every.device))

    def read(self, batch: Mapping[str, Tensor]) -> Texts:
        """The statements of a batch, as `VQACollator(statements=...)` makes them.

        Raises:
            ValueError: the batch has none.
        """
        if STATEMENT_IDS not in batch:
            raise ValueError(
                f"the batch has no {STATEMENT_IDS}, which a verifier learns from; collate with VQACollator(processor, "
                "statements=...), or leave the collator out"
            )
        real = batch[STATEMENT_ANSWERS] > 0
        found = torch.cat([batch[STATEMENT_IDS], batch[STATEMENT_ANSWERS][..., None]], -1)[real]
        each, place = found.unique(dim=0, return_inverse=True)  # a batch asks the same of many images
        index = torch.zeros_like(batch[STATEMENT_ANSWERS]).masked_scatter(real, place)
        return Texts(self.network.statements(*self._embedded(each[:, :-1], each[:, -1]))[index], real)

    def _statements(self, pairs: list[tuple[str, str]]) -> Tensor:
        """(M, dim); those of a network that does not learn are read once with the same input embeddings."""
        if any(p.requires_grad for p in self.network.parameters()):
            self._known.clear()
            return self.network.statements(*self._embedded(*encode(self.tokenizer, pairs)))
        weight = self._embed().weight.detach()  # shares storage, which is then not freed, and its count of changes
        if self._known_with is None or _changed(weight, *self._known_with):
            self._known.clear()
            self._known_with = weight, _writes(weight)
        if new := [pair for pair in pairs if pair not in self._known]:
            if len(self._known) > _REMEMBERED:
                self._known.clear()
                new = pairs
            with torch.no_grad():
                read = self.network.statements(*self._embedded(*encode(self.tokenizer, new)))
            self._known |= dict(zip(new, read, strict=True))
        return torch.stack([self._known[pair] for pair in pairs])

    def _embedded(self, ids: Tensor, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input embeddings (M, L, text_dim) of tokens from `data.statements.encode`, which are no padding and which
        are the answer's (M, L)."""
        embed = self._embed()
        ids, answers = ids.to(embed.weight.device), answers.to(embed.weight.device)
        mask = ids != PADDING
        place = torch.arange(ids.shape[1], device=ids.device)
        answer = mask & (place >= (mask.sum(1) - answers)[:, None])
        with torch.no_grad():
            return embed(ids.masked_fill(~mask, 0)), mask, answer

    def logits(self, features: Tensor, texts: Texts, tokens: Tensor | None = None) -> Tensor:
        """(N, S, K), differentiable: cosines of features (N, T, image_dim) of `self.bridge` and statements over the
        temperature; -inf where there is no statement."""
        image = self.network.project_image(features, tokens)
        cosines = self.network.cosine(image, texts.statements.flatten(1, 2)).view(texts.real.shape)
        return (self.network.scale * cosines).masked_fill(~texts.real, float("-inf"))

    def margin(self, features: Tensor, texts: Texts, tokens: Tensor | None = None) -> Tensor:
        """(N,), differentiable: log p / (1 - p) of the answer of each image's first statement among its
        alternatives."""
        logits = self.logits(features, texts, tokens)[:, 0]
        return logits[:, 0] - logits[:, 1:].logsumexp(1)

    def log_p(self, features: Tensor, texts: Texts, tokens: Tensor | None = None) -> Tensor:
        """(N,), differentiable: log p of the answer among its alternatives, mean over the statements of each image."""
        logits, there = self.logits(features, texts, tokens), texts.real[..., 0]
        # Filled before the sum over answers, whose gradient is NaN where all are -inf.
        logits = logits.masked_fill(~there[..., None], 0.0)
        each = (logits[..., 0] - logits.logsumexp(-1)) * there
        return each.sum(1) / there.sum(1)

    def consistency(self, features: Tensor, texts: Texts, tokens: Tensor | None = None) -> Tensor:
        """S_c (N,) in (0, 1], differentiable: p of the answer, geometric mean over the statements of each image."""
        return self.log_p(features, texts, tokens).exp()

    def scorer(self, texts: Texts) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
        """S_c of features of rows of a batch with these texts, as attacks take it; the texts are not differentiated."""
        fixed = texts.detached()
        return lambda features, tokens, rows: self.consistency(features, fixed.rows(rows), tokens)

    def save_pretrained(self, folder: str | Path, threshold: Threshold | None = None) -> None:
        """Writes verifier.safetensors (network, tower) and verifier.json (settings, threshold); see `cmcv.saved`."""
        encoder = self.tower if isinstance(self.tower, Encoder) else None
        tensors = {_NETWORK + k: v for k, v in self.network.state_dict().items()}
        if self.tower is not None:
            own = tower_weights(self.bridge) if encoder is None else encoder.encoder.state_dict()
            tensors |= {_TOWER + k: v for k, v in own.items()}
        record = {
            "format": FORMAT if encoder is None else ENCODER_FORMAT,
            "network": self.network.settings,
            "kinds": self.alternatives.kinds,
            "tower": self.tower is not None if encoder is None else encoder.record(),
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
            if record["format"] not in (FORMAT, ENCODER_FORMAT):
                raise ValueError(
                    f"format {record['format']!r}, and this version reads {FORMAT} and {ENCODER_FORMAT}; upgrade "
                    "cmai-fast"
                )
            with torch.random.fork_rng():  # weights that are overwritten below
                network = VerifyNetwork(**record["network"])
            alternatives = Alternatives(tuple(tuple(kind) for kind in record["kinds"]))
            towered, digest = record["tower"], record["sha256"]
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
        weights = {k.removeprefix(_TOWER): v for k, v in tensors.items() if k.startswith(_TOWER)}
        tower: Any = None
        if isinstance(towered, Mapping):
            try:
                tower = Encoder.restored(towered, weights, bridge)
            except ValueError as error:
                raise ValueError(f"{place} cannot be read ({error}); {AGAIN}") from error
        elif towered:
            tower = beside(bridge)
            set_tower(bridge_of(tower), weights)
        return cls(bridge, tokenizer, network, alternatives, tower), threshold


def _changed(weight: Tensor, known: Tensor, version: int) -> bool:
    """Whether the weight has other storage than the known one (exchanged, moved), or was written to since."""
    return weight.data_ptr() != known.data_ptr() or _writes(weight) != version


def _writes(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version  # made in inference mode: not counted


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
            "expected a tower of a model of the same family and size. That of another family can be a tower by itself: "
            "save the vision model and its image processor into a folder, and calibrate with --tower FOLDER"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(weights[name])

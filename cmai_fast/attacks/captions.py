"""The captions of a batch of a dual encoder, for attacks that change them: which image has which, and their rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from cmai_fast.attacks.losses import Loss
from cmai_fast.attacks.prompts import Judge, Texts, Vocabulary
from cmai_fast.attacks.state import AttackResult
from cmai_fast.attacks.victim import Victim
from cmai_fast.bridge import DualBridge
from cmai_fast.bridge.labels import is_right, task_loss
from cmai_fast.data import Sample
from cmai_fast.data.choices import ChoiceCollator
from cmai_fast.data.user_tokens import plain_tokens
from cmai_fast.metrics.exact_match import folded
from cmai_fast.pipeline import Pipeline


class Captions:
    """The captions that say what is right, of each sample of a batch, among the texts to choose from.

    A changed caption stands in place of the sample's own, for this sample alone: the other texts stay. The sample is
    right if its image is nearer to one of its changed captions than to every text of others.

    Args:
        pipeline: of a dual encoder with its texts (`Pipeline.choose_from`).
        samples: of the victim's batch, in its order.

    Raises:
        ValueError: another model, or one without texts.

    Attributes:
        owner: (M,) the sample of each caption; captions of a sample stand together.
        captions: M texts.
    """

    def __init__(self, pipeline: Pipeline, samples: Sequence[Sample]) -> None:
        if not isinstance(pipeline.bridge, DualBridge):
            raise ValueError(
                f"{type(pipeline.model).__name__} is no dual encoder, so there is no caption to change; choose an "
                "attack on prompts (hotflip, gcg) or on images"
            )
        collate = pipeline.collate
        assert isinstance(collate, ChoiceCollator)
        if collate.texts is None:
            raise ValueError(f"{pipeline.name} has no texts to choose from; call choose_from(samples)")
        self.pipeline, self.bridge, self.collate = pipeline, pipeline.bridge, collate
        self.samples, self.gallery = list(samples), collate.texts
        known = {folded(text) for text in self.gallery}
        pairs = [(i, t) for i, s in enumerate(samples) for t in dict.fromkeys(s.references) if folded(t) in known]
        self.captions = [text for _, text in pairs]
        self.owner = torch.tensor([i for i, _ in pairs], dtype=torch.int64, device=pipeline.model.device)

    def check(self, victim: Victim) -> None:
        """Raises ValueError for an attack that wants a text: a changed caption stands for what is right."""
        if victim.targeted:
            raise ValueError("the attack changes captions, and cannot aim at one; leave the target out")

    @cached_property
    def own(self) -> Tensor:
        """(N, K) bool: the texts to choose from that are right for each sample."""
        said = [{folded(r) for r in s.references} for s in self.samples]
        found = [[folded(text) in right for text in self.gallery] for right in said]
        return torch.tensor(found, dtype=torch.bool, device=self.owner.device)

    def ids(self, sample_ids: Tensor) -> list[int]:
        """(M,) an id per caption, for random draws: from that of its sample and its place among the sample's."""
        first: dict[int, int] = {}
        places = [k - first.setdefault(i, k) for k, i in enumerate(self.owner.tolist())]
        return [int(sample_ids[i]) + 9_176_501 * place for i, place in zip(self.owner.tolist(), places, strict=True)]

    def read(self) -> Texts:
        """The captions (M, L) as the text side reads them."""
        tokenizer = self.pipeline.processor.tokenizer
        inputs = self.pipeline.on_device(self.collate.read(self.captions))
        own = [plain_tokens(tokenizer, text) for text in self.captions]
        columns = [tokens.columns(ids.tolist()) for tokens, ids in zip(own, inputs["input_ids"], strict=True)]
        read = lambda texts: tokenizer(list(texts), truncation=True)["input_ids"]  # noqa: E731
        embedding = self.bridge.text_model.get_input_embeddings()
        return Texts(inputs, own, columns, Vocabulary.of(tokenizer), embedding, read)

    def embed(self, victim: Victim, texts: Texts, rows: Tensor, ids: Tensor) -> Tensor:
        """h_t (m, text_dim) of captions `rows` (m,) with these tokens (m, L)."""
        mask = texts.inputs.get("attention_mask")
        victim.passes.text_forward += 1
        return self.bridge.encode_texts(ids, None if mask is None else mask[rows])

    def rank(self, victim: Victim, features: Tensor, rows: Tensor, text: Tensor) -> Ranked:
        """Captions `rows` (m,) with h_t (m, text_dim), each against the texts of others, for images (m, 1, D)."""
        others = victim.batch.get("text_embeds")
        if others is None:
            others = self.bridge.encode_texts(victim.batch["input_ids"], victim.batch.get("attention_mask"))
        image = F.normalize(features.squeeze(1), dim=-1)
        scale = self.bridge.model.logit_scale.exp()
        beside = image @ F.normalize(others, dim=-1).t() * scale
        beside = beside.masked_fill(self.own[self.owner[rows]], float("-inf"))
        logits = torch.cat([beside, (image * F.normalize(text, dim=-1)).sum(-1, keepdim=True) * scale], 1)
        return Ranked(logits[:, None], torch.full((len(rows), 1), logits.shape[1] - 1, device=logits.device))

    def result(
        self, victim: Victim, texts: Sequence[str], wrong: Sequence[bool], losses: Sequence[float], adv: Tensor,
        model_input: Tensor,
    ) -> AttackResult:  # fmt: skip
        """Changed captions (M of each) by sample. A sample is fooled if each of its captions is wrong, and its loss is
        that of the caption that holds best."""
        found: list[list[int]] = [[] for _ in self.samples]
        for k, i in enumerate(self.owner.tolist()):
            found[i].append(k)
        none = torch.zeros(len(found), dtype=torch.int64, device=adv.device)
        return AttackResult(
            adv=adv,
            fooled=torch.tensor([all(wrong[k] for k in own) for own in found], device=adv.device),
            loss=torch.tensor([min(losses[k] for k in own) for own in found], dtype=adv.dtype, device=adv.device),
            passes=victim.passes,
            nonfinite=none,
            zero_gradients=none.clone(),
            model_input=model_input,
            captions=[[texts[k] for k in own] for own in found],
        )

    def judge(self, victim: Victim, features: Tensor, texts: Texts, loss: Loss) -> Judge:
        """By the rank of each caption for its image, of features (N, 1, D)."""

        def judged(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            at = features[self.owner[rows]]
            ranked = self.rank(victim, at, rows, self.embed(victim, texts, rows, ids))
            right = ranked.right if victim.exact else torch.ones_like(ranked.right)
            return loss(at, ranked, victim, self.owner[rows]), right  # type: ignore[arg-type]

        return judged


@dataclass
class Ranked:
    """What a loss asks of `Outputs`: logits (m, 1, K + 1) of which the last is the caption's own, targets (m, 1)."""

    logits: Tensor
    targets: Tensor

    @property
    def losses(self) -> Tensor:
        return task_loss(self.logits, self.targets)

    @property
    def right(self) -> Tensor:
        return is_right(self.logits.detach(), self.targets)

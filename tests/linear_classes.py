"""A linear classifier of several classes behind the interface of a bridge: losses and optima have closed forms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmai_fast.attacks import OtherAnswers, Victim
from linear_bridge import SPACE, LinearBridge


class ClassesBridge(LinearBridge):
    """Logits W x_model + b of 5 classes. The first leads until something makes it small."""

    def __init__(self, classes: int = 5, dtype: torch.dtype = torch.float64, lead: float = 8.0) -> None:
        super().__init__(dtype)
        self.model = nn.Linear(48, classes, dtype=dtype)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            self.model.weight.copy_(0.2 * torch.randn(classes, 48, generator=generator, dtype=torch.float64))
            self.model.bias.copy_(torch.linspace(0, -1, classes) - lead)
            self.model.bias[0] = 0.0

    def logits(self, pixels: Tensor) -> Tensor:
        """(N, classes) of images (N, 3, 4, 4) in [0, 1], by hand."""
        return self.model(SPACE.to_model(pixels).flatten(1))

    def of_class(self, labels: list[int], **settings: object) -> Victim:
        """A victim whose rows have these classes as labels, and know the others."""
        ids = torch.tensor([[0, label] for label in labels])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        batch["labels"][:, 0] = -100
        victim = Victim(self, SPACE, batch)  # type: ignore[arg-type]
        victim.others = OtherAnswers.classes(torch.tensor(labels), len(self.model.bias))
        for name, value in settings.items():
            setattr(victim, name, value)
        return victim

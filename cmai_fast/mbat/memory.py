"""The bridge gradients that steps leave behind, kept by sample in 8 bits until the sample comes again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class GradientMemory:
    """p (T, D) of the `most` samples that were kept last, on the CPU: for each token 8-bit integers and one float32
    scale, so T * (D + 4) bytes a sample (2.4 MB for the 576 tokens of 4,096 numbers of LLaVA-1.5-7B)."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, ids: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Replaces what is known of these samples by p (T, D) each; beyond `most` samples the oldest are dropped."""
        for sample, p in zip(ids, gradients, strict=True):
            p = p.detach().float()
            scale = p.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
            self._kept.pop(sample, None)
            self._kept[sample] = (p / scale).round().to(torch.int8).cpu(), scale.cpu()
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)

    def find(self, sample: int) -> Tensor | None:
        """p (T, D) float32 of this sample, on the CPU, each element within a 254th of the largest of its token; None
        if it is not kept."""
        if sample not in self._kept:
            return None
        codes, scale = self._kept[sample]
        return codes * scale

    def save(self, file: Path) -> None:
        """As safetensors."""
        tensors = {"ids": torch.tensor(list(self._kept), dtype=torch.int64)}
        for sample, (codes, scale) in self._kept.items():
            tensors |= {f"{sample}.codes": codes, f"{sample}.scale": scale}
        save_file(tensors, file)

    def load(self, file: Path) -> None:
        """Replaces all that is kept."""
        tensors = load_file(file)
        kept = tensors["ids"].tolist()[-self.most :]
        self._kept = OrderedDict((i, (tensors[f"{i}.codes"], tensors[f"{i}.scale"])) for i in kept)

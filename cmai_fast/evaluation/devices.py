"""What accelerators can do, by their data sheets, and which share of it training reached where that was measured.

Nothing here imports PyTorch, so that a command can check a name first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Attributes:
    peak: FLOP/s of dense matrix products, by bytes of an element (2: bfloat16; 4: float32, without TF32).
    bandwidth: of its memory, bytes/s.
    memory: bytes.
    link: bytes/s in one direction between cards of a machine.
    host: seconds that the host needs to launch forward and backward of one layer.
    process: bytes that the process holds besides tensors; on a GPU PyTorch's allocator does not count them.
    products, memory_share: the shares of `peak` and `bandwidth` that are reached.
    measured: whether training steps were measured on it; if not, the shares are those of the H200.
    """

    name: str
    peak: dict[int, float]
    bandwidth: float
    memory: float
    link: float
    host: float = 2.0e-3
    process: float = 0.0
    products: float = 0.45
    memory_share: float = 0.7
    measured: bool = False


# `host`, `products` and `memory_share`: one value each, fitted to the rows of benchmarks/results/h200 (docs/plan.md).
DEVICES = {
    # NVIDIA H100 Tensor Core GPU data sheet, SXM column; dense is half of the figure "with sparsity".
    "h100": Device("H100 SXM 80 GB", {2: 989.4e12, 4: 66.9e12}, 3.35e12, 80e9, 450e9),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM column.
    "h200": Device("H200 SXM 141 GB", {2: 989.4e12, 4: 66.9e12}, 4.8e12, 141e9, 450e9, measured=True),
    # NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM column.
    "a100": Device("A100 SXM 80 GB", {2: 312e12, 4: 19.5e12}, 2.039e12, 80e9, 300e9),
    # NVIDIA Ada GPU architecture white paper, table of the RTX 4090: bfloat16 with float32 accumulation; PCIe 4.0 x16.
    "4090": Device("GeForce RTX 4090 24 GB", {2: 165.2e12, 4: 82.6e12}, 1.008e12, 24e9, 32e9),
    # No data sheet: one thread of the machine of benchmarks/results/llava-100m.json, fitted to that file.
    "cpu": Device(
        "one thread of an x86-64 CPU", {2: 95e9, 4: 95e9}, 13e9, math.inf, 10e9,
        host=0.0, process=0.75e9, products=1.0, memory_share=1.0, measured=True,
    ),
}  # fmt: skip
MACHINE = 8  # cards that share fast links
NETWORK = 50e9  # bytes/s of a card to other machines: one port of 400 Gb/s each

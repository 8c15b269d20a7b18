"""The machine of the cost model: a handful of constants, all of which can be overridden."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Peak dense bf16 TFLOP/s of a GPU by words of its name, from NVIDIA's data sheets; the first match
# counts.
PEAK_TFLOPS: dict[tuple[str, ...], float] = {
    ("GB200",): 2500.0,
    ("B200",): 2250.0,
    ("B100",): 1750.0,
    ("GH200",): 989.0,
    ("H200", "NVL"): 835.0,
    ("H200",): 989.0,
    ("H100", "PCIe"): 756.0,
    ("H100", "NVL"): 835.0,
    ("H100",): 989.0,
    ("H800", "PCIe"): 756.0,
    ("H800",): 989.0,
    ("H20",): 148.0,
    ("A100",): 312.0,
    ("A800",): 312.0,
    ("L40S",): 362.0,
    ("A40",): 149.7,
}


def peak_tflops(device: str, dtype: str) -> float | None:
    """Peak dense TFLOP/s of a device, by its name (`torch.cuda.get_device_name`); None where nobody
    knows, which holds for fp32 everywhere: its peak depends on settings of the matrix products."""
    if dtype != "bf16":
        return None
    name = re.split(r"[^A-Za-z0-9]+", device)
    return next((p for words, p in PEAK_TFLOPS.items() if set(words) <= set(name)), None)


@dataclass(frozen=True)
class Machine:
    """GPUs and what joins them. The defaults are an H200 SXM's data sheet and, where a data sheet
    says nothing, an assumption that is named as one."""

    gpu_memory: float = 141e9
    """Bytes of a GPU's memory (141GB, 80GiB)."""
    headroom: float = 0.08
    """Share of it left to the CUDA context, NCCL's buffers and fragmentation (assumption)."""
    gpus_per_node: int = 8
    """GPUs joined by NVLink."""
    tflops: float = 989.0
    """Peak dense TFLOP/s of a GPU in the dtype of the run (bf16)."""
    efficiency: float = 0.45
    """Share of that peak that large matrix products reach (assumption)."""
    nvlink: float = 450.0
    """GB/s that a GPU sends inside a node."""
    network: float = 50.0
    """GB/s that a GPU sends to other nodes (one 400 Gb/s adapter each)."""
    pcie: float = 50.0
    """GB/s between a GPU and its host's pinned memory."""
    hbm: float = 4800.0
    """GB/s of the GPU's own memory."""
    latency_us: float = 20.0
    """Microseconds that a collective or a message takes before its first byte (assumption)."""

    @property
    def usable_memory(self) -> float:
        return self.gpu_memory * (1 - self.headroom)

    def bandwidth(self, ranks: int, stride: int, ring: bool) -> float:
        """Bytes per second that a rank sends in a group of `ranks`, `stride` apart in number.

        A group that leaves its node is as fast as its way out: NCCL runs a ring for every adapter
        of the group's ranks in a node, a single message has its rank's own.
        """
        if ranks * stride <= self.gpus_per_node:
            return 1e9 * self.nvlink
        adapters = max(1, self.gpus_per_node // stride) if ring else 1
        return 1e9 * min(self.nvlink, adapters * self.network)

"""The configuration of LoRA adapters (arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the student's linear layers; everything else is frozen."""

    rank: int = 32
    """Rank r: a linear layer W [out, in] becomes W + s B A with A [r, in] and B [out, r]."""
    alpha: float = 64.0
    """The scale s is alpha / rank."""
    rslora: bool = False
    """Make the scale alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)."""
    targets: tuple[str, ...] = ()
    """Linear layers that get an adapter, by the last part of their Hugging Face names, e.g.
    [q_proj, v_proj]; empty takes all linear layers of the decoder, experts included."""
    adapter: str = ""
    """Directory of an adapter in PEFT's format that the run starts from; empty starts from A random
    and B zero, which changes nothing."""

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

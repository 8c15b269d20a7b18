"""megaopd: large-scale on-policy distillation of language models on Megatron-Core."""

from megaopd.parallel import cpu

__version__ = "0.1.0"

cpu.install()

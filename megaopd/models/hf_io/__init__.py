"""Reads and writes Hugging Face directories: config.json, safetensors, tokenizer files.

Knows nothing of Megatron or process groups: the caller says which rank it is.
"""

from megaopd.models.hf_io.loading import check_weights, load_into, load_vocab_rows
from megaopd.models.hf_io.reader import HFReader
from megaopd.models.hf_io.source import WeightSource
from megaopd.models.hf_io.writer import HFWriter

__all__ = [
    "HFReader",
    "HFWriter",
    "WeightSource",
    "check_weights",
    "load_into",
    "load_vocab_rows",
]

"""Megatron checkpoint -> Hugging Face directory; `megaopd-convert megatron-to-hf`."""

import sys

from megaopd.convert.cli import run

if __name__ == "__main__":
    run(["megatron-to-hf", *sys.argv[1:]])

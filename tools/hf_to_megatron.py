"""Hugging Face directory -> Megatron checkpoint; `megaopd-convert hf-to-megatron`."""

import sys

from megaopd.convert.cli import run

if __name__ == "__main__":
    run(["hf-to-megatron", *sys.argv[1:]])

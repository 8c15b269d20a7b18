"""Evaluates a model; see --help and docs/evaluation.md."""

from __future__ import annotations

import sys

from megaopd.errors import run_cli
from megaopd.evaluation.cli import main

if __name__ == "__main__":
    run_cli(main, sys.argv[1:])

"""Compares the two sides of a conversion; `megaopd-convert check`."""

import sys

from megaopd.convert.cli import run

if __name__ == "__main__":
    run(["check", *sys.argv[1:]])

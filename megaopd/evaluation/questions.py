"""What an evaluation asks: the prompts of a file, with one instruction or another around them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megaopd.batch import Prompt
from megaopd.config import DataConfig
from megaopd.data.prompts import load_prompts
from megaopd.data.rows import data_files
from megaopd.data.sources import INSTRUCTIONS, ask, bare

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AS_WRITTEN = "as_written"


def _reworded(instruction: str, text: str) -> str:
    return ask(bare(text), instruction)


# How the last message of a prompt is asked, by the name of the variant: as the file has it, the
# bare problem, or the problem with another of our instructions in place of the file's.
VARIANTS: dict[str, Callable[[str], str] | None] = {
    AS_WRITTEN: None,
    "plain": partial(_reworded, "none"),
    **{name: partial(_reworded, name) for name in INSTRUCTIONS if name != "none"},
}


@dataclass(frozen=True)
class Questions:
    """Prompts of one file, asked in one way.

    Attributes:
        name: for people, and for the name of its files: unique in an evaluation.
        path: of the file.
        variant: an entry of `VARIANTS`.
        num_overlong: prompts that are longer than the limit, set aside.
        sha256: of the file or files.
    """

    name: str
    path: str
    variant: str
    prompts: tuple[Prompt, ...]
    num_overlong: int
    sha256: str


def load_questions(
    path: str,
    variant: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    num_prompts: int = 0,
) -> Questions:
    """Reads a prompt file; the teachers that it may name mean nothing here.

    Args:
        num_prompts: the first so many; 0 takes all.

    Raises:
        MegaOPDError: see `load_prompts`.
    """
    found = load_prompts(path, config, tokenizer, None, reword=VARIANTS[variant])
    stem = Path(path).stem or Path(path).resolve().name
    name = stem if variant == AS_WRITTEN else f"{stem}.{variant}"
    return Questions(
        name,
        path,
        variant,
        found.prompts[: num_prompts or None],
        found.num_overlong,
        _sha256(path),
    )


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    for file in data_files(path):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()

"""Tokenizers: loading from a directory, whether two are the same, which tokens end a response.

Reads local files only and never runs code that comes with a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaopd.config import DataConfig
from megaopd.errors import ConfigError, MegaOPDError
from megaopd.storage.steps import hf_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Names that tokenizers give to rows which only fill the vocabulary up to a round number.
_PLACEHOLDER = re.compile(r"extra|unused|reserved|pad|dummy|placeholder", re.IGNORECASE)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model's directory, of either format.

    Raises:
        CheckpointError: a Megatron checkpoint without a complete step.
        ConfigError: no such directory, or no tokenizer that can be read in it.
    """
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise ConfigError(str(path), "there is no such directory", "name a model's directory")
    try:
        return AutoTokenizer.from_pretrained(
            str(hf_directory(path)), local_files_only=True, trust_remote_code=False
        )
    except MegaOPDError:
        raise
    except Exception as error:  # whatever transformers and tokenizers make of a broken file
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            str(path), f"no tokenizer that can be read ({reason})", "add its tokenizer.json"
        ) from error


def check_same_tokenizer(
    student_path: str | Path, teacher_path: str | Path, where: str = "teacher.path"
) -> None:
    """Checks that a token id means the same to student and teacher.

    Rows beyond the end of the other's vocabulary are fine as long as they are placeholders
    (``<|extra_0|>``, ``[PAD151669]``): that is padding, and no text ever produces them.

    Args:
        where: the key of the teacher's path.

    Raises:
        ConfigError: names the first id that differs, with both tokens.
    """
    if Path(student_path).resolve() == Path(teacher_path).resolve():
        return
    student, teacher = (_tokens(load_tokenizer(p)) for p in (student_path, teacher_path))
    shared_end = min(max(student), max(teacher))
    for token_id in sorted(student.keys() | teacher.keys()):
        ours, theirs = student.get(token_id), teacher.get(token_id)
        if ours == theirs:
            continue
        surplus = ours if theirs is None else theirs if ours is None else None
        if surplus is not None and token_id > shared_end and _PLACEHOLDER.search(surplus):
            continue
        raise ConfigError(
            where,
            f"the tokenizers differ, first at id {token_id}: {_quote(ours)} in the student's, "
            f"{_quote(theirs)} in the teacher's",
            "choose a teacher with the student's tokenizer",
        )


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


def _quote(token: str | None) -> str:
    return "nothing" if token is None else repr(token)


def template_options(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, bool | str]:
    """What the chat template is given besides the messages.

    Raises:
        ConfigError: data.enable_thinking is set and no template reads it.
    """
    if config.enable_thinking is None:
        return {}
    if "enable_thinking" not in str(tokenizer.chat_template):
        raise ConfigError(
            "data.enable_thinking",
            f"{str(config.enable_thinking).lower()}, and the tokenizer's chat template does not "
            "read it",
            "set it to null, or take a tokenizer whose template does",
        )
    return {"enable_thinking": config.enable_thinking}


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, path: str | Path, stop: Sequence[str]
) -> tuple[int, ...]:
    """The tokens that end a response: the model's own end tokens, then rollout.stop.

    The model's own are `eos_token_id` of generation_config.json or, failing that, config.json in
    `path` (a number or a list), and the tokenizer's. A stop string matches where the model samples
    exactly its token; text that merely contains it, as part of a longer token, goes on.

    Raises:
        ConfigError: a stop string that is not exactly one token, or a broken JSON file.
    """
    ids = _model_end_ids(hf_directory(path))
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    for text in stop:
        pieces = tokenizer.encode(text, add_special_tokens=False)
        if len(pieces) != 1 and text in vocabulary:
            pieces = [vocabulary[text]]
        if len(pieces) != 1:
            tokens = tokenizer.convert_ids_to_tokens(pieces)
            raise ConfigError(
                "rollout.stop",
                f"{text!r} is {len(pieces)} tokens ({', '.join(map(repr, tokens))})",
                "give strings of exactly one token",
            )
        ids.append(pieces[0])
    return tuple(dict.fromkeys(ids))


def _model_end_ids(directory: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if not file.is_file():
            continue
        try:
            value: Any = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            if value is not None:
                return [int(v) for v in (value if isinstance(value, list) else [value])]
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                str(file), "not a JSON object with a sound eos_token_id", "restore the file"
            ) from error
    return []

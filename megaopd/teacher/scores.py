"""What a server is asked about a sample, and what its answer must be to be believed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaopd.errors import RolloutError

MAX_ID = 2**31 - 1
# Room for the rounding of log-probabilities that a server sends: of one token named twice, in nats,
# and of the mass of all tokens of a row.
_SAME_TOKEN_TOLERANCE = 0.05
_MASS_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Scores:
    """A teacher's word on R tokens.

    Attributes:
        logprobs_R: fp32, of the tokens themselves.
        ids_RK: int32 the K likeliest tokens at each place; -1 where fewer are in the vocabulary.
        top_logprobs_RK: fp32, theirs.
    """

    logprobs_R: Tensor
    ids_RK: Tensor
    top_logprobs_RK: Tensor


def score_body(token_ids: Sequence[int], num_prompt: int, top_k: int) -> dict[str, Any]:
    """The body of POST /generate that scores the tokens after the first `num_prompt` and generates
    nothing."""
    return {
        "input_ids": list(token_ids),
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        # The entry of the place where it starts holds no log-probability: it has no context.
        "logprob_start_len": num_prompt - 1,
        "top_logprobs_num": top_k,
        "stream": False,
    }


def read_scores(
    answer: Mapping[str, Any],
    token_ids: Sequence[int],
    num_prompt: int,
    top_k: int,
    vocab_size: int,
    where: str,
) -> Scores:
    """Checks the answer to `score_body` and makes `Scores` of it.

    Two lists that agree with each other are about the same places: a sampled token has one
    log-probability in both, and one that is no candidate is no likelier than the candidates.

    Candidates at or past `vocab_size`, which the student does not have, are left out and the rest
    is normalised without them.

    Raises:
        RolloutError: it names `where`: an answer about other tokens, or about more or fewer.
    """

    def check(holds: bool, found: str) -> None:
        if not holds:
            remedy = "the server must be an SGLang 0.4.10 or newer with the teacher's own weights"
            raise RolloutError(where, found, remedy)

    asked = list(token_ids[num_prompt - 1 :])
    meta = answer["meta_info"]
    check(isinstance(meta, Mapping), "an answer without meta_info")
    counted = meta.get("prompt_tokens", len(token_ids))
    check(counted == len(token_ids), f"{counted} tokens counted where {len(token_ids)} were scored")
    logprobs, ids = _columns(meta.get("input_token_logprobs"), check)
    check(len(ids) == len(asked), f"log-probs of {len(ids)} tokens where {len(asked)} were asked")
    # SGLang writes 0 for the vocabulary's last id, as for what is no text; the log-prob is its own.
    last = vocab_size - 1
    same = all(i == a or (i == 0 and a == last) for i, a in zip(ids, asked, strict=True))
    check(same, "log-probs of other tokens than those that were sent")
    check(all(map(_is_finite, logprobs[1:])), "log-probs that are not finite numbers")
    logprobs_R = torch.tensor(logprobs[1:], dtype=torch.float32)
    empty = torch.zeros(len(logprobs_R), 0)
    if not top_k:
        return Scores(logprobs_R, empty.int(), empty)

    rows = meta.get("input_top_logprobs") or []
    check(len(rows) == len(asked), f"{len(rows)} rows of candidates for {len(asked)} tokens")
    columns = [_columns(row, check) for row in rows[1:]]
    sizes = {len(row_ids) for _, row_ids in columns}
    check(sizes <= {top_k}, f"rows of {sorted(sizes)} candidates where {top_k} were asked for")
    check(
        all(_is_finite(x) for values, _ in columns for x in values),
        "candidates with log-probs that are not finite numbers",
    )
    check(
        all(type(i) is int and 0 <= i <= MAX_ID for _, row_ids in columns for i in row_ids),
        "candidates that are no token ids",
    )
    ids_RK = torch.tensor([row_ids for _, row_ids in columns], dtype=torch.int32)
    top_RK = torch.tensor([values for values, _ in columns], dtype=torch.float32)
    ids_RK, top_RK = ids_RK.view(-1, top_k), top_RK.view(-1, top_k)
    ordered = ids_RK.sort(dim=1).values
    check(not (ordered[:, 1:] == ordered[:, :-1]).any(), "a candidate that is there twice")
    mass_R = top_RK.double().exp().sum(1)
    check(not (mass_R > 1 + _MASS_TOLERANCE).any(), "candidates of more than all probability")
    is_sampled_RK = ids_RK == torch.tensor(asked[1:], dtype=torch.int32)[:, None]
    gap_RK = torch.where(is_sampled_RK, top_RK - logprobs_R[:, None], 0.0).abs()
    check(
        not (gap_RK > _SAME_TOKEN_TOLERANCE).any(),
        "candidates whose log-probs are not those of the same tokens in the other list",
    )
    likelier_R = logprobs_R > top_RK.amin(dim=1) + _SAME_TOKEN_TOLERANCE
    check(
        not (likelier_R & ~is_sampled_RK.any(dim=1)).any(),
        "a token that is likelier than candidates, and is none itself",
    )
    return Scores(logprobs_R, *_within(vocab_size, ids_RK, top_RK))


def _within(vocab_size: int, ids_RK: Tensor, logprobs_RK: Tensor) -> tuple[Tensor, Tensor]:
    """The candidates inside the vocabulary, given that one of its tokens comes next."""
    alien_RK = ids_RK >= vocab_size
    if not alien_RK.any():
        return ids_RK, logprobs_RK
    lost_R1 = torch.where(alien_RK, logprobs_RK.double().exp(), 0.0).sum(1, keepdim=True)
    kept_RK = logprobs_RK - torch.log1p(-lost_R1.clamp(max=1 - 1e-6)).float()
    return ids_RK.masked_fill(alien_RK, -1), kept_RK.masked_fill(alien_RK, 0.0)


def _columns(entries: Any, check: Any) -> tuple[list[Any], list[Any]]:
    """[[log-prob, token id, text], ...] -> log-probs and ids."""
    try:
        return [entry[0] for entry in entries], [entry[1] for entry in entries]
    except (TypeError, IndexError, KeyError):
        check(False, "log-probs that are no lists of entries")
        raise


def _is_finite(value: Any) -> bool:
    # JSON has no infinity: servers write null.
    return isinstance(value, int | float) and math.isfinite(value)

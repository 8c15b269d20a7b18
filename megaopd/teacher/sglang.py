"""The teacher on SGLang servers: one too large for the trainer's ranks.

It hands over log-probabilities at the sampled tokens' places: of the K likeliest tokens, or of the
sampled tokens alone. Rank 0 alone talks to the servers; the rows then go to the ranks whose
micro-batches hold the tokens, named by `PackedBatch.rows_T`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.batch import Sample, TeacherSignal, TokenSignal, TopKSignal
from megaopd.config import SGLangConfig, TeacherConfig
from megaopd.data.balancing import prompt_ids
from megaopd.data.packing import Batching
from megaopd.errors import RolloutError
from megaopd.protocols import Student
from megaopd.rollout.sglang.api import RequestRejected, ServerStalled, check_token_ids
from megaopd.rollout.sglang.client import ServerClient
from megaopd.rollout.sglang.loop import EventLoopThread
from megaopd.rollout.sglang.pool import Address, ServerPool
from megaopd.rollout.sglang.ranks import Ranks
from megaopd.teacher.hand_over import host_empty
from megaopd.teacher.scores import Scores, read_scores, score_body

# Other ranks wait in a collective, which has a time limit of its own: they hear from rank 0.
SIGN_OF_LIFE_S = 60.0
# Of one request, which may queue behind others; that the server as a whole makes progress is seen
# by `progress_timeout_s`.
REQUEST_TIMEOUT_S = 3600.0
# Bytes of rows that are sent to all ranks at a time.
PIECE_BYTES = 64 << 20


class SGLangTeacher:
    """Implements `megaopd.protocols.Teacher`. Its weights are the servers' own affair.

    Args:
        config: the servers' addresses and key, and how many candidates they name.
        servers: how to talk to them.
        vocab_size: of student and teacher together.
        student: how the student shares out and packs samples.
        device: where the process group's collectives want their tensors.
        rank, world_size, group: of the processes that call it together.
        name: it scores the samples whose `Prompt.teacher` is this.
        environ: environment variables, which hold the key.

    Attributes:
        metrics: of the last `score`, equal on every rank.

    Raises:
        RolloutError: on all ranks alike: a server does not answer, or refuses the key.
    """

    def __init__(
        self,
        config: TeacherConfig,
        servers: SGLangConfig,
        vocab_size: int,
        student: Batching,
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        group: dist.ProcessGroup | None = None,
        name: str = "",
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.name, self.student, self.device = name, student, device
        self.top_k = min(config.top_k, vocab_size)
        self.metrics: dict[str, float] = {}
        self._vocab_size = vocab_size
        self._progress_timeout_s = servers.progress_timeout_s
        self._ranks = Ranks(rank, world_size, group)
        self._loop: EventLoopThread | None = None
        self._pool: ServerPool | None = None
        self._retries = 0
        key = environ.get(config.api_key_env, "")
        self._ranks.on_rank_0(lambda: self._connect(config, servers, key))

    def _connect(self, config: TeacherConfig, servers: SGLangConfig, key: str) -> None:
        self._pool = ServerPool(
            [Address(url.rstrip("/"), key, key) for url in config.urls],
            vocab_size=self._vocab_size,
            max_tokens_in_flight=servers.max_tokens_in_flight,
            progress_timeout_s=servers.progress_timeout_s,
            health_interval_s=servers.health_interval_s,
            max_retries=servers.max_retries,
        )
        self._loop = EventLoopThread("megaopd-teacher")
        try:
            self._loop.run(self._pool.start())
        except RolloutError as error:
            self._loop.close()
            raise RolloutError(
                f"teachers.{self.name}.urls" if self.name else "teacher.urls",
                f"{error}",
                f"start the teacher's servers, or correct the addresses and ${config.api_key_env}",
            ) from None

    def score(self, samples: Sequence[Sample]) -> list[TeacherSignal]:
        """Scores its samples on the servers; collective.

        Returns:
            One signal per student micro-batch of this rank, in order, in host memory; without rows
            for a micro-batch of another teacher, and elsewhere than on the student's last stage.

        Raises:
            RolloutError: on all ranks alike: an answer that is not about the sample's tokens, a
                request that failed too often, or no server is left.
        """
        mine = [sample for sample in samples if sample.prompt.teacher == self.name]
        future: Future[Tensor] | None = None
        if self._loop is not None:
            future = self._loop.submit(self._score_all(mine))
        while not self._ranks.on_rank_0(lambda: _is_done(future)):
            pass
        self.metrics = {"teacher/retries": float(self._ranks.broadcast(self._new_retries()))}

        places = self._places(samples)
        wanted = [places[rows] for rows in self._rows(samples)]
        scores = None if future is None else future.result()
        found = self._share(scores, mine, torch.cat([places[:0], *wanted]))
        return [self._signal(part) for part in found.split([len(rows) for rows in wanted])]

    def follow(self, student: Student) -> None:
        """Its weights stay as they are."""

    def close(self) -> None:
        """Gives up what is under way and closes the connections."""
        if self._loop is not None and self._pool is not None:
            self._loop.run(self._pool.close())
            self._loop.close()
            self._loop = None

    # On rank 0.

    async def _score_all(self, samples: Sequence[Sample]) -> Tensor:
        """`_encoded` of all loss tokens, in order."""
        tasks = [asyncio.create_task(self._score(sample)) for sample in samples]
        try:
            parts = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return torch.cat([self._encoded(self._nothing()), *parts])

    async def _score(self, sample: Sample) -> Tensor:
        """`_encoded` of one sample's loss tokens."""
        assert self._pool is not None
        if not any(sample.response_mask):
            return self._encoded(self._nothing())
        where = f"teacher's scores of sample {sample.sample_id}"
        prompt = prompt_ids(sample, "teacher")
        tokens = (*prompt, *sample.response_ids)
        check_token_ids(tokens, self._vocab_size, where)
        limit = self._pool.max_request_tokens
        if limit and len(tokens) > limit:
            raise RolloutError(
                where,
                f"{len(tokens)} tokens exceed the servers' context {limit}",
                "shorten the prompt or the response, or give the servers more room",
            )
        body = score_body(tokens, len(prompt), self.top_k)
        try:
            answer = await self._pool.ask(
                lambda client: self._patient(client, body),
                tokens=len(tokens),
                affinity=sample.prompt.prompt_id,
                name=where,
            )
        except RequestRejected as rejected:
            raise RolloutError(
                where, f"the server rejects it ({rejected})", "look at its log"
            ) from None
        scores = read_scores(answer, tokens, len(prompt), self.top_k, self._vocab_size, where)
        return self._encoded(scores)[torch.tensor(sample.response_mask)]

    async def _patient(self, client: ServerClient, body: Mapping[str, Any]) -> dict[str, Any]:
        """One request, for as long as its server answers this or other ones."""
        start = time.monotonic()
        task = asyncio.ensure_future(client.generate_once(body, REQUEST_TIMEOUT_S))
        try:
            while True:
                silent_s = min(client.silent_s, time.monotonic() - start)
                left_s = self._progress_timeout_s - silent_s
                if left_s <= 0:
                    raise ServerStalled(
                        f"{client.url}: no scores for {self._progress_timeout_s:g} s"
                    )
                await asyncio.wait([task], timeout=left_s)
                if task.done():
                    return task.result()
        finally:
            task.cancel()

    def _new_retries(self) -> int:
        """Since the last `score`."""
        if self._pool is None:
            return 0
        before, self._retries = self._retries, self._pool.counters["retries"]
        return self._retries - before

    def _nothing(self) -> Scores:
        return Scores(
            torch.zeros(0),
            torch.zeros(0, self.top_k, dtype=torch.int32),
            torch.zeros(0, self.top_k),
        )

    # On every rank.

    def _encoded(self, scores: Scores) -> Tensor:
        """[R, 2 K] ids and log-probs, or [R, 1] log-probs of the tokens themselves where K = 0, as
        int32: one tensor travels."""
        if not self.top_k:
            return scores.logprobs_R[:, None].view(torch.int32)
        return torch.cat([scores.ids_RK, scores.top_logprobs_RK.view(torch.int32)], dim=1)

    def _signal(self, encoded: Tensor) -> TeacherSignal:
        """What `_encoded` put together."""
        if not self.top_k:
            return TokenSignal(encoded.view(torch.float32)[:, 0])
        ids_LK, logprobs_LK = encoded.split(self.top_k, dim=1)
        return TopKSignal(ids_LK, logprobs_LK.view(torch.float32))

    def _places(self, samples: Sequence[Sample]) -> Tensor:
        """By the row of a response token (`PackedBatch.rows_T`) its place among the scores, which
        are those of this teacher's loss tokens in order."""
        scored = [
            flag and sample.prompt.teacher == self.name
            for sample in samples
            for flag in sample.response_mask
        ]
        return torch.tensor(scored, dtype=torch.int64).cumsum(0) - 1

    def _rows(self, samples: Sequence[Sample]) -> list[Tensor]:
        """The rows of the loss tokens of each of this rank's micro-batches that it is to score."""
        layout, rank = self.student.layout, self._ranks.rank
        is_last_stage = layout.coordinates(rank).pp == layout.parallel.pipeline - 1
        batches = self.student.micro_batches(samples, self.student.assign(samples), rank)
        return [
            b.rows_T[b.loss_mask_T & (is_last_stage and b.teacher == self.name)] for b in batches
        ]

    def _share(self, scores: Tensor | None, samples: Sequence[Sample], wanted: Tensor) -> Tensor:
        """Those of rank 0's rows that this rank wants, [len(wanted), C] in host memory; collective.

        Every rank sees all rows go by, piece by piece, and keeps its own.
        """
        width = 2 * self.top_k or 1
        num_rows = sum(sum(sample.response_mask) for sample in samples)
        found = host_empty(len(wanted), width, torch.int32)
        step = max(1, PIECE_BYTES // (4 * width))
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            piece = torch.empty(stop - start, width, dtype=torch.int32, device=self.device)
            if scores is not None:
                piece.copy_(scores[start:stop])
            if self._ranks.world_size > 1:
                dist.broadcast(piece, src=0, group=self._ranks.group)
            here = ((wanted >= start) & (wanted < stop)).nonzero()[:, 0]
            found[here] = piece[(wanted[here] - start).to(self.device)].cpu()
        return found


def _is_done(future: Future[Tensor] | None) -> bool:
    """Whether it has ended, asked with patience; raises what it raised."""
    if future is None:
        return False
    try:
        future.result(timeout=SIGN_OF_LIFE_S)
    except TimeoutError:
        if future.done():
            raise
        return False
    return True

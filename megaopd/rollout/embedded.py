"""Generation in the trainer's own processes, with transformers' models and KV cache.

Every rank holds the whole student and generates its share of the samples, tensor-parallel ranks
included, so no core is idle during a rollout. The weights come from the trainer by `load_weights`.
The engine knows nothing of Megatron, of the loss or of the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.initialization import no_init_weights

from megaopd.batch import Completion, Prompt, Sample, SamplingParams
from megaopd.errors import CheckpointError, RolloutError, StopRequested
from megaopd.interruption import never, stopped
from megaopd.rollout.agent.batching import Request, hold_conversations
from megaopd.rollout.conversation import Conversation, Converse, mean_metrics, single_turn
from megaopd.rollout.deferred import DeferredRollout
from megaopd.rollout.sampling import check_sampling_params, sample_tokens, sample_uniforms
from megaopd.storage.steps import hf_directory

# A shorter common prefix is not worth a forward pass of its own.
MIN_SHARED_PREFIX = 8


class EmbeddedEngine:
    """A `RolloutEngine` over transformers' model of a directory of either format.

    The model is built from the directory's config.json alone and generates once `load_weights` has
    brought every tensor. `EmbeddedEngine.from_pretrained` takes a Hugging Face directory's own
    weights.

    Args:
        model_path: Hugging Face directory or Megatron checkpoint.
        device: where the model lives.
        dtype: of weights and activations; log-probabilities are computed in fp32.
        batch_size: most sequences that are generated at once on a rank.
        converse: what is done with a prompt; by default one response is sampled.
        stop_reason: why this process is to stop, asked before every token; once there is a reason
            on some rank, all of them give the rollout up.
        rank, world_size: of this process among the processes that share out the samples.
        group: their process group; None is the default group.

    Raises:
        CheckpointError: the directory holds no model that transformers knows.
    """

    def __init__(
        self,
        model_path: str,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        batch_size: int,
        converse: Converse = single_turn,
        stop_reason: Callable[[], str | None] = never,
        rank: int = 0,
        world_size: int = 1,
        group: dist.ProcessGroup | None = None,
        pretrained: bool = False,
    ) -> None:
        try:
            if pretrained:
                model = AutoModelForCausalLM.from_pretrained(
                    model_path, dtype=dtype, local_files_only=True
                )
            else:
                config = AutoConfig.from_pretrained(
                    hf_directory(model_path), local_files_only=True, trust_remote_code=False
                )
                # Random values would cost time and the trainer's random state, and be overwritten.
                with no_init_weights():
                    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
                model.tie_weights()
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                model_path, reason, "give a directory with a causal language model"
            ) from error
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.rank, self.world_size, self.group = rank, world_size, group
        self.weight_version = 0 if pretrained else -1
        self.metrics: dict[str, float] = {}
        self._converse = converse
        self._stop_reason = stop_reason
        self._complete = pretrained

    @classmethod
    def from_pretrained(cls, model_path: str, **arguments: Any) -> EmbeddedEngine:
        """Builds the engine with the directory's own weights, as version 0."""
        return cls(model_path, **arguments, pretrained=True)

    @torch.no_grad()
    def load_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Copies (Hugging Face name, full tensor) pairs into the model; local to the rank.

        The first load must cover every tensor (of tied ones, one name is enough); a later one may
        bring a part. After a failure the engine refuses to generate until a full load succeeds.

        Raises:
            RolloutError: an unknown name, another shape, or a tensor that never came.
        """
        # With keep_vars, tied names lead to one and the same tensor object.
        targets = _with_single_experts(self.model.state_dict(keep_vars=True))
        awaited = {} if self._complete else {id(t): name for name, t in targets.items()}
        self._complete = False
        remedy = "sync the weights of the model that the engine was built for"
        for name, tensor in weights:
            target = targets.get(name)
            if target is None:
                raise RolloutError(f"weight {name}", "the rollout model has no such tensor", remedy)
            if target.shape != tensor.shape:
                found = f"shape {list(tensor.shape)} instead of {list(target.shape)}"
                raise RolloutError(f"weight {name}", found, remedy)
            target.copy_(tensor)
            awaited.pop(id(target), None)
        if awaited:
            raise RolloutError(
                f"weight {next(iter(awaited.values()))}",
                f"it and {len(awaited) - 1} more tensors did not come with the first load",
                remedy,
            )
        self._complete, self.weight_version = True, version

    def weights(self) -> dict[str, Tensor]:
        """What it samples with, by the names that `load_weights` takes; views."""
        return _with_single_experts(self.model.state_dict())

    def start(self, prompts: Sequence[Prompt], params: SamplingParams) -> DeferredRollout:
        """The trainer has the processes meanwhile: samples when the result is asked for."""
        return DeferredRollout(self, prompts, params)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Sample]:
        """Samples `params.n` responses per prompt; collective, the result is on every rank.

        Raises:
            RolloutError: on every rank alike: bad parameters or prompts, no complete weights, or a
                model whose probabilities are not finite.
            StopRequested: on every rank alike: one of them was told to stop before its share was
                done.
        """
        self._check(prompts, params)
        jobs = [(prompt, index) for prompt in prompts for index in range(params.n)]
        # Dealt out by length: ranks get equal work, and the prompts of a batch need little padding.
        by_length = sorted(range(len(jobs)), key=lambda j: -len(jobs[j][0].token_ids))
        mine = by_length[self.rank :: self.world_size]
        own: dict[int, Conversation] | StopRequested
        try:
            held = hold_conversations(
                self._converse,
                [jobs[j] for j in mine],
                params,
                lambda requests: self._complete_all(requests, params),
            )
            own = dict(zip(mine, held, strict=True))
        except StopRequested as stop:
            own = stop
        conversations: dict[int, Conversation] = {}
        for share in self._exchange(own):
            conversations.update(share)
        ordered = [conversations[j] for j in range(len(jobs))]
        self.metrics = mean_metrics(ordered)
        return [c.sample(*job) for job, c in zip(jobs, ordered, strict=True)]

    def close(self) -> None:
        """Nothing to do: it goes with the process."""

    def _check(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        check_sampling_params(params)
        if not self._complete:
            raise RolloutError(
                "rollout engine", "it has no complete weights", "load weights before generating"
            )
        context = self.model.config.max_position_embeddings
        for prompt in prompts:
            where, length = f"prompt {prompt.prompt_id}", len(prompt.token_ids)
            if length == 0:
                raise RolloutError(where, "it is empty", "give it at least one token")
            if length + params.max_new_tokens > context:
                found = (
                    f"{length} + {params.max_new_tokens} new tokens exceed the context {context}"
                )
                raise RolloutError(where, found, "shorten the prompt or the response")

    def _exchange(
        self, own: dict[int, Conversation] | StopRequested
    ) -> list[dict[int, Conversation]]:
        """Returns every rank's share; raises on all ranks if one of them was told to stop, or met a
        broken model."""
        told = [own]
        if self.world_size > 1:
            told = [own] * self.world_size
            dist.all_gather_object(told, own, group=self.group)
        shares: list[dict[int, Conversation]] = []
        for share in told:
            if isinstance(share, StopRequested):
                raise share
            shares.append(share)
        for share in shares:
            for conversation in share.values():
                if not all(map(math.isfinite, conversation.logprobs)):
                    raise RolloutError(
                        "rollout engine",
                        f"weights of version {self.weight_version} give non-finite probabilities",
                        "restart from an earlier checkpoint with a lower learning rate",
                    )
        return shares

    def _complete_all(
        self, requests: Sequence[Request], params: SamplingParams
    ) -> list[Completion]:
        """Answers any number of requests, batch by batch, in their order."""
        # Sequences of like length need little padding.
        by_length = sorted(range(len(requests)), key=lambda r: -len(requests[r].token_ids))
        answers: dict[int, Completion] = {}
        num_batches = math.ceil(len(requests) / self.batch_size)
        for b in range(num_batches):
            first, end = (len(requests) * k // num_batches for k in (b, b + 1))
            batch = by_length[first:end]
            found = self._generate_batch([requests[r] for r in batch], params)
            answers.update(zip(batch, found, strict=True))
        return [answers[r] for r in range(len(requests))]

    @torch.inference_mode()
    def _generate_batch(
        self, requests: Sequence[Request], params: SamplingParams
    ) -> list[Completion]:
        """Generates one completion per request on this rank, in order.

        A row leaves the batch when it has ended, so long responses do not pay for short ones.
        """
        distinct = list(dict.fromkeys(r.token_ids for r in requests))
        longest = max(r.max_new_tokens for r in requests)
        logits_BV, mask_BL, cache = self._prefill(distinct, longest)
        if len(distinct) < len(requests):
            row_of = {ids: row for row, ids in enumerate(distinct)}
            rows = torch.tensor([row_of[r.token_ids] for r in requests], device=self.device)
            logits_BV, mask_BL = logits_BV[rows], mask_BL[rows]
            cache.batch_select_indices(rows)
        positions_B = torch.tensor([len(r.token_ids) for r in requests], device=self.device)
        uniforms_BR = torch.stack([_uniforms(r, params, longest) for r in requests])
        uniforms_BR = uniforms_BR.to(self.device)

        growing = list(range(len(requests)))
        ids: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        for step in range(longest):
            if (reason := self._stop_reason()) is not None:
                raise stopped(reason, "a rollout")
            ids_B, logprobs_B = sample_tokens(logits_BV, params, uniforms_BR[:, step])
            for r, token, logprob in zip(growing, ids_B.tolist(), logprobs_B.tolist(), strict=True):
                ids[r].append(token)
                logprobs[r].append(logprob)
            kept = [
                row
                for row, r in enumerate(growing)
                if ids[r][-1] not in params.stop_token_ids
                and len(ids[r]) < requests[r].max_new_tokens
            ]
            if not kept:
                break
            if len(kept) < len(growing):
                growing = [growing[row] for row in kept]
                rows = torch.tensor(kept, device=self.device)
                ids_B, positions_B, uniforms_BR = ids_B[rows], positions_B[rows], uniforms_BR[rows]
                mask_BL = mask_BL[rows]
                cache.batch_select_indices(rows)
            logits_BV = self._forward(ids_B[:, None], positions_B[:, None], mask_BL, cache)
            positions_B = positions_B + 1
        return [
            Completion(
                ids=tuple(ids[r]),
                logprobs=tuple(logprobs[r]),
                finish_reason="stop" if ids[r][-1] in params.stop_token_ids else "length",
                versions=(self.weight_version,) * len(ids[r]),
            )
            for r in range(len(requests))
        ]

    def _prefill(
        self, prompts: Sequence[tuple[int, ...]], num_new: int
    ) -> tuple[Tensor, Tensor, DynamicCache]:
        """Runs B distinct prompts through the model; a prefix that all of them share only once.

        In the cache a row is laid out as [shared prefix, padding, rest of its prompt, response].

        Returns:
            logits_BV: the logits of the first response token.
            mask_BL: int64, 0 on the padding; L has room for `num_new` response tokens.
            cache: the keys and values of the prompts.
        """
        cache = DynamicCache(config=self.model.config)
        num_shared = self._num_shared(prompts)
        if num_shared:
            prefix_1P = torch.tensor([prompts[0][:num_shared]], device=self.device)
            positions_1P = torch.arange(num_shared, device=self.device)[None]
            self._forward(prefix_1P, positions_1P, torch.ones_like(prefix_1P), cache)
            cache.batch_repeat_interleave(len(prompts))
        longest = max(map(len, prompts))
        padding = torch.tensor([longest - len(p) for p in prompts], device=self.device)
        # Padding holds token 0: it is masked for all others, and nobody reads what it computes.
        rests_BQ = torch.tensor(
            [(0,) * (longest - len(p)) + p[num_shared:] for p in prompts], device=self.device
        )
        positions_BQ = torch.arange(num_shared, longest, device=self.device) - padding[:, None]
        column_L = torch.arange(longest + num_new, device=self.device)
        masked_BL = (column_L >= num_shared) & (column_L < num_shared + padding[:, None])
        mask_BL = (~masked_BL).long()
        logits_BV = self._forward(rests_BQ, positions_BQ.clamp(min=0), mask_BL, cache)
        return logits_BV, mask_BL, cache

    def _num_shared(self, prompts: Sequence[tuple[int, ...]]) -> int:
        """The length of the prefix that is worth computing once for all of `prompts`."""
        layer_types = getattr(self.model.config, "layer_types", None) or ["full_attention"]
        windowed = getattr(self.model.config, "sliding_window", None) is not None
        # Padding between prefix and rest would take up room in an attention window.
        if len(prompts) == 1 or windowed or set(layer_types) != {"full_attention"}:
            return 0
        columns = zip(*prompts, strict=False)
        num_equal = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        # The last token of a prompt is never shared: its logits are wanted for each row.
        num_shared = min(num_equal, min(map(len, prompts)) - 1)
        return num_shared if num_shared >= MIN_SHARED_PREFIX else 0

    def _forward(
        self, ids_BQ: Tensor, positions_BQ: Tensor, mask_BL: Tensor, cache: DynamicCache
    ) -> Tensor:
        """Runs Q more tokens of each row, appends them to `cache`, returns the last's logits."""
        length = cache.get_seq_length() + ids_BQ.shape[1]
        output = self.model(
            input_ids=ids_BQ,
            attention_mask=mask_BL[:, :length],
            position_ids=positions_BQ,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def _uniforms(request: Request, params: SamplingParams, length: int) -> Tensor:
    """The random numbers of a request's tokens, then zeros: float64 [length].

    They are those of the tokens' places in the response, whatever turn they belong to.
    """
    prompt, start = request.prompt, request.position
    of_sample = sample_uniforms(params.seed, prompt.prompt_id, request.index, params.max_new_tokens)
    own = of_sample[start : start + request.max_new_tokens]
    return torch.nn.functional.pad(own, (0, length - len(own)))


def _with_single_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with views of single experts, as a directory names them, for fused ones.

    transformers 5 holds the experts of a layer in gate_up_proj [experts, 2 x features, hidden],
    gate rows first, and down_proj [experts, hidden, features].
    """
    single: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, projection = name.rpartition(".")
        if not prefix.endswith(".experts") or projection not in ("gate_up_proj", "down_proj"):
            single[name] = tensor
            continue
        for e, expert in enumerate(tensor):
            parts = {"down_proj": expert}
            if projection == "gate_up_proj":
                gate, up = expert.chunk(2)
                parts = {"gate_proj": gate, "up_proj": up}
            single |= {f"{prefix}.{e}.{part}.weight": view for part, view in parts.items()}
    return single

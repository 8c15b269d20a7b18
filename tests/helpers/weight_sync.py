"""The trainer's side of weight sync to real SGLang servers, and servers that refuse parts of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from aiohttp import web
from safetensors.torch import load_file
from torch import Tensor

from megaopd.batch import Sample
from megaopd.config import Config, ParallelConfig, RolloutConfig, SGLangConfig
from megaopd.data.packing import pack
from megaopd.rollout.sglang.engine import SGLangEngine
from megaopd.train_servers import TRANSPORTS
from tests.helpers.engine_contract import VOCAB
from tests.helpers.fault_proxy import FAULTS, FaultProxy

# Small buckets: the tiny model, of 0.9 MB, takes several.
BUCKET_BYTES = 200_000


def settings(kind: str, *, partial: bool = True, colocated: bool = False) -> Config:
    servers = SGLangConfig(
        sync=kind,  # type: ignore[arg-type]
        bucket_bytes=BUCKET_BYTES,
        verify=True,
        colocated=colocated,
    )
    return Config(rollout=RolloutConfig(kind="sglang", partial=partial, sglang=servers))


class OneRank:
    """What a transport is told of the process groups."""

    device = torch.device("cpu")


def connect(endpoints, config: Config, **others) -> SGLangEngine:
    return SGLangEngine(
        endpoints,
        config=config.rollout.sglang,
        vocab_size=VOCAB,
        partial=config.rollout.partial,
        transport=TRANSPORTS[config.rollout.sglang.sync](config, OneRank()),  # type: ignore[arg-type]
        **others,
    )


class Files:
    """A `Student` whose weights are those of a directory."""

    def __init__(self, model: Path) -> None:
        self.model = model

    def export_weights(self, only_trainable: bool = False) -> Iterator[tuple[str, Tensor]]:
        yield from load_file(self.model / "model.safetensors").items()


class Deadly(Files):
    """In the middle of its weights it calls `kill`, once."""

    def __init__(self, model: Path, kill: Callable[[], None]) -> None:
        super().__init__(model)
        self._kill = kill

    def export_weights(self, only_trainable: bool = False) -> Iterator[tuple[str, Tensor]]:
        for i, item in enumerate(super().export_weights()):
            if i == 10 and not self.done:
                self.done = True
                self._kill()
            yield item

    done = False


class Megatron:
    """A `Student` over all ranks, with a forward pass to compare with."""

    def __init__(self, world_size: int, path: Path) -> None:
        from megaopd.models.arch import read_arch
        from megaopd.models.build import build_model
        from megaopd.models.mapping import padded_vocab_size
        from megaopd.parallel import groups as parallel_groups

        parallel = ParallelConfig(tensor=world_size)
        self.groups = parallel_groups.initialize(parallel, torch.device("cpu"), seed=1)
        self.arch = read_arch(path)
        rows = padded_vocab_size(self.arch.vocab_size, world_size)
        self.chunks = build_model(self.arch, parallel, self.groups, "fp32", rows)
        self.chunks[0].eval()

    def load(self, path: Path) -> None:
        from megaopd.models import weights

        with torch.no_grad():
            weights.load_weights(self.chunks, self.arch, path)

    def export_weights(self, only_trainable: bool = False) -> Iterator[tuple[str, Tensor]]:
        from megaopd.models import weights

        return weights.export_weights(self.chunks, self.arch, self.groups)

    def compare(self, samples: list[Sample]) -> tuple[float, bool]:
        """The largest difference of a sample's log-probabilities from the forward pass's, and
        whether every token is the likeliest one there."""
        from megaopd.engine.schedule import forward_only

        size = self.groups.tp.size()
        batch = pack(samples, pad_to_multiple=size)
        (logits_TV,) = forward_only(
            self.chunks, [batch], self.groups, lambda i, b, hidden: hidden @ self.chunks[-1].head.T
        )
        shards = [torch.empty_like(logits_TV) for _ in range(size)]
        dist.all_gather(shards, logits_TV.contiguous(), group=self.groups.tp)
        logprobs_TV = torch.cat(shards, -1)[:, : self.arch.vocab_size].log_softmax(-1)
        ours_T = logprobs_TV.gather(1, batch.labels_T[:, None])[:, 0]
        mask_T = batch.loss_mask_T
        assert int(mask_T.sum()) == sum(len(s.response_ids) for s in samples)
        error = float((ours_T - batch.rollout_logprobs_T)[mask_T].abs().max())
        return error, bool((logprobs_TV.argmax(-1) == batch.labels_T)[mask_T].all())


class UpdateProxy(FaultProxy):
    """Spoils some requests for `paths`: the n-th (from 0) if `fails(n)`. Of these every second one
    is answered with 500, the others find their connection broken.

    Attributes:
        paths: what it spoils.
    """

    paths: tuple[str, ...] = ()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        count = self.requests[request.path]
        if request.path in self.paths and self.fails(count):
            self.requests[request.path] += 1
            await request.read()
            return await FAULTS["500" if count % 2 else "reset"](self, request, b"")
        return await super()._answer(request)

    def fails(self, count: int) -> bool:
        return True

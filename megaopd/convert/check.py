"""Checks a Megatron checkpoint against the Hugging Face directory that it was made from, or that
was made from it."""

from __future__ import annotations

import contextlib
import filecmp
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaopd.checkpoint.reader import MegatronReader
from megaopd.config import ParallelConfig
from megaopd.convert.compare import compare_tensors
from megaopd.convert.progress import Progress
from megaopd.convert.ranks import Ranks
from megaopd.errors import CheckpointError
from megaopd.models.arch import ModelArch, read_arch
from megaopd.models.families import hf_shapes
from megaopd.models.hf_io import HFReader, check_weights
from megaopd.models.hf_io.companions import CONFIG, companions
from megaopd.parallel.device import init_distributed
from megaopd.storage.manifest import MANIFEST
from megaopd.storage.steps import hf_directory

_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Item:
    """One line of the report; `passed` is None where it was not reached."""

    name: str
    passed: bool | None
    detail: str


@dataclass
class Report:
    """What was checked and what was found; the same on every rank."""

    items: list[Item] = field(default_factory=list)
    failure: CheckpointError | None = None

    def table(self) -> str:
        width = max(len(item.name) for item in self.items)
        words = {True: "pass", False: "FAIL", None: "-"}
        return "\n".join(
            f"{item.name:<{width}}  {words[item.passed]:<4}  {item.detail}" for item in self.items
        )

    def require(self) -> None:
        """Raises what failed first.

        Raises:
            CheckpointError: an item did not pass.
        """
        if self.failure is not None:
            raise self.failure


def check_conversion(
    hf: str | Path,
    megatron: str | Path,
    *,
    step: int | None = None,
    logits: bool = False,
    samples: int = 8,
    parallel: ParallelConfig | None = None,
    ranks: Ranks | None = None,
) -> Report:
    """Compares everything of the two; collective over the ranks of the launch.

    Manifests come first: a file that is not what was written is not read. Tensors are compared bit
    for bit, shared out over the ranks, a block at a time.

    Args:
        megatron: a checkpoint's root or the directory of one step.
        step: of the root; None is the newest complete one.
        logits: also compare logits, see `compare_logits`.
        samples: sequences for it.
        parallel: layout for it; None is one rank a model.
        ranks: the processes of the launch; None is torchrun's.

    Raises:
        ConfigError: an architecture that is not known, or a layout that does not fit.
    """
    with contextlib.ExitStack() as stack:
        if logits and not dist.is_initialized():
            init_distributed()
            stack.callback(dist.destroy_process_group)
        check = _Check(Path(hf), Path(megatron), step, ranks or Ranks.join())
        check.run("Hugging Face files", check.open_hf)
        check.run("Megatron files", check.open_megatron)
        opened = ("Hugging Face files", "Megatron files")
        check.run("config.json", check.config, after=opened)
        check.run("companion files", check.companions, after=opened)
        check.run("names and shapes", check.shapes, after=("config.json",))
        shapes = ("names and shapes",)
        check.run("tensors", check.tensors, after=shapes, combine=partial(reduce, add))
        check.run("padding", check.padding, after=shapes)
        if logits:
            layout = parallel or ParallelConfig()
            check.run("logits", lambda: check.logits(layout, samples), after=shapes)
        return check.report


class _Check:
    """The items, in the order in which one needs another; every rank runs all of them."""

    hf: HFReader
    megatron: MegatronReader
    arch: ModelArch

    def __init__(self, hf: Path, megatron: Path, step: int | None, ranks: Ranks) -> None:
        self._hf_path, self._megatron_path, self._step = hf, megatron, step
        self._ranks = ranks
        self.report = Report()

    def run(
        self,
        name: str,
        check: Callable[[], Any],
        after: tuple[str, ...] = (),
        combine: Callable[[list[Any]], Any] = lambda details: details[0],
    ) -> None:
        """Runs an item unless one of those in `after` did not pass; the ranks agree on it.

        Args:
            combine: what to show, from what `check` returned on each rank.
        """
        if any(item.name in after and item.passed is not True for item in self.report.items):
            self.report.items.append(Item(name, None, "not reached"))
            return
        detail = None
        try:
            with self._ranks.together():
                detail = check()
        except CheckpointError as error:
            self.report.items.append(Item(name, False, str(error)))
            self.report.failure = self.report.failure or error
        else:
            shown = combine(self._ranks.gather(detail))
            self.report.items.append(Item(name, True, str(shown)))

    def open_hf(self) -> str:
        self.hf = HFReader(self._hf_path)
        return self._verify(self.hf)

    def open_megatron(self) -> str:
        self.megatron = MegatronReader(self._megatron_path, self._step)
        return self._verify(self.megatron)

    def _verify(self, source: HFReader | MegatronReader) -> str:
        files = [file for file in source.path.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files) if self._ranks.is_main else 0
        with Progress(f"verifying {source.path}", size, Ranks(self._ranks.rank)) as progress:
            if self._ranks.is_main:
                source.verify(progress)
        if not (source.path / MANIFEST).exists():
            return f"{source.path}: no {MANIFEST} to compare with"
        return f"{source.path}: {len(files) - 1} files as in {MANIFEST}"

    def config(self) -> str:
        files = self._hf_path / CONFIG, hf_directory(self.megatron.path) / CONFIG
        self.arch = read_arch(files[0].parent)
        ours, theirs = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        differing = [k for k in sorted(ours | theirs) if ours.get(k) != theirs.get(k)]
        other = [key for key in differing if key not in _DTYPE_KEYS]
        if other:
            raise CheckpointError(
                f"{files[1]}: {other[0]}",
                f"is {theirs.get(other[0])!r}, in {files[0]} {ours.get(other[0])!r}",
                "give the directory that belongs to the checkpoint",
            )
        return f"{self.arch.family}; " + ("the same but for its dtype" if differing else "the same")

    def companions(self) -> str:
        ours, theirs = self._hf_path, hf_directory(self.megatron.path)
        names = [{*companions(directory)} - {CONFIG} for directory in (ours, theirs)]
        for name in sorted(names[0] ^ names[1]):
            there, lacking = (ours, theirs) if name in names[0] else (theirs, ours)
            raise CheckpointError(
                str(lacking / name), f"missing, though {there / name} is there", "convert again"
            )
        for name in sorted(names[0]):
            if not filecmp.cmp(ours / name, theirs / name, shallow=False):
                raise CheckpointError(
                    str(theirs / name), f"differs from {ours / name}", "convert again"
                )
        return f"{len(names[0])} files, the same bytes"

    def shapes(self) -> str:
        check_weights(self.hf, self.arch)
        check_weights(self.megatron, self.arch)
        return f"{len(hf_shapes(self.arch)):,} tensors"

    def tensors(self) -> Any:
        def nbytes(name: str) -> int:
            elements = torch.Size(self.megatron.shape(name)).numel()
            return elements * self.megatron.dtype(name).itemsize

        names = self._ranks.share(list(hf_shapes(self.arch)), nbytes)
        with Progress("comparing tensors", sum(map(nbytes, names)), self._ranks) as progress:
            return compare_tensors(self.hf, self.megatron, names, progress)

    def padding(self) -> str:
        return self.megatron.check_padding()

    def logits(self, parallel: ParallelConfig, samples: int) -> Any:
        from megaopd.convert.logits import compare_logits

        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())

        return compare_logits(self._hf_path, self.megatron, self.arch, parallel, device, samples)

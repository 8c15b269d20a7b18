"""Where the numbers of a run go: console and metrics.jsonl, TensorBoard, Weights & Biases,
Prometheus, and report.html as it grows.

Names have the form ``group/name``; names that end in ``_s`` are seconds.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megaopd.config import Config
from megaopd.errors import EnvironmentFault
from megaopd.logger import Progress, get_logger
from megaopd.memory import take_peak
from megaopd.metrics_file import METRICS_FILE, json_line, read_metrics
from megaopd.prometheus import PrometheusSink
from megaopd.report_refresh import RefreshedReport

logger = get_logger(__name__)


class _Sink(Protocol):
    """One place that numbers go to."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class MetricsWriter:
    """Writes the metrics of a run, from one rank: a line on the console, and files.

    Args:
        run_dir: directory of the run; created if need be.
        config: the run's configuration (`log` says where to write; all of it is shown in W&B).
        enabled: whether this rank writes; the others' calls do nothing.
        resume_step: the step of the checkpoint that the run resumes from: the lines up to it are
            kept, later ones, which will be written again, dropped. None starts a new file.

    Raises:
        EnvironmentFault: Weights & Biases is configured and not installed (on every rank), or
            Prometheus' port cannot be listened on (on the rank that writes).
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: Config,
        enabled: bool = True,
        resume_step: int | None = None,
    ) -> None:
        if config.log.wandb_project and importlib.util.find_spec("wandb") is None:
            raise EnvironmentFault(
                "log.wandb_project",
                f"{config.log.wandb_project!r}, and the package wandb is not installed",
                "pip install 'megaopd[wandb]', or leave log.wandb_project empty",
            )
        self._sinks: list[_Sink] = []
        if not enabled:
            return
        log, num_steps = config.log, config.train.num_steps
        if log.prometheus_port:  # first, for nothing is left behind where it fails
            name, host, port = config.run.name, log.prometheus_host, log.prometheus_port
            self._sinks.append(PrometheusSink(name, num_steps, host, port))
        directory = Path(run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        self._sinks.append(_Console(num_steps))
        self._sinks.append(_JsonLines(directory / METRICS_FILE, resume_step))
        if log.tensorboard:
            self._sinks.extend(_tensorboard(directory / "tensorboard", resume_step))
        if config.log.wandb_project:
            self._sinks.append(_WeightsAndBiases(directory, config))
        if log.report_interval:
            self._sinks.append(_report(directory, config, resume_step))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step: numbers, booleans or one-element tensors."""
        values = {name: float(value) for name, value in metrics.items() if name != "step"}
        for sink in self._sinks:
            sink.write(step, values)

    def close(self) -> None:
        """Flushes and closes every place; further writes go nowhere."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Console:
    """The progress of the run, through the package's log."""

    def __init__(self, num_steps: int) -> None:
        self._progress = Progress(num_steps)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        logger.info(self._progress.line(step, metrics))

    def close(self) -> None:
        pass


class _JsonLines:
    """One JSON object per line, on disk as soon as it is written."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        kept = []
        if resume_step is not None and path.is_file():
            kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
        # Replaced in one go: a run killed here still has its old file.
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(json_line(row.pop("step"), row) for row in kept), encoding="utf-8")
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json_line(step, metrics))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _tensorboard(directory: Path, resume_step: int | None) -> list[_Sink]:
    """The TensorBoard writer, or nothing and a warning where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("log.tensorboard: tensorboard is not installed; writing metrics.jsonl alone")
        return []
    if resume_step is None:
        for stale in directory.glob("events.out.tfevents.*"):
            stale.unlink()
        return [_TensorBoard(SummaryWriter(str(directory)))]
    return [_TensorBoard(SummaryWriter(str(directory), purge_step=resume_step + 1))]


def _report(directory: Path, config: Config, resume_step: int | None) -> _Sink:
    # A new run has no answers yet; those in the directory are older than its configuration.
    config_file = directory / "config.yaml"
    fresh = resume_step is None and config_file.is_file()
    return RefreshedReport(
        directory,
        config.train.num_steps,
        config.log.report_interval,
        config.log.num_report_samples,
        since=config_file.stat().st_mtime if fresh else 0.0,
    )


class _WeightsAndBiases:
    def __init__(self, directory: Path, config: Config) -> None:
        import wandb

        self._run = wandb.init(
            project=config.log.wandb_project,
            name=config.run.name,
            dir=str(directory),
            config=asdict(config),
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class PhaseTimer:
    """Adds up the wall-clock time of the phases of one step, from the moment it is made, and takes
    the peak of memory in each.

    Where CUDA is in use the clock is read after the device is done, so that queued work counts for
    the phase that queued it.

    Args:
        clock: seconds that only increase.
        take_peak: the peak of memory in bytes since its last call, None where nobody knows.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        take_peak: Callable[[], int | None] = take_peak,
    ) -> None:
        self._clock, self._take_peak = clock, take_peak
        self._started = self._now()
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, int] = {}
        self._open: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures the block as part of phase `name`; of nested phases each counts all of its time
        and memory."""
        self._add_peak()
        self._open.append(name)
        started = self._now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - started
            self._add_peak()
            self._open.pop()

    @property
    def total_s(self) -> float:
        """Seconds since the timer was made, between the phases included."""
        return self._now() - self._started

    def metrics(self) -> dict[str, float]:
        """``time/<phase>_s`` -> seconds, for every phase so far."""
        return {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}

    def peak_memory(self) -> dict[str, float]:
        """``memory/<phase>_peak_gib`` -> GiB, the largest of any rank, for every phase so far.

        Collective where processes are joined: every rank calls it after the same phases.
        """
        peaks = torch.tensor(list(self._peaks.values()), dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        return {
            f"memory/{name}_peak_gib": peak / 2**30
            for name, peak in zip(self._peaks, peaks.tolist(), strict=True)
            if peak
        }

    def _add_peak(self) -> None:
        """Counts the peak since the last call for every phase under way."""
        peak = self._take_peak() or 0
        for name in self._open:
            self._peaks[name] = max(self._peaks.get(name, 0), peak)

    def _now(self) -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return self._clock()

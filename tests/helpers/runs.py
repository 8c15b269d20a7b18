"""Whole training runs on tiny models, through the real command line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.processes import run_module
from tests.helpers.tiny_models import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]


def make_run(directory: Path, family: str = "Qwen3ForCausalLM", **overrides: object) -> Path:
    """Writes a tiny teacher, student, prompts and run.yaml; returns run.yaml."""
    make_tiny_model(directory / "teacher", family, seed=1, **overrides)
    make_tiny_model(directory / "student", family, seed=2, **(overrides | {"num_hidden_layers": 2}))
    rng = random.Random(0)
    for name, count in (("train", 64), ("eval", 6)):
        rows = []
        for i in range(count):
            text = "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(3, 12)))
            rows.append({"id": f"{name}{i}", "prompt": "x" + text, "answer": "a"})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines)
    config = directory / "run.yaml"
    config.write_text(
        f"""
run: {{dir: {directory}/out}}
student: {{path: {directory}/student, dtype: fp32}}
teacher: {{path: {directory}/teacher, dtype: fp32}}
data: {{train: {directory}/train.jsonl, eval: {directory}/eval.jsonl, max_prompt_tokens: 64}}
rollout: {{max_new_tokens: 12}}
optimizer: {{lr: 1.0e-3, warmup_steps: 2}}
train: {{num_steps: 3, global_batch_size: 8, micro_batch_size: 2, export: false}}
log: {{tensorboard: false}}
"""
    )
    return config


def run_training(
    config: Path, num_ranks: int, *overrides: str, timeout_s: float = 150, **killing: Any
) -> subprocess.CompletedProcess[str]:
    """The ranks of `torchrun -m megaopd.train conf=... overrides`, without torchrun around them.

    Args:
        killing: `kill_when` and `kill_with`, see `run_module`.
    """
    argv = [f"conf={config}", *overrides]
    return run_module("megaopd.train", argv, num_ranks, timeout_s, **killing)


def torchrun_training(
    config: Path, num_ranks: int, *overrides: str, timeout_s: float = 150
) -> subprocess.CompletedProcess[str]:
    """`torchrun -m megaopd.train conf=... overrides` in a process group that never outlives it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), "-m", "megaopd.train", f"conf={config}"]
    return run_command([*command, *overrides], timeout_s)


def run_command(
    command: list[str], timeout_s: float = 60, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command from the repository's root; the time limit ends its whole process group."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def metrics_of(run_dir: Path, name: str) -> list[float]:
    """The values of a metric over the steps of a run."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]

"""What a run is at, as plain values: what `--json` prints and the screen shows."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megaopd.metrics_file import METRICS_FILE, Row, is_training
from megaopd.run_status import MAX_WARNINGS, STATES, STATUS_FILE
from megaopd.status.files import (
    clean,
    integer,
    is_finite,
    modified,
    newest_checkpoint,
    number,
    read_object,
    read_rows,
    read_settings,
    words,
)

# A run writes status.json at least four times in it.
SILENT_S = 60.0
# Steps whose mean duration gives the estimate.
WINDOW = 20
MAX_PHASES = 16
# Points of the curve of the loss.
MAX_POINTS = 200

LOSSES = ("loss/divergence", "loss/estimator", "loss/policy_gradient", "loss/likelihood")
# What is shown of the last step beside its phases.
FIGURES = {
    "tokens_per_s": "perf/tokens_per_s",
    "mfu": "perf/mfu",
    "tflops_per_gpu": "perf/tflops_per_gpu",
    "teacher_tflops": "perf/teacher_tflops",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "staleness_mean": "rollout/staleness_mean",
    "staleness_max": "rollout/staleness_max",
    "mismatch_kl": "rollout/mismatch_kl",
    "response_tokens": "rollout/response_tokens_mean",
    "truncated_fraction": "rollout/truncated_fraction",
    "reward": "credit/reward_mean",
    "servers_up": "rollout/servers_up",
}
# What is counted over all steps that are read.
COUNTS = {
    "servers_lost": "rollout/servers_lost",
    "servers_back": "rollout/servers_back",
    "retries": "rollout/retries",
    "cuts": "rollout/cuts",
    "set_aside": "rollout/set_aside",
    "skipped": "train/skipped",
}
PARALLEL = {
    "tensor": "TP",
    "pipeline": "PP",
    "virtual_pipeline": "VPP",
    "context": "CP",
    "expert": "EP",
}


def take_snapshot(
    run_dir: Path,
    now: float | None = None,
    is_alive: Callable[[int], bool] | None = None,
) -> dict[str, Any]:
    """Reads what there is to know of a run; what nobody wrote is None or missing.

    Args:
        now: seconds since the epoch.
        is_alive: whether a process of this host is there.

    Raises:
        OSError: a file is there and cannot be read.
    """
    now = time.time() if now is None else now
    status, settings = read_object(run_dir / STATUS_FILE), read_settings(run_dir)
    rows, num_bad = read_rows(run_dir)
    steps = [row for row in rows if is_training(row)]
    done = max((row["step"] for row in steps), default=0)
    num_steps = integer(status, "num_steps") or integer(settings, "train.num_steps")
    state, detail = _state(run_dir, status, now, is_alive or _is_alive)
    step_s = _step_seconds(rows)
    left_s = None
    if state == "running" and step_s is not None and num_steps is not None:
        left_s = step_s * max(0.0, num_steps - done)
    started, since = number(status, "started"), number(status, "phase_since")
    summary = _summary(run_dir, started)
    last = steps[-1] if steps else {}
    return {
        "name": words(settings, "run.name") or clean(run_dir.resolve().name),
        "directory": clean(str(run_dir)),
        "state": state,
        "detail": detail,
        "process": _process(status),
        "elapsed_s": now - started if started is not None and state == "running" else None,
        "resumed_from": integer(status, "resumed_from"),
        "step": done,
        "num_steps": num_steps,
        "step_s": step_s,
        "eta_s": left_s,
        "phase": words(status, "phase") if state == "running" else "",
        "phase_step": integer(status, "step"),
        "phase_s": None if since is None else max(0.0, now - since),
        "phases": _phases(last),
        **{key: number(last, name) for key, name in FIGURES.items()},
        "loss": _loss(steps),
        "accuracy": _accuracy(rows, summary),
        "counts": _counts(steps),
        "max_staleness": integer(settings, "rollout.max_staleness"),
        "memory_gib": _memory(last),
        "checkpoint": _checkpoint(run_dir, settings, done, num_steps, step_s, now),
        "layout": _layout(settings, status),
        "warnings": _warnings(status, now),
        "unreadable_lines": num_bad,
    }


def _state(
    run_dir: Path, status: Mapping[str, Any], now: float, is_alive: Callable[[int], bool]
) -> tuple[str, str]:
    """(state, what there is to say of it)."""
    state = words(status, "state")
    if state not in STATES:
        written = modified(run_dir / METRICS_FILE)
        ended = modified(run_dir / "summary.json")
        if ended is not None and (written is None or ended >= written):
            return "finished", ""
        if written is None:
            return "not started", "no metrics yet"
        return "unknown", f"no status.json; last metrics {_ago(now - written)}"
    if state != "running":
        return state, words(status, "message")
    silent_s = now - (number(status, "updated") or 0.0)
    if silent_s <= SILENT_S:
        return "running", ""
    pid, here = integer(status, "pid"), words(status, "host") == clean(socket.gethostname())
    if pid is not None and here and not is_alive(pid):
        return "gone", f"process {pid} ended without a word, {_ago(silent_s)}"
    return "silent", f"no sign of life for {_ago(silent_s).removesuffix(' ago')}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0) if 0 < pid < 2**22 else None
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return 0 < pid < 2**22


def _ago(seconds: float) -> str:
    return f"{max(0, round(min(seconds, 1e9) / 60))} min ago"


def _process(status: Mapping[str, Any]) -> str:
    """Where it runs, in words."""
    parts = [words(status, "host")]
    pid, job, restarts = integer(status, "pid"), words(status, "slurm_job_id"), ""
    if count := words(status, "slurm_restarts"):
        restarts = f" (start {int(count) + 1})" if count.isdecimal() and len(count) < 6 else ""
    parts.append(f"process {pid}" if pid is not None else "")
    parts.append(f"Slurm job {job}{restarts}" if job else "")
    return ", ".join(part for part in parts if part)


def _step_seconds(rows: Sequence[Row]) -> float | None:
    """Mean seconds of the last steps, evaluations between them included."""
    steps = [i for i, row in enumerate(rows) if is_finite(row.get("time/step_s"))][-WINDOW:]
    if not steps:
        return None
    total = sum(rows[i]["time/step_s"] for i in steps)
    total += sum(r["time/eval_s"] for r in rows[steps[0] :] if is_finite(r.get("time/eval_s")))
    return total / len(steps)


def _phases(row: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of the phases of a step, and of what lies between them."""
    whole = row.get("time/step_s")
    found = {
        clean(name[len("time/") : -len("_s")], 20): row[name]
        for name in row
        if name.startswith("time/") and name.endswith("_s") and is_finite(row[name])
    }
    found.pop("step", None)
    found = dict(list(found.items())[:MAX_PHASES])
    if is_finite(whole):
        found["other"] = max(0.0, whole - sum(found.values()))
    return found


def _loss(steps: Sequence[Row]) -> dict[str, Any]:
    """The curve of the loss that the run has, and where it goes."""
    name = next((n for n in LOSSES if any(n in row for row in steps)), None)
    if name is None:
        return {}
    values = [row[name] for row in steps if is_finite(row.get(name))]
    size = -(-len(values) // MAX_POINTS) or 1
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    return {
        "name": name.removeprefix("loss/"),
        "last": steps[-1][name] if is_finite(steps[-1].get(name)) else None,
        "curve": [sum(group) / len(group) for group in groups],
        "change": _change(values),
        "change_steps": min(16, len(values) // 2),
    }


def _change(values: Sequence[float]) -> float | None:
    """The median of the last steps beside that of as many before them, less 1."""
    size = min(16, len(values) // 2)
    if size < 2:
        return None
    new, old = statistics.median(values[-size:]), statistics.median(values[-2 * size : -size])
    return (new - old) / abs(old) if old else None


def _accuracy(rows: Sequence[Row], summary: Mapping[str, Any]) -> dict[str, Any]:
    points = [(r["step"], r["eval/accuracy"]) for r in rows if is_finite(r.get("eval/accuracy"))]
    teacher = [
        r["eval/teacher_accuracy"] for r in rows if is_finite(r.get("eval/teacher_accuracy"))
    ]
    return {
        "before": points[0][1] if points else None,
        "now": points[-1][1] if len(points) > 1 else None,
        "step": points[-1][0] if points else None,
        "teacher": teacher[-1] if teacher else number(summary, "teacher_accuracy"),
    }


def _summary(run_dir: Path, started: float | None) -> dict[str, Any]:
    """summary.json, unless an earlier run left it."""
    written = modified(run_dir / "summary.json")
    if written is None or (started is not None and written < started):
        return {}
    return read_object(run_dir / "summary.json")


def _counts(steps: Sequence[Row]) -> dict[str, int]:
    """Totals over the steps that were read, of what there is to count at all."""
    found = {}
    for key, name in COUNTS.items():
        values = [row[name] for row in steps if is_finite(row.get(name))]
        if values:
            found[key] = round(sum(values))
    return found


def _memory(row: Mapping[str, Any]) -> dict[str, float]:
    prefix, suffix = "memory/", "_peak_gib"
    found = {
        clean(name[len(prefix) : -len(suffix)], 20): value
        for name, value in row.items()
        if name.startswith(prefix) and name.endswith(suffix) and is_finite(value)
    }
    return dict(sorted(found.items(), key=lambda item: -item[1])[:3])


def _checkpoint(
    run_dir: Path,
    settings: Mapping[str, Any],
    done: int,
    num_steps: int | None,
    step_s: float | None,
    now: float,
) -> dict[str, Any]:
    interval = integer(settings, "checkpoint.interval") or 0
    found: dict[str, Any] = {"interval": interval}
    if (last := newest_checkpoint(run_dir)) is not None:
        found |= {
            "step": last.step,
            "directory": last.directory,
            "age_s": max(0.0, now - last.written),
            "bytes": last.num_bytes,
        }
    if interval > 0 and num_steps is not None and done < num_steps:
        due = min((done // interval + 1) * interval, num_steps)
        found["next_step"] = due
        found["next_s"] = None if step_s is None else step_s * (due - done)
    return found


def _layout(settings: Mapping[str, Any], status: Mapping[str, Any]) -> str:
    """The ranks and how the models lie on them, in words."""
    world, device = integer(status, "world_size"), words(status, "device")
    student, teacher = (_parallel(settings, key) for key in ("parallel", "teacher.parallel"))
    head = f"{world} ranks" if world is not None else ""
    if head and device:
        head += f" on {device}"
    parts = [head, f"student {student}" if student else "", f"teacher {teacher}" if teacher else ""]
    if rollout := words(settings, "rollout.kind"):
        parts.append(f"rollout {rollout}")
    return "; ".join(part for part in parts if part)


def _parallel(settings: Mapping[str, Any], key: str) -> str:
    sizes = {name: integer(settings, f"{key}.{field}") for field, name in PARALLEL.items()}
    if sizes["TP"] is None:
        return ""
    found = [f"{name}{size}" for name, size in sizes.items() if size is not None and size > 1]
    return (
        " ".join([*found, "SP"] if settings.get(f"{key}.sequence_parallel") is True else found)
        or "DP"
    )


def _warnings(status: Mapping[str, Any], now: float) -> list[dict[str, Any]]:
    listed = status.get("warnings")
    found = []
    for entry in listed[-MAX_WARNINGS:] if isinstance(listed, list) else []:
        if isinstance(entry, dict) and (message := words(entry, "message")):
            at = number(entry, "at")
            age = None if at is None else max(0.0, now - at)
            found.append({"step": integer(entry, "step"), "age_s": age, "message": message})
    return found

"""A snapshot as lines of text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from megaopd.logger import format_duration

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
BAR, ASCII_BAR = ("█", "░"), ("#", "-")
CURVE_WIDTH, BAR_WIDTH = 32, 32
# A change of the loss below it is none.
FLAT = 0.02

_LABEL = 11
_HANGING: dict[str, Any] = {"subsequent_indent": " " * (_LABEL + 1), "max_lines": 6}


def screen(snapshot: Mapping[str, Any], width: int = 100, unicode: bool = True) -> list[str]:
    """The lines of the screen, none longer than `width`.

    Args:
        unicode: whether blocks can be shown; otherwise there is ASCII in their place.
    """
    s = snapshot
    rows = [
        ("phase", _phase(s)),
        ("last step", _times(s["phases"], s["step_s"])),
        ("speed", _speed(s)),
        ("memory", _joined(f"{name} {gib:.1f} GiB" for name, gib in s["memory_gib"].items())),
        ("loss", _loss(s, unicode)),
        ("accuracy", _accuracy(s["accuracy"])),
        ("rollout", _rollout(s)),
        ("health", _health(s)),
        ("checkpoint", _checkpoint(s["checkpoint"])),
        ("layout", s["layout"]),
    ]
    lines = [_title(s), _progress(s, unicode), ""]
    lines += [f"{label:<{_LABEL}} {text}" for label, text in rows if text]
    if s["unreadable_lines"]:
        lines.append(
            f"{'note':<{_LABEL}} {s['unreadable_lines']} lines of metrics.jsonl are no metrics"
        )
    for number, warning in enumerate(reversed(s["warnings"])):
        label = "warnings" if number == 0 else ""
        step = "" if warning["step"] is None else f"step {warning['step']}"
        age = "" if warning["age_s"] is None else f", {_duration(warning['age_s'])} ago"
        lines.append(f"{label:<{_LABEL}} {step}{age}: {warning['message']}")
    return [part for line in lines for part in textwrap.wrap(line, width, **_HANGING) or [""]]


def _joined(parts: Iterable[str], by: str = "   ") -> str:
    return by.join(part for part in parts if part)


def _duration(seconds: float) -> str:
    return format_duration(min(seconds, 1e9))


def _title(s: Mapping[str, Any]) -> str:
    state = s["state"].upper() if s["state"] in ("failed", "silent", "gone") else s["state"]
    if s["state"] == "stopped":
        state = "stopped, asks to be started again"
    elapsed = "" if s["elapsed_s"] is None else f"for {_duration(s['elapsed_s'])}"
    resumed = s["resumed_from"]
    resumed = f"resumed from step {resumed}" if resumed else ""
    head = f"{s['name']}: {state}"
    if s["detail"]:
        return f"{head}: {s['detail']}"
    return _joined([head, elapsed, s["process"], resumed], ", ")


def _progress(s: Mapping[str, Any], unicode: bool) -> str:
    done, total = s["step"], s["num_steps"]
    if not total:
        return f"step {done}"
    share = min(1.0, done / total)
    full, empty = BAR if unicode else ASCII_BAR
    filled = int(share * BAR_WIDTH)
    bar = full * filled + empty * (BAR_WIDTH - filled)
    eta = "" if s["eta_s"] is None else f"ETA {_duration(s['eta_s'])}"
    pace = "" if s["step_s"] is None else f"{s['step_s']:.2f} s/step"
    return _joined([f"step {done}/{total}", f"{bar} {100 * share:.0f} %", eta, pace])


def _phase(s: Mapping[str, Any]) -> str:
    if not s["phase"]:
        return ""
    step = s["phase_step"]
    of = f" of step {step}" if step else ""
    since = "" if s["phase_s"] is None else f", for {_duration(s['phase_s'])}"
    return f"{s['phase']}{of}{since}"


def _times(phases: Mapping[str, float], step_s: float | None) -> str:
    whole = sum(phases.values())
    parts = []
    for name, seconds in phases.items():
        share = f" {100 * seconds / whole:.0f} %" if whole else ""
        if seconds >= 0.005 * whole:
            parts.append(f"{name} {seconds:.3g}s{share}")
    return _joined(parts)


def _speed(s: Mapping[str, Any]) -> str:
    parts = []
    if s["tokens_per_s"] is not None:
        parts.append(f"{s['tokens_per_s']:,.0f} tok/s")
    if s["mfu"] is not None:
        parts.append(f"MFU {100 * s['mfu']:.1f} %")
    if s["tflops_per_gpu"] is not None:
        parts.append(f"student {s['tflops_per_gpu']:.3g} TFLOP/s a rank")
    if s["teacher_tflops"] is not None:
        parts.append(f"teacher {s['teacher_tflops']:.3g}")
    return _joined(parts)


def _loss(s: Mapping[str, Any], unicode: bool) -> str:
    loss = s["loss"]
    if not loss:
        return ""
    last = "not finite" if loss["last"] is None else f"{loss['last']:.4g}"
    parts = [f"{loss['name']} {last}", sparkline(loss["curve"], unicode), _trend(loss)]
    if s["grad_norm"] is not None:
        parts.append(f"grad {s['grad_norm']:.3g}")
    if s["lr"] is not None:
        parts.append(f"lr {s['lr']:.2e}")
    return _joined(parts)


def _trend(loss: Mapping[str, Any]) -> str:
    change = loss["change"]
    if change is None:
        return ""
    word = "flat" if abs(change) < FLAT else ("rising" if change > 0 else "falling")
    return f"{word} {100 * change:+.0f} % in {loss['change_steps']} steps"


def sparkline(values: Sequence[float], unicode: bool = True, width: int = CURVE_WIDTH) -> str:
    """A curve in a line of characters, from its lowest value to its highest."""
    count = min(len(values), width)
    ends = [i * len(values) // count for i in range(count + 1)] if count else [0]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(ends)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    blocks = BLOCKS if unicode else ASCII_BLOCKS
    span = (high - low) or 1.0
    return "".join(blocks[int((mean - low) / span * (len(blocks) - 1) + 0.5)] for mean in means)


def _accuracy(accuracy: Mapping[str, Any]) -> str:
    parts = []
    if accuracy["before"] is not None:
        parts.append(f"before {accuracy['before']:.3f}")
    if accuracy["now"] is not None:
        parts.append(f"now {accuracy['now']:.3f} (step {accuracy['step']})")
    if accuracy["teacher"] is not None:
        parts.append(f"teacher {accuracy['teacher']:.3f}")
    return _joined(parts)


def _rollout(s: Mapping[str, Any]) -> str:
    parts = []
    if s["response_tokens"] is not None:
        parts.append(f"{s['response_tokens']:.0f} tokens a response")
    if s["truncated_fraction"] is not None:
        parts.append(f"{100 * s['truncated_fraction']:.0f} % truncated")
    if s["staleness_mean"] is not None:
        bound = "" if s["max_staleness"] is None else f" (at most {s['max_staleness']})"
        parts.append(f"staleness {s['staleness_mean']:.2g}{bound}")
    if s["mismatch_kl"] is not None:
        parts.append(f"mismatch KL {s['mismatch_kl']:.2g}")
    if s["reward"] is not None:
        parts.append(f"reward {s['reward']:.3f}")
    return _joined(parts)


def _health(s: Mapping[str, Any]) -> str:
    counts = s["counts"]
    parts = [f"{counts['skipped']} steps skipped"] if "skipped" in counts else []
    if s["servers_up"] is not None:
        parts.append(f"{s['servers_up']:.0f} servers up")
    for key, name in (
        ("servers_lost", "lost"),
        ("servers_back", "came back"),
        ("retries", "retries"),
        ("cuts", "cuts"),
        ("set_aside", "prompts set aside"),
    ):
        if key in counts:
            parts.append(f"{counts[key]} {name}")
    return _joined(parts)


def _checkpoint(checkpoint: Mapping[str, Any]) -> str:
    parts = []
    if "step" in checkpoint:
        gib = checkpoint["bytes"] / 2**30
        size = f"{gib:.1f} GiB" if gib >= 0.1 else f"{checkpoint['bytes'] / 2**20:.1f} MiB"
        age = _duration(checkpoint["age_s"])
        parts.append(f"step {checkpoint['step']}, {age} ago, {size}, {checkpoint['directory']}")
    elif checkpoint["interval"]:
        parts.append("none yet")
    if "next_step" in checkpoint:
        at = "" if checkpoint["next_s"] is None else f", in about {_duration(checkpoint['next_s'])}"
        parts.append(f"next after step {checkpoint['next_step']}{at}")
    return _joined(parts, "; ")

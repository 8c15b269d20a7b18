"""The plan as text for people and as plain values for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megaopd.config import ParallelConfig
from megaopd.models.arch import ModelArch
from megaopd.plan.cost import StepTime, step_time
from megaopd.plan.machine import Machine
from megaopd.plan.memory import PHASES, RankMemory, plan_memory
from megaopd.plan.parameters import total_parameters
from megaopd.plan.search import Candidate, fitting_layouts
from megaopd.plan.traffic import Flow, HandOver, hand_over, model_flows, optimizer_flows, sync_flows
from megaopd.plan.workload import Workload


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that is said about a step."""

    work: Workload
    machine: Machine
    ranks: list[RankMemory]
    flows: list[Flow]
    hand_over: HandOver
    time: StepTime
    layouts: list[Candidate]

    @property
    def fullest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def fits(self) -> bool:
        return self.fullest.peak <= self.machine.usable_memory


def make_plan(work: Workload, machine: Machine, top: int) -> Plan:
    """Plans the layouts of `work.config`, and finds the `top` best that fit."""
    return Plan(
        work=work,
        machine=machine,
        ranks=plan_memory(work),
        flows=busiest_flows(work),
        hand_over=hand_over(work),
        time=step_time(work, machine),
        layouts=fitting_layouts(work, machine, top) if top else [],
    )


def busiest_flows(work: Workload) -> list[Flow]:
    """Of every kind of message the stage that sends most of it."""
    s, t = work.student_parallel, work.teacher_parallel
    flows = [
        *(f for i in range(t.pipeline) for f in model_flows(work, work.teacher, t, i, False)),
        *(f for i in range(s.pipeline) for f in model_flows(work, work.student, s, i, True)),
        *(f for i in range(s.pipeline) for f in optimizer_flows(work, i)),
        *sync_flows(work),
    ]
    busiest: dict[tuple[str, str, str], Flow] = {}
    for flow in flows:
        key = (flow.phase, flow.kind, flow.what)
        if key not in busiest or flow.bytes > busiest[key].bytes:
            busiest[key] = flow
    return list(busiest.values())


def layout_name(parallel: ParallelConfig) -> str:
    """A layout in a word: `TP2 PP4x2 SP`; a size of 1 is left out."""
    pipeline = f"PP{parallel.pipeline}"
    if parallel.virtual_pipeline > 1:
        pipeline += f"x{parallel.virtual_pipeline}"
    etp = parallel.expert_tensor
    words = [
        f"TP{parallel.tensor}" if parallel.tensor > 1 else "",
        "SP" if parallel.sequence_parallel else "",
        pipeline if parallel.pipeline > 1 else "",
        f"CP{parallel.context}" if parallel.context > 1 else "",
        f"EP{parallel.expert}" if parallel.expert > 1 else "",
        f"ETP{etp}" if etp is not None and parallel.expert > 1 else "",
    ]
    return " ".join(word for word in words if word) or "DP"


def as_text(plan: Plan) -> str:
    """The plan as tables; bytes in GB of 1e9."""
    work = plan.work
    sections = [_heading(work)]
    sections += [_memory_table(rank) for rank in plan.ranks]
    sections += [_host_line(plan), _traffic_table(plan.flows), _hand_over_lines(work, plan)]
    sections += [_time_lines(plan.time), _verdict(plan)]
    if plan.layouts:
        sections.append(_layout_table(plan))
    return "\n\n".join(section for section in sections if section) + "\n"


def as_values(plan: Plan) -> dict[str, Any]:
    """The plan as JSON's types; bytes and seconds."""
    work = plan.work

    def model(arch: ModelArch, parallel: ParallelConfig) -> dict[str, Any]:
        return {
            "parameters": total_parameters(arch),
            "layout": layout_name(parallel),
            "parallel": dataclasses.asdict(parallel),
            "data_parallel": work.dp_size(parallel),
        }

    return {
        "student": model(work.student, work.student_parallel),
        "teacher": model(work.teacher, work.teacher_parallel),
        "world_size": work.world_size,
        "tokens_per_step": work.num_tokens,
        "loss_tokens_per_step": work.num_loss_tokens,
        "tokens_per_micro_batch": work.tokens_per_micro_batch,
        "machine": dataclasses.asdict(plan.machine),
        "ranks": [
            dataclasses.asdict(rank) | {"worst_phase": rank.worst_phase, "peak": rank.peak}
            for rank in plan.ranks
        ],
        "traffic": [dataclasses.asdict(flow) for flow in plan.flows],
        "hand_over": dataclasses.asdict(plan.hand_over),
        "seconds": dataclasses.asdict(plan.time) | {"total": plan.time.total},
        "fits": plan.fits,
        "worst_phase": plan.fullest.worst_phase,
        "peak": plan.fullest.peak,
        "usable_memory": round(plan.machine.usable_memory),
        "layouts_that_fit": [
            dataclasses.asdict(c)
            | {"student_layout": layout_name(c.student), "teacher_layout": layout_name(c.teacher)}
            for c in plan.layouts
        ],
    }


def _gb(size: float) -> str:
    """GB to two digits; a byte more than nothing is never shown as 0."""
    return f"{size / 1e9:.2f}" if size >= 5e6 or size == 0 else "<0.01"


def _columns(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells as aligned text; the first `left` columns to the left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _ranges(ranks: Sequence[int]) -> str:
    """`0-3, 8` of 0, 1, 2, 3, 8."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _heading(work: Workload) -> str:
    rows = []
    for role, arch, p, budget in (
        ("student", work.student, work.student_parallel, work.tokens_per_micro_batch),
        ("teacher", work.teacher, work.teacher_parallel, work.teacher_tokens_per_micro_batch),
    ):
        count = work.num_micro_batches(p, budget)
        rows.append(
            [
                role,
                f"{total_parameters(arch) / 1e9:.2f} B parameters",
                layout_name(p),
                f"DP {work.dp_size(p)}",
                f"{count} micro-batches of {budget} tokens",
            ]
        )
    return (
        f"world {work.world_size}; a step of {work.num_samples} samples x "
        f"{work.tokens_per_sample} tokens = {work.num_tokens} tokens, {work.num_loss_tokens} of "
        f"them with a loss; recompute {work.config.train.recompute}\n" + _columns(rows, left=5)
    )


def _memory_table(rank: RankMemory) -> str:
    parts = list(dict.fromkeys(part for phase in PHASES for part in rank.phases[phase]))
    rows = [["GB", *PHASES]]
    for part in parts:
        rows.append([part, *(_gb(v) if (v := rank.phases[p].get(part, 0)) else "" for p in PHASES)])
    rows.append(["total", *(_gb(rank.total(phase)) for phase in PHASES)])
    title = (
        f"memory of ranks {_ranges(rank.ranks)} (pipeline stage {rank.student_stage} of the "
        f"student, {rank.teacher_stage} of the teacher)"
    )
    return f"{title}\n{_columns(rows)}"


def _host_line(plan: Plan) -> str:
    fullest = max(plan.ranks, key=lambda rank: sum(rank.host.values()))
    parts = ", ".join(f"{what} {_gb(size)}" for what, size in fullest.host.items())
    return f"pinned host memory of a rank, at most (GB): {parts or 'none'}"


def _traffic_table(flows: list[Flow]) -> str:
    rows = [["phase", "kind", "what", "ranks", "calls", "GB sent"]]
    for f in flows:
        rows.append([f.phase, f.kind, f.what, str(f.ranks), str(f.calls), _gb(f.bytes)])
    if not flows:
        rows.append(["none", "", "", "", "", ""])
    return "traffic of the busiest rank in a step\n" + _columns(rows, left=3)


def _hand_over_lines(work: Workload, plan: Plan) -> str:
    h = plan.hand_over
    as_logits = h.rows * h.logits_row_bytes
    as_hidden = h.rows * h.row_bytes
    return (
        f"hand-over of {h.rows} rows: as hidden states {_gb(as_hidden)} GB ({h.row_bytes} B a "
        f"row), as logits {_gb(as_logits)} GB ({h.logits_row_bytes} B a row), "
        f"{as_logits / max(1, as_hidden):.1f} times as much\n"
        f"sent between ranks in these layouts: {_gb(h.hidden_bytes)} GB, as logits "
        f"{_gb(h.logits_bytes)} GB"
    )


def _time_lines(time: StepTime) -> str:
    parts = [
        f"{name} {getattr(time, name):.2f}"
        for name in ("teacher", "hand_over", "student", "optimizer", "offload")
    ]
    return (
        f"cost model, seconds a step without generation: {time.total:.2f} = "
        f"{' + '.join(parts)} (bubbles {time.bubble:.2f})"
    )


def _verdict(plan: Plan) -> str:
    machine, fullest = plan.machine, plan.fullest
    return (
        f"{'fits' if plan.fits else 'DOES NOT FIT'}: {_gb(fullest.peak)} of "
        f"{_gb(machine.usable_memory)} GB ({_gb(machine.gpu_memory)} less "
        f"{machine.headroom:.0%}) on ranks {_ranges(fullest.ranks)} in the {fullest.worst_phase} "
        "phase"
    )


def _layout_table(plan: Plan) -> str:
    head = ["student", "teacher", "recompute", "offload", "s / step", "peak GB", "worst phase"]
    rows = [head]
    for c in plan.layouts:
        offload = " ".join(
            name for name, on in (("teacher", c.teacher_offload), ("train", c.train_offload)) if on
        )
        rows.append(
            [
                layout_name(c.student),
                layout_name(c.teacher),
                c.recompute,
                offload or "none",
                f"{c.seconds:.2f}",
                _gb(c.peak),
                c.worst_phase,
            ]
        )
    return "layouts that fit, best first by the cost model\n" + _columns(rows, left=4)

"""The plan's arithmetic against published sizes, hand-made sums and its own command line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megaopd.config import Config, LoraConfig, ParallelConfig, StudentConfig, TeacherConfig
from megaopd.errors import ConfigError, MegaOPDError
from megaopd.models.arch import WindowArch
from megaopd.plan import cost, memory, traffic
from megaopd.plan.__main__ import main
from megaopd.plan.activations import in_flight, layer_widths, training_activations
from megaopd.plan.machine import Machine
from megaopd.plan.parameters import (
    active_parameters,
    check_layout,
    chunks_of,
    rank_parameters,
    total_parameters,
)
from megaopd.plan.presets import PRESETS, find_arch
from megaopd.plan.search import fitting_layouts, layouts
from megaopd.plan.table import layout_name, make_plan
from megaopd.plan.workload import Workload

# Parameters as published by the models' authors (Qwen3, arXiv 2505.09388; Llama 3, 2407.21783).
PUBLISHED = {
    "Qwen3-0.6B": 0.6e9,
    "Qwen3-1.7B": 1.7e9,
    "Qwen3-4B": 4.0e9,
    "Qwen3-8B": 8.19e9,
    "Qwen3-14B": 14.8e9,
    "Qwen3-32B": 32.8e9,
    "Qwen3-30B-A3B": 30.5e9,
    "Qwen3-235B-A22B": 235e9,
    "Llama-3.1-8B": 8.03e9,
    "Llama-3.1-70B": 70.6e9,
}
TP2 = ParallelConfig(tensor=2, sequence_parallel=True)
TP4 = ParallelConfig(tensor=4, sequence_parallel=True)


def workload(
    student: ParallelConfig, teacher: ParallelConfig, world: int = 16, **sizes: int
) -> Workload:
    base = Workload(
        Config(),
        find_arch("Qwen3-8B", "student"),
        find_arch("Qwen3-32B", "teacher"),
        world,
        tokens_per_sample=sizes.get("sample", 2048),
        loss_tokens_per_sample=sizes.get("loss", 1024),
        tokens_per_micro_batch=sizes.get("tokens", 8192),
        teacher_tokens_per_micro_batch=sizes.get("teacher_tokens", 8192),
    )
    return base.with_choice(student, teacher, "none", True, False)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    assert total_parameters(find_arch(name, "student")) == pytest.approx(PUBLISHED[name], rel=0.03)


def test_qwen3_8b_is_counted_exactly() -> None:
    arch = find_arch("Qwen3-8B", "student")
    h, f, v = 4096, 12_288, 151_936
    layer = h * (32 + 8 + 8) * 128 + 32 * 128 * h + 3 * h * f + 2 * h + 2 * 128
    assert total_parameters(arch) == 36 * layer + 2 * v * h + h == 8_190_735_360
    assert active_parameters(arch) == (layer,) * 36
    assert total_parameters(find_arch("Qwen3-32B", "teacher")) == 32_762_123_264


@pytest.mark.parametrize(
    ("family", "fields", "wanted"),
    [  # Qwen2.5-7B, Mistral-7B-v0.3, GLM-4-9B, GLM-4-9B-0414
        ("Qwen2", (28, 3584, 28, 4, 18_944, 152_064), 7_615_616_512),
        ("Mistral", (32, 4096, 32, 8, 14_336, 32_768), 7_248_023_552),
        ("Glm", (40, 4096, 32, 2, 13_696, 151_552), 9_399_951_360),
        ("Glm4", (40, 4096, 32, 2, 13_696, 151_552), 9_400_279_040),
    ],
)
def test_published_models_are_counted_exactly(
    tmp_path: Path, family: str, fields: tuple[int, ...], wanted: int
) -> None:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    config = dict(zip((*names, "intermediate_size", "vocab_size"), fields, strict=True))
    more = {"rms_norm_eps": 1e-5, "max_position_embeddings": 32_768, "sliding_window": None}
    config |= more | {"architectures": [f"{family}ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert total_parameters(find_arch(str(tmp_path), "student")) == wanted


def test_a_token_of_a_mixture_meets_its_top_k_experts_alone() -> None:
    arch = find_arch("Qwen3-30B-A3B", "student")
    attention = 2048 * (32 + 4 + 4) * 128 + 32 * 128 * 2048 + 2 * 2048 + 2 * 128
    assert active_parameters(arch)[0] == attention + 128 * 2048 + 8 * 3 * 2048 * 768


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_shards_make_up_the_whole_model(tp: int, pp: int) -> None:
    arch = find_arch("Qwen3-8B", "student")
    parallel = ParallelConfig(tensor=tp, pipeline=pp)
    stages = [rank_parameters(arch, parallel, tp * pp, stage) for stage in range(pp)]
    padding = (math.ceil(arch.vocab_size / (128 * tp)) * 128 * tp - arch.vocab_size) * 4096 * 2
    norms = (36 * (2 * 4096 + 2 * 128) + 4096) * (tp - 1)  # replicated over TP
    assert tp * sum(stage.numel for stage in stages) == total_parameters(arch) + padding + norms


@pytest.mark.parametrize("ep", [1, 2, 8])
@pytest.mark.parametrize("etp", [1, 2])
def test_experts_are_shared_out_over_ep_and_expert_tp(ep: int, etp: int) -> None:
    arch = find_arch("Qwen3-30B-A3B", "student")
    parallel = ParallelConfig(tensor=2, expert=ep, expert_tensor=etp, sequence_parallel=True)
    rank = rank_parameters(arch, parallel, 16, 0)
    assert rank.expert * ep * etp == 48 * 128 * 3 * 2048 * 768
    assert [bucket.group_size for bucket in rank.buckets] == [8, 16 // (ep * etp)]
    assert rank.buckets[1].numel == rank.expert


def test_frozen_parameters_have_no_gradient_and_no_state() -> None:
    arch = find_arch("Qwen3-8B", "student")
    free = rank_parameters(arch, ParallelConfig(), 8, 0)
    held = rank_parameters(arch, ParallelConfig(), 8, 0, ("model.embed_tokens.weight",))
    assert held.numel == free.numel
    assert free.trainable - held.trainable == free.gradients - held.gradients == 151_936 * 4096
    assert held.stored == free.stored


def test_buckets_end_where_megatron_ends_them() -> None:
    arch = find_arch("Qwen3-0.6B", "student")
    rank = rank_parameters(arch, ParallelConfig(), 3, 0)
    assert rank.gradients % math.lcm(3, 128) == 0
    assert 0 <= rank.gradients - rank.trainable < 384
    tied = rank_parameters(arch, ParallelConfig(pipeline=2), 4, 1)
    assert len(tied.buckets) == 2  # the last stage's copy of the embedding is one by itself
    assert tied.buckets[-1].numel == 151_936 * 1024


def test_chunks_of_interleaved_stages_follow_the_network() -> None:
    parallel = ParallelConfig(pipeline=2, virtual_pipeline=2)
    first, second = (chunks_of(parallel, 8, stage) for stage in (0, 1))
    assert [c.layers for c in first] == [(0, 1), (4, 5)]
    assert [c.layers for c in second] == [(2, 3), (6, 7)]
    assert first[0].has_embedding
    assert second[1].has_head
    assert not first[1].has_head
    uneven = ParallelConfig(pipeline=2, layers_per_stage=(5, 3))
    assert [len(c.layers) for s in (0, 1) for c in chunks_of(uneven, 8, s)] == [5, 3]


def test_micro_batches_in_flight() -> None:
    assert [in_flight(ParallelConfig(pipeline=4), s, 8) for s in range(4)] == [4, 3, 2, 1]
    assert in_flight(ParallelConfig(pipeline=4), 0, 2) == 2
    # arXiv 2205.05198: interleaving costs the first stage a factor 1 + (p - 1) / (p v).
    for pp, v in ((2, 2), (4, 2), (4, 4)):
        flying = in_flight(ParallelConfig(pipeline=pp, virtual_pipeline=v), 0, 100)
        assert flying == pytest.approx(pp * (1 + (pp - 1) / (pp * v)))


def test_activations_of_a_layer() -> None:
    arch = find_arch("Qwen3-8B", "student")
    h, f, q, kv = 4096, 12_288, 32 * 128, 8 * 128
    w = layer_widths(arch, ParallelConfig(), 2, 0, fused=True)
    tensors = 4 * h + (q + 2 * kv) + (q + kv) + q + 3 * f
    statistics = 4 * (2 + 32 + 8 + 32)
    assert w.saved == 2 * tensors + statistics
    assert w.entry == 2 * h
    # With sequence parallelism everything is sharded, as in arXiv 2205.05198, section 4.2.2.
    sharded = layer_widths(arch, TP2, 2, 0, fused=True)
    assert sharded.saved == w.saved / 2
    only_tp = layer_widths(arch, ParallelConfig(tensor=2), 2, 0, fused=True)
    assert only_tp.saved == pytest.approx(w.saved / 2 + 2 * 4 * h / 2, rel=1e-3)


def test_recomputation_trades_activations() -> None:
    arch = find_arch("Qwen3-8B", "student")
    saved = {
        recompute: training_activations(
            arch,
            ParallelConfig(),
            0,
            tokens=4096,
            num_micro_batches=4,
            dtype_bytes=2,
            recompute=recompute,
        ).saved
        for recompute in ("none", "selective", "full")
    }
    assert saved["none"] > saved["selective"] > saved["full"]
    layer = layer_widths(arch, ParallelConfig(), 2, 0, fused=True)
    ends = 8 + 2 * 4096 + 4
    # The inputs of all layers, one layer whole, the ends.
    assert saved["full"] == round(4096 * (36 * layer.entry + ends + layer.saved - layer.entry))


def test_loss_chunk_holds_what_the_fused_divergence_allocates() -> None:
    work = workload(TP2, TP4)
    parts = memory.loss_chunk(work)
    rows = 152_064 // 2  # 151,936 padded to a multiple of 128 x 2
    assert parts["head gradient"] == rows * 4096 * 4
    # 4,096 loss tokens make two chunks of 2,048; both models' logits, and a block of the gradient.
    assert parts["loss chunk"] == 2 * 2048 * rows * 2 + 8192 * 4096 * 2
    # Hidden states of 8,192 tokens; at 4,096 of them copies, gradients and the teacher's.
    assert parts["loss rows"] == 8192 * 4096 * 2 + 4096 * (2 * 4096 + 5120) * 2


def test_memory_of_every_phase() -> None:
    work = workload(TP2, TP4)
    (rank,) = [r for r in memory.plan_memory(work) if 0 in r.ranks]
    student = rank_parameters(work.student, TP2, 16, 0)
    teacher = rank_parameters(work.teacher, TP4, 16, 0)
    train = rank.phases["student"]
    assert train["student weights"] == student.stored * 2
    assert train["gradients"] == student.gradients * 4
    assert train["optimizer state"] == 2 * train["main weights"] == student.gradients // 8 * 8
    assert "teacher weights" not in train  # offloaded
    assert rank.phases["teacher"]["teacher weights"] == teacher.numel * 2
    assert train["teacher head shard"] == 152_064 // 2 * 5120 * 2
    assert rank.host["teacher weights"] == teacher.numel * 2
    assert rank.host["teacher cache"] == 64 * 1024 // 8 * 5120 * 2
    assert rank.peak == max(rank.total(phase) for phase in memory.PHASES)


def test_offload_empties_the_other_phases() -> None:
    work = workload(TP2, TP4)
    here = work.with_choice(TP2, TP4, "none", False, False)
    away = work.with_choice(TP2, TP4, "none", True, True)
    (kept,), (moved,) = ([r for r in memory.plan_memory(w) if 0 in r.ranks] for w in (here, away))
    assert "gradients" in kept.phases["teacher"]
    assert "gradients" not in moved.phases["teacher"]
    assert "teacher weights" in kept.phases["student"]
    freed = kept.phases["optimizer"]["teacher weights"]
    assert kept.total("optimizer") - moved.total("optimizer") == freed


def test_an_average_of_the_student_is_shared_by_the_ranks_with_the_same_weights() -> None:
    """4 bytes a parameter over the copies of its shard; on the host where the teacher is."""
    arch = find_arch("Qwen3-30B-A3B", "student")
    layout = ParallelConfig(tensor=2, expert=4, expert_tensor=1, sequence_parallel=True)
    base = replace(workload(TP2, TP2), student=arch, teacher=arch)
    base = replace(base, config=replace(base.config, teacher=TeacherConfig(kind="ema")))
    here, away = (base.with_choice(layout, layout, "none", o, False) for o in (False, True))
    (kept,), (moved,) = (memory.plan_memory(work) for work in (here, away))
    held = rank_parameters(arch, layout, 16, 0)
    # 16 ranks: 8 copies of a shard in TP 2, 4 of an expert in EP 4.
    average = ((held.numel - held.expert) // 8 + held.expert // 4) * 4
    for phase in memory.PHASES:
        assert kept.phases[phase]["teacher average"] == pytest.approx(average, abs=8)
        assert "teacher average" not in moved.phases[phase]
    assert moved.host["teacher average"] == kept.phases["student"]["teacher average"]
    found = fitting_layouts(base, Machine(), 5)
    assert found
    assert all(c.student == c.teacher for c in found)


def test_every_rank_is_in_one_kind() -> None:
    work = workload(ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True), TP4)
    ranks = memory.plan_memory(work)
    assert sorted(r for kind in ranks for r in kind.ranks) == list(range(16))
    last = [kind for kind in ranks if kind.student_stage == 1]
    assert all("head gradient" in kind.phases["student"] for kind in last)
    assert all("head gradient" not in kind.phases["student"] for kind in ranks if kind not in last)


def test_traffic_of_tensor_parallelism() -> None:
    work = workload(ParallelConfig(tensor=2), TP4)
    flows = traffic.model_flows(work, work.student, work.student_parallel, 0, True)
    tokens = work.num_tokens / 8
    all_reduces = next(f for f in flows if f.what == "all-reduce")
    # Two all-reduces a layer forward, two backward; half of twice the bytes over two ranks.
    assert all_reduces.bytes == 36 * 4 * tokens * 4096 * 2
    gradients, weights = traffic.optimizer_flows(work, 0)
    numel = rank_parameters(work.student, work.student_parallel, 16, 0).gradients
    assert gradients.bytes == numel * 4 * 7 // 8
    assert weights.bytes == numel * 2 * 7 // 8


def test_pipeline_sends_one_hidden_state_a_token_and_boundary() -> None:
    work = workload(ParallelConfig(pipeline=2), TP4)
    for stage in (0, 1):
        (flow,) = [
            f
            for f in traffic.model_flows(work, work.student, work.student_parallel, stage, True)
            if f.kind == "PP"
        ]
        assert flow.bytes == work.num_tokens / 8 * 4096 * 2


def test_hand_over_costs_nothing_between_equal_layouts() -> None:
    assert traffic.hand_over(workload(TP2, TP2)).hidden_bytes == 0
    moved = traffic.hand_over(workload(TP2, TP4))
    rows = 64 * 1024
    # Every rank of the student needs its rows, and has a quarter of them already.
    assert moved.hidden_bytes == rows * 5120 * 2 * 2 * 3 // 4
    assert moved.logits_row_bytes / moved.row_bytes == pytest.approx(152_064 / 5120)
    apart = traffic.hand_over(workload(TP2, ParallelConfig(tensor=4, pipeline=2)))
    assert apart.busiest == rows // 8 * 5120 * 2  # where the teacher's last stage is not, all rows


def test_cost_model_counts_flops() -> None:
    work = workload(ParallelConfig(), ParallelConfig(), world=1)
    machine = Machine(tflops=1000, efficiency=1.0)
    seconds, bubble = cost.teacher_seconds(work, machine)
    products = 2 * sum(active_parameters(work.teacher))
    attention = 64 * 2 * 64 * 128 * 2048
    assert seconds == pytest.approx(work.num_tokens * (products + attention) / 1e15)
    assert bubble == 0
    pipelined = workload(ParallelConfig(), ParallelConfig(pipeline=2), world=2)
    seconds, bubble = cost.teacher_seconds(pipelined, machine)
    count = pipelined.num_micro_batches(ParallelConfig(pipeline=2), 8192)
    assert bubble == pytest.approx(seconds / (count + 1))


@pytest.mark.parametrize("window", [1, 5, 64, 100])
def test_a_window_costs_what_it_sees(window: int) -> None:
    arch = replace(find_arch("Qwen3-8B", "student.path"), window=WindowArch(window, (1,)))
    products, full = cost.layer_flops(arch, 0, 64)
    seen = sum(min(t, window) for t in range(64)) + min(64, window) / 2  # half of the diagonal
    assert cost.layer_flops(arch, 1, 64) == (products, pytest.approx(full * seen / (64 * 64 / 2)))


def test_bandwidth_knows_nodes_and_adapters() -> None:
    machine = Machine()
    assert machine.bandwidth(8, 1, True) == 450e9
    assert machine.bandwidth(16, 1, True) == 400e9  # eight rings leave the node
    assert machine.bandwidth(2, 8, True) == 50e9
    assert machine.bandwidth(16, 1, False) == 50e9


@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen3-30B-A3B"])
def test_searched_layouts_are_allowed(name: str) -> None:
    arch = find_arch(name, "student")
    found = list(layouts(arch, 16, 8, True))
    assert len(found) == len(set(found)) > 20
    for layout in found:
        check_layout(arch, layout, 16, "parallel", "student")
    assert any(layout.expert > 1 for layout in found) == (arch.moe is not None)


def test_found_layouts_fit_and_come_best_first() -> None:
    work, machine = workload(TP2, TP4), Machine()
    found = fitting_layouts(work, machine, 8)
    assert len(found) == 8
    assert [c.seconds for c in found] == sorted(c.seconds for c in found)
    for c in found:
        choice = work.with_choice(
            c.student, c.teacher, c.recompute, c.teacher_offload, c.train_offload
        )
        assert max(r.peak for r in memory.plan_memory(choice)) == c.peak <= machine.usable_memory
        assert cost.step_time(choice, machine).total == pytest.approx(c.seconds)
    assert any(c.student != c.teacher for c in found)
    assert fitting_layouts(work, Machine(gpu_memory=8e9), 8) == []


def test_verdict_follows_the_memory() -> None:
    work = workload(TP2, TP4)
    assert make_plan(work, Machine(), 0).fits
    assert not make_plan(work, Machine(gpu_memory=40e9), 0).fits


def test_layout_names() -> None:
    assert layout_name(ParallelConfig()) == "DP"
    parallel = ParallelConfig(
        tensor=2, pipeline=4, virtual_pipeline=2, context=2, sequence_parallel=True
    )
    assert layout_name(parallel) == "TP2 SP PP4x2 CP2"


PAIR = ["student=Qwen3-8B", "teacher=Qwen3-32B", "top=0"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["student=Qwen3-9B", "teacher=Qwen3-32B"], "student: no config.json in 'Qwen3-9B'; give"),
        (["teacher=Qwen3-32B"], "student: not given; give"),
        (["student=Qwen3-8B", "teacher=Llama-3.1-70B"], "teacher: a vocabulary of 128256"),
        ([*PAIR, "world=0"], "world: '0'; give an integer of 1 or more"),
        ([*PAIR, "gpu_memory=lots"], "gpu_memory: 'lots'; give bytes as 141GB or 80GiB"),
        ([*PAIR, "network=0"], "network: '0'; give a positive number"),
        ([*PAIR, "headroom=1"], "headroom: 1.0; give a share below 1"),
        ([*PAIR, "tokens_per_sample=9999"], "tokens_per_sample: 9999, more than"),
        ([*PAIR, "response_tokens=4000"], "response_tokens: 4000 of 2048 tokens; give fewer"),
        ([*PAIR, "world=8", "parallel.tensor=3"], "parallel"),
        ([*PAIR, "parallel.tensr=2"], "parallel.tensr"),
        ([*PAIR, "--jsn"], "--jsn: not an option; see --help"),
        ([*PAIR, "--json"], "--json: without a file; give --json FILE"),
    ],
)
def test_bad_input_is_one_line(words: list[str], text: str) -> None:
    with pytest.raises(MegaOPDError) as caught:
        main(words)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ConfigError)


def test_command_line_prints_tables_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    words = [
        *("world=16", "parallel.tensor=2", "parallel.sequence_parallel=true"),
        *("teacher.offload=true", "--json", str(file)),
    ]
    main([*PAIR, *words])
    out = capsys.readouterr().out
    assert "student  8.19 B parameters   TP2 SP  DP 8" in out
    assert "fits: " in out
    values = json.loads(file.read_text())
    assert values["student"]["parameters"] == 8_190_735_360
    assert values["fits"] is True
    assert values["peak"] == max(rank["peak"] for rank in values["ranks"])
    assert sum(len(rank["ranks"]) for rank in values["ranks"]) == 16


def test_help_names_every_option_and_constant(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    out = capsys.readouterr().out
    for word in ("world=N", "tokens_per_rank=N", "--json FILE", "nvlink=450", "examples:"):
        assert word in out


def test_runs_as_a_module_with_exit_status_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megaopd.plan", "student=nothing", "teacher=Qwen3-8B"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: student: no config.json in 'nothing'; give")
    assert done.stdout == ""


def test_lora_trains_its_adapters_alone() -> None:
    arch, lora = find_arch("Qwen3-8B", "student"), LoraConfig(rank=32)
    # A and B of q, k and v, o, gate and up, down; hidden 4096, KV 1024, feed-forward 12288.
    widths = (4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096) + 3 * (4096 + 12288)
    alone = rank_parameters(arch, ParallelConfig(), 1, 0, (), lora)
    assert alone.trainable == 36 * 32 * widths == 87_293_952
    assert alone.numel == total_parameters(arch) + alone.trainable
    # Tensor parallelism splits the B of what splits outputs, and the A of what splits inputs.
    split = (4096 + 2048) + 2 * (4096 + 512) + (2048 + 4096) + 2 * (4096 + 6144) + (6144 + 4096)
    assert rank_parameters(arch, TP2, 2, 0, (), lora).trainable == 36 * 32 * split
    config = Config(student=StudentConfig(lora=lora), teacher=TeacherConfig(kind="base"))
    work = replace(workload(TP2, TP2), config=config, teacher=arch)
    full = replace(work, config=Config(teacher=TeacherConfig(kind="self")))
    ours, theirs = (memory.plan_memory(w)[0].peak for w in (work, full))
    # Neither a second copy of 8 billion weights, nor their gradients and state.
    assert theirs - ours > total_parameters(arch) * 2 / 2

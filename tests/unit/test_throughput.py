"""FLOPs of a step and shares of a peak, against sums made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megaopd.batch import Prompt, Sample
from megaopd.config import Config, LoraConfig, LossConfig, ParallelConfig, TeacherConfig
from megaopd.models.arch import WindowArch
from megaopd.plan.cost import samples_flops
from megaopd.plan.machine import Machine, peak_tflops
from megaopd.plan.presets import find_arch
from megaopd.throughput import Throughput

STUDENT, TEACHER = find_arch("Qwen3-0.6B", "student"), find_arch("Qwen3-1.7B", "teacher")
# Weights of a layer of Qwen3-0.6B: q and k and v, output, MLP, two norms, norms of q and k.
LAYER = 1024 * (16 + 8 + 8) * 128 + 16 * 128 * 1024 + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128
TEACHER_LAYER = 2048 * (16 + 8 + 8) * 128 + 16 * 128 * 2048 + 3 * 2048 * 6144 + 2 * 2048 + 2 * 128
VOCAB = 151_936  # a multiple of 128


def sample(prompt: int, response: int, teacher: str = "", seen: int | None = None) -> Sample:
    """One whose first response token is a tool's; the teacher sees a prompt of `seen` tokens."""
    own = Prompt("p", (1,) * prompt, None, teacher, None if seen is None else (1,) * seen)
    mask = (False,) + (True,) * (response - 1)
    return Sample(own, 0, (2,) * response, (0.0,) * response, mask, "stop", 0)


SAMPLES = [sample(100, 51), sample(300, 401)]
# Attention: 28 layers of 16 heads of 128 features see half of the tokens, 4 products of each.
ATTENTION = 28 * 4 * 16 * 128 * (151**2 + 701**2) / 2
PRODUCTS = 2 * 28 * LAYER * (151 + 701)
LOSS_TOKENS = 50 + 400
HEAD = 2 * VOCAB * LOSS_TOKENS


def make(config: Config | None = None, **options) -> Throughput:
    teachers = {"": TEACHER, "math": STUDENT, "code": TEACHER}
    return Throughput(
        config or Config(), STUDENT, teachers, 4, options.pop("peak", None), **options
    )


def test_the_flops_of_a_step() -> None:
    assert samples_flops(STUDENT, [151, 701]) == (PRODUCTS, ATTENTION)
    step = make()
    wanted = 3 * (PRODUCTS + ATTENTION) + HEAD * (3 * 1024 + 2048)
    assert step.student_flops(SAMPLES) == pytest.approx(wanted, rel=1e-12)
    wanted = 28 * (2 * TEACHER_LAYER * 852 + 4 * 16 * 128 * (151**2 + 701**2) / 2)
    assert step.teacher_flops(SAMPLES) == pytest.approx(wanted, rel=1e-12)


def test_the_metrics_are_those_of_one_device_in_a_phase() -> None:
    times = {"time/student_s": 2.0, "time/teacher_s": 0.5, "time/rollout_s": 9.0}
    student = 3 * (PRODUCTS + ATTENTION) + HEAD * (3 * 1024 + 2048)
    found = make(peak=989.0)(SAMPLES, times)
    assert found["perf/tflops_per_gpu"] == pytest.approx(student / 2.0 / 4 / 1e12, rel=1e-12)
    assert found["perf/mfu"] == pytest.approx(student / 2.0 / 4 / 989e12, rel=1e-12)
    assert found["perf/teacher_tflops"] == pytest.approx(
        make().teacher_flops(SAMPLES) / 0.5 / 4 / 1e12, rel=1e-12
    )
    # On a CPU there is no peak to speak of, and without a time nothing to divide by.
    assert set(make()(SAMPLES, times)) == {"perf/tflops_per_gpu", "perf/teacher_tflops"}
    assert make()(SAMPLES, {"time/student_s": 0.0}) == {}


def test_who_does_not_compute_here_counts_nothing() -> None:
    served = Config(teacher=TeacherConfig(kind="sglang"))
    alone = Config(loss=LossConfig(objective="policy_gradient"))
    without = 3 * (PRODUCTS + ATTENTION) + HEAD * 3 * 1024
    for config in (served, alone):
        assert make(config).student_flops(SAMPLES) == pytest.approx(without, rel=1e-12)
        assert make(config).teacher_flops(SAMPLES) == 0
        assert "perf/teacher_tflops" not in make(config)(SAMPLES, {"time/teacher_s": 1.0})
    assert make(alone, scores=True).teacher_flops(SAMPLES) > 0


def test_weights_below_adapters_need_no_gradient() -> None:
    config = Config()
    config = replace(config, student=replace(config.student, lora=LoraConfig()))
    wanted = 2 * PRODUCTS + 3 * ATTENTION + HEAD * (2 * 1024 + 2048)
    assert make(config).student_flops(SAMPLES) == pytest.approx(wanted, rel=1e-12)


def test_each_sample_has_its_own_teacher_and_average_ones_have_several() -> None:
    teachers = {
        "math": TeacherConfig(path="m"),
        "code": TeacherConfig(path="c"),
        "both": TeacherConfig(kind="average", members=("math", "code")),
    }
    config = Config(teachers=teachers)
    small, large = samples_flops(STUDENT, [151]), samples_flops(TEACHER, [151])
    routed = [sample(100, 51, "math"), sample(100, 51, "code")]
    assert make(config).teacher_flops(routed) == pytest.approx(sum(small) + sum(large), rel=1e-12)
    averaged = [sample(100, 51, "both")]
    assert make(config).teacher_flops(averaged) == pytest.approx(sum(small) + sum(large), rel=1e-12)
    head = make(config).student_flops(averaged) - 3 * sum(small)
    assert head == pytest.approx(2 * VOCAB * 50 * (3 * 1024 + 1024 + 2048), rel=1e-12)


def test_a_teacher_reads_the_prompt_that_it_sees() -> None:
    privileged = make().teacher_flops([sample(100, 51, seen=300)])
    assert privileged == pytest.approx(sum(samples_flops(TEACHER, [351])), rel=1e-12)


def test_a_window_bounds_what_a_token_sees() -> None:
    windowed = replace(STUDENT, window=WindowArch(64, tuple(range(0, 28, 2))))
    seen = 64 - 64**2 / (2 * 701)
    wanted = 14 * 4 * 16 * 128 * 701 * (701 / 2 + seen)
    assert samples_flops(windowed, [701])[1] == pytest.approx(wanted, rel=1e-12)


def test_a_padded_vocabulary_is_multiplied_too() -> None:
    odd = replace(STUDENT, vocab_size=151_937)
    config = Config(parallel=ParallelConfig(tensor=2))
    step = Throughput(config, odd, {"": TEACHER}, 2, None)
    padded = 152_064  # the next multiple of 128 x 2
    body = 3 * (PRODUCTS + ATTENTION)
    wanted = body + 2 * padded * LOSS_TOKENS * (3 * 1024 + 2048)
    assert step.student_flops(SAMPLES) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("device", "dtype", "peak"),
    [
        ("NVIDIA H200", "bf16", 989.0),
        ("NVIDIA H200 NVL", "bf16", 835.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA GH200 480GB", "bf16", 989.0),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA H20", "bf16", 148.0),
        ("NVIDIA H200", "fp32", None),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
        ("cpu", "bf16", None),
    ],
)
def test_peaks(device: str, dtype: str, peak: float | None) -> None:
    assert peak_tflops(device, dtype) == peak
    assert Machine().tflops == peak_tflops("NVIDIA H200", "bf16")

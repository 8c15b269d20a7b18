"""A teacher on a real SGLang against the same teacher in Megatron: its word on every loss token, on
the ranks that need it, under tensor, context, pipeline and data parallelism. And a run with it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megaopd.batch import Prompt, Sample, TokenSignal, TopKSignal
from megaopd.config import ParallelConfig, SGLangConfig, TeacherConfig
from megaopd.data.packing import Batching, Packing
from megaopd.errors import RolloutError
from megaopd.models.arch import read_arch
from megaopd.parallel.layout import Layout
from megaopd.teacher.sglang import SGLangTeacher
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_run, metrics_of, run_training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TOLERANCE = 1e-4
VOCAB_SIZE, K = 512, 8
KEY_VARIABLE = TeacherConfig().api_key_env
LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "cp2": ParallelConfig(context=2),
    "pp2": ParallelConfig(pipeline=2),
    "dp2": ParallelConfig(),
}


def _samples() -> list[Sample]:
    """Some share a prompt, some have tool tokens, some another prompt for the teacher."""
    rng = random.Random(3)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(low, high)))

    samples = []
    for i in range(5):
        prompt = Prompt(str(i), tokens(1, 40), None, "", tokens(5, 50) if i % 2 else None)
        for index in range(2):
            # Servers call the vocabulary's last token 0.
            response = (*tokens(1, 90), VOCAB_SIZE - 1)
            mask = tuple(rng.random() < 0.8 for _ in response)
            zeros = (0.0,) * len(response)
            samples.append(Sample(prompt, index, response, zeros, mask, "stop", 0))
    return samples


def _teacher(url: str, key: str, top_k: int, student: Batching, **ranks: Any) -> SGLangTeacher:
    config = TeacherConfig(kind="sglang", urls=(url,), top_k=top_k)
    return SGLangTeacher(
        config,
        SGLangConfig(),
        VOCAB_SIZE,
        student,
        device=torch.device("cpu"),
        environ={KEY_VARIABLE: key},
        **ranks,
    )


def _work(rank: int, world_size: int, path: str, url: str, key: str) -> dict[str, Any]:
    return {name: _errors(path, url, key, parallel) for name, parallel in LAYOUTS.items()}


def _errors(path: str, url: str, key: str, parallel: ParallelConfig) -> dict[str, Any]:
    """The largest differences from Megatron's log-probs, and the rows that were compared."""
    from megaopd.models.mapping import padded_vocab_size
    from megaopd.parallel import groups as parallel_groups
    from megaopd.teacher.megatron import MegatronTeacher

    groups = parallel_groups.initialize(parallel, torch.device("cpu"), seed=1)
    student = Batching(groups.layout, Packing(2, pad_to_multiple=parallel.tensor))
    samples = _samples()
    config = TeacherConfig(path=path, dtype="fp32")
    own = Batching(groups.layout, Packing(2, pad_to_multiple=parallel.tensor), "teacher")
    rows = padded_vocab_size(VOCAB_SIZE, parallel.tensor)
    megatron = MegatronTeacher(config, read_arch(path), groups, own, student, rows)
    logprobs = [_full_logprobs(s, groups) for s in megatron.score(samples)]
    batches = student.micro_batches(samples, student.assign(samples), groups.rank)
    found: dict[str, Any] = {"rows": [], "top_k": 0.0, "sampled": 0.0}
    ranks = {"rank": groups.rank, "world_size": groups.world_size}
    for name, top_k in (("top_k", K), ("sampled", 0)):
        teacher = _teacher(url, key, top_k, student, **ranks)
        signals = teacher.score(samples)
        teacher.close()
        assert len(signals) == len(batches)
        for batch, wanted_LV, signal in zip(batches, logprobs, signals, strict=True):
            if isinstance(signal, TopKSignal):
                ours = signal.logprobs_LK
                assert len(ours) == len(wanted_LV)
            if not len(wanted_LV):
                continue  # not the last stage
            if isinstance(signal, TopKSignal):
                wanted = wanted_LV.gather(1, signal.ids_LK.long())
                # They are the likeliest ones.
                best = wanted_LV.topk(K, dim=1).values
                assert ours.shape == best.shape
                wanted = torch.stack([wanted, best])
            else:
                assert isinstance(signal, TokenSignal)
                ours = signal.logprobs_L
                labels = batch.labels_T[batch.loss_mask_T][:, None]
                wanted = wanted_LV.gather(1, labels)[:, 0]
            found[name] = max(found[name], float((ours - wanted).abs().max()))
            if name == "sampled":
                found["rows"] += batch.rows_T[batch.loss_mask_T].tolist()
    parallel_groups.release()
    return found


def _full_logprobs(signal: Any, groups: Any) -> Tensor:
    """[L, V] from the hidden states and all ranks' parts of the head."""
    import torch.distributed as dist

    part = signal.hidden_LH @ signal.head.shard().T
    parts = [torch.empty_like(part) for _ in range(groups.tp.size())]
    dist.all_gather(parts, part.contiguous(), group=groups.tp)
    return torch.cat(parts, dim=1)[:, :VOCAB_SIZE].log_softmax(-1)


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def model_dir(run_yaml) -> Path:
    return run_yaml.parent / "teacher"


@pytest.fixture(scope="module")
def server(sglang_servers, model_dir):
    return sglang_servers(model_dir)[0]


@pytest.fixture(scope="module")
def outcomes(server, model_dir) -> list[dict[str, Any]]:
    return run_distributed(_work, 2, str(model_dir), server.url, server.api_key, timeout_s=300)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_the_megatron_teacher(outcomes, layout):
    numbers = iter(range(10_000))
    wanted = sorted(
        number
        for sample in _samples()
        for number, counts in zip(numbers_of(sample, numbers), sample.response_mask, strict=True)
        if counts
    )
    for outcome in outcomes:
        assert outcome[layout]["top_k"] <= TOLERANCE
        assert outcome[layout]["sampled"] <= TOLERANCE
    # Every loss token's row is where it is needed: on both ranks of a tensor-parallel group, on the
    # last pipeline stage, else on one rank or the other.
    rows = [sorted(outcome[layout]["rows"]) for outcome in outcomes]
    if layout == "tp2":
        assert rows == [wanted, wanted]
    elif layout == "pp2":
        assert rows == [[], wanted]
    else:
        assert sorted(rows[0] + rows[1]) == wanted
        assert rows[0]
        assert rows[1]


def numbers_of(sample: Sample, numbers) -> list[int]:
    return [next(numbers) for _ in sample.response_ids]


def test_a_wrong_key_ends_in_one_line(server):
    student = Batching(Layout(ParallelConfig(), 1), Packing(2))
    config = TeacherConfig(kind="sglang", urls=(server.url,))
    with pytest.raises(RolloutError, match=r"^teacher\.urls: .*refuses the key"):
        SGLangTeacher(
            config, SGLangConfig(), VOCAB_SIZE, student, device=torch.device("cpu"), environ={}
        )


def test_a_sample_longer_than_the_servers_context_is_named(server):
    student = Batching(Layout(ParallelConfig(), 1), Packing(2))
    teacher = _teacher(server.url, server.api_key, K, student)
    long = Sample(Prompt("long", (1, 2)), 0, (3,) * 300, (0.0,) * 300, (True,) * 300, "stop", 0)
    with pytest.raises(RolloutError, match="teacher's scores of sample long/0"):
        teacher.score([long])
    teacher.close()


@pytest.mark.long
def test_a_run(server, run_yaml, monkeypatch):
    """With all tokens as candidates, what it minimises is the whole reverse KL of its samples; the
    teacher's own accuracy is taken on its servers too."""
    monkeypatch.setenv(KEY_VARIABLE, server.api_key)
    out, record = run_yaml.parent / "out", run_yaml.parent / "record.jsonl"
    done = run_training(
        run_yaml,
        2,
        "parallel.tensor=2",
        "teacher.kind=sglang",
        f"teacher.urls=[{server.url}]",
        f"teacher.top_k={VOCAB_SIZE}",
        f"rollout.record={record}",
        timeout_s=400,
    )
    assert done.returncode == 0, done.stderr
    first = json.loads(record.read_text().splitlines()[0])["samples"]
    wanted = _reverse_kl(run_yaml.parent / "student", run_yaml.parent / "teacher", first)
    assert metrics_of(out, "loss/divergence")[0] == pytest.approx(wanted, rel=1e-4)
    assert metrics_of(out, "teacher/top_k_mass") == pytest.approx([1.0] * 3, abs=1e-4)
    before, after = metrics_of(out, "eval/reverse_kl_lower_bound")
    assert 0 < after < before
    summary = json.loads((out / "summary.json").read_text())
    assert summary["teacher_accuracy"] is not None


def _reverse_kl(student: Path, teacher: Path, samples: list[dict[str, Any]]) -> float:
    """Of two directories' models, the mean over the response tokens of samples."""
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (student, teacher)
    ]
    found = []
    for sample in samples:
        prompt, response = sample["prompt"]["token_ids"], sample["response_ids"]
        with torch.no_grad():
            log_p, log_q = (
                model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
                for model in models
            )
        log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
        found.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return float(torch.cat(found).mean())

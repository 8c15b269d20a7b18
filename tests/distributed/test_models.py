"""A model under tensor, pipeline and expert parallelism: its logits, and its way back to Hugging
Face."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megaopd.batch import Prompt, Sample
from megaopd.config import ParallelConfig
from megaopd.data.packing import pack
from megaopd.models.arch import read_arch
from megaopd.models.families import FAMILIES
from megaopd.models.hf_io import HFReader
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_models import ROPE_VARIANTS, TP3_CONFIG, make_tiny_model

SMOLLM2 = Path(__file__).resolve().parents[2] / ".cache/demo/teacher"
TOLERANCE = 1e-4
MOE = "Qwen3MoeForCausalLM"


def _samples(vocab_size: int, seed: int) -> list[Sample]:
    """Three sequences of 9, 5 and 12 tokens."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i, length in enumerate((9, 5, 12)):
        ids = tuple(torch.randint(0, vocab_size, (length,), generator=generator).tolist())
        prompt, response = ids[:3], ids[3:]
        n = len(response)
        samples.append(
            Sample(Prompt(str(i), prompt), 0, response, (0.0,) * n, (True,) * n, "stop", 0)
        )
    return samples


@dataclass(frozen=True)
class Case:
    """One model in one layout; only in fp32 are there logits to compare."""

    path: str
    parallel: ParallelConfig
    dtype: str = "fp32"

    @property
    def world_size(self) -> int:
        """The smallest; data-parallel ranks get different samples."""
        p = self.parallel
        dense = p.tensor * p.pipeline
        return math.lcm(dense, p.pipeline * p.expert * (p.expert_tensor or p.tensor))


@dataclass(frozen=True)
class Outcome:
    """What a rank saw.

    Attributes:
        difference: the largest, of its logits from transformers'; None where it has none.
        magnitude: the largest logit of transformers; None likewise.
        unequal: exported tensors that are not the file's.
        replicated: keys of a distributed checkpoint that this rank gives in full, with its place
            among the ranks that have the same.
    """

    difference: float | None
    magnitude: float | None
    unequal: list[str]
    replicated: dict[str, tuple[int, ...]]


def _check_models(rank: int, world_size: int, cases: list[Case]) -> list[Outcome]:
    return [_check_model(case) for case in cases]


def _check_model(case: Case) -> Outcome:
    """Logits against transformers, and the export against the files, bit by bit."""
    from megaopd.engine.schedule import forward_only
    from megaopd.models import weights
    from megaopd.models.build import build_model
    from megaopd.models.mapping import padded_vocab_size
    from megaopd.parallel import groups as parallel_groups

    parallel, path = case.parallel, case.path
    groups = parallel_groups.initialize(parallel, torch.device("cpu"), seed=1)
    arch = read_arch(path)
    rows = padded_vocab_size(arch.vocab_size, parallel.tensor)
    chunks = build_model(arch, parallel, groups, case.dtype, rows)
    weights.load_weights(chunks, arch, path)
    for chunk in chunks:
        chunk.eval()

    with_graph: list[bool] = []  # of every layer's output; a forward pass alone keeps none
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        layer.register_forward_hook(lambda _, args, out: with_graph.append(out[0].requires_grad))
    difference = magnitude = None
    collected = []
    if case.dtype == "fp32":
        samples = _samples(arch.vocab_size, seed=3 + groups.dp.rank())
        batch = pack(samples, pad_to_multiple=parallel.tensor)
        collected = forward_only(
            chunks,
            [batch] * parallel.pipeline,
            groups,
            lambda i, b, hidden: hidden @ chunks[-1].head.T,
        )
        assert with_graph
        assert not any(with_graph)
    if collected and groups.is_last_stage:
        shards = [torch.empty_like(collected[0]) for _ in range(parallel.tensor)]
        dist.all_gather(shards, collected[0].contiguous(), group=groups.tp)
        ours = torch.cat(shards, -1)[:, : arch.vocab_size]
        theirs = _transformers_logits(path, samples)
        difference = (ours[: len(theirs)] - theirs).abs().max().item()
        magnitude = theirs.abs().max().item()

    reader, unequal, names = HFReader(path), [], set()
    for name, exported in weights.export_weights(chunks, arch, groups):
        names.add(name)
        if exported.dtype != reader.dtype(name) or not torch.equal(exported, reader.read(name)):
            unequal.append(name)
    assert names == set(reader.names())
    with groups.active():
        metadata = {"dp_cp_group": groups.dp_cp}
        sharded = [s for c in chunks for s in c.sharded_state_dict(metadata=metadata).values()]
    replicated = {
        s.key: s.replica_id
        for s in sharded
        if s.key.endswith("norm.weight") and s.global_shape[-1] == s.local_shape[-1]
    }
    parallel_groups.release()
    return Outcome(difference, magnitude, unequal, replicated)


@torch.no_grad()
def _transformers_logits(path: str, samples: list[Sample]) -> torch.Tensor:
    """[T, V], each sequence by itself."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = [torch.tensor([s.prompt.token_ids + s.response_ids]) for s in samples]
    return torch.cat([model(x).logits[0] for x in ids])


def _run(cases: list[Case]) -> None:
    (world_size,) = {case.world_size for case in cases}
    by_rank = run_distributed(_check_models, world_size, cases, timeout_s=240)
    for i, case in enumerate(cases):
        outcomes = [outcomes[i] for outcomes in by_rank]
        assert all(not o.unequal for o in outcomes), (case, outcomes[0].unequal)
        _check_checkpointed_norms(case, outcomes)
        if case.dtype != "fp32":
            continue
        with_logits = [o for o in outcomes if o.difference is not None]
        assert len(with_logits) == world_size // case.parallel.pipeline
        for outcome in with_logits:
            assert outcome.difference < TOLERANCE, case
            assert outcome.magnitude > 1.0  # random or zero weights would not get here


def _check_checkpointed_norms(case: Case, outcomes: list[Outcome]) -> None:
    """The norms behind attention and MLP are in a checkpoint once, whoever writes it."""
    if not read_arch(case.path).post_norms:
        return
    for key in ("decoder.layers.self_attn_bda.norm.weight", "decoder.layers.mlp_bda.norm.weight"):
        places = [o.replicated[key] for o in outcomes]
        if case.parallel.pipeline == 1:
            assert len(set(places)) == len(outcomes), (case, key, places)


def _models(folder: Path) -> dict[str, list[Path]]:
    """By family a tied model and an untied one, of a vocabulary that nothing divides."""
    return {
        family: [
            make_tiny_model(
                folder / f"{family}{tied}", family, tie_word_embeddings=tied, vocab_size=509
            )
            for tied in (True, False)
        ]
        for family in sorted(FAMILIES)
    }


def test_one_rank(tmp_path):
    cases = [Case(str(p), ParallelConfig()) for paths in _models(tmp_path).values() for p in paths]
    for rope in sorted(set(ROPE_VARIANTS) - {"default"}):
        path = make_tiny_model(
            tmp_path / rope, "LlamaForCausalLM", rope_parameters=ROPE_VARIANTS[rope]
        )
        cases.append(Case(str(path), ParallelConfig()))
    _run(cases)


@pytest.mark.slow
def test_two_ranks(tmp_path):
    cases = []
    for family, paths in _models(tmp_path).items():
        for path in paths:
            layouts = [
                ParallelConfig(tensor=2),
                ParallelConfig(tensor=2, sequence_parallel=True),
                ParallelConfig(pipeline=2),
                ParallelConfig(pipeline=2, virtual_pipeline=2),
            ]
            if FAMILIES[family].moe_layer:
                layouts.append(ParallelConfig(expert=2))
            cases += [Case(str(path), layout) for layout in layouts]
    _run(cases)


@pytest.mark.slow
def test_bf16_is_loaded_to_the_bit(tmp_path):
    cases = []
    for family in sorted(FAMILIES):
        path = make_tiny_model(tmp_path / family, family, dtype=torch.bfloat16, vocab_size=509)
        cases.append(Case(str(path), ParallelConfig(tensor=2), "bf16"))
        cases.append(Case(str(path), ParallelConfig(pipeline=2), "bf16"))
    _run(cases)


# Windows shorter than the sequences: of some layers, of all, and as a mixture has it.
WINDOWS = {
    "later_layers": (
        "Qwen3ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
    "some_layers": (
        "Qwen3ForCausalLM",
        {
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "all_layers": (MOE, {"use_sliding_window": True, "sliding_window": 2}),
}


def _windows(folder: Path, layouts: list[ParallelConfig]) -> list[Case]:
    cases = []
    for name, (family, fields) in WINDOWS.items():
        path = make_tiny_model(folder / name, family, vocab_size=509, **fields)
        window = read_arch(path).window
        assert window is not None
        assert window.size == fields["sliding_window"]
        cases += [Case(str(path), parallel) for parallel in layouts]
    return cases


@pytest.mark.slow
def test_windows_on_one_rank(tmp_path):
    _run(_windows(tmp_path, [ParallelConfig()]))


@pytest.mark.slow
def test_windows_on_two_ranks(tmp_path):
    layouts = [
        ParallelConfig(tensor=2, sequence_parallel=True),
        ParallelConfig(pipeline=2, layers_per_stage=(1, 3)),
        ParallelConfig(pipeline=2, virtual_pipeline=2),
    ]
    _run(_windows(tmp_path, layouts))


MIXTURES = {
    "normalised": {"norm_topk_prob": True},
    "not_normalised": {"norm_topk_prob": False},
    "some_layers": {"mlp_only_layers": [0, 3]},
    "one_expert": {"norm_topk_prob": False, "num_experts_per_tok": 1},
}


def _mixtures(folder: Path, layouts: list[ParallelConfig]) -> list[Case]:
    cases = []
    for name, fields in MIXTURES.items():
        path = make_tiny_model(folder / name, MOE, vocab_size=509, **fields)
        cases += [Case(str(path), parallel) for parallel in layouts]
    return cases


@pytest.mark.slow
def test_mixtures_on_one_rank(tmp_path):
    _run(_mixtures(tmp_path, [ParallelConfig()]))


@pytest.mark.slow
def test_mixtures_on_two_ranks(tmp_path):
    layouts = [
        ParallelConfig(expert=2),
        ParallelConfig(tensor=2),
        ParallelConfig(tensor=2, expert=2, expert_tensor=1, sequence_parallel=True),
        ParallelConfig(pipeline=2, virtual_pipeline=2),
    ]
    _run(_mixtures(tmp_path, layouts))


@pytest.mark.slow
@pytest.mark.long
def test_mixtures_on_four_ranks(tmp_path):
    layouts = [
        ParallelConfig(tensor=2, expert=2, sequence_parallel=True),
        ParallelConfig(expert=2, expert_tensor=2),
        ParallelConfig(pipeline=2, expert=2, layers_per_stage=(1, 3)),
    ]
    _run(_mixtures(tmp_path, layouts))


@pytest.mark.slow
def test_fused_experts(tmp_path):
    """As transformers 5 saves them with save_original_format=False."""
    path = make_tiny_model(tmp_path / "apart", MOE, vocab_size=509)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    _run([Case(str(tmp_path / "fused"), ParallelConfig(expert=2, expert_tensor=1))])


@pytest.mark.slow
def test_three_ranks(tmp_path):
    cases = []
    for family in ("LlamaForCausalLM", MOE):
        path = make_tiny_model(tmp_path / family, family, **TP3_CONFIG)
        cases.append(Case(str(path), ParallelConfig(tensor=3)))
    _run(cases)


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 3])
def test_smollm2(tensor):
    if not (SMOLLM2 / "config.json").is_file():
        pytest.skip("run tools/prepare_demo.py for SmolLM2-135M")
    _run([Case(str(SMOLLM2), ParallelConfig(tensor=tensor))])

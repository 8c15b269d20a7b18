"""A mixture of experts in training: gradients under every layout, and the load-balancing loss.

The yardstick is transformers with plain autograd, in fp64. All layouts get the samples and the
teacher of test_layout_gradients.py. Few launches do all the work.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from megaopd.config import Config, OptimizerConfig, ParallelConfig, StudentConfig
from megaopd.data.packing import Assignment, MicroBatch, Packing
from megaopd.models.arch import read_arch
from tests.distributed.test_layout_gradients import (
    NUM_LOSS_TOKENS,
    SAMPLES,
    TEACHER_HIDDEN,
    VOCAB_SIZE,
    TableHead,
    Workbench,
    differences,
    full_gradients,
    layout_in_place,
)
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow

FAMILY = "Qwen3MoeForCausalLM"
# Weights of the chosen experts divided by their sum, and not; layers with and without experts.
MODELS: dict[str, dict[str, Any]] = {
    "normalised": {"norm_topk_prob": True},
    "mixed": {"norm_topk_prob": False, "mlp_only_layers": [1]},
}
TWO_RANKS = {
    "ep2": ParallelConfig(expert=2),
    "dp2": ParallelConfig(),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "tp2_sp_etp1": ParallelConfig(tensor=2, sequence_parallel=True, expert_tensor=1),
    "tp2_sp_ep2_etp1": ParallelConfig(tensor=2, sequence_parallel=True, expert=2, expert_tensor=1),
    "pp2": ParallelConfig(pipeline=2),
    "cp2": ParallelConfig(context=2),
    "cp2_ep2": ParallelConfig(context=2, expert=2),
}
FOUR_RANKS = {
    "ep4": ParallelConfig(expert=4),
    "dp4_ep2": ParallelConfig(expert=2),
    "tp2_sp_ep2_etp2": ParallelConfig(tensor=2, sequence_parallel=True, expert=2),
    "tp2_sp_ep4_etp1": ParallelConfig(tensor=2, sequence_parallel=True, expert=4, expert_tensor=1),
    "ep2_etp2": ParallelConfig(expert=2, expert_tensor=2),
    "pp2_ep2": ParallelConfig(pipeline=2, expert=2),
    "pp2_vp2_ep2": ParallelConfig(pipeline=2, virtual_pipeline=2, expert=2),
}
COEF = 0.25
# Two micro-batches of an even number of tokens: nothing is filled up under sequence parallelism.
MICRO_BATCHES = ((0, 1, 2), (3, 4, 5, 6, 7))
# The load-balancing loss is a micro-batch's, and so is compared where the two stay what they are.
BALANCED = ("ep2", "dp2", "tp2_sp", "tp2_sp_etp1", "pp2", "cp2_ep2")

Gradients = dict[str, Tensor]


def _assignment(dp_size: int, num_multiple: int) -> Assignment:
    """The two micro-batches on one rank, or one on each; others have padding alone."""
    parts = [MicroBatch("", indices) for indices in MICRO_BATCHES]
    nothing = MicroBatch("", ())
    if dp_size == 1:
        return Assignment((tuple(parts),))
    rows = [[part] for part in parts] + [[nothing]] * (dp_size - 2)
    return Assignment(tuple(tuple(r + [nothing] * (num_multiple - 1)) for r in rows))


def _gradients(bench: Workbench, model: str, coef: float) -> dict[str, Any]:
    """Of one step, with its metrics."""
    from megaopd.engine.student import MegatronStudent
    from megaopd.models.mapping import padded_vocab_size

    groups, path = bench.groups, str(bench.folder / model)
    config = Config(
        student=StudentConfig(path, "fp32", router_aux_loss_coef=coef),
        parallel=groups.parallel,
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.0),
    )
    rows = padded_vocab_size(VOCAB_SIZE, groups.tp.size())
    student = MegatronStudent(config, read_arch(path), groups, rows, VOCAB_SIZE)
    multiple = 2 if groups.parallel.virtual_pipeline > 1 else 1
    batches = bench.batches(Packing(), _assignment(groups.place.dp_size, multiple))
    metrics = bench.step(student, batches).metrics
    return {"metrics": metrics, "gradients": full_gradients(student)}


def _record(rank: int, world_size: int, folder: Path) -> dict[str, dict[float, dict[str, Any]]]:
    with layout_in_place(folder, ParallelConfig()) as bench:
        found = {m: {coef: _gradients(bench, m, coef) for coef in (0.0, COEF)} for m in MODELS}
    torch.save(found, folder / "one_rank.pt")
    return found


def _run_layouts(
    rank: int, world_size: int, folder: Path, layouts: dict[str, ParallelConfig]
) -> dict[str, Any]:
    """Every layout against one rank: differences by tensor, and metrics."""
    wanted = torch.load(folder / "one_rank.pt")
    found: dict[str, Any] = {}
    for name, parallel in layouts.items():
        with layout_in_place(folder, parallel) as bench:
            found[name] = {}
            for model in MODELS:
                for coef in (0.0, COEF) if name in BALANCED else (0.0,):
                    ours, theirs = (
                        _gradients(bench, model, coef),
                        copy.deepcopy(wanted[model][coef]),
                    )
                    if coef and parallel.context > 1:
                        # Its padding is balanced too: compared with the yardstick itself.
                        gradients = torch.load(folder / f"{model}_cp2.pt")
                        ours["metrics"].pop("train/grad_norm")
                        theirs["metrics"].pop("train/grad_norm")
                        theirs["gradients"] = gradients
                    found[name][model, coef] = {
                        "metrics": ours["metrics"],
                        "wanted": theirs["metrics"],
                        "gradients": differences(ours["gradients"], theirs["gradients"]),
                    }
    return found


def _single_experts(name: str, grad: Tensor) -> Gradients:
    """By the names of a directory; transformers 5 has the experts of a layer in one tensor."""
    prefix, _, projection = name.rpartition(".")
    if not prefix.endswith(".experts"):
        return {name: grad}
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[projection]
    return {
        f"{prefix}.{e}.{part}.weight": piece
        for e, expert in enumerate(grad)
        for part, piece in zip(parts, expert.chunk(len(parts)), strict=True)
    }


def _plain(folder: Path, model: str, coef: float, multiple: int = 1) -> Gradients:
    """Gradients of sum(weight * KL(p || q)) / number of loss tokens + coef * balance, in fp64.

    balance is the sum over layers of E sum_i f_i P_i, a mean over micro-batches by their tokens.

    Args:
        multiple: every sequence is padded with token 0 to a multiple of it.
    """
    student = AutoModelForCausalLM.from_pretrained(
        folder / model, dtype=torch.float64, experts_implementation="eager"
    )
    routed: list[Tensor] = []
    for layer in student.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda gate, args, out: routed.append(out[0]))
    head = TableHead(0, 1, VOCAB_SIZE).rows.double()
    generator = torch.Generator().manual_seed(8)
    num_rows = sum(len(s.response_ids) for s in SAMPLES)
    table = torch.randn(num_rows, TEACHER_HIDDEN, generator=generator).double()
    rows = table.split([len(s.response_ids) for s in SAMPLES])

    kl = torch.zeros((), dtype=torch.float64)
    balances, lengths = [], []
    for indices in MICRO_BATCHES:
        by_layer: list[list[Tensor]] = []
        for i in indices:
            sample = SAMPLES[i]
            ids = torch.tensor(sample.prompt.token_ids + sample.response_ids)
            first, num = len(sample.prompt.token_ids) - 1, len(sample.response_ids)
            ids = F.pad(ids, (0, -len(ids) % multiple))
            routed.clear()
            p = student(ids[None]).logits[0, first : first + num].log_softmax(-1)
            by_layer.append(list(routed))
            q = (rows[i] @ head.T).log_softmax(-1)
            weights = torch.tensor(sample.response_ids) % 5 / 2 * torch.tensor(sample.response_mask)
            kl = kl + weights.double() @ (p.exp() * (p - q)).sum(-1)
        layers = [torch.cat(parts) for parts in zip(*by_layer, strict=True)]
        balances.append(sum(_balance(logits, student.config) for logits in layers))
        lengths.append(len(layers[0]))
    balance = sum(b * n for b, n in zip(balances, lengths, strict=True)) / sum(lengths)
    (kl / NUM_LOSS_TOKENS + coef * balance).backward()
    gradients: Gradients = {}
    for name, param in student.named_parameters():
        gradients |= _single_experts(name, param.grad)
    return gradients


def _balance(logits_TE: Tensor, config: Any) -> Tensor:
    """E sum_i f_i P_i of one layer on one micro-batch."""
    probs_TE = logits_TE.softmax(-1)
    chosen = probs_TE.topk(config.num_experts_per_tok).indices
    fractions_E = F.one_hot(chosen, probs_TE.size(1)).double().mean(dim=(0, 1))
    return probs_TE.size(1) * fractions_E @ probs_TE.mean(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("moe")
    for model, fields in MODELS.items():
        make_tiny_model(path / model, FAMILY, seed=2, vocab_size=VOCAB_SIZE, **fields)
        torch.save(
            {n: g.float() for n, g in _plain(path, model, COEF, multiple=4).items()},
            path / f"{model}_cp2.pt",
        )
    return path


@pytest.fixture(scope="module")
def one_rank(folder) -> dict[str, dict[float, dict[str, Any]]]:
    return run_distributed(_record, 1, folder, timeout_s=180)[0]


@pytest.fixture(scope="module")
def ep2(folder, one_rank) -> list[dict[str, Any]]:
    return run_distributed(_run_layouts, 2, folder, {"ep2": TWO_RANKS["ep2"]}, timeout_s=180)


@pytest.fixture(scope="module")
def all_layouts(folder, one_rank) -> dict[str, list[dict[str, Any]]]:
    """By layout, what every rank found."""
    found: dict[str, list[dict[str, Any]]] = {}
    for world_size, layouts in ((2, TWO_RANKS), (4, FOUR_RANKS)):
        ranks = run_distributed(_run_layouts, world_size, folder, layouts, timeout_s=600)
        found |= {name: [rank[name] for rank in ranks] for name in layouts}
    return found


def _check(by_rank: list[dict[Any, Any]]) -> None:
    for found in by_rank:
        for case, step in found.items():
            assert step["metrics"] == pytest.approx(step["wanted"], rel=1e-5, abs=1e-7), case
            worst = max(step["gradients"], key=step["gradients"].__getitem__)
            assert step["gradients"][worst] < 1e-5, (case, worst, step["gradients"][worst])


@pytest.mark.parametrize("coef", [0.0, COEF])
@pytest.mark.parametrize("model", MODELS)
def test_one_rank_has_the_gradients_of_plain_autograd(folder, one_rank, model, coef):
    """So 0 leaves the load-balancing loss out, and any other weight adds just that much of it."""
    found = differences(
        {n: g.double() for n, g in one_rank[model][coef]["gradients"].items()},
        _plain(folder, model, coef),
    )
    worst = max(found, key=found.__getitem__)
    assert found[worst] < 1e-5, (worst, found[worst])


@pytest.mark.parametrize("model", MODELS)
def test_the_balancing_loss_moves_only_what_leads_to_a_router(one_rank, model):
    without, balanced = (one_rank[model][coef] for coef in (0.0, COEF))
    for name in set(without["metrics"]) - {"train/grad_norm"}:
        assert balanced["metrics"][name] == without["metrics"][name], name
    last = "model.layers.3.mlp.experts."
    for name, gradient in without["gradients"].items():
        beyond = name in ("model.norm.weight", "lm_head.weight") or name.startswith(last)
        assert balanced["gradients"][name].equal(gradient) == beyond, name


def test_expert_parallelism_has_the_gradients_of_one_rank(ep2):
    _check([rank["ep2"] for rank in ep2])


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*TWO_RANKS, *FOUR_RANKS])
def test_every_layout_has_the_gradients_of_one_rank(all_layouts, layout):
    _check(all_layouts[layout])

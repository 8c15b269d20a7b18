"""TIP's selection of tokens, and the loss by step."""

from __future__ import annotations

import itertools
import math
import random
import typing
from dataclasses import replace

import pytest
import torch

from megaopd.batch import HiddenSignal, TokenSignal
from megaopd.config import LossConfig, LossStage
from megaopd.data.packing import pack
from megaopd.losses import DIVERGENCES
from megaopd.losses.objective import OBJECTIVES, Objective
from megaopd.losses.schedule import NUMBERS, loss_at
from megaopd.losses.selection import SELECTIONS, keep_in_batch, select
from megaopd.parallel.layout import Place
from tests.helpers.random_batches import random_samples
from tests.unit.losses.reference import from_logprobs
from tests.unit.test_objective_forms import make_case
from tests.unit.test_objective_signals import Case, V


def slow(name: str, ratio: float, h: list[float], d: list[float], lowest: bool = False) -> set[int]:
    """One response, as the paper describes it: the tokens that are kept."""
    cap = sorted(h)[math.floor(0.98 * (len(h) - 1))]
    h = [min(x, cap) for x in h]

    def scaled(values: list[float]) -> list[float]:
        low, high = min(values), max(values)
        return [(x - low) / (high - low) if high > low else 0.0 for x in values]

    score = {
        "soft_or": lambda i: 1 - (1 - scaled(h)[i]) * (1 - scaled(d)[i]),
        "entropy": lambda i: scaled(h)[i],
        "q3": lambda i: (1 - scaled(h)[i]) * d[i],
    }[name]
    sign = 1 if lowest else -1
    order = sorted(range(len(h)), key=lambda i: (sign * score(i), i))
    return set(order[: max(1, math.floor(ratio * len(h) + 1e-9))])


@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("name", SELECTIONS)
def test_the_tokens_of_each_response_compete_among_themselves(name, lowest):
    rng = random.Random(5)
    for ratio in (0.01, 0.3, 0.5, 1.0):
        lengths = [1, 2, 7, 10, 120]
        responses = [
            ([rng.choice([0.0, rng.random()]) for _ in range(n)], [rng.random() for _ in range(n)])
            for n in lengths
        ]
        expected = [slow(name, ratio, *response, lowest) for response in responses]
        sequences = [i for i, n in enumerate(lengths) for _ in range(n)]
        order = list(range(sum(lengths)))
        rng.shuffle(order)  # as context-parallel ranks hold them

        def shuffled(values, order=order):
            kind = torch.float64 if isinstance(values[0], float) else torch.int64
            return torch.tensor([values[i] for i in order], dtype=kind)

        h, d = (list(itertools.chain(*(r[k] for r in responses))) for k in (0, 1))
        arguments = (shuffled(sequences), torch.tensor(order))
        kept = select(name, ratio, lowest, *arguments, shuffled(h), shuffled(d))
        starts = list(itertools.accumulate(lengths, initial=0))
        wanted = {starts[i] + t for i, tokens in enumerate(expected) for t in tokens}
        assert {order[i] for i in kept.nonzero()[:, 0].tolist()} == wanted


def test_a_response_of_equal_tokens_and_none_at_all():
    same = torch.ones(4, dtype=torch.float64)
    places = torch.arange(4)
    for name in SELECTIONS:
        kept = select(name, 0.5, False, torch.zeros(4, dtype=torch.int64), places, same, same)
        assert kept.tolist() == [True, True, False, False]
        empty = torch.zeros(0, dtype=torch.int64)
        assert select(name, 0.5, False, empty, empty, same[:0], same[:0]).tolist() == []


@pytest.mark.parametrize("cp_size", [1, 2])
def test_the_choice_does_not_depend_on_the_packing(cp_size):
    """Tokens of one pack, and of packs of one sample each: the same rows of the global batch."""
    samples = random_samples(random.Random(2), 6)
    num_rows = sum(len(s.response_ids) for s in samples)
    generator = torch.Generator().manual_seed(0)
    h, d = torch.rand(2, num_rows, generator=generator).double()
    starts = list(itertools.accumulate((len(s.response_ids) for s in samples), initial=0))

    def kept_rows(batches) -> set[int]:
        found: set[int] = set()
        for batch in batches:
            rows = batch.rows_T[batch.loss_mask_T]
            kept = keep_in_batch("soft_or", 0.4, False, batch, h[rows], d[rows], None)
            found |= set(rows[kept].tolist())
        return found

    together = kept_rows([pack(samples)])
    assert together == kept_rows(pack([s], first_rows=[starts[i]]) for i, s in enumerate(samples))
    reversed_ = [len(samples) - 1 - i for i in range(len(samples))]
    turned = pack([samples[i] for i in reversed_], 4, first_rows=[starts[i] for i in reversed_])
    assert kept_rows([turned]) == together
    assert len(together) == sum(
        max(1, math.floor(0.4 * n)) for s in samples if (n := sum(s.response_mask))
    )
    if cp_size == 2:  # what the ranks would gather, put together by hand
        halves = [pack(samples, place=Place(cp_size=2, cp_rank=r)) for r in range(2)]
        rows = torch.cat([b.rows_T[b.loss_mask_T] for b in halves])
        lengths = [(b.cu_seqlens[1:] - b.cu_seqlens[:-1]) // 2 for b in halves]
        sequences = torch.cat(
            [
                torch.arange(len(n)).repeat_interleave(n)[b.loss_mask_T]
                for n, b in zip(lengths, halves, strict=True)
            ]
        )
        kept = select("soft_or", 0.4, False, sequences, rows, h[rows], d[rows])
        assert set(rows[kept].tolist()) == together


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("name", SELECTIONS)
def test_the_loss_is_that_of_the_kept_tokens(name, kind):
    if kind is TokenSignal and name != "entropy":
        return  # refused, see test_objective_forms
    case = make_case()
    case.batch = replace(case.batch, token_weights_T=torch.ones(7))
    config = LossConfig(backend="eager", selection=name, selection_ratio=0.6, entropy_coef=0.1)
    signal = case.signal(kind)
    out = Objective(config, V, 1.0, None)(case.hidden, case.head, case.batch, signal)
    assert int(out.num_tokens) == int(out.num_scored) == 3
    assert out.sums["loss/selected_fraction"].item() == 3
    assert out.counts["loss/selected_fraction"].item() == 5
    kept = _kept(case, name) if kind is HiddenSignal else None
    gradient = case.gradients(out.loss_sum)[0][case.mask].norm(dim=1) > 0
    assert int(gradient.sum()) == 3
    if kept is not None:
        assert set(gradient.nonzero()[:, 0].tolist()) == kept
        plain = replace(config, selection="none")
        mask = torch.zeros(5)
        mask[list(kept)] = 1.0
        weights = torch.zeros(7)
        weights[case.mask] = mask
        batch = replace(case.batch, token_weights_T=weights)
        alone = Objective(plain, V, 1.0, None)(case.hidden, case.head, batch, signal)
        assert alone.loss_sum.item() == out.loss_sum.item()


def _kept(case: Case, name: str) -> set[int]:
    log_p, log_q = case.log_p().detach(), case.log_q
    h = -(log_p.exp() * log_p).sum(-1)
    kind = SELECTIONS[name].kind or "reverse_kl"
    d = from_logprobs(kind, log_p, log_q, 0.5, 0.1)
    return slow(name, 0.6, h.tolist(), d.tolist())


@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("name", SELECTIONS)
def test_what_is_not_finite_is_kept(name, lowest):
    """So that the step sees it, and is skipped."""
    config = LossConfig(
        backend="eager", selection=name, selection_ratio=0.2, selection_lowest=lowest
    )
    for bad in (1, 4, 5):  # loss tokens
        case = make_case()
        hidden = case.hidden.detach().clone()
        hidden[bad] = torch.nan
        signal = case.signal(HiddenSignal)
        out = Objective(config, V, 1.0, None)(hidden, case.head, case.batch, signal)
        assert not out.loss_sum.isfinite()


def test_selecting_everything_changes_nothing():
    case = make_case()
    outs = [
        Objective(LossConfig(backend="eager", selection=name), V, 1.0, None)(
            case.hidden, case.head, case.batch, case.signal(HiddenSignal)
        )
        for name in ("none", *SELECTIONS)
    ]
    assert len({out.loss_sum.item() for out in outs}) == 1
    assert {int(out.num_tokens) for out in outs} == {5}


def test_selections_are_of_the_table_and_of_divergences():
    choices = typing.get_args(typing.get_type_hints(LossConfig)["selection"])
    assert choices == ("none", *SELECTIONS)
    assert {s.kind for s in SELECTIONS.values()} - {None} <= set(DIVERGENCES)


TWO_STAGES = LossConfig(
    kind="reverse_kl",
    entropy_coef=0.2,
    schedule={
        # By their steps, not by their order.
        "blend": LossStage(until_step=8, kind="mixed", beta=1.0, entropy_coef=0.0, linear=True),
        "start": LossStage(until_step=4, kind="mixed", beta=0.0),
    },
)


def test_forward_kl_then_a_blend_then_reverse_kl():
    at = {step: loss_at(TWO_STAGES, step) for step in range(1, 12)}
    assert [at[s].kind for s in at] == ["mixed"] * 8 + ["reverse_kl"] * 3
    assert [at[s].beta for s in range(1, 9)] == pytest.approx([0, 0, 0, 0, 0.25, 0.5, 0.75, 1])
    coefs = [at[s].entropy_coef for s in at]
    assert coefs == pytest.approx([0.2] * 4 + [0.15, 0.1, 0.05, 0.0] + [0.2] * 3)
    assert at[9] == replace(TWO_STAGES, schedule={})


def test_the_first_stage_may_be_linear_and_end_values_are_exact():
    config = LossConfig(beta=0.1, schedule={"a": LossStage(until_step=3, beta=0.7, linear=True)})
    assert [loss_at(config, s).beta for s in (1, 2)] == pytest.approx([0.3, 0.5])
    assert loss_at(config, 3).beta == 0.7
    assert loss_at(config, 4).beta == 0.1


def test_a_loss_is_that_of_its_step_whatever_came_before():
    """What a resumed run computes: an objective that never saw the earlier steps."""
    case = make_case()
    signal = case.signal(HiddenSignal)

    def loss(objective: Objective, step: int) -> float:
        objective.start_step(step)
        return objective(case.hidden, case.head, case.batch, signal).loss_sum.item()

    config = replace(TWO_STAGES, backend="eager")
    through = Objective(config, V, 1.0, None)
    values = [loss(through, step) for step in range(1, 11)]
    assert values == [loss(Objective(config, V, 1.0, None), step) for step in range(1, 11)]
    assert len(set(values)) == 6  # four alike, four of the blend (its last is not the last stage)


def test_what_a_stage_may_set():
    fields = typing.get_type_hints(LossStage)
    assert set(fields) == {"until_step", "kind", "linear", *NUMBERS}
    assert set(NUMBERS) <= set(typing.get_type_hints(LossConfig))

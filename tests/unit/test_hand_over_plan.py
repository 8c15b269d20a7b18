"""Who sends which hidden states to whom, for many pairs of layouts: the plan alone, no process."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megaopd.batch import Sample
from megaopd.config import ParallelConfig
from megaopd.data.packing import Assignment, Batching, CostModel, Packing
from megaopd.parallel.layout import Layout
from megaopd.teacher.hand_over import HandOver, plan
from tests.helpers.random_batches import random_batching, random_samples


def rows_by_rank(
    samples: list[Sample], batching: Batching, assignment: Assignment
) -> list[list[list[int]]]:
    """[rank][micro-batch] -> the rows of its loss tokens, on ranks of the last stage."""
    held = []
    for rank in range(batching.layout.world_size):
        batches = batching.micro_batches(samples, assignment, rank)
        last = batching.layout.parallel.pipeline - 1
        on_last = batching.layout.coordinates(rank).pp == last
        held.append([b.rows_T[b.loss_mask_T].tolist() if on_last else [] for b in batches])
    return held


@pytest.mark.parametrize("seed", range(60))
def test_every_row_arrives_once_from_a_rank_that_holds_it(seed: int) -> None:
    rng = random.Random(seed)
    world_size = rng.choice([1, 2, 4, 6, 8, 12])
    samples = random_samples(rng, rng.randrange(1, 14), privileged=seed % 2 == 0)
    student = random_batching(rng, world_size)
    teacher = random_batching(rng, world_size, "teacher")
    theirs, ours = teacher.assign(samples), student.assign(samples)
    rounds = plan(samples, teacher, theirs, student, ours)
    assert len(rounds) == ours.num_micro_batches

    first_row = [sum(len(s.response_ids) for s in samples[:i]) for i in range(len(samples))]
    held = [
        {row for part in parts for row in part} for parts in rows_by_rank(samples, teacher, theirs)
    ]
    wanted = rows_by_rank(samples, student, ours)
    for index, round_ in enumerate(rounds):
        num_sent = 0
        for rank in range(world_size):
            arrived = []
            for move in (m for m in round_.moves if m.target == rank):
                mask = samples[move.sample].response_mask
                rows = [first_row[move.sample] + r for r in range(move.start, move.stop) if mask[r]]
                assert held[move.source].issuperset(rows)
                if held[rank].issuperset(rows) and rows:
                    assert move.source == rank  # what a rank holds it does not ask for
                num_sent += len(rows) * (move.source != rank)
                arrived += rows
            assert arrived == wanted[rank][index]
        assert round_.num_sent == num_sent
    # A rank's own plan is its part of the whole.
    for rank in range(world_size):
        own = plan(samples, teacher, theirs, student, ours, rank)
        for mine, whole in zip(own, rounds, strict=True):
            assert mine.num_sent == whole.num_sent
            assert mine.moves == tuple(m for m in whole.moves if rank in (m.source, m.target))
        handed = HandOver(samples, teacher, theirs, student, ours, rank)
        assert handed.num_held == len(held[rank])


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_sent_where_the_layouts_agree(seed: int) -> None:
    rng = random.Random(100 + seed)
    samples = random_samples(rng, 12)
    student = random_batching(rng, 8)
    teacher = replace(student, side="teacher")
    rounds = plan(samples, teacher, teacher.assign(samples), student, student.assign(samples))
    assert sum(len(r.moves) for r in rounds) > 0
    assert [r.num_sent for r in rounds] == [0] * len(rounds)


def test_costs_and_budgets_of_its_own_send_nothing_either() -> None:
    student = Batching(Layout(ParallelConfig(tensor=2), 16), Packing(2))
    theirs = Packing(max_tokens=40)
    teacher = replace(student, side="teacher", packing=theirs, cost=CostModel(attention_length=5))
    sent_apart = 0
    for seed in range(10):
        samples = random_samples(random.Random(200 + seed), 24)
        ours = student.assign(samples)
        apart = plan(samples, teacher, teacher.assign(samples), student, ours)
        sent_apart += sum(r.num_sent for r in apart)
        alike = plan(samples, teacher, teacher.assign(samples, like=ours), student, ours)
        assert sum(r.num_sent for r in alike) == 0
        assert sum(len(r.moves) for r in alike) > 0
    assert sent_apart > 0  # shared out by itself, the teacher does compute others' samples


def test_nothing_is_sent_to_a_student_of_the_teachers_tensor_ranks() -> None:
    """A teacher of TP 4 without data parallelism holds everything everywhere."""
    samples = random_samples(random.Random(0), 9)
    teacher = Batching(Layout(ParallelConfig(tensor=4), 4), Packing(2), "teacher")
    for parallel in (ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(context=2)):
        student = Batching(Layout(parallel, 4), Packing(1))
        rounds = plan(samples, teacher, teacher.assign(samples), student, student.assign(samples))
        assert sum(r.num_sent for r in rounds) == 0


def test_senders_share_the_load() -> None:
    """Four student ranks take from the teacher's last stage, two ranks, as much from each."""
    samples = random_samples(random.Random(1), 9)
    layouts = (ParallelConfig(tensor=2, pipeline=4), ParallelConfig(tensor=4, pipeline=2))
    teacher, student = (Batching(Layout(p, 8), Packing(1)) for p in layouts)
    rounds = plan(samples, teacher, teacher.assign(samples), student, student.assign(samples))
    sources = {(m.source, m.target) for r in rounds for m in r.moves}
    assert sources == {(6, 4), (7, 5), (6, 6), (7, 7)}


def test_samples_of_other_teachers_stay() -> None:
    samples = random_samples(random.Random(2), 8)
    samples[3:] = [replace(s, prompt=replace(s.prompt, teacher="x")) for s in samples[3:]]
    student = Batching(Layout(ParallelConfig(), 2), Packing(1))
    teacher = Batching(Layout(ParallelConfig(pipeline=2), 2), Packing(2), "teacher")
    ours, theirs = student.assign(samples), teacher.assign(samples, teacher="x")
    rounds = plan(samples, teacher, theirs, student, ours)
    assert {m.sample for r in rounds for m in r.moves} == {
        i for i in range(3, 8) if samples[i].response_ids
    }

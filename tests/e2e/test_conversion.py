"""The real SmolLM2-135M to Megatron and back, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.runs import ROOT, run_command

pytestmark = pytest.mark.slow

SMOLLM2 = ROOT / ".cache/demo/teacher"
PROMPTS = (
    "The capital of France is",
    "112, 113, 114, 115\n415, 416, 417, 418\n36, 37, 38,",
    "def fibonacci(n):",
    "Water boils at",
    "Dear Ms. Miller,\n",
)


def convert(
    *arguments: object, ranks: int = 1, timeout_s: float = 200
) -> subprocess.CompletedProcess[str]:
    """`megaopd-convert`, under torchrun where there are ranks to start."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "megaopd.convert", *map(str, arguments)]
    return run_command(command, timeout_s)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """hf -> megatron -> back, converted once."""
    if not (SMOLLM2 / "config.json").is_file():
        pytest.skip("run tools/prepare_demo.py for SmolLM2-135M")
    folder = tmp_path_factory.mktemp("smollm2")
    for arguments in (
        ("hf-to-megatron", SMOLLM2, folder / "megatron"),
        ("megatron-to-hf", folder / "megatron", folder / "back", "--max-shard-size", "200MB"),
    ):
        done = convert(*arguments)
        assert done.returncode == 0, done.stderr
    return folder


def test_tensors_are_equal_bit_for_bit(made):
    original = load_file(SMOLLM2 / "model.safetensors")
    files = sorted((made / "back").glob("*.safetensors"))
    assert len(files) == 3  # an index and its files
    total = 0
    for file in files:
        for name, tensor in load_file(file).items():
            expected = original.pop(name)
            assert tensor.dtype == expected.dtype == torch.float32
            assert torch.equal(tensor.view(torch.int32), expected.view(torch.int32)), name
            total += tensor.numel()
    assert not original
    assert total == 134_515_008


def test_everything_else_is_equal(made):
    back = made / "back"
    kept = {f.name for f in SMOLLM2.iterdir()} - {"model.safetensors"}
    ours = {f.name for f in back.iterdir() if f.suffix != ".safetensors"}
    assert ours == kept | {"model.safetensors.index.json", "SHA256SUMS"}
    for name in kept:
        assert (back / name).read_bytes() == (SMOLLM2 / name).read_bytes(), name
    assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is True


@torch.no_grad()
def greedy(path: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        answer = model.generate(**ids, do_sample=False, max_new_tokens=24)
        answers.append(answer[0].tolist())
    return answers


@pytest.mark.long
def test_greedy_generations_are_identical(made):
    ours, theirs = greedy(made / "back"), greedy(SMOLLM2)
    assert ours == theirs
    assert len({tuple(answer[-5:]) for answer in theirs}) == len(PROMPTS)


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.long)])
def test_check_with_logits(made, ranks):
    layout = ("--tensor", ranks) if ranks > 1 else ()
    done = convert(
        "check", made / "back", made / "megatron", "--logits", "--samples", 4, *layout, ranks=ranks
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "  pass  " in line]
    assert len(lines) == 8, done.stdout
    assert "272 tensors, 134,515,008 values: bit for bit" in done.stdout
    assert "greedy token the same at 100.00 %" in done.stdout
    assert "FAIL" not in done.stdout


def test_sha256sum_reads_the_manifest(made):
    done = run_command(
        ["bash", "-c", f"cd {made / 'megatron/iter_0000000'} && sha256sum -c SHA256SUMS"]
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.endswith(": OK") for line in lines)
    assert "hf/tokenizer.json: OK" in lines
    assert "__0_0.distcp: OK" in lines

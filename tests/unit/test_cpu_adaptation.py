"""Megatron-Core without CUDA: its modules see another torch, everyone else the one there is.

What a process imports cannot be taken back, so the checks run in two fresh processes: one imports
megaopd, then megatron, then transformers; the other transformers alone, and then megatron first.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import ROPE_VARIANTS, make_tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA there is nothing to adapt"),
]

ROOT = Path(__file__).resolve().parents[2]

# A module of megatron.core that does what its real modules do, found through the real import hook.
PROBE = """
import torch
from torch import Tensor

def made():
    device = torch.cuda.current_device()
    return {
        "arange": torch.arange(3, device="cuda"),
        "empty": torch.empty(2, device=torch.device("cuda", 0)),
        "full": torch.full((2,), 7.0, device="cuda:0"),
        "ones": torch.ones(2, device=device, pin_memory=True),
        "rand": torch.rand(2, device="cuda"),
        "randn": torch.randn(2, device="cuda"),
        "tensor": torch.tensor([1, 2], device="cuda", dtype=torch.int32),
        "zeros": torch.zeros(2, device="cuda"),
        "moved": torch.ones(2).cuda(),
        "moved_with_options": torch.ones(2).cuda(device, non_blocking=True),
    }

def moved_is_itself(x):
    return x.cuda() is x

def types(x):
    return [x.type(), x.bfloat16().type(), x.long().type()]

def cast(x):
    return x.type(torch.float64).dtype == torch.float64

def device_calls():
    torch.cuda.set_device(0)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    again = torch.rand(4)
    torch.cuda.manual_seed(5)
    seeded = torch.rand(4)
    return first.equal(again), seeded.equal(torch.rand(4, generator=torch.manual_seed(5)))

same_classes = torch.Tensor is Tensor and torch.nn.Module is torch.nn.modules.Module
"""
PLAIN = "def answer():\n    return 42\n"

WITH_MEGATRON = """
import json, sys
from pathlib import Path
import torch
import torch._dynamo  # torch itself wraps its manual_seed here

places = {"torch": torch, "torch.cuda": torch.cuda, "torch.Tensor": torch.Tensor}
originals = {place: dict(vars(thing)) for place, thing in places.items()}
zeros, current_device = torch.zeros, torch.cuda.current_device

import megaopd
from megaopd.models import build
from megatron.core.optimizer import distrib_optimizer
from megatron.core.tensor_parallel import layers
import megatron.core

folder, model_dir, answers = map(Path, sys.argv[1:])
sys.pycache_prefix, sys.dont_write_bytecode = str(folder / "pycache"), False
megatron.core.__path__.append(str(folder))
from megatron.core import plain, probe
cached = sorted(path.name.split(".")[0] for path in (folder / "pycache").rglob("*.pyc"))
sys.pycache_prefix, sys.dont_write_bytecode = None, True

build_groups = distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups
seen = {
    "replaced": {
        place: sorted(n for n, v in originals[place].items() if vars(thing).get(n) is not v)
        for place, thing in places.items()
    },
    "same": torch.zeros is zeros and torch.cuda.current_device is current_device,
    "torch_of_ours": build.torch is torch,
    "real_torch_in": sorted(
        name for name, module in sys.modules.items()
        if name.startswith("megatron.") and vars(module).get("torch") is torch
    ),
    "view_is_megatrons": layers.torch is not torch,
    "megatron_zeros": str(layers.torch.zeros(2, device="cuda").device),
    "megatron_device": str(layers.torch.cuda.current_device()),
    "made": {name: str(x.device) for name, x in probe.made().items()},
    "full": probe.made()["full"].tolist(),
    "moved_is_itself": probe.moved_is_itself(torch.ones(1)),
    "types": probe.types(torch.ones(1)),
    "cast": probe.cast(torch.ones(1)),
    "device_calls": list(probe.device_calls()),
    "same_classes": probe.same_classes,
    "rewritten": "_megaopd_cuda_type" in build_groups.__code__.co_names,
    "plain": plain.answer(),
    "cached": cached,
    "still_cuda_for_others": {},
}
for name, call in {
    "zeros": lambda: torch.zeros(1, device="cuda"),
    "cuda": lambda: torch.ones(1).cuda(),
    "current_device": lambda: torch.cuda.current_device(),
}.items():
    try:
        call()
        seen["still_cuda_for_others"][name] = "no error"
    except (RuntimeError, AssertionError):
        seen["still_cuda_for_others"][name] = "error"
seen["type_for_others"] = torch.ones(1).type()
print(json.dumps(seen))
"""

# Both processes end with this, over a model that neither has seen before.
LOGITS = """
import transformers
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(torch.arange(40)[None] * 7 % 500).logits
torch.save({"logits": logits, "inv_freq": model.model.rotary_emb.inv_freq}, answers)
"""

WITHOUT_MEGATRON = """
import sys
import torch
_, model_dir, answers = sys.argv[1:]
"""

MEGATRON_FIRST = """
assert not any(name.startswith(("megaopd", "megatron")) for name in sys.modules)
import megatron.core
try:
    import megaopd
except RuntimeError as error:
    print(error)
"""


def _python(code: str, *arguments: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adaptation")
    (path / "probe.py").write_text(PROBE)
    (path / "plain.py").write_text(PLAIN)
    rope = ROPE_VARIANTS["llama3"]
    make_tiny_model(path / "model", "LlamaForCausalLM", rope_parameters=rope, num_hidden_layers=2)
    return path


@pytest.fixture(scope="module")
def seen(folder) -> dict[str, Any]:
    """What a process saw that imported megaopd, megatron, then transformers."""
    code = WITH_MEGATRON + LOGITS
    return json.loads(_python(code, folder, folder / "model", folder / "with.pt"))


@pytest.fixture(scope="module")
def complaint(folder, seen) -> str:
    """What importing megaopd said after megatron; before that the process had neither."""
    code = WITHOUT_MEGATRON + LOGITS + MEGATRON_FIRST
    return _python(code, folder, folder / "model", folder / "without.pt")


def test_torch_is_as_it_was(seen):
    assert seen["replaced"] == {"torch": [], "torch.cuda": [], "torch.Tensor": []}
    assert seen["same"]
    assert seen["torch_of_ours"]
    assert set(seen["still_cuda_for_others"].values()) == {"error"}
    assert seen["type_for_others"] == "torch.FloatTensor"


def test_transformers_computes_the_same(folder, seen, complaint):
    ours, theirs = (torch.load(folder / f"{name}.pt") for name in ("with", "without"))
    assert ours["inv_freq"].equal(theirs["inv_freq"])
    assert ours["inv_freq"][0] == 1.0
    assert ours["logits"].equal(theirs["logits"])
    assert theirs["logits"].std() > 0.1


def test_megatron_sees_the_view(seen):
    assert seen["real_torch_in"] == []
    assert seen["view_is_megatrons"]
    assert seen["megatron_zeros"] == seen["megatron_device"] == "cpu"
    assert set(seen["made"].values()) == {"cpu"}
    assert len(seen["made"]) == 10
    assert seen["full"] == [7.0, 7.0]
    assert seen["device_calls"] == [True, True]
    assert seen["same_classes"]


def test_tensor_methods_are_rewritten(seen):
    assert seen["moved_is_itself"]
    assert seen["types"] == [
        "torch.cuda.FloatTensor",
        "torch.cuda.BFloat16Tensor",
        "torch.cuda.LongTensor",
    ]
    assert seen["cast"]  # .type(dtype) is a cast and stays one
    assert seen["rewritten"]  # in a real module of Megatron's


def test_no_bytecode_of_a_rewritten_module_is_cached(seen):
    assert seen["plain"] == 42
    assert seen["cached"] == ["plain"]


def test_megatron_first_is_refused(complaint):
    assert complaint.endswith("was imported before megaopd; import megaopd first")
    assert complaint.startswith("megatron.core")

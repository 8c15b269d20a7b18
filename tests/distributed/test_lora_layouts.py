"""LoRA under every layout: gradients of A and B, merged and separate export, recomputation, resume.

Two yardsticks. On one rank the gradients are held against those of the whole weights W + s B A of a
student without adapters, dA = s B^T dW and dB = s dW A^T by the chain rule; the other layouts
against one rank. Few launches do all the work; samples and teacher are test_layout_gradients.py's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaopd.config import (
    Config,
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
    StudentConfig,
    TrainConfig,
)
from megaopd.data.packing import Packing
from megaopd.errors import CheckpointError
from megaopd.models.arch import read_arch
from megaopd.models.hf_io import HFWriter
from megaopd.models.hf_io.adapter import adapter_config, write_adapter
from megaopd.models.hf_io.reader import HFReader
from megaopd.models.lora_spec import adapter_mappings, targets
from tests.distributed.test_layout_gradients import (
    VOCAB_SIZE,
    Workbench,
    differences,
    full_gradients,
    layout_in_place,
)
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow

# "sandwich" has gate and up in one tensor; "part" adapts some of the layers that Megatron fuses.
# They meet the layouts that cut layers.
FAMILIES = {
    "untied": "Qwen3ForCausalLM",
    "sandwich": "Glm4ForCausalLM",
    "experts": "Qwen3MoeForCausalLM",
}
CASES = {
    "untied": LoraConfig(rank=4, alpha=6.0),
    "part": LoraConfig(rank=3, alpha=6.0, rslora=True, targets=("q_proj", "v_proj", "up_proj")),
    "sandwich": LoraConfig(rank=4, alpha=6.0),
    "experts": LoraConfig(rank=4, alpha=6.0),
}
LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline=2),
    "pp2_vp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "cp2": ParallelConfig(context=2),
    "dp2": ParallelConfig(),
}
EXPERT_LAYOUTS = {
    "ep2": ParallelConfig(expert=2),
    "etp2": ParallelConfig(expert_tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "tp2_sp_etp1": ParallelConfig(tensor=2, sequence_parallel=True, expert_tensor=1),
    "tp2_sp_ep2_etp1": ParallelConfig(tensor=2, sequence_parallel=True, expert=2, expert_tensor=1),
}
ALL = [(n, c) for n in ("tp2", "tp2_sp") for c in ("untied", "part", "sandwich")]
ALL += [(n, "untied") for n in LAYOUTS if not n.startswith("tp2")]
ALL += [(n, "experts") for n in EXPERT_LAYOUTS]
RECOMPUTED, SAVED = ("tp2_sp", "pp2_vp2"), ("tp2_sp", "pp2")
PACKING = Packing(micro_batch_size=3)


def _family(case: str) -> str:
    return "untied" if case == "part" else case


def _student(
    bench: Workbench, case: str, lora: LoraConfig | None, path: Path, **options: Any
) -> Any:
    from megaopd.engine.student import MegatronStudent
    from megaopd.models.mapping import padded_vocab_size

    recompute = options.pop("recompute", "none")
    config = Config(
        student=StudentConfig(str(path), options.pop("dtype", "fp32"), lora=lora),
        parallel=bench.groups.parallel,
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.0),
        train=TrainConfig(recompute=recompute),
    )
    rows = padded_vocab_size(VOCAB_SIZE, bench.groups.tp.size())
    arch = read_arch(bench.folder / _family(case))
    return MegatronStudent(config, arch, bench.groups, rows, VOCAB_SIZE)


def _adapted(bench: Workbench, case: str, **options: Any) -> Any:
    """A student with the case's adapter, whose B is not 0."""
    from dataclasses import replace

    lora = replace(CASES[case], adapter=str(bench.folder / f"{case}_adapter"))
    return _student(bench, case, lora, bench.folder / _family(case), **options)


def _tensors(pairs: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pairs}


def _step(bench: Workbench, student: Any) -> dict[str, Any]:
    """Metrics of a step, and the gradients of A and B, which take the adapter's place."""
    metrics = bench.step(student, bench.batches(PACKING)).metrics
    full_gradients(student)
    gradients = _tensors(student.export_adapter())
    norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    return {"metrics": metrics, "gradients": gradients, "norm": norm}


def _record(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """What one rank finds, as files; and the chain rule's gradients beside its own."""
    found: dict[str, Any] = {}
    with layout_in_place(folder, ParallelConfig()) as bench:
        for case, lora in CASES.items():
            student = _adapted(bench, case)
            weights = _tensors(student.export_weights())
            adapter = _tensors(student.export_adapter())
            arch = read_arch(folder / _family(case))
            with HFWriter(folder / f"{case}_merged", folder / _family(case), arch) as out:
                out.add_all(weights.items())
            ours = _step(bench, student)
            whole = _student(bench, case, None, folder / f"{case}_merged")
            metrics = bench.step(whole, bench.batches(PACKING)).metrics
            grads = full_gradients(whole)
            wanted = {}
            for layer in {name.rsplit(".lora_", 1)[0] for name in adapter}:
                a, b = (adapter[f"{layer}.lora_{x}.weight"] for x in "AB")
                grad = grads[f"{layer}.weight"]
                wanted[f"{layer}.lora_A.weight"] = lora.scale * b.t() @ grad
                wanted[f"{layer}.lora_B.weight"] = lora.scale * grad @ a.t()
            torch.save({**ours, "weights": weights}, folder / f"{case}.pt")
            found[case] = {
                "loss": (ours["metrics"]["loss/divergence"], metrics["loss/divergence"]),
                "gradients": differences(ours["gradients"], wanted),
                "norms": (ours["metrics"]["train/grad_norm"], ours["norm"]),
            }
        found["base"] = _base_teacher(bench)
        found["bf16"] = _losses(bench)
    return found


def _losses(bench: Workbench) -> list[float]:
    student = _student(bench, "untied", CASES["untied"], bench.folder / "untied", dtype="bf16")
    batches = bench.batches(PACKING)
    return [bench.step(student, batches).metrics["loss/divergence"] for _ in range(6)]


def _base_teacher(bench: Workbench) -> float:
    """Largest difference between the hidden states of the base by itself and under adapters."""
    from megaopd.models.lora_layers import base_only

    batch = bench.batches(Packing(micro_batch_size=8))[0].to(bench.groups.device)
    adapted, plain = (
        _adapted(bench, "untied"),
        _student(bench, "untied", None, bench.folder / "untied"),
    )
    with torch.no_grad(), bench.groups.active():
        changed, wanted = adapted.chunks[0](batch), plain.chunks[0](batch)
        with base_only(adapted.chunks):
            found = adapted.chunks[0](batch)
        assert float((changed - wanted).abs().max()) > 0.05
    return float((found - wanted).abs().max())


def _run_layouts(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, parallel in (LAYOUTS | EXPERT_LAYOUTS).items():
        with layout_in_place(folder, parallel) as bench:
            found[name] = {case: _compare(bench, name, case) for n, case in ALL if n == name}
            if name in RECOMPUTED:
                found[name]["recomputed"] = _recomputed(bench)
    return found


def _compare(bench: Workbench, name: str, case: str) -> dict[str, Any]:
    folder = bench.folder
    wanted = torch.load(folder / f"{case}.pt")
    student = _adapted(bench, case)
    weights, adapter = _tensors(student.export_weights()), _tensors(student.export_adapter())
    stored = HFReader(folder / "files" / f"{case}_adapter")
    started = _student(bench, case, CASES[case], folder / _family(case))
    base = HFReader(folder / _family(case))
    out = {
        "weights": max(differences(weights, wanted["weights"]).values()),
        "adapter": all(
            stored.read(f"base_model.model.{n}").equal(tensor) for n, tensor in adapter.items()
        ),
        "only_trainable": [n for n, _ in student.export_weights(only_trainable=True)],
        "start": {n: float(t.double().sum()) for n, t in started.export_adapter()},
        "start_is_base": all(base.read(n).equal(t) for n, t in started.export_weights()),
    }
    if name in SAVED:
        from megaopd.checkpoint import open_weights

        root = folder / f"saved_{name}_{case}"
        student.save(root, folder / _family(case))
        saved = open_weights(root)
        out["saved"] = all(saved.read(n).equal(tensor) for n, tensor in weights.items())
    ours = _step(bench, student)
    return {
        **out,
        "metrics": ours["metrics"],
        "wanted": wanted["metrics"],
        "norm": ours["norm"],
        "gradients": differences(ours["gradients"], wanted["gradients"]),
    }


def _recomputed(bench: Workbench) -> bool:
    """Whether recomputation gives the gradients of none, to the bit."""
    none, full = (
        _step(bench, _adapted(bench, "untied", recompute=r))["gradients"] for r in ("none", "full")
    )
    return all(full[n].equal(none[n]) for n in none)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora")
    for name, family in FAMILIES.items():
        sizes: dict[str, Any] = {"num_hidden_layers": 4, "num_key_value_heads": 4}
        make_tiny_model(path / name, family, seed=2, vocab_size=VOCAB_SIZE, **sizes)
    for seed, (case, lora) in enumerate(CASES.items()):
        arch = read_arch(path / _family(case))
        mappings = adapter_mappings(arch, lora)
        generator = torch.Generator().manual_seed(seed)
        tensors = [
            (m.hf[0], torch.randn(m.layout.hf_shapes()[0], generator=generator) * 0.2)
            for m in mappings.values()
        ]
        adapter = path / f"{case}_adapter"
        config = adapter_config(lora, targets(arch, lora), str(path / _family(case)))
        write_adapter(adapter, config, mappings.values(), tensors, torch.float32)
        # HFReader reads any safetensors under the name that it knows.
        copy = path / "files" / f"{case}_adapter"
        copy.mkdir(parents=True)
        (copy / "model.safetensors").symlink_to(adapter / "adapter_model.safetensors")
    return path


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> dict[str, Any]:
    return run_distributed(_record, 1, folder, timeout_s=240)[0]


@pytest.fixture(scope="module")
def layouts(folder: Path, one_rank: dict[str, Any]) -> list[dict[str, Any]]:
    return run_distributed(_run_layouts, 2, folder, timeout_s=600)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_whole_weights_by_the_chain_rule(
    one_rank: dict[str, Any], case: str
) -> None:
    found = one_rank[case]
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-5)
    assert max(found["gradients"].values()) < 1e-4
    assert found["norms"][0] == pytest.approx(found["norms"][1], rel=1e-5)


def test_the_base_under_adapters_is_the_base_to_the_bit(one_rank: dict[str, Any]) -> None:
    assert one_rank["base"] == 0.0


def test_adapters_learn_in_bf16(one_rank: dict[str, Any]) -> None:
    losses = one_rank["bf16"]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("name", "case"), ALL)
def test_a_layout_changes_nothing(layouts: list[dict[str, Any]], name: str, case: str) -> None:
    for found in (rank[name][case] for rank in layouts):
        for metric in ("loss/divergence", "train/grad_norm"):
            wanted = found["wanted"][metric]
            assert found["metrics"][metric] == pytest.approx(wanted, rel=1e-5), metric
        assert found["metrics"]["train/grad_norm"] == pytest.approx(found["norm"], rel=1e-5)
        assert max(found["gradients"].values()) < 1e-4
        assert found["weights"] < 1e-6
        assert found["adapter"]
        assert found["start_is_base"]  # B is 0
        assert found["start"] == layouts[0]["ep2" if case == "experts" else "tp2"][case]["start"]


@pytest.mark.parametrize(("name", "case"), [(n, c) for n, c in ALL if n in SAVED])
def test_a_checkpoint_has_the_adapters_merged(
    layouts: list[dict[str, Any]], name: str, case: str
) -> None:
    assert all(rank[name][case]["saved"] for rank in layouts)


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputation_changes_nothing(layouts: list[dict[str, Any]], name: str) -> None:
    assert layouts[0][name]["recomputed"]


def test_only_adapted_weights_are_synchronised(layouts: list[dict[str, Any]]) -> None:
    part = layouts[0]["tp2"]["part"]["only_trainable"]
    # What Megatron fuses with an adapted layer comes along.
    kinds = {name.rsplit(".", 2)[1] for name in part}
    assert kinds == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


def test_an_adapter_of_other_settings_is_refused(folder: Path) -> None:
    from megaopd.models.hf_io.adapter import AdapterReader

    arch, lora = read_arch(folder / "untied"), CASES["untied"]
    reader = AdapterReader(folder / "untied_adapter")
    reader.check(lora, adapter_mappings(arch, lora))
    for other, said in (
        (LoraConfig(rank=8, alpha=6.0), "r is 4, student.lora.rank 8"),
        (LoraConfig(rank=4, alpha=8.0), "lora_alpha is 6, student.lora.alpha 8.0"),
        (LoraConfig(rank=4, alpha=6.0, rslora=True), "use_rslora is false"),
        (LoraConfig(rank=4, alpha=6.0, targets=("q_proj",)), "is on a layer that gets no adapter"),
    ):
        with pytest.raises(CheckpointError, match=said):
            reader.check(other, adapter_mappings(arch, other))
    config = json.loads((folder / "untied_adapter" / "adapter_config.json").read_text())
    others = {"use_dora": True, "modules_to_save": ["lm_head"], "peft_type": "IA3"}
    for key, value in (others | {"init_lora_weights": "pissa"}).items():
        reader.config = config | {key: value}
        with pytest.raises(CheckpointError, match=key):
            reader.check(lora, adapter_mappings(arch, lora))

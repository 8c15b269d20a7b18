"""Comparing a Megatron checkpoint with a Hugging Face directory."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaopd.convert import check, compare, logits
from megaopd.convert.check import check_conversion
from megaopd.convert.compare import compare_tensors
from megaopd.convert.to_megatron import convert_to_megatron
from megaopd.errors import CheckpointError
from megaopd.models.arch import read_arch
from megaopd.models.families import FAMILIES
from megaopd.models.hf_io import HFReader
from megaopd.models.mapping import Vocab
from tests.helpers.tiny_models import edit_config, make_tiny_model

WEIGHTS = "model.safetensors"
NORM, KEY = "model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.k_proj.weight"


def source(path, tensors):
    path.mkdir()
    save_file(tensors, path / WEIGHTS)
    return HFReader(path)


class TestCompareTensors:
    """Two sources of any kind; here both are Hugging Face directories."""

    @pytest.fixture(autouse=True)
    def _small_blocks(self, monkeypatch):
        monkeypatch.setattr(compare, "BLOCK_BYTES", 1000)

    @pytest.fixture
    def tensors(self):
        generator = torch.Generator().manual_seed(0)
        return {
            "matrix": torch.randn(61, 37, generator=generator),
            "vector": torch.randn(700, generator=generator),
        }

    def compared(self, tmp_path, ours, theirs):
        num_bytes = []
        sources = source(tmp_path / "ours", ours), source(tmp_path / "theirs", theirs)
        found = compare_tensors(*sources, sorted(ours), num_bytes.append)
        assert sum(num_bytes) == sum(tensor.nbytes for tensor in theirs.values())
        assert len(num_bytes) > 6  # a block at a time
        assert found.tensors == 2
        assert found.values == 61 * 37 + 700
        return found.equality

    def test_equal(self, tmp_path, tensors):
        assert self.compared(tmp_path, tensors, tensors) == {"bit for bit": 2}

    def test_rounded(self, tmp_path, tensors):
        rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        assert self.compared(tmp_path, tensors, rounded) == {"float32 rounded to bfloat16": 2}

    def test_widened(self, tmp_path, tensors):
        """Wider than they need be: nothing may have been added."""
        narrow = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        wide = {name: tensor.float() for name, tensor in narrow.items()}
        same = {"the same values in bfloat16 and float32": 2}
        assert self.compared(tmp_path, narrow, wide) == same

    def test_one_rounded_and_one_equal(self, tmp_path, tensors):
        other = tensors | {"vector": tensors["vector"].bfloat16()}
        senses = {"bit for bit": 1, "float32 rounded to bfloat16": 1}
        assert self.compared(tmp_path, tensors, other) == senses

    def test_half_and_bfloat16(self, tmp_path, tensors):
        ours = {name: tensor.half() for name, tensor in tensors.items()}
        theirs = {name: tensor.bfloat16() for name, tensor in ours.items()}
        senses = {"float16 rounded to bfloat16": 2}
        assert self.compared(tmp_path, ours, theirs) == senses

    def differing(self, tmp_path, ours, theirs):
        with pytest.raises(CheckpointError) as caught:
            self.compared(tmp_path, ours, theirs)
        return str(caught.value)

    def test_it_says_where_and_by_how_much(self, tmp_path, tensors):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed["matrix"][40, 3] = 9.0
        changed["matrix"][41, 4] += 0.25
        text = self.differing(tmp_path, tensors, changed)
        was = tensors["matrix"][40, 3].item()
        assert f"theirs/{WEIGHTS}: matrix: differs from" in text
        assert f"ours/{WEIGHTS}: matrix: 9 against {was:.9g} at [40, 3]; 2 of 2,257 values" in text
        assert f"by up to {9 - was:.3g}" in text

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda t: t[699].neg_(), "at [699]; 1 of 700 values"),
            (lambda t: t[5].fill_(torch.nan), "nan against"),
            (lambda t: t.copy_(torch.where(t == 0, -0.0, t)), "-0 against 0 at [2]; 1 of 700"),
            (lambda t: t.view(torch.int32)[7].add_(1), "at [7]; 1 of 700 values"),
        ],
        ids=["sign", "NaN", "sign of zero", "last bit"],
    )
    def test_the_least_difference(self, tmp_path, tensors, change, says):
        tensors["vector"][2] = 0.0
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        change(changed["vector"])
        assert says in self.differing(tmp_path, tensors, changed)

    def test_rounded_otherwise(self, tmp_path, tensors):
        """Truncated, not rounded to the nearest."""
        truncated = {
            name: (tensor.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
            for name, tensor in tensors.items()
        }
        assert "matrix: differs" in self.differing(tmp_path, tensors, truncated)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A model and its conversion, of which tests take copies."""
    folder = tmp_path_factory.mktemp("converted")
    make_tiny_model(folder / "hf", "Qwen3ForCausalLM", vocab_size=509, num_hidden_layers=2)
    convert_to_megatron(folder / "hf", folder / "megatron")
    return folder


@pytest.fixture
def pair(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "pair")
    return tmp_path / "pair" / "hf", tmp_path / "pair" / "megatron"


def outcome(report):
    return {item.name: item.passed for item in report.items}


def test_all_passes(pair):
    report = check_conversion(*pair)
    assert set(outcome(report).values()) == {True}
    report.require()
    details = {item.name: item.detail for item in report.items}
    assert details["tensors"] == "25 tensors, 139,264 values: bit for bit"
    assert details["config.json"] == "Qwen3ForCausalLM; the same"
    assert details["companion files"].endswith("files, the same bytes")
    assert "no SHA256SUMS" in details["Hugging Face files"]
    assert "SHA256SUMS" in details["Megatron files"]
    lines = report.table().splitlines()
    assert len(lines) == len(report.items)
    assert all("  pass  " in line for line in lines)


def rewrite(path, change):
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def _flip(file: Path, position: int = -40) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)


DIFFERENCES = {
    "a value": (
        lambda hf, megatron: rewrite(hf, lambda t: t[KEY][3, 2].add_(0.5)),
        "tensors",
        (KEY, "at [3, 2]; 1 of 2,048 values, by up to 0.5"),
        set(),
    ),
    "a tensor too few": (
        lambda hf, megatron: rewrite(hf, lambda t: t.pop(NORM)),
        "names and shapes",
        (NORM, "missing"),
        {"tensors", "padding"},
    ),
    "a byte of Megatron's": (
        lambda hf, megatron: _flip(megatron / "iter_0000000/__0_0.distcp"),
        "Megatron files",
        ("__0_0.distcp", "SHA-256 differs"),
        {"config.json", "companion files", "names and shapes", "tensors", "padding"},
    ),
    "a field of config.json": (
        lambda hf, megatron: edit_config(hf, rms_norm_eps=1e-3),
        "config.json",
        ("config.json: rms_norm_eps", "1e-06", "0.001"),
        {"names and shapes", "tensors", "padding"},
    ),
    "the tokenizer": (
        lambda hf, megatron: _flip(hf / "tokenizer.json", 100),
        "companion files",
        ("tokenizer.json", "differs from"),
        set(),
    ),
    "a file more": (
        lambda hf, megatron: (hf / "notes.md").write_text("new"),
        "companion files",
        ("hf/notes.md", "missing"),
        set(),
    ),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_difference_is_named(pair, difference):
    change, failing, says, not_reached = DIFFERENCES[difference]
    change(*pair)
    report = check_conversion(*pair)
    expected = dict.fromkeys(outcome(report), True)
    expected |= {failing: False} | dict.fromkeys(not_reached)
    assert outcome(report) == expected
    assert "FAIL" in report.table()
    with pytest.raises(CheckpointError) as caught:
        report.require()
    assert all(words in str(caught.value) for words in says), str(caught.value)


def test_another_dtype(pair, tmp_path):
    hf, _ = pair
    convert_to_megatron(hf, tmp_path / "bf16", dtype=torch.bfloat16)
    report = check_conversion(hf, tmp_path / "bf16")
    report.require()
    details = {item.name: item.detail for item in report.items}
    assert details["tensors"].endswith("values: float32 rounded to bfloat16")
    assert details["config.json"].endswith("the same but for its dtype")
    config = tmp_path / "bf16/iter_0000000/hf/config.json"
    assert json.loads(config.read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_with_logits(tmp_path, family):
    hf, megatron = make_tiny_model(tmp_path / "hf", family, vocab_size=509), tmp_path / "megatron"
    convert_to_megatron(hf, megatron)
    report = check_conversion(hf, megatron, logits=True, samples=3)
    report.require()
    details = {item.name: item.detail for item in report.items}
    assert set(outcome(report).values()) == {True}
    assert details["padding"] == "6 rows, all zero"
    assert details["tensors"].endswith(": bit for bit")
    assert "positions of text" in details["logits"]
    assert "greedy token the same at 100.00 %" in details["logits"]


def test_padding_that_is_not_zero(pair, monkeypatch):
    hf, megatron = pair
    load = Vocab.load

    def dirty(self, read, part):
        rows = load(self, read, part).clone()
        rows[510] = 1.0
        return rows

    monkeypatch.setattr(Vocab, "load", dirty)
    convert_to_megatron(hf, megatron.with_name("dirty"))
    report = check_conversion(hf, megatron.with_name("dirty"))
    assert outcome(report)["tensors"] is True
    assert outcome(report)["padding"] is False
    with pytest.raises(CheckpointError, match="row 510, after the vocabulary of 509, is not zero"):
        report.require()


def test_logits_that_differ(pair, monkeypatch):
    """Every tensor is right, and Megatron's network is not."""
    arch = read_arch(pair[0])
    monkeypatch.setattr(check, "read_arch", lambda path: replace(arch, norm_eps=0.1))
    report = check_conversion(*pair, logits=True, samples=2)
    assert outcome(report)["tensors"] is True
    assert outcome(report)["logits"] is False
    with pytest.raises(CheckpointError, match=r"logits differ from transformers': .* positions"):
        report.require()


def test_logits_of_weights_alone(pair):
    """Without a tokenizer the sequences are random ids."""
    hf, _ = pair
    for file in hf.glob("tokenizer*"):
        file.unlink()
    sequences, text = logits.probe_sequences(hf, vocab_size=509, number=3)
    assert not text
    assert len(sequences) == 3
    assert all(0 <= token < 509 for ids in sequences for token in ids)
    assert len({tuple(ids) for ids in sequences}) == 3


def test_sequences_of_text(pair):
    sequences, text = logits.probe_sequences(pair[0], vocab_size=509, number=20)
    assert text
    assert len({tuple(ids) for ids in sequences}) == 20
    assert min(map(len, sequences)) > 10

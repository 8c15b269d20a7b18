"""Hugging Face -> Megatron -> Hugging Face, and what keeps either from being written."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from transformers import AutoModelForCausalLM

from megaopd.checkpoint.reader import MegatronReader
from megaopd.convert import cli
from megaopd.convert.progress import Progress
from megaopd.convert.ranks import Ranks
from megaopd.convert.to_hf import convert_to_hf
from megaopd.convert.to_megatron import convert_to_megatron
from megaopd.errors import CheckpointError, ConfigError, EnvironmentFault
from megaopd.models.families import FAMILIES
from megaopd.models.hf_io.companions import companions
from megaopd.storage.manifest import MANIFEST, verify_manifest, write_manifest
from megaopd.storage.steps import complete_steps
from tests.helpers.tiny_models import edit_config, make_tiny_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
KEY = "model.layers.1.self_attn.k_proj.weight"
MOE = "Qwen3MoeForCausalLM"
POINTER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def model_dir(tmp_path):
    return make_tiny_model(tmp_path / "model", "Qwen3ForCausalLM", vocab_size=509)


def files_in(path):
    return {file.name for file in path.iterdir()}


def tensors_in(path):
    """All tensors of a Hugging Face directory, read without our own reader."""
    found = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    return found


def rewrite(path, change):
    """Lets `change` edit the dict of the tensors of a directory with one file."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def assert_same_model(ours, theirs):
    """Names, dtypes, bits and companions."""
    mine, other = tensors_in(ours), tensors_in(theirs)
    assert mine.keys() == other.keys()
    for name, tensor in other.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name
    assert companions(ours) == companions(theirs)
    for name in companions(theirs):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def round_trip(src, **options):
    megatron, hf = src.with_name("megatron"), src.with_name("back")
    step = convert_to_megatron(src, megatron)
    verify_manifest(step)
    convert_to_hf(megatron, hf, **options)
    verify_manifest(hf)
    return hf


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(
    ("tied", "dtype", "max_shard_size"),
    [(False, torch.float32, "200KB"), (True, torch.bfloat16, "5GB")],
)
def test_round_trip_is_exact(tmp_path, family, tied, dtype, max_shard_size):
    source = make_tiny_model(
        tmp_path / "model",
        family,
        vocab_size=509,
        tie_word_embeddings=tied,
        dtype=dtype,
        max_shard_size=max_shard_size,
    )
    (source / "extra").mkdir()
    (source / "extra" / "custom_tokens.json").write_text("{}")
    assert_same_model(round_trip(source), source)
    assert files_in(tmp_path) == {"model", "megatron", "back"}
    assert files_in(tmp_path / "megatron") == {"iter_0000000", POINTER}
    assert (tmp_path / "megatron" / POINTER).read_text() == "0"


def test_several_data_files(model_dir, monkeypatch):
    monkeypatch.setattr("megaopd.convert.to_megatron.FILE_BYTES", 200_000)
    assert_same_model(round_trip(model_dir), model_dir)
    step = model_dir.with_name("megatron") / "iter_0000000"
    sizes = {file.name: file.stat().st_size for file in step.glob("*.distcp")}
    assert sizes.keys() == {f"__0_{i}.distcp" for i in range(len(sizes))}
    assert len(sizes) == 4


def test_files_of_the_export(tmp_path, model_dir):
    back = round_trip(model_dir, max_shard_bytes=200_000)
    shards = sorted(back.glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((back / INDEX).read_text())
    assert index["weight_map"] == {name: s.name for s in shards for name in load_file(s)}
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (back, model_dir)
        )
    assert torch.equal(ours, theirs)


def test_fused_experts(tmp_path):
    apart = make_tiny_model(tmp_path / "model", MOE)
    fused = tmp_path / "fused"
    shutil.copytree(apart, fused)
    model = AutoModelForCausalLM.from_pretrained(apart)
    model.save_pretrained(fused, save_original_format=False)
    assert any("gate_up_proj" in name for name in tensors_in(fused))
    back = round_trip(fused)
    ours, theirs = tensors_in(back), tensors_in(apart)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


class TestDtypes:
    def test_norms_in_fp32(self, tmp_path):
        """What Megatron stores in one tensor is alike, so everything keeps its own dtype."""
        source = make_tiny_model(tmp_path / "model", dtype=torch.bfloat16)
        rewrite(
            source,
            lambda ts: ts.update({n: t.float() for n, t in ts.items() if "layernorm" in n}),
        )
        assert_same_model(round_trip(source), source)

    def test_one_layer_differs(self, tmp_path):
        source = make_tiny_model(tmp_path / "model", dtype=torch.bfloat16)
        name = "model.layers.2.mlp.up_proj.weight"
        rewrite(source, lambda ts: ts.update({name: ts[name].float()}))
        with pytest.raises(CheckpointError) as caught:
            convert_to_megatron(source, tmp_path / "megatron")
        assert f"{name}: is float32 while model.layers.0.mlp.gate_proj.weight" in str(caught.value)
        assert "--dtype" in str(caught.value)
        assert files_in(tmp_path) == {"model"}
        convert_to_megatron(source, tmp_path / "megatron", dtype=torch.bfloat16)
        convert_to_hf(tmp_path / "megatron", tmp_path / "back")
        rewrite(source, lambda ts: ts.update({name: ts[name].bfloat16()}))
        assert_same_model(tmp_path / "back", source)

    @pytest.mark.parametrize("on_the_way", ["there", "back"])
    def test_cast(self, tmp_path, model_dir, on_the_way):
        there = {"dtype": torch.bfloat16} if on_the_way == "there" else {}
        back = {"dtype": torch.bfloat16} if on_the_way == "back" else {}
        convert_to_megatron(model_dir, tmp_path / "megatron", **there)
        convert_to_hf(tmp_path / "megatron", tmp_path / "back", **back)
        source, ours = tensors_in(model_dir), tensors_in(tmp_path / "back")
        assert all(torch.equal(ours[name], source[name].bfloat16()) for name in source)
        assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("value", "dtype", "found"),
    [
        (float("nan"), None, r"model.safetensors: .*k_proj.weight: 1 of 2048 values are NaN"),
        (float("-inf"), None, r"k_proj.weight: 1 of 2048 values are NaN or infinite"),
        (3.4e38, torch.bfloat16, r"weight as bfloat16: 1 of 8192 values are NaN or infinite"),
    ],
)
def test_values_that_are_no_numbers(tmp_path, model_dir, value, dtype, found):
    rewrite(model_dir, lambda ts: ts[KEY].__setitem__((3, 5), value))
    with pytest.raises(CheckpointError, match=found):
        convert_to_megatron(model_dir, tmp_path / "megatron", dtype=dtype)
    assert files_in(tmp_path) == {"model"}


def test_nan_in_a_megatron_checkpoint(tmp_path, model_dir, monkeypatch):
    monkeypatch.setattr("megaopd.convert.to_megatron.finite_reader", lambda s, m: s.reader_of(m))
    rewrite(model_dir, lambda ts: ts[KEY].__setitem__((3, 5), float("nan")))
    convert_to_megatron(model_dir, tmp_path / "megatron")
    with pytest.raises(CheckpointError, match=r"k_proj.weight.*: 1 of 2048 values are NaN"):
        convert_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert files_in(tmp_path) == {"model", "megatron"}


class TestDestination:
    def test_exists(self, tmp_path, model_dir):
        megatron, back = tmp_path / "megatron", tmp_path / "back"
        step = convert_to_megatron(model_dir, megatron)
        convert_to_hf(megatron, back)
        before = [(file, file.stat().st_mtime_ns) for file in (step / MANIFEST, back / MANIFEST)]
        with pytest.raises(ConfigError, match="megatron: holds a converted model.*--overwrite"):
            convert_to_megatron(model_dir, megatron)
        with pytest.raises(ConfigError, match="back: exists"):
            convert_to_hf(megatron, back)
        assert before == [(file, file.stat().st_mtime_ns) for file, _ in before]

    def test_overwrite(self, tmp_path, model_dir):
        round_trip(model_dir)
        rewrite(model_dir, lambda ts: ts[KEY].mul_(2))
        convert_to_megatron(model_dir, tmp_path / "megatron", overwrite=True)
        convert_to_hf(tmp_path / "megatron", tmp_path / "back", overwrite=True)
        assert_same_model(tmp_path / "back", model_dir)
        assert files_in(tmp_path / "megatron") == {"iter_0000000", POINTER}

    def test_checkpoints_of_a_run_are_not_replaced(self, tmp_path, model_dir):
        (tmp_path / "megatron" / "iter_0000100").mkdir(parents=True)
        with pytest.raises(ConfigError, match="exists and holds iter_0000100"):
            convert_to_megatron(model_dir, tmp_path / "megatron", overwrite=True)
        assert files_in(tmp_path / "megatron") == {"iter_0000100"}

    def test_something_else_is_not_replaced(self, tmp_path, model_dir):
        convert_to_megatron(model_dir, tmp_path / "megatron")
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "thesis.tex").write_text("")
        with pytest.raises(ConfigError, match="thesis: "):
            convert_to_hf(tmp_path / "megatron", tmp_path / "thesis", overwrite=True)
        with pytest.raises(ConfigError, match=r"thesis: exists and holds thesis\.tex"):
            convert_to_megatron(model_dir, tmp_path / "thesis", overwrite=True)
        assert files_in(tmp_path / "thesis") == {"thesis.tex"}

    def test_inside_the_source(self, tmp_path, model_dir):
        with pytest.raises(ConfigError, match="lie in one another"):
            convert_to_megatron(model_dir, model_dir / "megatron")
        convert_to_megatron(model_dir, tmp_path / "megatron")
        with pytest.raises(ConfigError, match="lie in one another"):
            convert_to_hf(tmp_path / "megatron", tmp_path / "megatron/iter_0000000/hf")

    def test_no_room(self, tmp_path, model_dir, monkeypatch):
        convert_to_megatron(model_dir, tmp_path / "megatron")
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
        for convert, src in (
            (convert_to_megatron, model_dir),
            (convert_to_hf, tmp_path / "megatron"),
        ):
            with pytest.raises(EnvironmentFault, match=r"needs \d{6,} bytes, 100000 are free"):
                convert(src, tmp_path / "new")
        assert files_in(tmp_path) == {"model", "megatron"}

    @pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
    def test_the_disk_fills_up(self, tmp_path, model_dir, monkeypatch, direction):
        """The room was there at the start, and is gone halfway."""
        convert_to_megatron(model_dir, tmp_path / "megatron")
        monkeypatch.setattr("megaopd.storage.streamed.StreamedFile._append", full_after(300_000))
        convert = {"hf-to-megatron": convert_to_megatron, "megatron-to-hf": convert_to_hf}
        src = {"hf-to-megatron": model_dir, "megatron-to-hf": tmp_path / "megatron"}
        with pytest.raises(EnvironmentFault, match=r"no space left .* needs \d+ bytes, \d+ are"):
            convert[direction](src[direction], tmp_path / "new")
        assert files_in(tmp_path) == {"model", "megatron"}


def full_after(num_bytes):
    """A `StreamedFile._append` on a disk with so much room."""

    def append(self, view):
        if self._written + len(view) > num_bytes:
            raise OSError(28, os.strerror(28), str(self._file.name))
        self._file.write(view)
        self._written += len(view)

    return append


def test_a_changed_source_is_not_read(tmp_path, model_dir):
    """A source with a manifest is held against it, in both formats."""
    back = round_trip(model_dir)
    for src, convert in ((back, convert_to_megatron), (tmp_path / "megatron", convert_to_hf)):
        (file,) = [*src.rglob("*.safetensors"), *src.rglob("*.distcp")]
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{file.name}: SHA-256 differs"):
            convert(src, tmp_path / "new")
    assert files_in(tmp_path) == {"model", "megatron", "back"}


def test_optimizer_states_stay_behind(tmp_path, model_dir):
    """A training's checkpoint holds more than the model."""
    step = convert_to_megatron(model_dir, tmp_path / "megatron")
    metadata = pickle.loads((step / ".metadata").read_bytes())
    weight = metadata.state_dict_metadata["embedding.word_embeddings.weight"]
    (place,) = [v for k, v in metadata.storage_data.items() if k.fqn.startswith("embedding")]
    for key in ("optimizer.state.exp_avg.embedding.word_embeddings.weight", "rng_state"):
        chunk = ChunkStorageMetadata(weight.chunks[0].offsets, weight.chunks[0].sizes)
        metadata.state_dict_metadata[key] = TensorStorageMetadata(
            TensorProperties(dtype=torch.float32), weight.size, [chunk]
        )
        metadata.storage_data[MetadataIndex(key, chunk.offsets)] = place
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    (step / MANIFEST).unlink()
    write_manifest(step)
    convert_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_model(tmp_path / "back", model_dir)


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _signals(self, monkeypatch):
        monkeypatch.setattr(cli.signal, "signal", lambda number, handler: None)

    def test_dry_run(self, tmp_path, model_dir, capsys):
        dst = tmp_path / "dst"
        cli.main(["hf-to-megatron", str(model_dir), str(dst), "--dtype", "bf16", "--dry-run"])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["name", "shape", "dtype", "bytes", "made", "of"]
        (qkv,) = [line for line in lines if "linear_qkv.weight(2, 0, 0)" in line]
        assert "[1, 128, 64]  bfloat16  16384 " in qkv
        assert qkv.endswith(" ".join(f"model.layers.2.self_attn.{x}_proj.weight" for x in "qkv"))
        assert f"would be written to {dst}/iter_0000000; nothing was" in lines[-1]
        assert files_in(tmp_path) == {"model"}

        convert_to_megatron(model_dir, tmp_path / "megatron")
        before = files_in(tmp_path)
        cli.main(["megatron-to-hf", str(tmp_path / "megatron"), str(dst), "--dry-run"])
        lines = capsys.readouterr().out.splitlines()
        (key,) = [line for line in lines if line.startswith(KEY)]
        assert key.split() == [KEY, "[32,", "64]", "float32", "8192", WEIGHTS]
        num_tensors = len(tensors_in(model_dir))
        assert lines[-1].startswith(f"{num_tensors} tensors, ")
        assert files_in(tmp_path) == before

    def test_both_directions(self, tmp_path, model_dir, capsys):
        megatron, back = str(tmp_path / "megatron"), str(tmp_path / "back")
        cli.main(["hf-to-megatron", str(model_dir), megatron])
        cli.main(["megatron-to-hf", megatron, back, "--step", "0", "--max-shard-size", "200KB"])
        cli.main(["hf-to-megatron", back, megatron, "--overwrite"])
        assert_same_model(tmp_path / "back", model_dir)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in lines] == [
            f"{megatron}/iter_0000000",
            back,
            f"{megatron}/iter_0000000",
        ]

    def test_unknown_architecture(self, tmp_path, model_dir):
        edit_config(model_dir, architectures=["MambaForCausalLM"])
        with pytest.raises(ConfigError) as caught:
            cli.main(["hf-to-megatron", str(model_dir), str(tmp_path / "dst")])
        assert all(family in str(caught.value) for family in FAMILIES)

    @pytest.mark.parametrize("argv", [[], ["hf-to-megatron"], ["megatron-to-hf", "a", "b", "c"]])
    def test_usage(self, argv, capsys):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 2

    def test_sizes(self):
        sizes = {"5GB": 5_000_000_000, "500mb": 500_000_000, "1.5KB": 1500, "4GiB": 4 << 30}
        assert {text: cli.parse_size(text) for text in sizes} == sizes
        for text in ("5", "GB", "-1GB", "0B", "5 apples"):
            with pytest.raises(cli.argparse.ArgumentTypeError, match="is "):
                cli.parse_size(text)


def test_shares_are_equal_in_bytes():
    sizes = [100, 3, 1, 40, 30, 30, 2]
    shares = [Ranks(rank, 3).share(sizes, lambda size: size) for rank in range(3)]
    assert shares == [[100], [3, 40, 30], [1, 30, 2]] or sorted(sum(shares, [])) == sorted(sizes)
    assert max(map(sum, shares)) == 100
    assert all(share == sorted(share, key=sizes.index) for share in shares)


def test_an_incomplete_step_is_not_exported(tmp_path, model_dir):
    step = convert_to_megatron(model_dir, tmp_path / "megatron")
    (step / ".metadata").unlink()
    assert complete_steps(tmp_path / "megatron") == []
    with pytest.raises(CheckpointError, match="iter_0000000"):
        MegatronReader(tmp_path / "megatron")
    with pytest.raises(CheckpointError, match="iter_0000000"):
        convert_to_hf(tmp_path / "megatron", tmp_path / "back")


class TestProgress:
    def advance(self, ranks):
        with Progress("writing", 4_000_000, ranks) as progress:
            progress(1_000_000)
            progress(1_000_000)

    def test_lines_where_there_is_no_terminal(self, capsys, monkeypatch):
        monkeypatch.setattr("megaopd.convert.progress.LINE_EVERY_S", 0.0)
        self.advance(Ranks())
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch(r"writing: 2\.0 MB of 4\.0 MB, [\d.]+ [kMGT]?B/s, \d+ s left", line)

    def test_silence_in_between_and_on_other_ranks(self, capsys, monkeypatch):
        self.advance(Ranks())
        monkeypatch.setattr("megaopd.convert.progress.LINE_EVERY_S", 0.0)
        self.advance(Ranks(1, 2))
        assert capsys.readouterr().err == ""

    def test_bar(self, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        self.advance(Ranks(0, 2))
        bar = capsys.readouterr().err
        assert "writing (rank 0's share of 2): " in bar
        assert "2.00M/4.00M" in bar

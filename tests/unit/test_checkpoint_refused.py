"""Megatron checkpoints that are damaged, incomplete, of another model or malicious."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from megaopd.checkpoint import MegatronReader
from megaopd.checkpoint.keys import StoredParam
from megaopd.checkpoint.metadata import COMMON, METADATA
from megaopd.errors import CheckpointError
from megaopd.models.families import EMBEDDING
from megaopd.models.hf_io import check_weights
from megaopd.storage.manifest import MANIFEST, write_manifest
from tests.helpers.checkpoints import params_of, write_checkpoint
from tests.helpers.tiny_models import edit_config


def _rejected(step: Path, error: str, call: Callable[[MegatronReader], Any] | None = None) -> None:
    with pytest.raises(CheckpointError, match=error):
        (call or (lambda reader: check_weights(reader, reader.arch)))(MegatronReader(step))


def test_missing_unexpected_and_doubled_tensors(tmp_path, hf):
    params = params_of(hf)
    del params["decoder.final_layernorm.weight"]
    _rejected(
        write_checkpoint(tmp_path / "a", hf, params), r"model.norm.weight: missing, though Qw"
    )

    params = params_of(hf)
    key = "decoder.extra.weight"
    params[key] = StoredParam(key, (3,), (0,), (3,)), torch.zeros(3)
    _rejected(write_checkpoint(tmp_path / "b", hf, params), r"decoder.extra.weight: unexpected; ")

    params = params_of(hf)
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    params["twice"] = StoredParam(name, (64, 128), (0, 0), (64, 128)), params[name][1]
    _rejected(
        write_checkpoint(tmp_path / "c", hf, params),
        rf"{name}: holds {name}, which decoder.layers.mlp.linear_fc2.weight holds too",
    )


def test_layer_that_is_not_there(tmp_path, hf):
    """A hole in a stacked tensor."""
    params = params_of(hf)
    del params["decoder.layers.1.mlp.linear_fc1.weight"]
    step = write_checkpoint(tmp_path / "root", hf, params)
    name = "model.layers.1.mlp.up_proj.weight"
    _rejected(
        step,
        r"linear_fc1.weight\[1\]: its chunks do not cover it exactly once",
        lambda reader: reader.read(name),
    )


def test_wrong_shapes(tmp_path, hf):
    for i, (field, value, error) in enumerate(
        [
            ("intermediate_size", 96, r"gate_proj.weight .*has shape \[256, 64\], .* \[192, 64\]"),
            ("num_key_value_heads", 4, r"q_proj.weight .*has shape \[128, 64\], .* \[192, 64\]"),
            ("vocab_size", 600, r"embed_tokens.weight .*has shape \[384, 64\], .* \[600, 64\]"),
            ("num_hidden_layers", 3, r"\[4, 64\], config.json says that it begins with \[3\]"),
        ]
    ):
        step = write_checkpoint(tmp_path / str(i), hf, params_of(hf))
        edit_config(step / "hf", **{field: value})
        if field == "num_hidden_layers":
            edit_config(step / "hf", remove=("layer_types",))
        write_manifest(step)
        _rejected(step, error)


def test_integer_weights(tmp_path, hf):
    params = params_of(hf)
    place, tensor = params["decoder.final_layernorm.weight"]
    params["decoder.final_layernorm.weight"] = place, tensor.long()
    _rejected(write_checkpoint(tmp_path / "root", hf, params), r"norm.weight .*torch.int64")


def test_200_flipped_bits_are_200_refusals_that_name_the_file(step):
    rng = random.Random(0)
    files = sorted(f for f in step.rglob("*") if f.is_file())
    assert {"SHA256SUMS", METADATA, COMMON, "__0_0.distcp"} <= {f.name for f in files}
    for i in range(200):
        file = files[i % len(files)]
        content = file.read_bytes()
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        with pytest.raises(CheckpointError) as caught:
            MegatronReader(step).verify()
        assert file.name in str(caught.value), file
        file.write_bytes(content)
    MegatronReader(step).verify()


def test_small_files_are_compared_before_they_are_parsed(step):
    for name in (METADATA, COMMON, "metadata.json", "hf/config.json"):
        content = (step / name).read_bytes()
        (step / name).write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match=f"{name}: SHA-256 differs"):
            MegatronReader(step)
        (step / name).write_bytes(content)


def test_truncated_missing_and_additional_files(step):
    data = step / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    _rejected(step, "__0_0.distcp: truncated")
    data.unlink()
    _rejected(step, r"iter_0000000: is incomplete \(__0_0.distcp is missing")
    data.write_bytes(content)
    (step / "hf" / "added.json").write_text("{}")
    _rejected(step, "hf/added.json: is not listed in SHA256SUMS")


class Executed:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.file,)


def _call(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls a function with a string."""
    texts = [b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name, argument)]
    return b"\x80\x04" + texts[0] + texts[1] + b"\x93" + texts[2] + b"\x85R."


def _malicious(file: Path) -> dict[str, bytes]:
    """Ways to have `file` made by whoever unpickles them."""
    metadata = Metadata({}, planner_data=Executed(file))
    return {
        "reduce": pickle.dumps(Executed(file)),
        "inside": pickle.dumps(metadata),
        "eval": f"cbuiltins\neval\n(Vopen({str(file)!r}, 'w')\ntR.".encode(),
        "torch": b"ctorch\nload\n(V" + str(file).encode() + b"\ntR.",
        "dotted": _call("torch.distributed.checkpoint.filesystem", "os.mkdir", str(file)),
    }


@pytest.mark.parametrize("how", sorted(_malicious(Path("x"))))
@pytest.mark.parametrize("name", [METADATA, COMMON])
def test_malicious_pickles_are_never_executed(step, tmp_path, name, how):
    """Even where the manifest matches: 0 executions."""
    made = tmp_path / "made"
    content = _malicious(made)[how]
    if name == COMMON and how in ("reduce", "inside"):
        archive = io.BytesIO()
        torch.save({"args": Executed(made)}, archive)
        content = archive.getvalue()
    (step / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: SHA-256 differs"):
        MegatronReader(step)
    write_manifest(step)
    with pytest.raises(CheckpointError, match=f"{name}: ") as caught:
        MegatronReader(step)
    assert caught.value.exit_status == 4
    assert not made.exists()
    if name == METADATA:
        assert "would execute code" in str(caught.value)


def test_the_malicious_pickles_would_have_executed(tmp_path):
    for how, content in _malicious(tmp_path / "made").items():
        if how != "torch":
            pickle.loads(content)
            made = tmp_path / "made"
            assert made.exists(), how
            made.rmdir() if made.is_dir() else made.unlink()


def test_malicious_data_file(step, tmp_path):
    """A block's own pickle, with a manifest that matches."""
    metadata = pickle.loads((step / METADATA).read_bytes())
    index = next(i for i in metadata.storage_data if i.fqn == EMBEDDING)
    place = metadata.storage_data[index]
    archive = io.BytesIO()
    torch.save(Executed(tmp_path / "made"), archive)
    (step / "__9_0.distcp").write_bytes(archive.getvalue())
    place.relative_path, place.offset, place.length = "__9_0.distcp", 0, len(archive.getvalue())
    (step / METADATA).write_bytes(pickle.dumps(metadata))
    write_manifest(step)
    _rejected(
        step,
        "__9_0.distcp: would execute code",
        lambda reader: reader.read("model.embed_tokens.weight"),
    )
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname"])
def test_metadata_that_leads_outside(step, path):
    metadata = pickle.loads((step / METADATA).read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = path
    (step / METADATA).write_bytes(pickle.dumps(metadata))
    write_manifest(step)
    _rejected(step, r"\.metadata: makes no sense .*lies outside the checkpoint")


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m.state_dict_metadata["output_layer.weight"].chunks.clear(),
        lambda m: m.state_dict_metadata["output_layer.weight"].chunks.append(
            m.state_dict_metadata["output_layer.weight"].chunks[0]
        ),
        lambda m: setattr(
            m.state_dict_metadata["output_layer.weight"], "size", torch.Size([384, 65])
        ),
        lambda m: m.storage_data.clear(),
        lambda m: setattr(m, "storage_data", None),
        lambda m: setattr(m.state_dict_metadata["output_layer.weight"], "size", "large"),
        lambda m: [setattr(p, "offset", p.offset + 1) for p in m.storage_data.values()],
        lambda m: [setattr(p, "length", 10) for p in m.storage_data.values()],
        lambda m: [setattr(p, "transform_descriptors", ["zstd"]) for p in m.storage_data.values()],
    ],
)
def test_metadata_that_makes_no_sense(step, damage):
    metadata = pickle.loads((step / METADATA).read_bytes())
    damage(metadata)
    (step / METADATA).write_bytes(pickle.dumps(metadata))
    write_manifest(step)
    with pytest.raises(CheckpointError):
        MegatronReader(step).read("lm_head.weight")


def test_a_checkpoint_without_companions(step):
    shutil.rmtree(step / "hf")
    write_manifest(step)
    with pytest.raises(CheckpointError, match="config.json"):
        MegatronReader(step)
    assert json.loads((step / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    (step / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="SHA256SUMS is missing"):
        MegatronReader(step)

"""Reading Megatron checkpoints by Hugging Face names: any chunks, any keys, any padding."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaopd.checkpoint import MegatronReader, open_weights
from megaopd.checkpoint.keys import StoredParam, is_model_key, locate_params, stored_params
from megaopd.checkpoint.metadata import METADATA, read_metadata
from megaopd.errors import CheckpointError
from megaopd.models.arch import ModelArch, read_arch
from megaopd.models.families import FAMILIES, OUTPUT_LAYER, hf_shapes, param_mappings
from megaopd.models.hf_io import HFReader, check_weights, load_into
from megaopd.models.mapping import Partition, padded_vocab_size
from megaopd.storage.manifest import write_manifest
from tests.helpers.checkpoints import VOCAB_SIZE, Params, at_random, params_of, write_checkpoint
from tests.helpers.tiny_models import make_tiny_model


def assert_same_weights(reader: MegatronReader, hf: Path) -> None:
    """Names, shapes and values, whole and in slices, and a rank's shards."""
    theirs = HFReader(hf)
    check_weights(reader, reader.arch)
    assert reader.names() == set(hf_shapes(reader.arch))
    for name, shape in hf_shapes(reader.arch).items():
        assert reader.shape(name) == shape
        assert reader.dtype(name) == theirs.dtype(name)
        assert torch.equal(reader.read(name), theirs.read(name)), name
        rows = slice(shape[0] // 3, shape[0] // 3 + 5)
        assert torch.equal(reader.read(name, rows), theirs.read(name, rows)), name
        if len(shape) == 2:
            cols = slice(7, 19)
            assert torch.equal(reader.read(name, None, cols), theirs.read(name, None, cols))
            assert torch.equal(reader.read(name, rows, cols), theirs.read(name, rows, cols))
    for rank in range(2):
        part = Partition(rank, 2, padded_vocab_size(VOCAB_SIZE, 2))
        ours, expected = (_shards(source, reader.arch, part) for source in (reader, theirs))
        for name, shard in expected.items():
            assert torch.equal(ours[name], shard), name


def _shards(source: Any, arch: ModelArch, part: Partition) -> dict[str, Tensor]:
    mappings = param_mappings(arch)
    shards = {n: m.layout.load(source.reader_of(m), part) for n, m in mappings.items()}
    params = {name: torch.full_like(shard, float("nan")) for name, shard in shards.items()}
    load_into(params, arch, source, part)
    return params


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(tmp_path, family, tied):
    hf = make_tiny_model(tmp_path / "hf", family, vocab_size=VOCAB_SIZE, tie_word_embeddings=tied)
    write_checkpoint(tmp_path / "root", hf, params_of(hf), at_random(0))
    source = open_weights(tmp_path / "root")
    assert isinstance(source, MegatronReader)
    assert_same_weights(source, hf)
    assert source.check_padding() == f"{83 if tied else 166} rows, all zero"
    source.verify()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_chunks(tmp_path, seed, dtype):
    hf = make_tiny_model(tmp_path / "hf", "Qwen3MoeForCausalLM", vocab_size=VOCAB_SIZE, dtype=dtype)
    write_checkpoint(tmp_path / "root", hf, params_of(hf), at_random(seed))
    assert_same_weights(MegatronReader(tmp_path / "root"), hf)


@pytest.mark.parametrize("vocab_rows", [VOCAB_SIZE, 302, 384, 1024])
def test_any_padding(tmp_path, hf, vocab_rows):
    write_checkpoint(tmp_path / "root", hf, params_of(hf, vocab_rows))
    reader = MegatronReader(tmp_path / "root")
    assert_same_weights(reader, hf)
    assert reader.check_padding() == f"{2 * (vocab_rows - VOCAB_SIZE)} rows, all zero"


def test_padding_that_is_not_zero_is_never_loaded(tmp_path, hf):
    params = params_of(hf)
    params[OUTPUT_LAYER][1][310] = 1.0
    write_checkpoint(tmp_path / "root", hf, params)
    reader = MegatronReader(tmp_path / "root")
    assert_same_weights(reader, hf)
    with pytest.raises(CheckpointError, match=r"lm_head.weight .*row 310, after the vocabulary"):
        reader.check_padding()


def _by_index(name: str, place: StoredParam) -> StoredParam:
    """Layers and experts in tensors of their own."""
    key = name.replace(".mlp.experts.", ".mlp.experts.experts.")
    own = place.param_shape
    return StoredParam(key, own, (0,) * len(own), own)


def _plain_norms(name: str, place: StoredParam) -> StoredParam:
    key = place.key.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    key = key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    return StoredParam(key, place.global_shape, place.offset, place.shape, place.num_axes)


def _experts_stacked(name: str, place: StoredParam) -> StoredParam:
    """Each layer by itself, its experts together, as Megatron-Core has it for mixtures."""
    if ".layers." not in name or place.num_axes < 2:
        return place
    layer = name.split(".layers.")[1].split(".")[0]
    key = place.key.replace(".layers.", f".layers.{layer}.")
    return StoredParam(key, place.global_shape[1:], place.offset[1:], place.shape[1:], 1)


@pytest.mark.parametrize("spelling", [_by_index, _plain_norms, _experts_stacked])
@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", "Qwen3MoeForCausalLM"])
def test_any_keys(tmp_path, family, spelling):
    hf = make_tiny_model(tmp_path / "hf", family, vocab_size=VOCAB_SIZE)
    params = {
        name: (spelling(name, place), tensor) for name, (place, tensor) in params_of(hf).items()
    }
    write_checkpoint(tmp_path / "root", hf, params)
    assert_same_weights(MegatronReader(tmp_path / "root"), hf)


def test_stacked_layers_and_experts_of_a_mixture(tmp_path):
    """[layers, experts, ...], as Megatron-Core stacks where all layers are mixtures."""
    hf = make_tiny_model(tmp_path / "hf", "Qwen3MoeForCausalLM", vocab_size=VOCAB_SIZE)
    params: Params = {}
    for name, (place, tensor) in params_of(hf).items():
        if name.startswith("decoder.layers."):
            layer, _, rest = place.key.removeprefix("decoder.layers.").partition(".")
            place = StoredParam(
                f"decoder.layers.{rest}",
                (4, *place.global_shape),
                (int(layer), *place.offset),
                (1, *place.shape),
                place.num_axes + 1,
            )
        params[name] = place, tensor
    write_checkpoint(tmp_path / "root", hf, params, at_random(3))
    assert_same_weights(MegatronReader(tmp_path / "root"), hf)


def test_a_training_holds_more_than_the_model(tmp_path, hf):
    params = params_of(hf)
    for key in ("optimizer.state.exp_avg.output_layer.weight", "chained_0.optimizer.x.y"):
        tensor = torch.zeros(3)
        params[key] = StoredParam(key, (3,), (0,), (3,)), tensor
        assert not is_model_key(key)
    write_checkpoint(tmp_path / "root", hf, params)
    assert_same_weights(MegatronReader(tmp_path / "root"), hf)


def test_unusual_tensors_in_the_archives(tmp_path, hf):
    """Strides, an offset in a larger storage, and a parameter instead of a tensor."""
    params = params_of(hf)
    step = write_checkpoint(tmp_path / "root", hf, params)
    arch = read_arch(hf)
    metadata = pickle.loads((step / METADATA).read_bytes())
    weight = params["decoder.layers.2.self_attention.linear_proj.weight"][1]
    larger = torch.zeros(2, *weight.shape)
    larger[1] = weight
    for stored in (weight.T.contiguous().T[None], larger[1:], torch.nn.Parameter(weight[None])):
        archive = io.BytesIO()
        torch.save(stored, archive)
        (step / "__9_0.distcp").write_bytes(b"x" * 13 + archive.getvalue())
        for index, place in metadata.storage_data.items():
            if index.fqn.endswith("linear_proj.weight") and index.offset[0] == 2:
                place.relative_path, place.offset = "__9_0.distcp", 13
                place.length = len(archive.getvalue())
        (step / METADATA).write_bytes(pickle.dumps(metadata))
        write_manifest(step)
        reader = MegatronReader(step)
        assert_same_weights(reader, hf)
        assert reader.arch == arch


def test_metadata_of_megatron_itself(step):
    """What is there is found without reading a weight, an optimizer's tensors included."""
    tensors = read_metadata(step)
    assert tensors["decoder.layers.mlp.linear_fc1.weight"].shape == (4, 256, 64)
    assert len(tensors["decoder.layers.mlp.linear_fc1.weight"].chunks) == 4
    assert tensors["output_layer.weight"].dtype == torch.float32


def test_stored_params_of_a_dense_model_and_of_a_mixture(hf, tmp_path):
    dense = stored_params(read_arch(hf))
    assert dense["decoder.layers.2.pre_mlp_layernorm.weight"] == StoredParam(
        "decoder.layers.mlp.linear_fc1.layer_norm_weight", (4, 64), (2, 0), (1, 64), 1
    )
    moe = make_tiny_model(tmp_path / "moe", "Qwen3MoeForCausalLM", vocab_size=VOCAB_SIZE)
    mixture = stored_params(read_arch(moe))
    assert mixture["decoder.layers.2.mlp.experts.3.linear_fc2.weight"] == StoredParam(
        "decoder.layers.2.mlp.experts.experts.linear_fc2.weight",
        (4, 64, 48),
        (3, 0, 0),
        (1, 64, 48),
        1,
    )
    shapes = {place.key: place.global_shape for place in mixture.values()}
    assert locate_params(read_arch(moe), shapes, "here") == (mixture, [])


def test_formats_are_told_apart(hf, step, tmp_path):
    assert isinstance(open_weights(hf), HFReader)
    assert isinstance(open_weights(step), MegatronReader)
    assert open_weights(step.parent, 0).path == step
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        open_weights(tmp_path / "empty")

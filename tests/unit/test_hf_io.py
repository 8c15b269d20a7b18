"""Reading and checking Hugging Face directories, and filling shards from them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megaopd.errors import CheckpointError
from megaopd.models.arch import read_arch
from megaopd.models.families import FAMILIES, param_mappings
from megaopd.models.hf_io import HFReader, check_weights, load_into, load_vocab_rows
from megaopd.models.mapping import Partition
from tests.helpers.tiny_models import TP3_CONFIG, make_tiny_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
KEY = "model.layers.3.self_attn.k_proj.weight"
INVENTED = "model.layers.3.self_attn.sinks"


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def model_dir(tmp_path):
    return make_tiny_model(tmp_path / "model", "Qwen3ForCausalLM", vocab_size=509)


@pytest.fixture
def sharded_dir(tmp_path):
    return make_tiny_model(tmp_path / "sharded", "Qwen3ForCausalLM", max_shard_size="200KB")


class CountingReader(HFReader):
    """Counts the bytes of what it is asked for."""

    num_bytes = 0

    def read(self, name, rows=None, cols=None):
        tensor = super().read(name, rows, cols)
        self.num_bytes += tensor.numel() * tensor.element_size()
        return tensor


def local_shape(name, arch, tp_size, padded_vocab_size):
    """Shape of Megatron's shard, from the rules of tensor parallelism rather than the mapping."""
    q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    ffn = arch.moe.ffn_hidden_size if ".experts." in name else arch.ffn_hidden_size
    if name.endswith("linear_qkv.bias"):
        return ((q + 2 * kv) // tp_size,)
    return {
        "word_embeddings": (padded_vocab_size // tp_size, arch.hidden_size),
        "output_layer": (padded_vocab_size // tp_size, arch.hidden_size),
        "linear_qkv": ((q + 2 * kv) // tp_size, arch.hidden_size),
        "linear_proj": (arch.hidden_size, q // tp_size),
        "linear_fc1": (2 * ffn // tp_size, arch.hidden_size),
        "linear_fc2": (arch.hidden_size, ffn // tp_size),
        "router": (arch.moe.num_experts if arch.moe else 0, arch.hidden_size),
        "q_layernorm": (arch.head_dim,),
        "k_layernorm": (arch.head_dim,),
    }.get(kind, (arch.hidden_size,))


def empty_params(arch, tp_size, padded_vocab_size, dtype=torch.float32):
    """Uninitialised shards of a rank: NaN, so that one left unfilled shows."""
    return {
        name: torch.full(local_shape(name, arch, tp_size, padded_vocab_size), torch.nan).to(dtype)
        for name in param_mappings(arch)
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_each_rank_reads_only_its_slices(tmp_path, family, tied, tp_size):
    sizes = TP3_CONFIG if tp_size == 3 else {"vocab_size": 509}
    path = make_tiny_model(tmp_path, family, tie_word_embeddings=tied, **sizes)
    arch, original = read_arch(path), load_file(path / WEIGHTS)
    padded = 768 if tp_size == 3 else 512
    ranks = []
    for rank in range(tp_size):
        reader, params = CountingReader(path), empty_params(arch, tp_size, padded)
        load_into(params, arch, reader, Partition(rank, tp_size, padded))
        shard = padded // tp_size
        num_padding = shard - max(0, min(509 - rank * shard, shard))
        num_read = sum(p.numel() for p in params.values())
        num_read -= num_padding * arch.hidden_size * (1 if tied else 2)
        assert reader.num_bytes == 4 * num_read
        ranks.append(params)
    for name, mapping in param_mappings(arch).items():
        exported = mapping.layout.export([params[name] for params in ranks])
        for hf_name, tensor in zip(mapping.hf, exported, strict=True):
            assert torch.equal(tensor, original.pop(hf_name)), hf_name
    assert not original


def test_loading_casts(model_dir):
    arch, original = read_arch(model_dir), load_file(model_dir / WEIGHTS)
    params = empty_params(arch, 1, 512, torch.bfloat16)
    load_into(params, arch, HFReader(model_dir), Partition(0, 1, 512))
    loaded = params["decoder.layers.1.mlp.linear_fc2.weight"]
    assert torch.equal(loaded, original["model.layers.1.mlp.down_proj.weight"].bfloat16())


def test_a_part_of_the_model_loads_alone(sharded_dir):
    """As a pipeline stage does; the slices come from the index's files."""
    arch = read_arch(sharded_dir)
    name = "decoder.layers.3.input_layernorm.weight"
    params = {name: torch.zeros(64)}
    load_into(params, arch, HFReader(sharded_dir), Partition(0, 2, 512))
    norm = HFReader(sharded_dir).read("model.layers.3.input_layernorm.weight")
    assert torch.equal(params[name], norm)
    assert norm.std() > 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_vocab_rows_of_any_partition(tmp_path, tied):
    path = make_tiny_model(tmp_path, tie_word_embeddings=tied, vocab_size=509)
    arch, reader = read_arch(path), HFReader(path)
    head = load_file(path / WEIGHTS)["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert torch.equal(load_vocab_rows(reader, arch, 100, 300), head[100:300])
    straddling = load_vocab_rows(reader, arch, 500, 520)
    assert torch.equal(straddling[:9], head[500:])
    assert torch.equal(straddling[9:], torch.zeros(11, 64))
    assert torch.equal(load_vocab_rows(reader, arch, 512, 640), torch.zeros(128, 64))


def rewrite(path, change):
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def reshape_key(tensors):
    tensors[KEY] = tensors[KEY][:-1].clone()


def quantise_key(tensors):
    tensors[KEY] = tensors[KEY].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda t: t.pop(KEY), f"{WEIGHTS}: {KEY}: missing"),
        (lambda t: t.update({INVENTED: torch.ones(4)}), f"{WEIGHTS}: {INVENTED}: unexpected"),
        (reshape_key, f"{KEY}: has shape [31, 64], config.json says [32, 64]"),
        (quantise_key, f"{KEY}: has dtype I8"),
    ],
    ids=["missing", "unexpected", "shape", "dtype"],
)
def test_wrong_tensor(model_dir, change, found):
    rewrite(model_dir, change)
    arch = read_arch(model_dir)
    params = empty_params(arch, 1, 512)
    with pytest.raises(CheckpointError) as caught:
        load_into(params, arch, HFReader(model_dir), Partition(0, 1, 512))
    assert found in str(caught.value)
    assert str(model_dir) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 4
    # Nothing was loaded before everything was checked.
    assert all(param.isnan().all() for param in params.values())


def test_missing_shard_file(sharded_dir):
    file = json.loads((sharded_dir / INDEX).read_text())["weight_map"][KEY]
    (sharded_dir / file).unlink()
    with pytest.raises(CheckpointError, match=rf"{file}: no such file, though .* places model\."):
        check_weights(HFReader(sharded_dir), read_arch(sharded_dir))


@pytest.mark.parametrize("keep", [0, 5, 100, -4], ids=["empty", "length", "header", "data"])
def test_truncated_shard(sharded_dir, keep):
    file = sharded_dir / "model-00002-of-00005.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{file.name}: truncated or corrupt \("):
        check_weights(HFReader(sharded_dir), read_arch(sharded_dir))


def test_truncated_single_file(model_dir):
    file = model_dir / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: truncated or corrupt"):
        HFReader(model_dir)


def test_index_names_a_tensor_that_its_file_lacks(sharded_dir):
    index = json.loads((sharded_dir / INDEX).read_text())
    file = index["weight_map"][KEY]
    other = next(f for f in index["weight_map"].values() if f != file)
    index["weight_map"][KEY] = other
    (sharded_dir / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        check_weights(HFReader(sharded_dir), read_arch(sharded_dir))
    assert f"{other}: {KEY}: {INDEX} places the tensor here, but it is not" in str(caught.value)


def test_index_lacks_a_tensor(sharded_dir):
    index = json.loads((sharded_dir / INDEX).read_text())
    del index["weight_map"][KEY]
    (sharded_dir / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{INDEX}: {KEY}: missing"):
        check_weights(HFReader(sharded_dir), read_arch(sharded_dir))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_not_an_index(sharded_dir, text):
    (sharded_dir / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=f"{INDEX}: is not an index with a weight_map"):
        HFReader(sharded_dir)


def test_index_leaves_the_directory(sharded_dir):
    index = {"weight_map": {KEY: "../model.safetensors"}}
    (sharded_dir / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the directory"):
        HFReader(sharded_dir)


def test_no_safetensors(tmp_path):
    with pytest.raises(CheckpointError, match=f"has neither {WEIGHTS} nor {INDEX}"):
        HFReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin but no safetensors; load it"):
        HFReader(tmp_path)


def test_rotary_buffers_are_ignored(model_dir):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(model_dir, lambda t: t.update({name: torch.ones(8)}))
    arch, reader = read_arch(model_dir), HFReader(model_dir)
    check_weights(reader, arch)
    params = empty_params(arch, 1, 512)
    load_into(params, arch, reader, Partition(0, 1, 512))
    assert not any(param.isnan().any() for param in params.values())


def test_a_tied_head_may_repeat_the_embedding(tmp_path):
    path = make_tiny_model(tmp_path, tie_word_embeddings=True)
    arch = read_arch(path)
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    check_weights(HFReader(path), arch)
    rewrite(path, lambda t: t["lm_head.weight"][-1].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head.weight: row 511 is not the embedding's"):
        check_weights(HFReader(path), arch)
    rewrite(path, lambda t: t["lm_head.weight"][-1].sub_(1))
    rewrite(path, lambda t: t["lm_head.weight"][317, 5].add_(1e-3))
    with pytest.raises(CheckpointError, match=r"lm_head.weight: row 317 is not the embedding's"):
        check_weights(HFReader(path), arch)
    rewrite(path, lambda t: t.update({"lm_head.weight": torch.ones(3, 64)}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight: has shape \[3, 64\]"):
        check_weights(HFReader(path), arch)


class TestFusedExperts:
    """Experts in 3-D tensors, as transformers 5 saves them with save_original_format=False."""

    @pytest.fixture
    def apart(self, tmp_path):
        return make_tiny_model(tmp_path / "apart", "Qwen3MoeForCausalLM", num_hidden_layers=2)

    @pytest.fixture
    def fused(self, tmp_path, apart):
        path = tmp_path / "fused"
        model = AutoModelForCausalLM.from_pretrained(apart)
        model.save_pretrained(path, save_original_format=False, max_shard_size="200KB")
        return path

    def test_they_are_read_like_single_ones(self, apart, fused):
        ours, theirs = HFReader(fused), HFReader(apart)
        index = json.loads((fused / INDEX).read_text())["weight_map"]
        assert "model.layers.1.mlp.experts.gate_up_proj" in index
        assert ours.names() == theirs.names()
        check_weights(ours, read_arch(fused))
        rows, cols = slice(3, 7), slice(2, 5)
        for name in theirs.names():
            assert ours.shape(name) == theirs.shape(name)
            assert ours.dtype(name) == theirs.dtype(name)
            assert torch.equal(ours.read(name), theirs.read(name)), name
            assert torch.equal(ours.read(name, rows), theirs.read(name, rows)), name
            if len(theirs.shape(name)) == 2:
                assert torch.equal(ours.read(name, rows, cols), theirs.read(name, rows, cols)), name

    def test_errors_name_the_expert_and_the_file(self, fused):
        name = "model.layers.1.mlp.experts.gate_up_proj"
        file = fused / json.loads((fused / INDEX).read_text())["weight_map"][name]
        tensors = load_file(file)
        tensors[name] = tensors[name][:3].clone()
        save_file(tensors, file, metadata={"format": "pt"})
        missing = r"model.layers.1.mlp.experts.3.gate_proj.weight: missing"
        with pytest.raises(CheckpointError, match=missing):
            check_weights(HFReader(fused), read_arch(fused))
        tensors[name] = tensors[name].new_zeros(4, 94, 64)
        save_file(tensors, file, metadata={"format": "pt"})
        shape = rf"{file.name}: model.layers.1.mlp.experts.0.gate_proj.weight: has shape \[47, 64\]"
        with pytest.raises(CheckpointError, match=shape):
            check_weights(HFReader(fused), read_arch(fused))


def test_untied_without_a_head(model_dir):
    rewrite(model_dir, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head.weight: missing"):
        check_weights(HFReader(model_dir), read_arch(model_dir))


def test_parameter_without_a_mapping(model_dir):
    arch = read_arch(model_dir)
    with pytest.raises(CheckpointError, match=r"parameter decoder.layers.0.mlp.router.weight"):
        load_into(
            {"decoder.layers.0.mlp.router.weight": torch.zeros(4)},
            arch,
            HFReader(model_dir),
            Partition(0, 1, 512),
        )


def test_parameter_of_another_shape(model_dir):
    params = {"decoder.final_layernorm.weight": torch.zeros(63)}
    with pytest.raises(
        CheckpointError, match=r"model.norm.weight: .*\[64\] for .* which is \[63\]"
    ):
        load_into(params, read_arch(model_dir), HFReader(model_dir), Partition(0, 1, 512))

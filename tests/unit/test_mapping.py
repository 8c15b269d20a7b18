"""Hugging Face tensors -> shards -> Hugging Face tensors, bit for bit, for every family and TP."""

import pytest
import torch
from safetensors.torch import load_file

from megaopd.errors import ConfigError
from megaopd.models.arch import read_arch
from megaopd.models.families import FAMILIES, hf_shapes, param_mappings
from megaopd.models.mapping import QKV, GatedMLP, Partition, RowParallel, Vocab, canonical_name
from tests.helpers.tiny_models import TP3_CONFIG, make_tiny_model

MOE = "Qwen3MoeForCausalLM"


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param


def padded(vocab_size, tp_size):
    """The next multiple of 128 * tp_size: from 509 rows, one rank of three has padding only."""
    multiple = 128 * tp_size
    return -(-vocab_size // multiple) * multiple


def shards_of(mapping, tensors, tp_size, padded_vocab_size):
    def read(index, rows=None, cols=None):
        tensor = tensors[mapping.hf[index]][rows or slice(None)]
        return tensor if cols is None else tensor[:, cols]

    return [
        mapping.layout.load(read, Partition(rank, tp_size, padded_vocab_size))
        for rank in range(tp_size)
    ]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_round_trip_is_exact(tmp_path, family, tied, tp_size):
    sizes = TP3_CONFIG if tp_size == 3 else {"vocab_size": 509}
    path = make_tiny_model(tmp_path, family, tie_word_embeddings=tied, **sizes)
    original = load_file(path / "model.safetensors")
    arch = read_arch(path)
    rows = padded(arch.vocab_size, tp_size)

    exported, shards = {}, {}
    for name, mapping in param_mappings(arch).items():
        assert name == mapping.megatron
        shards[name] = shards_of(mapping, original, tp_size, rows)
        tensors = mapping.layout.export(shards[name])
        assert tuple(tuple(t.shape) for t in tensors) == mapping.layout.hf_shapes()
        assert not exported.keys() & set(mapping.hf)
        exported.update(zip(mapping.hf, tensors, strict=True))

    assert exported.keys() == original.keys() == hf_shapes(arch).keys()
    for name, tensor in original.items():
        assert torch.equal(exported[name], tensor), name
    assert ("output_layer.weight" in shards) == (not tied)
    assert ("decoder.layers.3.self_attention.q_layernorm.weight" in shards) == arch.qk_norm
    assert ("decoder.layers.3.mlp.experts.2.linear_fc1.weight" in shards) == bool(arch.moe)
    assert ("decoder.layers.3.self_attention.linear_qkv.bias" in shards) == arch.qkv_bias
    assert ("decoder.layers.3.mlp_bda.norm.weight" in shards) == arch.post_norms

    embedding = torch.cat(shards["embedding.word_embeddings.weight"])
    assert embedding.shape == (rows, arch.hidden_size)
    assert torch.equal(embedding[509:], torch.zeros(rows - 509, arch.hidden_size))


def test_a_rank_of_padding_only():
    """V = 130 over four ranks of 128 rows: ranks 2 and 3 hold no word."""
    weight = torch.arange(130.0)[:, None] + 1
    layout = Vocab(vocab_size=130, hidden_size=1)
    parts = [Partition(rank, 4, 512) for rank in range(4)]
    shards = [layout.load(lambda i, rows: weight[rows], part) for part in parts]
    assert [(s != 0).sum().item() for s in shards] == [128, 2, 0, 0]
    assert [len(s) for s in shards] == [128] * 4
    assert torch.equal(layout.export(shards)[0], weight)


def test_qkv_rows_go_by_group():
    """4 heads, 2 KV heads of 1 feature: rows are named by head, group 0 is q0 q1 k0 v0."""
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    tensors = (q, k, v)
    layout = QKV(num_heads=4, num_kv_heads=2, head_dim=1, cols=None)

    def load(rank, size):
        return layout.load(lambda i, rows: tensors[i][rows], Partition(rank, size, 0)).tolist()

    assert load(0, 1) == [0, 1, 10, 20, 2, 3, 11, 21]
    assert load(0, 2) == [0, 1, 10, 20]
    assert load(1, 2) == [2, 3, 11, 21]


def test_gate_rows_precede_up_rows_on_each_rank():
    gate, up = torch.tensor([[0], [1], [2], [3]]), torch.tensor([[10], [11], [12], [13]])
    layout = GatedMLP(ffn_size=4, cols=1)
    read = lambda i, rows: (gate, up)[i][rows]
    assert layout.load(read, Partition(0, 2, 0)).flatten().tolist() == [0, 1, 10, 11]
    assert layout.load(read, Partition(1, 2, 0)).flatten().tolist() == [2, 3, 12, 13]


def test_gate_and_up_rows_of_one_tensor():
    """Hugging Face's 4 gate rows, then 4 up rows; a rank has both of its features."""
    weight = torch.tensor([[0], [1], [2], [3], [10], [11], [12], [13]])
    layout = GatedMLP(ffn_size=4, cols=1, fused=True)
    shards = [layout.load(lambda i, rows: weight[rows], Partition(r, 2, 0)) for r in range(2)]
    assert [s.flatten().tolist() for s in shards] == [[0, 1, 10, 11], [2, 3, 12, 13]]
    (exported,) = layout.export(shards)
    assert torch.equal(exported, weight)


def test_row_parallel_shares_the_columns():
    weight = torch.arange(6).reshape(2, 3)
    layout = RowParallel(rows=2, cols=3)
    shards = [layout.load(lambda i, cols: weight[:, cols], Partition(r, 3, 0)) for r in range(3)]
    assert [s.flatten().tolist() for s in shards] == [[0, 3], [1, 4], [2, 5]]
    assert torch.equal(layout.export(shards)[0], weight)


def test_indivisible_sizes_are_refused():
    layout = QKV(num_heads=4, num_kv_heads=2, head_dim=1, cols=None)
    with pytest.raises(ConfigError, match=r"parallel.tensor: 4 ranks do not divide 2 KV heads"):
        layout.load(lambda i, rows: torch.zeros(4), Partition(0, 4, 0))
    expert = Partition(0, 3, 0, field="parallel.expert_tensor")
    with pytest.raises(ConfigError, match=r"parallel.expert_tensor: 3 ranks do not divide 32 feed"):
        GatedMLP(32, 64).load(lambda i, rows: torch.zeros(32, 64), expert)


@pytest.mark.parametrize(
    ("local", "canonical"),
    [
        (
            "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
            "decoder.layers.13.input_layernorm.weight",
        ),
        (
            "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
            "decoder.layers.12.pre_mlp_layernorm.weight",
        ),
        ("decoder.layers.0.input_layernorm.weight", "decoder.layers.12.input_layernorm.weight"),
        (
            "decoder.layers.0.self_attention.linear_qkv.weight",
            "decoder.layers.12.self_attention.linear_qkv.weight",
        ),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("output_layer.weight", "output_layer.weight"),
    ],
)
def test_canonical_name(local, canonical):
    assert canonical_name(local, layers=range(12, 24)) == canonical
    assert canonical_name(canonical, layers=range(24)) == canonical


@pytest.mark.parametrize(
    "local",
    [
        "decoder.layers.1.mlp.experts.local_experts.10.linear_fc2.weight",  # one after another
        "decoder.layers.1.mlp.experts.linear_fc2.weight10",  # TransformerEngine's grouped product
    ],
)
def test_canonical_name_of_an_expert(local):
    canonical = "decoder.layers.9.mlp.experts.74.linear_fc2.weight"
    assert canonical_name(local, layers=(3, 9), first_expert=64) == canonical
    assert canonical_name(canonical, layers=range(24)) == canonical


def test_the_names_of_a_mixture(tmp_path):
    path = make_tiny_model(tmp_path, MOE, num_hidden_layers=2, mlp_only_layers=[0], num_experts=2)
    mappings = param_mappings(read_arch(path))
    mlp = {name: mapping for name, mapping in mappings.items() if ".mlp." in name}
    assert list(mlp) == [
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc2.weight",
        "decoder.layers.1.mlp.router.weight",
        "decoder.layers.1.mlp.experts.0.linear_fc1.weight",
        "decoder.layers.1.mlp.experts.0.linear_fc2.weight",
        "decoder.layers.1.mlp.experts.1.linear_fc1.weight",
        "decoder.layers.1.mlp.experts.1.linear_fc2.weight",
    ]
    assert [mapping.expert for mapping in mlp.values()] == [None, None, None, 0, 0, 1, 1]


def test_norms_behind_attention_and_mlp(tmp_path):
    """GLM-4's names: the norm called post_attention lies before the MLP."""
    mappings = param_mappings(read_arch(make_tiny_model(tmp_path, "Glm4ForCausalLM")))
    layer, theirs = "decoder.layers.3.", "model.layers.3."
    norms = {
        name.removeprefix(layer): mapping.hf[0].removeprefix(theirs)
        for name, mapping in mappings.items()
        if name.startswith(layer) and "norm" in name
    }
    assert norms == {
        "input_layernorm.weight": "input_layernorm.weight",
        "self_attn_bda.norm.weight": "post_self_attn_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "mlp_bda.norm.weight": "post_mlp_layernorm.weight",
    }
    assert mappings[layer + "mlp.linear_fc1.weight"].hf == (theirs + "mlp.gate_up_proj.weight",)


def test_the_names_are_megatrons(tmp_path):
    """Spelled out once, since Megatron is not imported here."""
    arch = read_arch(make_tiny_model(tmp_path, "Qwen3ForCausalLM", num_hidden_layers=1))
    layer = "decoder.layers.0."
    assert list(param_mappings(arch)) == [
        "embedding.word_embeddings.weight",
        layer + "input_layernorm.weight",
        layer + "pre_mlp_layernorm.weight",
        layer + "self_attention.linear_qkv.weight",
        layer + "self_attention.q_layernorm.weight",
        layer + "self_attention.k_layernorm.weight",
        layer + "self_attention.linear_proj.weight",
        layer + "mlp.linear_fc1.weight",
        layer + "mlp.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]

"""Reading and checking Hugging Face directories, and filling shards from them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megaopd.errors import CheckpointError
from megaopd.models.arch import read_arch
from megaopd.models.families import FAMILIES, param_mappings
from megaopd.models.hf_io import HFReader, check_weights, load_into, load_vocab_rows
from megaopd.models.mapping import Partition
from megaopd.storage.manifest import MANIFEST, write_manifest
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


def test_the_first_problem_says_how_many_more_there_are(model_dir):
    def change(tensors):
        reshape_key(tensors)
        del tensors["model.norm.weight"]
        tensors[INVENTED] = torch.ones(4)

    rewrite(model_dir, change)
    with pytest.raises(CheckpointError) as caught:
        check_weights(HFReader(model_dir), read_arch(model_dir))
    assert f"{KEY}: has shape [31, 64], config.json says [32, 64], and 2 more" in str(caught.value)


def header_of(file):
    """The header as a list of (name, fields), and the tensors' bytes."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return list(json.loads(content[8:end]).items()), content[end:]


def write_raw(file, pairs, data):
    """Writes a safetensors file with any header, also one that has a name twice."""
    text = "{" + ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in pairs) + "}"
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data)


def edit_header(file, change):
    pairs, data = header_of(file)
    write_raw(file, *change(pairs, data))


def rename(old, new):
    """The tensor `old` under another name, its place and bytes unchanged."""
    return lambda pairs, data: ([(new if k == old else k, v) for k, v in pairs], data)


def set_field(name, **fields):
    return lambda pairs, data: ([(k, v | fields if k == name else v) for k, v in pairs], data)


class Directory:
    """What is done to a model of several files, of which FIRST holds `name`."""

    def __init__(self, path):
        self.path = path
        self.index = json.loads((path / INDEX).read_text())
        self.files = sorted(set(self.index["weight_map"].values()))
        self.first = path / self.files[0]
        self.name = next(k for k, f in self.index["weight_map"].items() if f == self.files[0])

    def place(self, name, file):
        self.index["weight_map"][name] = file
        self.write_index(json.dumps(self.index))

    def forget(self, name):
        del self.index["weight_map"][name]
        self.write_index(json.dumps(self.index))

    def write_index(self, text):
        (self.path / INDEX).write_text(text)

    def repeat_in_index(self):
        pair = f"{json.dumps(self.name)}: {json.dumps(self.files[0])}"
        self.write_index((self.path / INDEX).read_text().replace(pair, f"{pair}, {pair}"))

    def store_twice(self):
        edit_header(self.path / self.files[1], rename(header_names(self, 1)[0], self.name))

    def swap_for_folder(self):
        self.first.unlink()
        self.first.mkdir()


def header_names(d, number):
    return [k for k, _ in header_of(d.path / d.files[number])[0] if k != "__metadata__"]


# What is done to the directory -> what must be said; {first}, {second}: files, {name}: a tensor.
DAMAGE = {
    "missing shard": (
        lambda d: d.first.unlink(),
        "/{first}: no such file, though model.safetensors.index.json places",
    ),
    "a directory for a shard": (lambda d: d.swap_for_folder(), "/{first}: is not a regular file"),
    "truncated by a byte": (
        lambda d: d.first.write_bytes(d.first.read_bytes()[:-1]),
        "/{first}: truncated or corrupt (",
    ),
    "longer by a byte": (
        lambda d: d.first.write_bytes(d.first.read_bytes() + b"x"),
        "/{first}: truncated or corrupt (",
    ),
    "cut within the header": (
        lambda d: d.first.write_bytes(d.first.read_bytes()[:20]),
        "/{first}: truncated or corrupt (20 bytes",
    ),
    "empty": (lambda d: d.first.write_bytes(b""), "/{first}: truncated or corrupt (0 bytes"),
    "header longer than any": (
        lambda d: d.first.write_bytes(b"\xff" * 8 + b"{}"),
        "/{first}: truncated or corrupt (10 bytes",
    ),
    "header is no JSON": (
        lambda d: d.first.write_bytes((4).to_bytes(8, "little") + b"nope"),
        "/{first}: truncated or corrupt (",
    ),
    "header nested without end": (
        lambda d: d.first.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000),
        "/{first}: truncated or corrupt (nested too deeply",
    ),
    "header is a list": (
        lambda d: d.first.write_bytes((2).to_bytes(8, "little") + b"[]"),
        "/{first}: truncated or corrupt (its header is not a JSON object",
    ),
    "entry without a place": (
        lambda d: edit_header(d.first, lambda p, x: ([*p, ("new", {"dtype": "F32"})], x)),
        "/{first}: truncated or corrupt (new has no dtype, shape and data_offsets",
    ),
    "negative size": (
        lambda d: edit_header(d.first, set_field(d.name, shape=[-1, 2])),
        "/{first}: truncated or corrupt ({name} has no sound dtype, shape",
    ),
    "shape and bytes disagree": (
        lambda d: edit_header(d.first, set_field(d.name, shape=[3])),
        "/{first}: truncated or corrupt ({name} is F32 [3] in ",
    ),
    "two tensors in the same bytes": (
        lambda d: edit_header(d.first, lambda p, x: ([*p, ("new", dict(p)[d.name])], x)),
        "/{first}: truncated or corrupt (",
    ),
    "twice in a header": (
        lambda d: edit_header(d.first, lambda p, x: ([*p, (d.name, dict(p)[d.name])], x)),
        "/{first}: {name}: stands twice in the file's header",
    ),
    "in two files": (lambda d: d.store_twice(), "/{first}: {name}: is also in {second}"),
    "twice in the index": (
        lambda d: d.repeat_in_index(),
        f"/{INDEX}: is not an index with a weight_map ({{name}} stands twice",
    ),
    "in the index, not in its file": (
        lambda d: d.place("model.new", d.files[0]),
        f"/{{first}}: model.new: {INDEX} places the tensor here, but it is not",
    ),
    "in another file than the index says": (
        lambda d: d.place(d.name, d.files[1]),
        f"/{{second}}: {{name}}: {INDEX} places the tensor here, but it is not",
    ),
    "in a file, not in the index": (
        lambda d: d.forget(d.name),
        f"/{{first}}: {{name}}: is not in {INDEX}",
    ),
    "a single file beside the index": (
        lambda d: shutil.copy(d.first, d.path / WEIGHTS),
        f": has both {WEIGHTS} and an {INDEX} that does not name it",
    ),
    "index leaves the directory": (
        lambda d: d.place(d.name, "../model.safetensors"),
        f"/{INDEX}: {{name}}: is in '../model.safetensors', outside the directory",
    ),
    "index with an absolute path": (
        lambda d: d.place(d.name, "/etc/model.safetensors"),
        "'/etc/model.safetensors', outside the directory",
    ),
    "index names the parent": (lambda d: d.place(d.name, ".."), "'..', not a safetensors file"),
    "index names a pickle": (
        lambda d: d.place(d.name, "pytorch_model.bin"),
        "'pytorch_model.bin', not a safetensors file; load it with transformers",
    ),
    "index with a NUL": (
        lambda d: d.place(d.name, "a\0.safetensors"),
        "'a\\x00.safetensors', outside the directory",
    ),
    **{
        f"index is {text}": (
            lambda d, text=text: d.write_index(text),
            f"/{INDEX}: is not an index with a weight_map (",
        )
        for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}')
    },
    "index with a number for a file": (
        lambda d: d.place(d.name, 3),
        f"/{INDEX}: is not an index with a weight_map (a file's name is not a string",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_directory(sharded_dir, damage):
    """Found from headers alone, when the directory is opened."""
    change, says = DAMAGE[damage]
    d = Directory(sharded_dir)
    change(d)
    with pytest.raises(CheckpointError) as caught:
        HFReader(sharded_dir)
    text = str(caught.value)
    assert says.format(first=d.files[0], second=d.files[1], name=d.name) in text
    assert str(sharded_dir) in text
    assert "\n" not in text
    assert caught.value.exit_status == 4


def test_files_may_be_links(sharded_dir, tmp_path):
    """As in Hugging Face's cache, where a snapshot links to blobs."""
    original = {name: t.clone() for name, t in tensors_of(sharded_dir).items()}
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(sharded_dir.glob("*.safetensors"))):
        file.rename(blobs / str(i))
        file.symlink_to(blobs / str(i))
    linked = tensors_of(sharded_dir)
    assert linked.keys() == original.keys()
    assert all(torch.equal(linked[name], original[name]) for name in original)


def tensors_of(path):
    reader = HFReader(path)
    return {name: reader.read(name) for name in reader.names()}


def test_files_against_a_manifest(sharded_dir):
    reader = HFReader(sharded_dir)
    reader.verify()  # there is none
    write_manifest(sharded_dir)
    num_bytes = []
    reader.verify(num_bytes.append)
    sizes = {f.name: f.stat().st_size for f in sharded_dir.iterdir() if f.name != MANIFEST}
    assert sum(num_bytes) == sum(sizes.values())
    for name in sizes:
        content = (sharded_dir / name).read_bytes()
        (sharded_dir / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"/{name}: SHA-256 differs"):
            reader.verify()
        (sharded_dir / name).write_bytes(content)
    reader.verify()


def test_an_index_of_one_file(model_dir):
    names = load_file(model_dir / WEIGHTS).keys()
    (model_dir / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)}))
    check_weights(HFReader(model_dir), read_arch(model_dir))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_read_is_what_safetensors_reads(tmp_path, dtype):
    tensors = {
        "matrix": torch.randn(37, 53).to(dtype),
        "vector": torch.randn(41).to(dtype),
        "scalar": torch.randn(()).to(dtype),
        "empty": torch.zeros(0, 5, dtype=dtype),
    }
    save_file(tensors, tmp_path / WEIGHTS)
    reader = HFReader(tmp_path)
    assert reader.names() == tensors.keys()
    for name, tensor in tensors.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == dtype
        assert torch.equal(reader.read(name), tensor)
    matrix = tensors["matrix"]
    assert torch.equal(reader.read("matrix", slice(5, 30)), matrix[5:30])
    assert torch.equal(reader.read("matrix", slice(30, 99)), matrix[30:])
    assert torch.equal(reader.read("matrix", slice(9, 9)), matrix[9:9])
    assert torch.equal(reader.read("matrix", slice(5, 30), slice(2, 51)), matrix[5:30, 2:51])
    assert torch.equal(reader.read("matrix", cols=slice(7, 8)), matrix[:, 7:8])
    assert torch.equal(reader.read("vector", slice(1, 3)), tensors["vector"][1:3])


def test_tensors_that_are_not_aligned(tmp_path):
    """A header of any length is valid; safetensors itself pads it."""
    values = torch.arange(6, dtype=torch.float32)
    for padding in range(4):
        fields = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
        pairs = [("w" * (padding + 1), fields)]
        write_raw(tmp_path / WEIGHTS, pairs, values.numpy().tobytes())
        (tensor,) = tensors_of(tmp_path).values()
        assert torch.equal(tensor, values.view(2, 3))
        assert torch.equal(tensor * 2, values.view(2, 3) * 2)


def test_writing_to_what_was_read_leaves_the_file_alone(model_dir):
    before = (model_dir / WEIGHTS).read_bytes()
    HFReader(model_dir).read(KEY).zero_()
    assert (model_dir / WEIGHTS).read_bytes() == before


def test_reading_keeps_nothing(tmp_path):
    """What was read is out of memory with its tensor, however large the file."""
    path = tmp_path / WEIGHTS
    save_file({f"w{i}": torch.ones(4 << 20) for i in range(16)}, path)  # 256 MB
    reader = HFReader(tmp_path)

    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssFile")).split()[1]) << 10

    before = resident()
    for name in reader.names():
        assert reader.read(name).sum() == 4 << 20
    assert resident() - before < 32 << 20


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

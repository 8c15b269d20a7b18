"""Writing Hugging Face directories that transformers loads."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaopd.errors import CheckpointError, ConfigError, EnvironmentFault
from megaopd.models.arch import read_arch
from megaopd.models.families import FAMILIES, hf_shapes
from megaopd.models.hf_io import HFReader, HFWriter
from megaopd.models.hf_io.companions import companions, copy_companions
from megaopd.models.hf_io.writer import ShardFile, plan_shards
from megaopd.storage.manifest import verify_manifest
from tests.helpers.tiny_models import edit_config, make_tiny_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MANIFEST = "SHA256SUMS"
KEY = "model.layers.3.self_attn.k_proj.weight"
INVENTED = "model.layers.3.self_attn.sinks"


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def model_dir(tmp_path):
    return make_tiny_model(tmp_path / "model", "Qwen3ForCausalLM", vocab_size=509)


def logits(path):
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path)(tokens).logits


def files_in(path):
    return {file.name for file in path.iterdir()}


def tensors_of(path):
    """(name, tensor) in the order in which a model exports them."""
    reader = HFReader(path)
    return [(name, reader.read(name)) for name in hf_shapes(read_arch(path))]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [150_000, 5_000_000_000])
def test_transformers_loads_what_is_written(tmp_path, family, tied, max_shard_bytes):
    source = make_tiny_model(tmp_path / "source", family, tie_word_embeddings=tied)
    tensors = dict(tensors_of(source))
    dst = tmp_path / "new" / "dst"
    with HFWriter(
        dst, source, read_arch(source), torch.float32, max_shard_bytes=max_shard_bytes
    ) as writer:
        writer.add_all(tensors.items())
    assert torch.equal(logits(dst), logits(source))
    model = AutoModelForCausalLM.from_pretrained(dst)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == 511
    text = "hello abc"
    ours, theirs = AutoTokenizer.from_pretrained(dst), AutoTokenizer.from_pretrained(source)
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.chat_template == theirs.chat_template
    assert (dst / "config.json").read_bytes() == (source / "config.json").read_bytes()

    shards = sorted(dst.glob("*.safetensors"))
    if max_shard_bytes > 1_000_000:
        assert files_in(dst) == files_in(source) | {MANIFEST}
    else:
        count = len(shards)
        assert count > 2
        assert [s.name for s in shards] == [
            f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
        ]
        index = json.loads((dst / INDEX).read_text())
        held = {name: shard.name for shard in shards for name in load_file(shard)}
        assert index["weight_map"] == held
        assert index["metadata"] == {
            "total_size": sum(t.nbytes for t in tensors.values()),
            "total_parameters": sum(t.numel() for t in tensors.values()),
        }
        for shard in shards:
            content = load_file(shard)
            assert len(content) == 1 or sum(t.nbytes for t in content.values()) <= max_shard_bytes
    assert files_in(tmp_path / "new") == {"dst"}
    modes = {file.stat().st_mode for file in dst.iterdir()}
    assert len(modes) == 1
    verify_manifest(dst)


@pytest.mark.parametrize("max_shard_size", ["200KB", "5GB"])
def test_files_are_those_of_save_pretrained(tmp_path, family, max_shard_size):
    source = make_tiny_model(tmp_path / "source", family, max_shard_size=max_shard_size)
    limit = {"200KB": 200_000, "5GB": 5_000_000_000}[max_shard_size]
    with HFWriter(tmp_path / "dst", source, read_arch(source), max_shard_bytes=limit) as writer:
        writer.add_all(tensors_of(source))
    verify_manifest(tmp_path / "dst")
    if max_shard_size == "5GB":
        return
    ours = json.loads((tmp_path / "dst" / INDEX).read_text())
    theirs = json.loads((source / INDEX).read_text())
    assert ours["metadata"] == theirs["metadata"]
    assert ours.keys() == theirs.keys()
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()


def test_wide_dtypes_come_first_and_are_aligned(tmp_path):
    """A bf16 tensor of an odd number of elements would leave the fp32 ones behind it askew."""
    shapes = {"a": (3,), "b": (5,), "c": (2, 2)}
    dtypes = {"a": torch.bfloat16, "b": torch.float32, "c": torch.bfloat16}
    (shard,) = plan_shards(shapes, dtypes, 1_000)
    assert list(shard.tensors) == ["b", "a", "c"]
    tensors = {name: torch.randn(shapes[name]).to(dtypes[name]) for name in shard.tensors}
    with ShardFile(tmp_path, shard) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
    written = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    content = (tmp_path / WEIGHTS).read_bytes()
    assert file.hexdigest() == hashlib.sha256(content).hexdigest()
    assert (len(content) - shard.nbytes) % 8 == 0


def test_companions(tmp_path):
    """All that is beside the weights goes along; weights, code and hidden files do not."""
    source, dst = tmp_path / "source", tmp_path / "dst"
    kept = ["config.json", "LICENSE", "my_tokens.txt", "vocab.bpe", "extra/deep/list.json"]
    left = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "original/consolidated.00.pth",
        "model.gguf",
        "tf_model.h5",
        "training_args.bin",
        "onnx/model.onnx",
        "modeling_custom.py",
        ".gitattributes",
        ".git/config",
        MANIFEST,
    ]
    for name in kept + left:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "link.json").symlink_to(source / "config.json")  # as in a hub's cache
    (source / "loop").symlink_to(source)
    dst.mkdir()
    copy_companions(source, dst)
    assert companions(dst) == companions(source) == sorted([*kept, "link.json"])
    assert all((dst / name).read_text() == name for name in kept)
    assert not (dst / "link.json").is_symlink()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_says_the_dtype_written(tmp_path, model_dir, key):
    edit_config(model_dir, remove=("dtype",), **{key: "float32"})
    arch, tensors = read_arch(model_dir), tensors_of(model_dir)
    with HFWriter(tmp_path / "dst", model_dir, arch) as writer:
        writer.add_all((name, tensor.bfloat16()) for name, tensor in tensors)
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert {k: config[k] for k in ("dtype", "torch_dtype") if k in config} == {key: "bfloat16"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dst").dtype == torch.bfloat16
    assert read_arch(tmp_path / "dst") == arch


def test_the_exporter_may_reuse_its_memory(tmp_path, model_dir):
    with HFWriter(tmp_path / "dst", model_dir, read_arch(model_dir)) as writer:
        for name, tensor in tensors_of(model_dir):
            buffer = tensor.clone().t().contiguous().t()
            writer.add(name, buffer)
            buffer.zero_()
    written = load_file(tmp_path / "dst" / WEIGHTS)
    tensors = load_file(model_dir / WEIGHTS)
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_existing_directory(tmp_path, model_dir):
    arch, tensors = read_arch(model_dir), tensors_of(model_dir)
    dst = tmp_path / "dst"
    dst.mkdir()
    with HFWriter(dst, model_dir, arch) as writer:  # an empty directory is in nobody's way
        writer.add_all(tensors)
    (dst / "stale").write_text("")
    with pytest.raises(ConfigError, match=r"dst: "), HFWriter(dst, model_dir, arch):
        pass
    with HFWriter(dst, model_dir, arch, overwrite=True) as writer:
        writer.add_all((name, tensor + 1) for name, tensor in tensors)
    assert files_in(dst) == files_in(model_dir) | {MANIFEST}
    assert torch.equal(load_file(dst / WEIGHTS)[KEY], dict(tensors)[KEY] + 1)
    assert files_in(tmp_path) == {"model", "dst"}


def test_overwrite_spares_what_is_no_model(tmp_path, model_dir):
    dst = tmp_path / "thesis"
    dst.mkdir()
    (dst / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(ConfigError, match="thesis: "),
        HFWriter(dst, model_dir, read_arch(model_dir), overwrite=True),
    ):
        pass
    assert (dst / "thesis.tex").read_text() == "years of work"


def test_no_room(tmp_path, model_dir, monkeypatch):
    arch = read_arch(model_dir)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with (
        pytest.raises(EnvironmentFault, match=r"needs .* free"),
        HFWriter(tmp_path / "dst", model_dir, arch, torch.float32),
    ):
        pass
    assert files_in(tmp_path) == {"model"}


def test_a_model_may_replace_its_source(model_dir):
    arch, tensors = read_arch(model_dir), tensors_of(model_dir)
    before = files_in(model_dir)
    with HFWriter(model_dir, model_dir, arch, overwrite=True) as writer:
        writer.add_all((name, tensor * 2) for name, tensor in tensors)
    assert files_in(model_dir) == before | {MANIFEST}
    assert torch.equal(load_file(model_dir / WEIGHTS)[KEY], dict(tensors)[KEY] * 2)


def drop_last(pairs):
    return pairs[:-1]


def drop_all(pairs):
    return []


def repeat_first(pairs):
    return [pairs[0], pairs[0]]


def one_too_many(pairs):
    return [*pairs, pairs[0]]


def invent(pairs):
    return [(INVENTED, torch.ones(4))]


def misshape(pairs):
    return [(pairs[0][0], torch.ones(4))]


def mix_dtypes(pairs):
    return [pairs[0], (pairs[1][0], pairs[1][1].bfloat16())]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (drop_last, "1 tensors were not written, lm_head.weight first"),
        (drop_all, "tensors were not written, model.embed_tokens.weight first"),
        (repeat_first, "got model.embed_tokens.weight [509, 64] float32, where model.layers.0"),
        (one_too_many, "float32, where nothing is due"),
        (invent, f"got {INVENTED} [4] float32, where model.embed_tokens.weight [509, 64] float32"),
        (misshape, "got model.embed_tokens.weight [4] float32, where"),
        (mix_dtypes, "bfloat16, where model.layers.0"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("max_shard_bytes", [1, 5_000_000_000])
def test_wrong_export_leaves_nothing(tmp_path, model_dir, change, found, max_shard_bytes):
    arch = read_arch(model_dir)
    pairs = change(tensors_of(model_dir))
    with (
        pytest.raises(CheckpointError) as caught,
        HFWriter(tmp_path / "dst", model_dir, arch, max_shard_bytes=max_shard_bytes) as writer,
    ):
        writer.add_all(pairs)
    assert found in str(caught.value)
    assert files_in(tmp_path) == {"model"}


def test_an_error_inside_keeps_the_old_model(tmp_path, model_dir):
    arch, tensors = read_arch(model_dir), tensors_of(model_dir)
    shutil.copytree(model_dir, tmp_path / "dst")

    def interrupted():
        yield from tensors[:5]
        raise KeyboardInterrupt

    writer = HFWriter(tmp_path / "dst", model_dir, arch, max_shard_bytes=1, overwrite=True)
    with pytest.raises(KeyboardInterrupt), writer:
        writer.add_all(interrupted())
    assert files_in(tmp_path) == {"model", "dst"}
    assert torch.equal(load_file(tmp_path / "dst" / WEIGHTS)[KEY], dict(tensors)[KEY])


def test_source_of_another_architecture(tmp_path, model_dir):
    other = make_tiny_model(tmp_path / "other", "Qwen3ForCausalLM", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"other: config.json is of another architecture"):
        HFWriter(tmp_path / "dst", other, read_arch(model_dir))

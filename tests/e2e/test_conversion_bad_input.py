"""What a person sees whose checkpoint is damaged, dangerous, or does not fit: one line and an exit
status, and nothing that looks like a model at the destination."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata

from megaopd.convert.cli import main
from megaopd.errors import MegaOPDError
from megaopd.models.families import FAMILIES
from megaopd.storage.manifest import MANIFEST, write_manifest
from tests.helpers.runs import run_command
from tests.helpers.tiny_models import edit_config, make_tiny_model

pytestmark = pytest.mark.slow

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
KEY, NORM = "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
SINKS = "model.layers.1.self_attn.sinks"
TO_MEGATRON = ("hf-to-megatron", "{hf}", "{dst}")
TO_HF = ("megatron-to-hf", "{megatron}", "{dst}")
CHECK = ("check", "{hf}", "{megatron}")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A model (several files), its Megatron checkpoint, and the export of that."""
    folder = tmp_path_factory.mktemp("sound")
    sizes = {"vocab_size": 509, "num_hidden_layers": 2, "max_shard_size": "200KB"}
    make_tiny_model(folder / "hf", "Qwen3ForCausalLM", **sizes)
    hf, megatron, export = (str(folder / name) for name in ("hf", "megatron", "export"))
    main(["hf-to-megatron", hf, megatron])
    main(["megatron-to-hf", megatron, export, "--max-shard-size", "200KB"])
    return folder


class Bench:
    """Copies of the sound directories, to be damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hf, self.megatron = folder / "hf", folder / "megatron"
        self.export, self.dst = folder / "export", folder / "new" / "dst"
        self.step = self.megatron / "iter_0000000"
        self.marker = folder / "executed"

    def fill(self, words: tuple[str, ...]) -> list[str]:
        return [word.format(**{k: str(v) for k, v in vars(self).items()}) for word in words]

    def file_of(self, name: str) -> Path:
        index = json.loads((self.hf / INDEX).read_text())
        return self.hf / index["weight_map"][name]

    def rewrite(self, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        """Changes the tensors of the file that holds `name`; the index follows."""
        file = self.file_of(name)
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        index = json.loads((self.hf / INDEX).read_text())
        places = {k: f for k, f in index["weight_map"].items() if f != file.name}
        index["weight_map"] = places | dict.fromkeys(tensors, file.name)
        (self.hf / INDEX).write_text(json.dumps(index))

    def change_metadata(self, change: Callable[[Any], Any]) -> None:
        """Changes .metadata, and makes the manifest say that this is right."""
        file = self.step / ".metadata"
        metadata = pickle.loads(file.read_bytes())
        change(metadata)
        file.write_bytes(pickle.dumps(metadata))
        self.sign()

    def sign(self) -> None:
        (self.step / MANIFEST).unlink()
        write_manifest(self.step)

    def leftovers(self) -> list[str]:
        return sorted(p.name for p in self.dst.parent.glob("*")) if self.dst.parent.exists() else []


@pytest.fixture
def bench(sound, tmp_path) -> Bench:
    shutil.copytree(sound, tmp_path / "bench")
    return Bench(tmp_path / "bench")


def outcome(words: list[str]) -> tuple[int, str]:
    """Runs the command line in this process: (exit status, its one line)."""
    try:
        main(words)
    except MegaOPDError as error:
        return error.exit_status, str(error)
    return 0, ""


@dataclass(frozen=True)
class Mistake:
    """What is done, what is started, and what must be said about it."""

    status: int
    says: tuple[str, ...]
    damage: Callable[[Bench], Any]
    command: tuple[str, ...] = TO_MEGATRON


def _truncate(file: Path, by: int = 100) -> None:
    file.write_bytes(file.read_bytes()[:-by])


def _flip(file: Path, position: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY] = tensors[KEY][:-1].clone()


def _store_twice(bench: Bench) -> None:
    """In another file too, which the index does not say."""
    other = next(f for f in sorted(bench.hf.glob("*.safetensors")) if f != bench.file_of(KEY))
    tensors = load_file(other)
    save_file(tensors | {KEY: torch.zeros(32, 64)}, other, metadata={"format": "pt"})


def _tie(bench: Bench) -> None:
    edit_config(bench.hf, tie_word_embeddings=True)


def _pickle_only(bench: Bench) -> None:
    for file in (*bench.hf.glob("*.safetensors"), bench.hf / INDEX):
        file.unlink()
    torch.save({}, bench.hf / "pytorch_model.bin")


def _second_step(bench: Bench) -> None:
    """A later step of which a file is missing."""
    shutil.copytree(bench.step, bench.megatron / "iter_0000010")
    (bench.megatron / "iter_0000010/__0_0.distcp").unlink()


def _first_key(metadata: Any) -> str:
    return next(k for k in metadata.state_dict_metadata if k.endswith("linear_qkv.weight"))


def _drop_key(metadata: Any) -> None:
    del metadata.state_dict_metadata[_first_key(metadata)]


def _add_key(metadata: Any) -> None:
    old, new = _first_key(metadata), "decoder.layers.self_attention.sinks"
    metadata.state_dict_metadata[new] = metadata.state_dict_metadata[old]
    for index, place in list(metadata.storage_data.items()):
        if index.fqn == old:
            metadata.storage_data[replace(index, fqn=new)] = place


def _lose_a_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata[_first_key(metadata)].chunks.pop()


def _other_size(bench: Bench) -> None:
    edit_config(bench.step / "hf", intermediate_size=96)
    bench.sign()


def _huge(bench: Bench) -> None:
    """An embedding of twice the free space, in a sparse file whose header is sound."""
    free, row_bytes = shutil.disk_usage(bench.folder).free, 4 * 64
    rows = 2 * free // row_bytes
    size = rows * row_bytes
    if size > 8 << 40:
        pytest.skip("more free space than a file may have")
    edit_config(bench.hf, vocab_size=rows, tie_word_embeddings=True)
    bench.rewrite("lm_head.weight", lambda t: t.pop("lm_head.weight"))
    bench.rewrite(EMBEDDING, lambda t: t.pop(EMBEDDING))
    fields = {"dtype": "F32", "shape": [rows, 64], "data_offsets": [0, size]}
    header = json.dumps({EMBEDDING: fields}).encode()
    file = bench.hf / "huge.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(file, 8 + len(header) + size)
    index = json.loads((bench.hf / INDEX).read_text())
    index["weight_map"][EMBEDDING] = file.name
    (bench.hf / INDEX).write_text(json.dumps(index))


MISTAKES = {
    "missing shard": Mistake(
        4,
        (".safetensors: no such file, though model.safetensors.index.json places",),
        lambda b: b.file_of(KEY).unlink(),
    ),
    "truncated shard": Mistake(
        4,
        (".safetensors: truncated or corrupt (",),
        lambda b: _truncate(b.file_of(KEY)),
    ),
    "missing tensor": Mistake(
        4, (f"{KEY}: missing",), lambda b: b.rewrite(KEY, lambda t: t.pop(KEY))
    ),
    "unexpected tensor": Mistake(
        4,
        (f"{SINKS}: unexpected; Qwen3ForCausalLM",),
        lambda b: b.rewrite(KEY, lambda t: t.update({SINKS: torch.ones(4)})),
    ),
    "wrong shape": Mistake(
        4,
        (f"{KEY}: has shape [31, 64], config.json says [32, 64]",),
        lambda b: b.rewrite(KEY, _reshape),
    ),
    "integers": Mistake(
        4,
        (f"{KEY}: has dtype I8",),
        lambda b: b.rewrite(KEY, lambda t: t.update({KEY: t[KEY].to(torch.int8)})),
    ),
    "duplicated tensor": Mistake(4, (f"{KEY}: is also in model-0000",), _store_twice),
    "NaN": Mistake(
        4,
        (f"{KEY}: 1 of 2048 values are NaN or infinite",),
        lambda b: b.rewrite(KEY, lambda t: t[KEY][3, 4].fill_(torch.nan)),
    ),
    "infinity": Mistake(
        4,
        (f"{NORM}: 64 of 64 values are NaN or infinite",),
        lambda b: b.rewrite(NORM, lambda t: t[NORM].fill_(-torch.inf)),
    ),
    "too large for bf16": Mistake(
        4,
        (f"{NORM} as bfloat16: 1 of 64 values are NaN or infinite",),
        lambda b: b.rewrite(NORM, lambda t: t[NORM][5].fill_(3.4e38)),
        (*TO_MEGATRON, "--dtype", "bf16"),
    ),
    "tied-embedding conflict": Mistake(
        4,
        ("lm_head.weight: row 0 is not the embedding's, though config.json ties them",),
        _tie,
    ),
    "a pickle": Mistake(
        4,
        ("has pytorch_model.bin but no safetensors; load it with transformers and save_pret",),
        _pickle_only,
    ),
    "no model": Mistake(4, ("config.json: no such file",), lambda b: shutil.rmtree(b.hf)),
    "unknown architecture": Mistake(
        2,
        ("FalconForCausalLM is not supported", *sorted(FAMILIES)),
        lambda b: edit_config(b.hf, architectures=["FalconForCausalLM"]),
    ),
    "incomplete checkpoint": Mistake(
        4,
        ("iter_0000010: is incomplete (__0_0.distcp is missing", "use step 0, the last good one"),
        _second_step,
        (*TO_HF, "--step", "10"),
    ),
    "no such step": Mistake(
        4, ("iter_0000007", "use step 0"), lambda b: None, (*TO_HF, "--step", "7")
    ),
    "nothing but an incomplete checkpoint": Mistake(
        4,
        ("iter_0000000: is incomplete (__0_0.distcp is missing", "no other step is whole"),
        lambda b: (b.step / "__0_0.distcp").unlink(),
        TO_HF,
    ),
    "no manifest": Mistake(
        4,
        ("iter_0000000: is incomplete (SHA256SUMS is missing",),
        lambda b: (b.step / MANIFEST).unlink(),
        TO_HF,
    ),
    "a file too many": Mistake(
        4,
        ("iter_0000000/extra: is not listed in SHA256SUMS",),
        lambda b: (b.step / "extra").write_text("x"),
        TO_HF,
    ),
    "a link": Mistake(
        4,
        ("iter_0000000: is incomplete (hf/linked is not a regular file)",),
        lambda b: (b.step / "hf/linked").symlink_to("/etc/hostname"),
        TO_HF,
    ),
    "no Megatron checkpoint": Mistake(
        4, ("no such directory",), lambda b: shutil.rmtree(b.megatron), TO_HF
    ),
    "the directories the other way round": Mistake(
        4, ("has no iter_* directory",), lambda b: None, ("megatron-to-hf", "{hf}", "{dst}")
    ),
    "Megatron lacks a tensor": Mistake(
        4, ("q_proj.weight", "missing"), lambda b: b.change_metadata(_drop_key), TO_HF
    ),
    "Megatron has one too many": Mistake(
        4, ("sinks", "unexpected"), lambda b: b.change_metadata(_add_key), TO_HF
    ),
    "Megatron has another shape": Mistake(
        4,
        ("mlp.gate_proj.weight", "has shape [256, 64], config.json says [192, 64]"),
        _other_size,
        TO_HF,
    ),
    "Megatron lacks a chunk": Mistake(
        4,
        ("linear_qkv.weight[1]: its chunks do not cover it",),
        lambda b: b.change_metadata(_lose_a_chunk),
        TO_HF,
    ),
    "a changed export": Mistake(
        4,
        ("export/tokenizer.json: SHA-256 differs from SHA256SUMS",),
        lambda b: _flip(b.export / "tokenizer.json", 50),
        ("hf-to-megatron", "{export}", "{dst}"),
    ),
    "output exists": Mistake(
        2,
        ("dst: exists; choose another destination, or pass --overwrite",),
        lambda b: shutil.copytree(b.export, b.dst),
        TO_HF,
    ),
    "output is something else": Mistake(
        2,
        ("dst: is not a directory of the kind that would replace it",),
        lambda b: (b.dst.mkdir(parents=True), (b.dst / "thesis.txt").write_text("years")),
        (*TO_HF, "--overwrite"),
    ),
    "output is a file": Mistake(
        2,
        ("dst: is not a directory",),
        lambda b: (b.dst.parent.mkdir(), b.dst.write_text("x")),
        TO_HF,
    ),
    "no room": Mistake(5, ("dst", "needs ", " bytes", "are free"), _huge),
    "another model": Mistake(
        4,
        ("config.json: rms_norm_eps", "is 1e-06"),
        lambda b: edit_config(b.hf, rms_norm_eps=0.1),
        CHECK,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(bench, mistake):
    case = MISTAKES[mistake]
    case.damage(bench)
    before = bench.leftovers()
    status, line = outcome(bench.fill(case.command))
    assert status == case.status, line
    assert all(words in line for words in case.says), line
    assert "\n" not in line
    assert bench.leftovers() == before


def _flips(folder: Path, number: int) -> Iterator[tuple[Path, int, int]]:
    """Random bits; every file is met, large or small."""
    rng = random.Random(5)
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size)
    for i in range(number):
        file = files[i % len(files)]
        yield file, rng.randrange(file.stat().st_size), rng.randrange(8)


@pytest.mark.parametrize("side", ["megatron", "export"])
def test_200_flipped_bits_are_200_refusals(bench, side):
    """Before anything is read from the file but its bytes."""
    command = TO_HF if side == "megatron" else ("hf-to-megatron", "{export}", "{dst}")
    folder = bench.step if side == "megatron" else bench.export
    met = set()
    for file, position, bit in _flips(folder, 200):
        _flip(file, position, bit)
        status, line = outcome(bench.fill(command))
        where = f"{file.relative_to(folder)} at byte {position}"
        assert status == 4, (where, line)
        assert file.name in line, (where, line)
        assert bench.leftovers() == []
        met.add(file)
        _flip(file, position, bit)
    assert len(met) >= 8
    assert outcome(bench.fill(command)) == (0, "")  # undone, all is well


class Evil:
    """An object whose unpickling creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.marker)!r}, 'w').close()",)


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def _call(module: str, name: str, argument: bytes) -> bytes:
    """Opcodes that call a function with one argument, itself opcodes."""
    return _text(module) + _text(name) + b"\x93(" + argument + b"tR"


def _pickled(opcodes: bytes) -> bytes:
    return b"\x80\x04" + opcodes + b"."


def _touch(marker: Path) -> bytes:
    return _text(f"touch '{marker}'")


def _as_a_member(marker: Path) -> bytes:
    metadata = Metadata({})
    metadata.state_dict_metadata = {"x": Evil(marker)}  # type: ignore[dict-item]
    return pickle.dumps(metadata)


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


# The file, and what is written into it; all of these create the file that they are given.
ATTACKS: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    ".metadata calls eval": (".metadata", lambda m: pickle.dumps(Evil(m))),
    ".metadata in the first protocol": (".metadata", lambda m: pickle.dumps(Evil(m), 0)),
    ".metadata calls a command": (
        ".metadata",
        lambda m: _pickled(_call("posix", "system", _touch(m))),
    ),
    ".metadata calls a module of a module": (
        ".metadata",
        lambda m: _pickled(_call("torch", "os.system", _touch(m))),
    ),
    ".metadata within an argument of its own classes": (
        ".metadata",
        lambda m: _pickled(_call("torch", "Size", _call("posix", "system", _touch(m)))),
    ),
    ".metadata as a member of its own classes": (".metadata", _as_a_member),
    ".metadata after its end": (
        ".metadata",
        lambda m: pickle.dumps(Metadata({}))[:-1] + pickle.dumps(Evil(m))[2:],
    ),
    "common.pt calls eval": ("common.pt", lambda m: _saved(Evil(m))),
    "common.pt within a dictionary": ("common.pt", lambda m: _saved({"iteration": Evil(m)})),
    "common.pt as a bare pickle": ("common.pt", lambda m: pickle.dumps(Evil(m))),
}


@pytest.mark.parametrize("signed", [False, True], ids=["manifest as it was", "manifest forged"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_checkpoint_is_executed(bench, attack, signed):
    name, content = ATTACKS[attack]
    file = bench.step / name
    file.write_bytes(content(bench.marker))
    if signed:
        bench.sign()
    for command in (TO_HF, CHECK):
        status, line = outcome(bench.fill(command))
        assert status == 4, line
        assert name in line
        assert "\n" not in line
    assert not bench.marker.exists()
    assert bench.leftovers() == []


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_attacks_are_real(tmp_path, attack):
    """Without the defence they run: otherwise the test above would prove nothing."""
    file, marker = tmp_path / "file", tmp_path / "executed"
    file.write_bytes(ATTACKS[attack][1](marker))
    with contextlib.suppress(TypeError, RuntimeError):  # of what it makes of the call's result
        torch.load(file, weights_only=False) if "common" in attack else pickle.loads(
            file.read_bytes()
        )
    assert marker.exists()


def test_nothing_in_a_tensor_is_executed(bench):
    """A chunk is a pickle of its own."""
    file = bench.step / "__0_0.distcp"
    evil = _saved(Evil(bench.marker))
    start = file.stat().st_size
    with file.open("ab") as stream:
        stream.write(evil)

    def redirect(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.offset, info.length = start, len(evil)

    bench.change_metadata(redirect)
    for command in (TO_HF, CHECK):
        status, line = outcome(bench.fill(command))
        assert status == 4, line
        assert "__0_0.distcp" in line or "iter_0000000" in line
    assert not bench.marker.exists()
    assert bench.leftovers() == []


def test_a_models_own_code_is_not_executed(bench):
    """auto_map asks for it; the model is read by its architecture, and the code stays behind."""
    evil = f"open({str(bench.marker)!r}, 'w').close()\n"
    for module in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (bench.hf / f"{module}.py").write_text(evil)
    edit_config(
        bench.hf,
        auto_map={
            "AutoConfig": "configuration_evil.EvilConfig",
            "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM",
        },
    )
    file = bench.hf / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto_map}))
    bench.dst.parent.mkdir()
    assert outcome(bench.fill(TO_MEGATRON)) == (0, "")
    assert not list(bench.dst.rglob("*.py"))
    status, line = outcome(bench.fill(("check", "{hf}", "{dst}", "--logits", "--samples", "2")))
    assert (status, line) == (0, "")
    assert not bench.marker.exists()


def test_the_newest_complete_step_is_taken(bench, capfd):
    _second_step(bench)
    assert outcome(bench.fill(TO_HF)) == (0, "")
    assert "iter_0000010 is incomplete; using step 0" in capfd.readouterr().err
    ours, theirs = load_all(bench.dst), load_all(bench.hf)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def load_all(path: Path) -> dict[str, torch.Tensor]:
    return {k: t for f in path.glob("*.safetensors") for k, t in load_file(f).items()}


# As processes: the exit status, the one line, no traceback. A limit on the size of a file stands in
# for a disk that fills up while it is written.
PROCESSES = {
    "success": (0, "", lambda b: None, "", TO_MEGATRON),
    "unknown architecture": (
        2,
        "FalconForCausalLM is not supported",
        lambda b: edit_config(b.hf, architectures=["FalconForCausalLM"]),
        "",
        TO_MEGATRON,
    ),
    "truncated": (4, "truncated or corrupt", lambda b: _truncate(b.file_of(KEY)), "", TO_MEGATRON),
    "full disk, to Megatron": (5, "no space left", lambda b: None, "ulimit -f 200;", TO_MEGATRON),
    "full disk, to Hugging Face": (5, "no space left", lambda b: None, "ulimit -f 200;", TO_HF),
}


@pytest.mark.parametrize("process", PROCESSES)
def test_process(bench, process):
    status, says, damage, limit, words = PROCESSES[process]
    damage(bench)
    command = [sys.executable, "-m", "megaopd.convert", *bench.fill(words)]
    done = run_command(["bash", "-c", f'{limit} exec "$0" "$@"', *command], timeout_s=120)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    if status:
        (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
        assert says in line
        assert bench.leftovers() == []
        if status == 5:
            assert "needs " in line
            assert " are free" in line


@pytest.mark.parametrize(
    "process", ["truncated", pytest.param("full disk, to Megatron", marks=pytest.mark.long)]
)
def test_two_ranks_say_it_once(bench, process):
    status, says, damage, limit, words = PROCESSES[process]
    damage(bench)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "megaopd.convert", *bench.fill(words)]
    done = run_command(["bash", "-c", f'{limit} exec "$0" "$@"', *command], timeout_s=120)
    assert done.returncode != 0
    lines = [text for text in done.stderr.splitlines() if "error: " in text and says in text]
    assert len(lines) == 1, done.stderr
    assert f"exitcode  : {status}" in done.stderr
    assert bench.leftovers() == []

"""Measures the converters against `cp` of the same bytes on the same disk, and their memory.

    python tools/bench/convert.py [--gb 2] [--rounds 5] [--dir .bench] [--json FILE]

Writes a random bf16 Qwen3 model of at least --gb in four safetensors files, then in each round, one
after another: `cp -r` alone, `cp -r` and fsync of every file (what the converters also do), and
both directions with one process and with two under torchrun. Before each, the source is read once,
so that it is in the page cache if it fits, and everything written earlier is on the disk.

Time is that of the conversion, checks, hashing and fsync included; `CPU` the processor time of all
its processes, which other load on the machine changes less; `process` is from the start of
the command to its end, the imports of torch, transformers and Megatron-Core included. Peak memory
is the process's highest resident set (VmHWM) less that of the same process when its imports were
done; `anon` leaves out pages of mapped files, which the kernel takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script's own directory is on the path, the repository's is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

ROOT = Path(__file__).resolve().parents[2]
MIN_RATIO, MAX_PEAK_BYTES = 0.7, 1.5e9

# Of the random model, but for the number of layers: about 100 MB a layer, 0.6 GB of embedding.
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def make_model(directory: Path, gigabytes: float) -> None:
    """Writes the random model, tensor by tensor."""
    import torch

    from megaopd.models.arch import read_arch
    from megaopd.models.families import hf_shapes
    from megaopd.models.hf_io.writer import ShardFile, nbytes, plan_shards, write_index

    directory.mkdir(parents=True)
    shapes: dict[str, tuple[int, ...]] = {}
    size = layers = 0
    while size < gigabytes * 1e9:
        layers += 1
        config = CONFIG | {"num_hidden_layers": layers}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        shapes = hf_shapes(read_arch(directory))
        size = sum(nbytes(torch.bfloat16, shape) for shape in shapes.values())
    shards = plan_shards(shapes, dict.fromkeys(shapes, torch.bfloat16), size // 4 + 50_000_000)
    # Other values in every tensor: a window of one pool of random numbers.
    pool = torch.randn(1 << 24).bfloat16()
    for shard in shards:
        with ShardFile(directory, shard) as file:
            for i, (name, (_, shape)) in enumerate(shard.tensors.items()):
                count = torch.Size(shape).numel()
                copies = -(-count // len(pool))
                file.add(name, pool.roll(i * 4099).repeat(copies)[:count].view(shape))
    write_index(directory, shards)


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def run_child(result: Path, argv: list[str]) -> None:
    """Converts in this process, which is one of the measured, and notes time and memory."""
    from megaopd.convert import cli

    cli.use_huge_pages()
    import torch.distributed as dist

    import megaopd.convert.to_hf
    import megaopd.convert.to_megatron  # noqa: F401
    from megaopd.convert.ranks import Ranks

    ranks = Ranks.join()
    peak_anon, stop = 0, threading.Event()

    def sample() -> None:
        nonlocal peak_anon
        while not stop.wait(0.01):
            peak_anon = max(peak_anon, status_bytes("RssAnon"))

    interpreter, interpreter_anon = status_bytes("VmHWM"), status_bytes("RssAnon")
    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    ranks.gather(None)
    started, cpu = time.perf_counter(), time.process_time()
    cli.main(argv)
    elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
    stop.set()
    sampler.join()
    measured = {
        "seconds": elapsed,
        "cpu": cpu,
        "peak": status_bytes("VmHWM") - interpreter,
        "anon": peak_anon - interpreter_anon,
    }
    parts = ranks.gather(measured)
    if ranks.is_main:
        worst = {key: max(part[key] for part in parts) for key in measured}
        worst["cpu"] = sum(part["cpu"] for part in parts)
        result.write_text(json.dumps(worst))
    if dist.is_initialized():
        dist.destroy_process_group()


def convert(work: Path, num_processes: int, argv: list[str]) -> dict[str, float]:
    """Runs one conversion in fresh processes."""
    result = work / "result.json"
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(num_processes)]
    command += [str(Path(__file__).resolve()), "--child", str(result), *argv]
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_processes))}
    started = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    process = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    measured = json.loads(result.read_text()) | {"process": process}
    result.unlink()
    return measured


def copy(src: Path, dst: Path, *, sync: bool) -> dict[str, float]:
    started, cpu = time.perf_counter(), os.times()
    subprocess.run(["cp", "-r", str(src), str(dst)], check=True)
    if sync:
        files = [str(file) for file in dst.rglob("*") if file.is_file()]
        subprocess.run(["sync", *files], check=True)
    elapsed, now = time.perf_counter() - started, os.times()
    cpu_s = now.children_user + now.children_system - cpu.children_user - cpu.children_system
    return {"seconds": elapsed, "process": elapsed, "cpu": cpu_s}


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def settle(src: Path) -> None:
    """Puts the source into the page cache and everything else onto the disk."""
    os.sync()
    for file in src.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass
    os.sync()


def measure(work: Path, rounds: int) -> tuple[dict[str, list[dict[str, float]]], int]:
    """Runs the rounds; returns the measurements by contender, and the bytes that each moves."""
    hf = work / "hf"
    megatron = {n: work / f"megatron{n}" for n in (1, 2)}
    for n, directory in megatron.items():
        convert(work, n, ["hf-to-megatron", str(hf), str(directory)])
    out = work / "out"
    # Files of a quarter of the model: processes share whole files.
    quarter = f"{size_of(hf) // 4 + 50_000_000}B"
    contenders: dict[str, tuple[Path, Any]] = {
        "cp -r": (hf, lambda: copy(hf, out, sync=False)),
        "cp -r, fsync": (hf, lambda: copy(hf, out, sync=True)),
    }
    for n in (1, 2):
        processes = f"{n} process{'es' if n > 1 else ''}"
        contenders[f"hf-to-megatron, {processes}"] = (
            hf,
            lambda n=n: convert(work, n, ["hf-to-megatron", str(hf), str(out)]),
        )
        contenders[f"megatron-to-hf, {processes}"] = (
            megatron[n],
            lambda n=n: convert(
                work,
                n,
                ["megatron-to-hf", str(megatron[n]), str(out), "--max-shard-size", quarter],
            ),
        )
    found = defaultdict(list)
    for number in range(rounds):
        for name, (src, contender) in contenders.items():
            settle(src)
            found[name].append(contender())
            shutil.rmtree(out)
            print(f"round {number + 1}: {name}: {found[name][-1]['seconds']:.2f} s", flush=True)
    return found, size_of(hf)


def summarise(found: dict[str, list[dict[str, float]]], num_bytes: int) -> list[dict[str, Any]]:
    """Medians over the rounds; a ratio is the median of the rounds' own ratios."""
    rows = []
    for name, runs in found.items():
        row: dict[str, Any] = {"contender": name}
        row["seconds"] = statistics.median(run["seconds"] for run in runs)
        row["process"] = statistics.median(run["process"] for run in runs)
        row["cpu"] = statistics.median(run["cpu"] for run in runs)
        row["mb_per_s"] = num_bytes / row["seconds"] / 1e6
        for key, base in (("to_cp", "cp -r"), ("to_cp_fsync", "cp -r, fsync")):
            pairs = zip(found[base], runs, strict=True)
            row[key] = statistics.median(cp["seconds"] / own["seconds"] for cp, own in pairs)
        for key in ("peak", "anon"):
            row[key] = max(run.get(key, 0) for run in runs)
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{'':28} {'seconds':>8} {'MB/s':>6} {'of cp':>6} {'of cp+fsync':>11} {'CPU':>6} "
        f"{'process':>8} {'peak GB':>8} {'anon GB':>8}"
    )
    for row in rows:
        line = (
            f"{row['contender']:28} {row['seconds']:8.2f} {row['mb_per_s']:6.0f} "
            f"{row['to_cp']:6.0%} {row['to_cp_fsync']:11.0%} {row['cpu']:5.1f}s "
            f"{row['process']:7.1f}s"
        )
        if row["peak"]:
            line += f" {row['peak'] / 1e9:8.2f} {row['anon'] / 1e9:8.2f}"
        print(line)
    converters = [row for row in rows if row["peak"]]
    slowest = min(row["to_cp_fsync"] for row in converters)
    largest = max(row["peak"] for row in converters)
    print(
        f"\nthroughput at least {MIN_RATIO:.0%} of cp that is on the disk as well: "
        f"{'yes' if slowest >= MIN_RATIO else 'NO'} ({slowest:.0%})\n"
        f"peak at most {MAX_PEAK_BYTES / 1e9} GB above the interpreter: "
        f"{'yes' if largest <= MAX_PEAK_BYTES else 'NO'} ({largest / 1e9:.2f} GB)"
    )


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        run_child(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=2.0, help="size of the model at least (2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=ROOT / ".bench", help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="also write the measurements here")
    args = parser.parse_args()
    work = args.dir / "convert"
    shutil.rmtree(work, ignore_errors=True)
    try:
        make_model(work / "hf", args.gb)
        load = os.getloadavg()[0]
        found, num_bytes = measure(work, args.rounds)
        rows = summarise(found, num_bytes)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(
        f"\n{num_bytes / 1e9:.2f} GB, {args.rounds} rounds, medians; {os.cpu_count()} cores, "
        f"load before {load:.1f}, after {os.getloadavg()[0]:.1f}"
    )
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps({"bytes": num_bytes, "rows": rows, "runs": found}))


if __name__ == "__main__":
    main()

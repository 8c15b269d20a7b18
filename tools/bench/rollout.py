"""Tokens per second of megaopd's rollout client beside SGLang's own benchmark client.

    python tools/bench/rollout.py --sglang .cache/sglang/bin/python [--model DIR] [--rounds 3]

One server, started here, answers both in turn, with as many requests in flight: the same number of
prompts, of as many random tokens, of responses as long, log-probabilities included, sampled at
temperature 1. Without --model it serves a small random one, so that a CPU answers fast enough for
the clients to matter; its tokenizer is the demo's (make demo), which SGLang's client wants.

Ours is `SGLangEngine.generate`; theirs `sglang.bench_serving`, as it comes and with
`--disable-stream`, and the better of the two counts. Each figure is the median over the rounds.

What SGLang's client needs besides is installed into a folder of its own (.bench/sglang), never into
the project or the server's environment.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from megaopd.batch import Prompt, SamplingParams
from megaopd.config import SGLangConfig
from megaopd.rollout.sglang.engine import SGLangEngine
from megaopd.rollout.sglang.flags import DEVICE_ENVIRONMENT, ServerSpec
from megaopd.rollout.sglang.fleet import ServerFleet
from megaopd.rollout.sglang.server import SGLangServer

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / ".bench"
# What SGLang's client imports and its server does not.
CLIENT_PACKAGES = [
    "datasets==5.2.0",
    "multiprocess==0.70.19",
    "pandas==3.1.1",
    "pyarrow==26.0.1",
    "python-dateutil==4.0.0",
    "pytz==2026.6",
    "six==1.17.0",
    "tzdata==2026.6",
]
# In flight -> prompts of a round.
NUM_PROMPTS = {1: 4, 8: 32, 64: 256}
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}


def make_model(tokenizer_dir: Path) -> Path:
    """Writes the small random model once."""
    path = BENCH / "rollout_model"
    if not (path / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        torch.manual_seed(0)
        config = Qwen3Config(vocab_size=len(tokenizer), **SHAPE)
        Qwen3ForCausalLM(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


def run_ours(
    server: SGLangServer, in_flight: int, args: argparse.Namespace, vocab_size: int, seed: int
) -> float:
    """Tokens per second with `in_flight` requests at a time."""
    rng = random.Random(seed)
    prompts = [
        Prompt(f"p{i}", tuple(rng.randrange(vocab_size) for _ in range(args.input)))
        for i in range(NUM_PROMPTS[in_flight])
    ]
    params = SamplingParams(max_new_tokens=args.output, temperature=1.0, seed=seed)
    config = SGLangConfig(max_tokens_in_flight=in_flight * (args.input + args.output))
    engine = SGLangEngine([server], config=config, vocab_size=vocab_size)
    try:
        start = time.perf_counter()
        samples = engine.generate(prompts, params)
        elapsed_s = time.perf_counter() - start
    finally:
        engine.close()
    tokens = sum(len(sample.response_ids) for sample in samples)
    assert tokens == len(prompts) * args.output, "responses are missing or too short"
    assert engine.metrics["rollout/retries"] == 0, "requests were sent again"
    return tokens / elapsed_s


def run_theirs(
    server: SGLangServer, in_flight: int, args: argparse.Namespace, stream: bool, seed: int
) -> float:
    """What `sglang.bench_serving` reports for the same work."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        command = [
            *(args.sglang, "-m", "sglang.bench_serving", "--backend", "sglang"),
            *("--base-url", server.url, "--model", args.model, "--tokenizer", args.model),
            *("--dataset-name", "random-ids", "--tokenize-prompt"),
            *("--num-prompts", NUM_PROMPTS[in_flight], "--max-concurrency", in_flight),
            *("--random-input-len", args.input, "--random-output-len", args.output),
            *("--random-range-ratio", 1.0, "--temperature", 1.0, "--return-logprob"),
            *("--warmup-requests", 0, "--disable-tqdm", "--seed", seed, "--output-file", report),
        ]
        if not stream:
            command.append("--disable-stream")
        env = os.environ | dict(DEVICE_ENVIRONMENT[args.device])
        env |= {"PYTHONPATH": str(BENCH / "sglang"), "OPENAI_API_KEY": server.api_key}
        done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
        if done.returncode != 0 or not report.exists():
            sys.exit(f"sglang.bench_serving failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        result = json.loads(report.read_text().splitlines()[-1])
    assert result["completed"] == NUM_PROMPTS[in_flight], result
    return NUM_PROMPTS[in_flight] * args.output / result["duration"]


def install_client(python: str) -> None:
    target = BENCH / "sglang"
    if not (target / "datasets").is_dir():
        command = [python, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
        subprocess.run([*command, *CLIENT_PACKAGES], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sglang", default=sys.executable, help="interpreter that has sglang")
    parser.add_argument("--model", default="", help="Hugging Face directory")
    parser.add_argument("--device", default="cpu", choices=sorted(DEVICE_ENVIRONMENT))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--input", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens of a response")
    parser.add_argument("--in-flight", type=int, nargs="*", default=list(NUM_PROMPTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=BENCH / "rollout.json")
    args = parser.parse_args()
    args.model = args.model or str(make_model(ROOT / ".cache/demo/student"))
    install_client(args.sglang)
    vocab_size = AutoConfig.from_pretrained(args.model).vocab_size
    spec = ServerSpec(args.model, args.sglang, args.device, args.dtype)
    server = SGLangServer(spec, 0, BENCH / "rollout_logs")
    fleet = ServerFleet([server])
    fleet.start()
    print(f"sglang {server.version}, ready after {server.start_s:.1f} s", flush=True)
    results = {}
    try:
        # Warms up the server, which is slower at first.
        run_ours(server, max(args.in_flight), args, vocab_size, seed=0)
        for in_flight in args.in_flight:
            every: dict[str, list[float]] = {"megaopd": [], "stream": [], "no stream": []}
            for round_ in range(args.rounds):
                seed = 1000 * in_flight + 10 * round_
                every["megaopd"].append(run_ours(server, in_flight, args, vocab_size, seed + 1))
                for offset, (name, stream) in enumerate((("stream", True), ("no stream", False))):
                    rate = run_theirs(server, in_flight, args, stream, seed + 2 + offset)
                    every[name].append(rate)
            medians = {name: statistics.median(rates) for name, rates in every.items()}
            ratio = medians["megaopd"] / max(medians["stream"], medians["no stream"])
            results[in_flight] = {"tokens_per_s": medians, "all": every, "ratio": ratio}
            print(
                f"{in_flight:>3} in flight: megaopd {medians['megaopd']:,.0f} tokens/s, "
                f"sglang.bench_serving {medians['stream']:,.0f} streaming, "
                f"{medians['no stream']:,.0f} not; ratio {ratio:.3f}",
                flush=True,
            )
    finally:
        fleet.stop()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"version": server.version, "in_flight": results}, indent=2))


if __name__ == "__main__":
    main()

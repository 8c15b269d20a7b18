"""Which flags a server is started with, by device. Versions differ in flags, not in meaning.

An option is a list of alternatives, best first; the launcher takes the first one whose flags this
version knows. An empty last alternative makes the option one that a version may lack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megaopd.errors import RolloutError

Option = list[list[str]]

SECRET_FLAGS = {"api": "--api-key", "admin": "--admin-api-key"}
"""Key -> the flag that takes it; versions before 0.5.8 have no admin key."""


OUR_FLAGS = ("--host", "--port", *SECRET_FLAGS.values())
"""Where a server listens and who may talk to it is not for `ServerSpec.args` to say."""


@dataclass(frozen=True)
class ServerSpec:
    """What one server serves, and where.

    Attributes:
        model_path: Hugging Face directory, with the weights that it starts from.
        has_weights: whether there are any; without them it starts from random numbers.
        host: the address that it listens on, loopback or of a private interface.
        device: "cuda" or "cpu".
        dtype: "fp32" or "bf16", of weights and activations.
        tensor: tensor-parallel size.
        first_gpu: index of its first GPU among those that this process sees.
        colocated: it shares its GPUs with the trainer, and gives up memory on request.
        seed: of the sampler.
        args: more arguments, which override the others.
        python: interpreter that has sglang.
    """

    model_path: str
    python: str
    device: str
    dtype: str
    host: str = "127.0.0.1"
    tensor: int = 1
    first_gpu: int = 0
    colocated: bool = False
    seed: int = 0
    args: tuple[str, ...] = ()
    has_weights: bool = True


def check_args(args: Sequence[str]) -> None:
    """Raises RolloutError if one of these arguments is ours, or an abbreviation of ours."""
    for word in args:
        flag = word.split("=")[0]
        if flag.startswith("--") and any(ours.startswith(flag) for ours in OUR_FLAGS):
            raise RolloutError(
                "rollout.sglang.args", f"{flag} is set by us", "take it out; see docs/security.md"
            )


def server_options(spec: ServerSpec, port: int) -> list[Option]:
    """The options of one server: those of every server, then its device's."""
    common: list[Option] = [
        [["--model-path", spec.model_path]],
        [["--host", spec.host]],
        [["--port", str(port)]],
        [["--dtype", {"fp32": "float32", "bf16": "bfloat16"}[spec.dtype]]],
        [["--tp-size", str(spec.tensor)]],
        [["--random-seed", str(spec.seed)]],
        # Token ids go in and come out: a tokenizer of its own could only disagree with ours.
        [["--skip-tokenizer-init"]],
        # One line of log per request is too many.
        [["--log-level-http", "warning"]],
        # Else every event of a stream repeats all tokens before it.
        [["--incremental-streaming-output"], ["--stream-output"], []],
    ]
    if not spec.has_weights:
        common.append([["--load-format", "dummy"]])
    return common + DEVICE_OPTIONS[spec.device](spec)


def _cuda_options(spec: ServerSpec) -> list[Option]:
    options: list[Option] = [[["--device", "cuda"]], [["--base-gpu-id", str(spec.first_gpu)]]]
    if spec.colocated:
        options.append([["--enable-memory-saver"]])
        # Without a copy in host memory the weights would have to stay on the device.
        options.append([["--enable-weights-cpu-backup"], []])
    return options


def _cpu_options(spec: ServerSpec) -> list[Option]:
    return [
        [["--device", "cpu"]],
        # The default for a CPU wants AMX.
        [["--attention-backend", "torch_native"]],
        [["--sampling-backend", "pytorch"]],
        [
            [
                *("--cuda-graph-backend-decode", "disabled"),
                *("--cuda-graph-backend-prefill", "disabled"),
            ],
            ["--disable-cuda-graph"],
        ],
        [["--disable-overlap-schedule"]],
        # An idle scheduler would take a core that the trainer has work for.
        [["--sleep-on-idle"], []],
        # Without a bound the cache of keys and values takes most of the machine's memory.
        [["--max-total-tokens", "16384"]],
        # The prompts of many requests at once would keep it silent for longer than a hang may last.
        [["--chunked-prefill-size", "1024"]],
        [["--max-running-requests", "64"]],
    ]


DEVICE_OPTIONS: Mapping[str, Callable[[ServerSpec], list[Option]]] = {
    "cuda": _cuda_options,
    "cpu": _cpu_options,
}

DEVICE_ENVIRONMENT: Mapping[str, Mapping[str, str]] = {
    "cuda": {},
    "cpu": {"SGLANG_USE_CPU_ENGINE": "1"},
}

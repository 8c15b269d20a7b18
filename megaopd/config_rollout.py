"""The part of the configuration that says how the student samples; see `megaopd.config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class SGLangConfig:
    """SGLang servers: what we start, how we talk to them, how they get the student's weights."""

    num_servers: int = 1
    """Servers to start, with `rollout.launch`."""
    tensor: int = 1
    """Tensor-parallel size of a server that we start."""
    host: str = "127.0.0.1"
    """Address that the servers we start listen on: loopback, or the job's private interface."""
    python: str = ""
    """Interpreter that has sglang, to start servers with; empty is this one."""
    args: tuple[str, ...] = ()
    """More arguments for `sglang.launch_server`, after our own."""
    api_key_env: str = "MEGAOPD_SGLANG_API_KEY"
    """Environment variable of the key for generation; where it is not set, servers that we start
    get a random one."""
    admin_key_env: str = "MEGAOPD_SGLANG_ADMIN_KEY"
    """Environment variable of the key for weight updates and the like; where it is not set, servers
    that we start get a random one, and those given by URL are asked with the other key."""
    max_tokens_in_flight: int = 0
    """Most prompt and response tokens that a server is asked for at one time; 0 is four times its
    KV cache, for it queues what does not fit and few responses are as long as they may be."""
    progress_timeout_s: float = 30.0
    """A request without a new token for so long is given up: its server hangs."""
    health_interval_s: float = 3.0
    """Seconds between two health checks of a server."""
    start_timeout_s: float = 600.0
    """Longest time from the start of a server to its first answer."""
    max_retries: int = 5
    """Times that a failed request is sent again, with back-off."""
    max_restarts: int = 10
    """Restarts in a row after which a server that we started is given up."""
    colocated: bool = False
    """The servers share the trainer's GPUs: they give up their memory while it trains."""
    sync: Literal["disk", "tensor", "distributed"] = "disk"
    """How weights travel: `disk` by files in sync_dir, `tensor` in the request or by CUDA IPC (same
    host), `distributed` over NCCL or gloo between the trainer and the servers."""
    sync_dir: str = "/dev/shm"
    """Directory of `disk`, seen by the trainer and the servers."""
    bucket_bytes: int = 512 << 20
    """Bytes of weights that are gathered and sent at a time."""
    verify: bool = False
    """Compare checksums of all tensors after every weight sync."""


@dataclass(frozen=True)
class AgentConfig:
    """Conversations in which the student calls tools."""

    tools: tuple[str, ...] = ()
    """Tools on offer, entries of megaopd.rollout.agent.TOOLS."""
    max_turns: int = 8
    """Most turns of the student in a conversation."""
    tool_timeout_s: float = 10.0
    """Longest time that a tool may take; after it the student reads that it failed."""
    max_tool_tokens: int = 1024
    """Longest output of one tool call; the rest is cut off."""
    database: str = ""
    """SQLite file that the tool `sqlite` reads; the student may see all of it."""


@dataclass(frozen=True)
class MixtureConfig:
    """Who answers the training prompts: the student, their teachers, the data set."""

    on_policy: float = 1.0
    """Fraction of the prompts that the student answers: lambda of GKD (arXiv 2306.13649)."""
    teacher: float = 0.0
    """Fraction that their teacher answers. What is left has the data set's own responses, from
    data.response_column."""


@dataclass(frozen=True)
class RolloutConfig:
    """How the student samples."""

    kind: Literal["embedded", "recorded", "sglang"] = "embedded"
    """Engine: `embedded` generates in the trainer's processes, `sglang` on servers, `recorded`
    replays `path`."""
    n: int = 1
    """Samples per prompt."""
    max_new_tokens: int = 1024
    """Longest response; of a conversation, all turns and tool outputs together."""
    temperature: float = 1.0
    """Sampling temperature; on-policy distillation wants 1."""
    top_p: float = 1.0
    """Nucleus mass; below 1 the samples are no longer the student's own distribution."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    stop: tuple[str, ...] = ()
    """Strings of exactly one token each that end a response, besides the model's own end tokens."""
    batch_size: int = 64
    """Sequences that one rank of the embedded engine generates at once."""
    max_staleness: int = 0
    """Steps that samples may be behind the weights they train: with k > 0 the servers generate the
    next k batches while this one trains; 0 is strictly on-policy."""
    partial: bool = True
    """A response under way at a weight update goes on from its tokens with the new weights; false
    makes the update wait for it."""
    path: str = ""
    """Rollouts to replay, for `recorded`."""
    record: str = ""
    """File to record every step's samples to; empty records nothing."""
    urls: tuple[str, ...] = ()
    """Servers that are there already, for `sglang`, e.g. http://10.0.0.7:30000."""
    launch: bool = False
    """Start the servers ourselves, for `sglang`, and stop them at the end."""
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    mixture: MixtureConfig | None = None
    """Samples of others among the student's; null trains on the student's alone."""
    agent: AgentConfig | None = None
    """Conversations with tools instead of single responses; null generates single responses."""

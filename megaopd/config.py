"""The configuration of a run: what can be set, what it means, what it is when nobody sets it.

Defaults and their documentation live here, in frozen dataclasses; a YAML file under conf/ holds
what differs. Each field's docstring is what `python -m megaopd.config conf=NAME` prints above its
value. Rules between fields are in `megaopd.config_validate`.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megaopd.config_compose import compose
from megaopd.config_credit import CreditConfig
from megaopd.config_lora import LoraConfig
from megaopd.config_reliability import CheckpointConfig, DeadlineConfig, GuardConfig
from megaopd.config_rollout import AgentConfig, MixtureConfig, RolloutConfig, SGLangConfig
from megaopd.config_schema import build, to_markdown, to_yaml
from megaopd.config_validate import validate, validate_models
from megaopd.errors import run_cli

__all__ = [
    "AgentConfig",
    "CheckpointConfig",
    "Config",
    "CreditConfig",
    "DeadlineConfig",
    "GuardConfig",
    "MixtureConfig",
    "RolloutConfig",
    "SGLangConfig",
    "load",
    "to_yaml",
    "validate",
    "validate_models",
]

Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class RunConfig:
    """Name, place and seed of a run."""

    name: str = ""
    """Name of the run; empty takes the name of the configuration."""
    dir: str = ""
    """Directory of everything the run writes; empty is runs/NAME."""
    seed: int = 1234
    """Seed of data order and sampling; the same seed and layout give the same run bit for bit."""


@dataclass(frozen=True)
class ParallelConfig:
    """A layout; the ranks that remain are data-parallel."""

    tensor: int = 1
    """Tensor-parallel size (TP); divides the attention heads and the KV heads."""
    pipeline: int = 1
    """Pipeline-parallel size (PP)."""
    virtual_pipeline: int = 1
    """Virtual stages per pipeline rank (interleaved 1F1B); above 1 needs pipeline above 1."""
    layers_per_stage: tuple[int, ...] = ()
    """Layers of every (virtual) stage in the order of the network, pipeline x virtual_pipeline
    numbers; empty shares them out evenly."""
    context: int = 1
    """Context-parallel size (CP): every sequence is cut into 2 x CP pieces, two a rank."""
    expert: int = 1
    """Expert-parallel size (EP) of a mixture of experts; divides its experts, and the ranks of a
    pipeline stage together with expert_tensor."""
    expert_tensor: int | None = None
    """Tensor-parallel size inside an expert; null is `tensor`."""
    sequence_parallel: bool = False
    """Shard norms and residuals over the tensor-parallel group (needs tensor > 1)."""


@dataclass(frozen=True)
class StudentConfig:
    """The model in training."""

    path: str = ""
    """Directory the student starts from: Hugging Face (config.json, safetensors, tokenizer), or a
    Megatron checkpoint, of which the newest complete step is taken."""
    dtype: Dtype = "bf16"
    """Weights and activations; with bf16 the optimizer keeps fp32 main weights."""
    freeze: tuple[str, ...] = ()
    """Patterns (fnmatch) over Hugging Face tensor names that are not trained."""
    router_aux_loss_coef: float = 0.0
    """Weight of the load-balancing loss of a mixture of experts; 0 keeps it out of training."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the weights; null trains the weights."""


@dataclass(frozen=True)
class TeacherConfig:
    """The model that scores the student's samples."""

    kind: Literal["checkpoint", "self", "base", "ema", "sglang", "average"] = "checkpoint"
    """Its weights: `checkpoint` those at path; `self` the student's own, frozen at step 0; `base`
    the student's without its LoRA adapters, so that one set of weights serves both; `ema` an
    exponential moving average of the student's; these three in the student's layout and dtype;
    `sglang` those of the servers at urls, which score the samples; `average` those of its members,
    whose log-probs are averaged."""
    path: str = ""
    """Directory of the teacher, of either format; its tokenizer must be the student's. Of a teacher
    on servers the weights are not read."""
    dtype: Dtype = "bf16"
    """Weights and activations of the teacher, and of the hidden states that it hands over."""
    ema_decay: float = 0.999
    """What an `ema` teacher keeps of its own weights at each step."""
    parallel: ParallelConfig | None = None
    """The teacher's own layout over the same ranks; null is the student's (`parallel`)."""
    max_tokens_per_micro_batch: int | None = None
    """Token budget of a forward pass; null packs as the student does."""
    offload: bool = False
    """Keep the weights in pinned host memory while the teacher does not score."""
    urls: tuple[str, ...] = ()
    """Servers that hold the teacher, for `sglang`, e.g. http://10.0.0.9:30000."""
    top_k: int = 64
    """Likeliest tokens whose log-probs a server gives at each position, for `sglang`; the loss puts
    the rest into one tail bucket. 0 asks for the sampled tokens' alone."""
    api_key_env: str = "MEGAOPD_TEACHER_API_KEY"
    """Environment variable of the servers' key."""
    members: tuple[str, ...] = ()
    """Entries of `teachers` that an `average` is made of; no prompt can be routed to them."""
    member_weights: tuple[float, ...] = ()
    """What each member counts, for `average`, divided by their sum; empty counts all alike."""


@dataclass(frozen=True)
class DataConfig:
    """Prompts: where they are and how they become tokens."""

    name: str = ""
    """Name of the task, for summary.json and the report."""
    train: str = ""
    """Training prompts: a JSONL or parquet file, or a directory of them."""
    eval: str = ""
    """Evaluation prompts, in the same forms; empty evaluates nothing."""
    prompt_column: str = "prompt"
    """Column of the prompt: a string, or a list of {role, content} messages. Here and in the other
    columns dots lead into nested ones: reward_model.ground_truth."""
    answer_column: str = "answer"
    """Column of the reference answer; may be missing where the reward needs none."""
    teacher_column: str = "teacher"
    """Column that routes a prompt to an entry of `teachers`; where it is missing, to `teacher`."""
    teacher_prompt_column: str = ""
    """Column of the prompt that the teacher sees in place of the student's (privileged context);
    empty shows it the same."""
    response_column: str = ""
    """Column of the data set's own response to the prompt, as text, for rollout.mixture; the end
    token is added where it is missing."""
    id_column: str = "id"
    """Column of the prompt's unique id; where it is missing, the row's number is the id."""
    chat_template: bool = False
    """Render string prompts as one user message of the tokenizer's chat template."""
    enable_thinking: bool | None = None
    """Given to the chat template: whether the model thinks before it answers, for templates that
    know it; null leaves it to the template."""
    max_prompt_tokens: int = 1024
    """Longest prompt; a longer one is set aside and counted."""
    shuffle: bool = True
    """Shuffle the prompts of each epoch, from run.seed."""


@dataclass(frozen=True)
class LossStage:
    """What `loss` is up to a step."""

    until_step: int = 0
    """The last step of the stage, from 1; a stage begins where the one before it ends."""
    kind: str | None = None
    """`loss.kind` in this stage; null leaves it."""
    beta: float | None = None
    """`loss.beta`, likewise."""
    alpha: float | None = None
    """`loss.alpha`, likewise."""
    entropy_coef: float | None = None
    """`loss.entropy_coef`, likewise."""
    selection_ratio: float | None = None
    """`loss.selection_ratio`, likewise."""
    linear: bool = False
    """Move the numbers that are set here on a straight line over the steps of the stage, from what
    they were at the end of the stage before (in the first one from those of `loss`)."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised, per sampled token."""

    objective: Literal["divergence", "policy_gradient", "estimator", "likelihood"] = "divergence"
    """How the teacher's word becomes a gradient: `divergence` of the two distributions as far as
    the teacher's kind of signal tells them; `policy_gradient` of the advantages of `credit`;
    `estimator` of the KL on the sampled token, as a loss; `likelihood` of the tokens, whoever wrote
    them (SFT), without the teacher."""
    kind: str = "reverse_kl"
    """Divergence of student p and teacher q, an entry of megaopd.losses.DIVERGENCES."""
    beta: float = 0.5
    """Teacher's weight in the mixture of `jsd` (GKD, arXiv 2306.13649); weight of reverse KL in
    `mixed`."""
    alpha: float = 0.1
    """Skew of `skew_forward_kl` and `skew_reverse_kl` (arXiv 2402.03898); order of `alpha`."""
    temperature: float = 1.0
    """Both sides' logits are divided by it."""
    estimator: Literal["k2", "k3"] = "k2"
    """Of `estimator`: k2 = d^2 / 2 has the gradient of the reverse KL, k3 = e^-d - 1 + d, d = log p
    - log q, that of the FORWARD KL, whatever its value estimates."""
    clip_low: float = 0.2
    """`policy_gradient` gives a token of negative advantage no gradient once its probability is
    below 1 - clip_low of the sampler's (PPO, arXiv 1707.06347)."""
    clip_high: float = 0.2
    """Likewise one of positive advantage once it is above 1 + clip_high of it."""
    entropy_coef: float = 0.0
    """Bonus for the student's entropy over the whole vocabulary: the loss of a token is less by
    entropy_coef times it."""
    selection: Literal["none", "soft_or", "entropy", "q3"] = "none"
    """Tokens of a response that are trained on (TIP, arXiv 2604.14084), by h, the student's
    entropy, and d, the divergence, both scaled to [0, 1] over the response: `soft_or` h + d - h d
    with the reverse KL, `entropy` h, `q3` (1 - h) times the forward KL: sure and wrong."""
    selection_ratio: float = 1.0
    """The share of a response's tokens that selection keeps, the best ones."""
    selection_lowest: bool = False
    """Keep the worst ones instead: what selection is compared with."""
    schedule: dict[str, LossStage] = field(default_factory=dict)
    """Other values for the first steps, stage by stage; after the last one those above hold."""
    chunk_tokens: int | None = None
    """Tokens whose logits exist at one time; none lets the engine choose."""
    backend: Literal["auto", "eager", "compiled", "triton"] = "auto"
    """Implementation of the divergence."""
    fused: bool = True
    """Multiply hidden states and heads chunk by chunk inside the divergence; false makes all logits
    of a micro-batch first, which shows what the fused form saves."""
    importance: Literal["none", "truncated", "icepop"] = "truncated"
    """Correction of a sampled-token objective for samples of other weights, by the ratio of the
    trainer's to the engine's probability of a token: `truncated` caps it at importance_cap,
    `icepop` leaves out tokens outside [icepop_low, icepop_high]. Full-vocabulary ones need none."""
    importance_cap: float = 2.0
    """Largest ratio of `truncated`."""
    icepop_low: float = 0.5
    """Smallest ratio that `icepop` keeps."""
    icepop_high: float = 5.0
    """Largest ratio that `icepop` keeps."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the schedule of its learning rate."""

    lr: float = 1e-6
    """Learning rate after the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the last step, for a decaying schedule."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the schedule after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Global gradient norm to clip to; 0 does not clip."""


@dataclass(frozen=True)
class TrainConfig:
    """Length and batch of the training."""

    num_steps: int = 100
    """Optimizer steps."""
    global_batch_size: int = 64
    """Samples per optimizer step: global_batch_size / rollout.n prompts; a multiple of the
    data-parallel size x micro_batch_size, unless there is a token budget."""
    micro_batch_size: int = 1
    """Samples packed into one forward pass of a data-parallel rank."""
    max_tokens_per_micro_batch: int | None = None
    """Token budget of a forward pass, prompt and response together, over all context-parallel
    ranks; packs by length instead of micro_batch_size. It must hold the longest sequence."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, the attention's, or whole layers'."""
    offload: bool = False
    """Keep gradients, optimizer state and main weights in pinned host memory outside the student's
    phase, and the student's weights while an engine generates."""
    max_skipped_steps: int = 3
    """Steps in a row with a non-finite loss or gradient that end the run."""
    max_wall_time: str = ""
    """Longest time of the process as "[DAYS-]HH:MM:SS", in quotes; then it saves a checkpoint and
    exits with status 75, to be started again. Empty sets no limit."""
    export: bool = True
    """Write the student as a Hugging Face directory (run.dir/hf) at the end, LoRA adapters merged
    into it; these also by themselves in PEFT's format (run.dir/adapter)."""
    export_megatron: bool = False
    """Write the student as a Megatron checkpoint (run.dir/megatron) at the end, for any layout;
    its step is the number of the run's optimizer steps."""


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation of student and teacher."""

    num_prompts: int = 0
    """Evaluation prompts to use; 0 takes all of them."""
    interval: int = 0
    """Evaluate every so many steps; 0 evaluates before and after only."""
    reward: str = "exact_match"
    """How a response is scored: an entry of megaopd.rewards.REWARDS, or a function of yours,
    path/to/file.py:function."""
    n: int = 1
    """Samples per prompt; above 1 pass@k and the majority vote are measured too."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass; 1 leaves the distribution whole."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    teacher: bool = True
    """Measure the teacher's accuracy too."""


@dataclass(frozen=True)
class LogConfig:
    """Where the metrics go, besides the console and run.dir/metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard events to run.dir/tensorboard."""
    wandb_project: str = ""
    """Weights & Biases project; empty logs nothing there."""
    num_report_samples: int = 8
    """Samples shown before and after in report.html."""
    report_interval: int = 10
    """Refresh report.html every so many steps; 0 writes it at the end alone."""
    prometheus_port: int = 0
    """Port of rank 0 for the newest metrics as Prometheus text, /metrics; 0 serves none."""
    prometheus_host: str = "127.0.0.1"
    """Address to serve them on: loopback, or the job's private interface."""


@dataclass(frozen=True)
class Config:
    """Everything that can be set."""

    run: RunConfig = field(default_factory=RunConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """More teachers, by the name that data.teacher_column routes to."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    deadline: DeadlineConfig = field(default_factory=DeadlineConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)


def load(argv: list[str]) -> Config:
    """Reads ``["conf=NAME", "key=value", ...]`` into a configuration.

    NAME is conf/NAME.yaml (in the working directory, then beside the package) or a path to a YAML
    file; the rest are Hydra overrides. An empty run.name or run.dir is filled in.

    Raises:
        ConfigError: an unknown key (the nearest name is offered), a wrong type, bad YAML.
    """
    name, values = compose(argv, dataclasses.asdict(Config()))
    config = build(Config, values)
    run_name = config.run.name or name
    run_dir = config.run.dir or str(Path("runs") / run_name)
    return dataclasses.replace(
        config, run=dataclasses.replace(config.run, name=run_name, dir=run_dir)
    )


_HELP = """\
usage: python -m megaopd.config conf=NAME [key=value ...]   print the resolved configuration
       python -m megaopd.config --markdown                  print the reference of all keys

conf=NAME    conf/NAME.yaml in the working directory, then in the repository; or a path to a file
key=value    overrides, as `torchrun -m megaopd.train` takes them:
               loss.kind=jsd                     a value
               'rollout.stop=["<|im_end|>"]'     a list (quoted, for the shell)
               parallel=tp2                      a file of a group: conf/parallel/tp2.yaml
               parallel@teacher.parallel=tp4     the same group, for the teacher's layout
               (+parallel=tp2 where the configuration's defaults list does not name the group)
               teachers.math.path=PATH           a key of a teacher that is named here

What is printed is YAML: saved to a file it can be given back as conf=PATH. Example:
  python -m megaopd.config conf=demo_cpu train.num_steps=10
"""

_MARKDOWN_HEAD = """\
# Configuration

<!-- Generated: python -m megaopd.config --markdown > docs/configuration.md -->

A run is started with `torchrun -m megaopd.train conf=NAME key=value ...`.

- `conf=NAME` is `conf/NAME.yaml`, looked for in the working directory and then in the repository,
  or a path to a YAML file. The file holds only what differs from the defaults below.
- `key=value` overrides one value; the syntax is Hydra's. Quote lists and strings with special
  characters for the shell: `'rollout.stop=["<|im_end|>"]'`. Escapes such as `\\n` are read in YAML
  files only.
- A YAML file may start with a `defaults` list that takes in other files of `conf/`, whole groups of
  them (`conf/parallel/tp2.yaml` is chosen by `- parallel: tp2`, or by `parallel=tp2` on the command
  line where the list names that group, `+parallel=tp2` where it does not). A layout serves either
  side: `- parallel@teacher.parallel: tp4` is the teacher's.
- A section that is null takes the defaults of its own keys once one of them is set:
  `teacher.parallel.tensor=2`. One of several named ones begins with its first key:
  `teachers.math.path=PATH`.
- A value may refer to another: `min_lr: ${optimizer.lr}`. Nothing else is interpolated, neither the
  environment nor a resolver.
- An unknown key, a wrong type or a rule broken between two keys ends the run before any model is
  loaded, with one line and exit status 2.

`python -m megaopd.config conf=NAME key=value ...` prints every value with its meaning.

"""


def main(argv: list[str]) -> None:
    """The command line `python -m megaopd.config`."""
    if not argv or {"-h", "--help"} & set(argv):
        print(_HELP, end="")
    elif argv == ["--markdown"]:
        print(_MARKDOWN_HEAD + to_markdown(Config), end="")
    else:
        print(to_yaml(load(argv)), end="")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])

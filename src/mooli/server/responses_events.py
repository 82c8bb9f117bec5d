"""The answer of the Responses API, as it grows: parts of a message in, items and the events that tell of them out.

Owns the order of the events, their numbers, the ids of items, and the shape of the response. A whole answer is the
response of a stream's last event, so both are made here, in one way. Pure: never reads a sequence, an engine or a
clock, and never frames an event.

Source: OpenAI API reference, responses: the response object, streaming events.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from mooli.frontend.parts import Part
from mooli.server.responses_items import CUSTOM_ARGUMENT, CalledTool

Event = dict[str, Any]
"""With a `type` and a `sequence_number`."""

Emit = Callable[..., None]
"""Adds an event of a type; fields are keywords."""

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class ResponseWriter:
    """One response.

    response_id: begins with "resp_"; ids of items are made of it. echo: fields of the response that repeat the request,
    or belong to the moment. called: by the model's name for it, each tool as the client knows it. as_summary: reasoning
    is shown as the summary that the client has asked for.
    """

    def __init__(
        self, response_id: str, echo: Mapping[str, Any], called: Mapping[str, CalledTool], *, as_summary: bool = False
    ) -> None:
        self._id = response_id
        self._echo = echo
        self._called = called
        self._as_summary = as_summary
        self._output: list[dict[str, Any]] = []
        self._item: _Item | None = None
        self._pending: list[Any] = []
        """Log-probabilities of tokens that are no text yet, and may become the first of a message."""
        self._events: list[Event] = []
        self._number = 0
        self.response: dict[str, Any] = {}
        """As the last event about the whole of it has it."""

    def take(self) -> list[Event]:
        """The events that were made since the last time."""
        events, self._events = self._events, []
        return events

    def repeat(self, **fields: Any) -> None:
        """What else each `response` says from here on."""
        self._echo = {**self._echo, **fields}

    def begin(self) -> None:
        for kind in ("response.created", "response.in_progress"):
            self._tell(kind, "in_progress", None)

    def add(self, part: Part, logprobs: Sequence[Any] = ()) -> None:
        """A part between the first and the last. logprobs: of its tokens, in the API's shape."""
        if part.kind == "call_begin":
            called = self._called.get(part.text, CalledTool(part.text))
            self._open("ctc" if called.is_custom else "fc", _Call, part.call_id, called)
        elif part.kind == "call_end":
            self._close("completed")
        elif part.kind == "arguments":
            self._grow(_Call, part.text, ())
        elif part.kind == "reasoning":
            if part.text and not isinstance(self._item, _Reasoning):
                self._open("rs", _Summary if self._as_summary else _Reasoning)
            self._grow(_Reasoning, part.text, ())
        elif part.kind == "text":
            if not part.text and not isinstance(self._item, _Message):
                self._pending += logprobs
                return
            if not isinstance(self._item, _Message):
                pending = self._pending
                self._open("msg", _Message)
                logprobs = [*pending, *logprobs]
            self._grow(_Message, part.text, logprobs)

    def end(self, usage: Mapping[str, Any], *, is_cut: bool) -> None:
        """is_cut: there was more to say than there were tokens for. A response without words has an empty message."""
        if self._item is None and not self._output:
            pending = self._pending
            self._open("msg", _Message)
            self._grow(_Message, "", pending)
        self._close("incomplete" if is_cut else "completed")
        if is_cut:
            reason = {"reason": "max_output_tokens"}
            self._tell("response.incomplete", "incomplete", usage, incomplete_details=reason)
        else:
            self._tell("response.completed", "completed", usage)

    def fail(self, code: str, message: str, usage: Mapping[str, Any]) -> None:
        """What was not finished is no item: a client could take it for one, and run a call that was cut off."""
        self._item = None
        self._tell("response.failed", "failed", usage, error={"code": code, "message": message})

    def _tell(self, kind: str, status: Status, usage: Mapping[str, Any] | None, **fields: Any) -> None:
        self.response = {
            "id": self._id, "object": "response", **self._echo, "status": status, "error": None,
            "incomplete_details": None, "output": list(self._output), "usage": usage, **fields,
        }  # fmt: skip
        self._emit(kind, response=self.response)

    def _emit(self, kind: str, /, **fields: Any) -> None:
        self._events.append({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1

    def _open(self, prefix: str, kind: Callable[..., _Item], *arguments: Any) -> None:
        self._close("completed")
        self._pending = []
        index = len(self._output)
        item_id = f"{prefix}_{self._id.removeprefix('resp_')}{index:02x}"

        def emit(event: str, /, **fields: Any) -> None:
            self._emit(event, item_id=item_id, output_index=index, **fields)

        self._item = kind(emit, item_id, *arguments)
        self._emit("response.output_item.added", output_index=index, item=self._item.shown("in_progress"))
        self._item.begin()

    def _grow(self, kind: type, text: str, logprobs: Sequence[Any]) -> None:
        if self._item is not None and isinstance(self._item, kind) and (text or logprobs):
            self._item.grow(text, logprobs)

    def _close(self, status: Status) -> None:
        if self._item is None:
            return
        item, self._item = self._item, None
        shown = item.shown(item.end(status))
        self._emit("response.output_item.done", output_index=len(self._output), item=shown)
        self._output.append(shown)


# -- items -------------------------------------------------------------------------------------------------------------
class _Item(Protocol):
    """What grows at the moment."""

    def shown(self, status: Status) -> dict[str, Any]:
        """By now."""
        ...

    def begin(self) -> None: ...

    def grow(self, text: str, logprobs: Sequence[Any]) -> None: ...

    def end(self, status: Status) -> Status:
        """Emits what stands before `output_item.done`; the status that the item then has."""
        ...


class _Message:
    """Words, in one part."""

    def __init__(self, emit: Emit, item_id: str) -> None:
        self._emit = emit
        self._id = item_id
        self._texts: list[str] = []
        self._logprobs: list[Any] = []
        self._has_begun = False

    def shown(self, status: Status) -> dict[str, Any]:
        content = [self._part()] if self._has_begun else []
        return {"id": self._id, "type": "message", "status": status, "role": "assistant", "content": content}

    def begin(self) -> None:
        self._has_begun = True
        self._emit("response.content_part.added", content_index=0, part=self._part())

    def grow(self, text: str, logprobs: Sequence[Any]) -> None:
        self._texts.append(text)
        self._logprobs += logprobs
        self._emit("response.output_text.delta", content_index=0, delta=text, logprobs=list(logprobs))

    def end(self, status: Status) -> Status:
        part = self._part()
        self._emit("response.output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"])
        self._emit("response.content_part.done", content_index=0, part=part)
        return status

    def _part(self) -> dict[str, Any]:
        text = "".join(self._texts)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logprobs)}


class _Reasoning:
    """What was thought, as it is."""

    field = "content"
    part_type = "reasoning_text"
    index = "content_index"
    part_event, text_event = "response.content_part", "response.reasoning_text"

    def __init__(self, emit: Emit, item_id: str) -> None:
        self._emit = emit
        self._id = item_id
        self._texts: list[str] = []
        self._has_begun = False

    def shown(self, status: Status) -> dict[str, Any]:
        item: dict[str, Any] = {
            "id": self._id, "type": "reasoning", "status": status, "summary": [], "encrypted_content": None,
        }  # fmt: skip
        return {**item, self.field: [self._part()] if self._has_begun else []}

    def begin(self) -> None:
        self._has_begun = True
        self._emit(f"{self.part_event}.added", part=self._part(), **{self.index: 0})

    def grow(self, text: str, logprobs: Sequence[Any]) -> None:
        self._texts.append(text)
        self._emit(f"{self.text_event}.delta", delta=text, **{self.index: 0})

    def end(self, status: Status) -> Status:
        part = self._part()
        self._emit(f"{self.text_event}.done", text=part["text"], **{self.index: 0})
        self._emit(f"{self.part_event}.done", part=part, **{self.index: 0})
        return status

    def _part(self) -> dict[str, Any]:
        return {"type": self.part_type, "text": "".join(self._texts)}


class _Summary(_Reasoning):
    """The same in the place of its summary: clients that ask for one show that, and send it back."""

    field = "summary"
    part_type = "summary_text"
    index = "summary_index"
    part_event, text_event = "response.reasoning_summary_part", "response.reasoning_summary_text"


class _Call:
    """A call: of a function with its arguments, of a custom tool with its text."""

    def __init__(self, emit: Emit, item_id: str, call_id: str, called: CalledTool) -> None:
        self._emit = emit
        self._id = item_id
        self._call_id = call_id
        self._called = called
        self._texts: list[str] = []
        self._custom = CustomInput() if called.is_custom else None

    def shown(self, status: Status) -> dict[str, Any]:
        kind, field = ("custom_tool_call", "input") if self._custom else ("function_call", "arguments")
        item = {
            "id": self._id, "type": kind, "status": status, "call_id": self._call_id, "name": self._called.name,
            field: "".join(self._texts),
        }  # fmt: skip
        return {**item, "namespace": self._called.namespace} if self._called.namespace else item

    def begin(self) -> None: ...

    def grow(self, text: str, logprobs: Sequence[Any]) -> None:
        said = text if self._custom is None else self._custom.push(text)
        if said:
            self._texts.append(said)
            kind = "function_call_arguments" if self._custom is None else "custom_tool_call_input"
            self._emit(f"response.{kind}.delta", delta=said)

    def end(self, status: Status) -> Status:
        """Arguments that are no JSON were cut short, whatever the status of the rest."""
        if self._custom is not None:
            rest = self._custom.flush()
            if rest:
                self._texts.append(rest)
                self._emit("response.custom_tool_call_input.delta", delta=rest)
            self._emit("response.custom_tool_call_input.done", input="".join(self._texts))
            return status if self._custom.is_whole else "incomplete"
        if not self._texts and status == "completed":
            self.grow("{}", ())
        arguments = "".join(self._texts)
        self._emit("response.function_call_arguments.done", name=self._called.name, arguments=arguments)
        return status if _is_json(arguments) else "incomplete"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


# -- custom tools ------------------------------------------------------------------------------------------------------
_HEAD = re.compile(rf'\s*\{{\s*"{CUSTOM_ARGUMENT}"\s*:\s*"')
_PIECE = re.compile(r'[^"\\]+|\\u([0-9a-fA-F]{4})|\\([^u])')
"""Of a string's inside: plain text, or one escape."""
_LOW = re.compile(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})")
_BEGUN = re.compile(r"(\\(u[0-9a-fA-F]{0,3})?)?")
"""An escape that is not all there."""
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\\": "\\", '"': '"'}


class CustomInput:
    """The text that a custom tool is called with, out of the JSON that a model writes: an object with that one text.

    The text comes as it grows. From arguments of another form it comes at their end, whole: the one text that they
    hold, or they themselves. What all pushes and `flush` give, joined, does not depend on the cut.
    """

    def __init__(self) -> None:
        self._raw = ""
        """Before the text has begun all of it; then what is not decoded yet."""
        self._is_inside = False
        self.is_whole = False
        """Whether the text has ended, and was not cut short."""

    def push(self, text: str) -> str:
        if self._is_inside and self.is_whole:
            return ""
        self._raw += text
        if not self._is_inside:
            head = _HEAD.match(self._raw)
            if head is None:
                return ""
            self._is_inside, self._raw = True, self._raw[head.end() :]
        return self._decoded()

    def flush(self) -> str:
        if self._is_inside:
            return ""
        try:
            given = json.loads(self._raw)
        except (ValueError, RecursionError):
            return self._raw
        self.is_whole = True
        texts = list(given.values()) if isinstance(given, dict) else [given]
        if isinstance(given, dict) and isinstance(given.get(CUSTOM_ARGUMENT), str):
            texts = [given[CUSTOM_ARGUMENT]]
        text = texts[0] if len(texts) == 1 and isinstance(texts[0], str) else self._raw
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a pair cannot be sent

    def _decoded(self) -> str:
        """Of the string's inside all that is certain. An escape that JSON does not have stays as it is written."""
        raw, position, texts = self._raw, 0, []
        while position < len(raw):
            piece = _PIECE.match(raw, position)
            if piece is None:
                if raw[position] == '"':
                    self.is_whole, position = True, len(raw)
                elif _BEGUN.fullmatch(raw, position):
                    break
                else:
                    texts.append("\\u")
                    position += 2
                continue
            code = int(piece[1], 16) if piece[1] else 0
            low = _LOW.match(raw, piece.end()) if 0xD800 <= code < 0xDC00 else None
            if low is not None:
                texts.append(chr(0x10000 + ((code - 0xD800) << 10) + int(low[1], 16) - 0xDC00))
                position = low.end()
                continue
            if 0xD800 <= code < 0xDC00 and _BEGUN.fullmatch(raw, piece.end()):
                break  # its other half may still come
            if piece[1]:
                texts.append("\ufffd" if 0xD800 <= code < 0xE000 else chr(code))
            elif piece[2]:
                texts.append(_ESCAPES.get(piece[2], piece[0]))
            else:
                texts.append(piece[0])
            position = piece.end()
        self._raw = raw[position:]
        return "".join(texts)

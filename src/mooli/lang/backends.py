"""What carries out programs: an engine in this process, or whatever else has the methods of `Backend`.

Owns the default backend of this process and the little that programs need of a model. Never knows programs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from mooli.errors import ProgramError, PromptError, RequestError

if TYPE_CHECKING:
    from mooli.frontend.engine import Engine


class Chunks(Protocol):
    """Growing answers, as `Engine.generate(stream=True)` gives them."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def close(self) -> None:
        """End the requests, and the iteration on whichever thread it waits. Any thread."""
        ...


@runtime_checkable
class Backend(Protocol):
    """keeps_ids: ids may be put together with those of texts around them, and give the same text."""

    keeps_ids: bool

    def encode(self, text: str, *, begins: bool, has_special: bool) -> list[int]:
        """begins: with the tokens that begin a prompt. has_special: texts of special tokens are read as these; False is
        asked only of a backend that keeps ids."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, is_open: bool, goes_on: bool = True) -> list[int]:
        """is_open: the last message goes on; otherwise the assistant begins one, unless goes_on is False."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are written out."""
        ...

    def start(
        self, input_ids: list[int] | list[list[int]], sampling_params: Mapping[str, Any], **arguments: Any
    ) -> Chunks:
        """Begin one request, or several at once. arguments: the log-probability arguments of `Engine.generate`."""
        ...

    def flush_cache(self) -> None: ...

    def get_server_info(self) -> dict[str, Any]: ...


class EngineBackend:
    """An `Engine` in this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        tokenizer = engine.tokenizer_manager.tokenizer
        if tokenizer is None:
            raise PromptError("programs are text and need a tokenizer: start the engine without skip_tokenizer_init")
        self._tokenizer = tokenizer
        self.keeps_ids: bool = tokenizer.is_byte_level

    def encode(self, text: str, *, begins: bool, has_special: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=begins, parse_special=has_special)
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, is_open: bool, goes_on: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=goes_on and not is_open, continue_final_message=is_open
        )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def start(
        self, input_ids: list[int] | list[list[int]], sampling_params: Mapping[str, Any], **arguments: Any
    ) -> Chunks:
        if arguments.pop("return_text_in_logprobs", False):
            raise RequestError(
                "return_text_in_logprobs is a server's: here, engine.tokenizer_manager.tokenizer has token_text"
            )
        call = self._engine.generate(None, sampling_params, input_ids, stream=True, **arguments)
        return cast(Chunks, call)

    def flush_cache(self) -> None:
        self._engine.flush_cache()

    def get_server_info(self) -> dict[str, Any]:
        return self._engine.get_server_info()


_default: list[Backend] = []
"""The default backend, if one is set: SGLang's API has it for the process."""


def set_default_backend(backend: Any) -> None:
    """What programs run on that are not given a backend: an `Engine`, a `RuntimeEndpoint` or a `Runtime`."""
    _default[:] = [as_backend(backend)]


def backend_or_default(backend: Any = None) -> Backend:
    """Raises ProgramError if there is neither."""
    if backend is not None:
        return as_backend(backend)
    if not _default:
        raise ProgramError(
            "there is no backend to run on: call mooli.set_default_backend(mooli.Engine(model_path=…)), or give"
            " run(backend=…)"
        )
    return _default[0]


def as_backend(backend: Any) -> Backend:
    """Raises ProgramError for what is none."""
    from mooli.frontend.engine import Engine  # here: a program that runs over HTTP needs no engine

    if isinstance(backend, Engine):
        return EngineBackend(backend)
    endpoint = getattr(backend, "endpoint", backend)
    if not isinstance(endpoint, Backend):
        raise ProgramError(f"a {type(backend).__name__} is no backend: give an Engine, a RuntimeEndpoint or a Runtime")
    return endpoint


def flush_cache(backend: Any = None) -> None:
    """Have the backend forget its cached prefixes."""
    backend_or_default(backend).flush_cache()


def get_server_info(backend: Any = None) -> dict[str, Any]:
    """The backend's arguments and counters."""
    return backend_or_default(backend).get_server_info()

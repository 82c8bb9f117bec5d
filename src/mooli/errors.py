"""Every error Mooli raises, as one tree.

Owns the types and nothing else: no formatting helpers, no logging. A message says what happened, with which value, and
what to do about it.

    MooliError
    ├── ConfigError (ValueError)              an engine argument or flag is wrong
    │   ├── UnknownArgumentError (TypeError)  no argument of that name
    │   └── StoreError                        the folder for the KV cache on disk cannot be used
    ├── RequestError (ValueError)             one request is wrong; the engine goes on
    │   ├── PromptError                       empty, too long, or with ids outside the vocabulary
    │   │   └── ContextLengthError            longer than the context, alone or with the answer asked for
    │   ├── SamplingParamsError               a sampling value out of its range
    │   │   └── UnknownSamplingParamError (TypeError)
    │   ├── RowError                          a row of a batch file is wrong; the other rows go on
    │   ├── StorageError                      a file cannot be kept: too large, too many, or the disk is full
    │   └── GrammarError                      a schema or grammar that is wrong, impossible or cannot be kept to
    │       └── GrammarTooLargeError          one that grew too large while an answer was held to it
    ├── ProgramError (RuntimeError)           a program of the frontend language is wrong, or something in it failed
    ├── BatchError (RuntimeError)             a batch cannot begin, go on or end; what is done of it is kept
    ├── BusyError (RuntimeError)              no room for one request now; the same may be sent again
    │   ├── QueueFullError                    as many run and wait as may
    │   ├── KeyBusyError                      as many of the same key do
    │   └── ModelsInUseError                  no memory for one more model beside those in use
    ├── ModelError                            a model cannot be used
    │   ├── ModelNotFoundError (FileNotFoundError)
    │   ├── DownloadError (ConnectionError)   a model cannot be fetched from a hub
    │   ├── CheckpointError (ValueError)      a file is truncated, malformed or lies about its contents
    │   ├── UnsupportedModelError (ValueError)  a family, tensor type or feature that is not implemented
    │   ├── TokenizerError (ValueError)
    │   └── ChatTemplateError (ValueError)
    ├── BackendUnavailableError (RuntimeError)  what the backend needs is not installed or not present
    ├── OutOfMemoryError (MemoryError)
    └── EngineError (RuntimeError)
        ├── EngineClosedError                 used after shutdown
        ├── EngineDeadError                   the engine loop died; carries the cause
        └── RequestFailedError                one request ended with `error`; carries the cause
"""

from __future__ import annotations


class MooliError(Exception):
    """Base of all errors raised on purpose by Mooli."""


class ConfigError(MooliError, ValueError):
    """An engine argument or command line flag has a value that cannot be used."""


class UnknownArgumentError(ConfigError, TypeError):
    """There is no engine argument of that name. A TypeError too, as Python raises for unknown keywords."""


class StoreError(ConfigError):
    """The folder that the KV cache shall be kept in cannot be used; or what is to be kept is no page of its kind."""


class RequestError(MooliError, ValueError):
    """One request cannot be served as asked. Other requests are not affected.

    `status_code` is the HTTP status a server answers with. `argument` is what is wrong, by its name in Python: an
    argument of `Engine.generate` or a sampling parameter; None where it is not a single one. `message` is for whoever
    sent the request, and has names of arguments only where these are meant: a server puts in those of its fields.
    `advice` is for who holds the engine, and stands behind it in the text.
    """

    status_code = 400

    def __init__(self, message: str = "", *, argument: str | None = None, advice: str = "") -> None:
        super().__init__(f"{message} {advice}" if advice else message)
        self.message = message
        self.argument = argument


class PromptError(RequestError):
    """The prompt is empty, too long for the context or the cache, or holds ids outside the vocabulary."""


class ContextLengthError(PromptError):
    """The prompt, or the prompt and the answer it asks for, are longer than the context.

    prompt_tokens: of the prompt, at least so many where `is_estimate`. max_new_tokens: of the answer, where only both
    together are too long. prompt_index: in a batch. All are None where they are not known.
    """

    def __init__(
        self,
        message: str = "",
        *,
        argument: str | None = None,
        advice: str = "",
        prompt_tokens: int | None = None,
        is_estimate: bool = False,
        context_length: int | None = None,
        max_new_tokens: int | None = None,
        prompt_index: int | None = None,
    ) -> None:
        super().__init__(message, argument=argument, advice=advice)
        self.prompt_tokens = prompt_tokens
        self.is_estimate = is_estimate
        self.context_length = context_length
        self.max_new_tokens = max_new_tokens
        self.prompt_index = prompt_index


class SamplingParamsError(RequestError):
    """A sampling parameter is out of its range or of the wrong type."""


class UnknownSamplingParamError(SamplingParamsError, TypeError):
    """There is no sampling parameter of that name."""


class RowError(RequestError):
    """A row of a batch file is wrong. code: a word for programs. custom_id: of the row, where it has one of its own."""

    def __init__(self, code: str, message: str, *, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


class ProgramError(MooliError, RuntimeError):
    """A program of the frontend language is wrong, or something in it failed: `__cause__` says what, if not this."""


class StorageError(RequestError):
    """A file of a client cannot be kept. status_code: 413 for one that is too large, 507 where there is no room."""

    def __init__(self, message: str, *, status_code: int) -> None:
        super().__init__(message)
        self.status_code = status_code


class GrammarError(RequestError):
    """What the output shall keep to is no grammar, allows no output, or asks for what cannot be enforced."""


class GrammarTooLargeError(GrammarError):
    """What an output is held to grew beyond its limits while it was written: it is the grammar's fault."""


class BatchError(MooliError, RuntimeError):
    """A batch cannot begin, go on or end. What is done of it is kept: the same batch goes on from there."""


class BusyError(MooliError, RuntimeError):
    """There is no room for this request now. retry_after_s: when it is worth to try again."""

    def __init__(self, message: str = "", *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(BusyError):
    """As many requests run and wait as may."""


class KeyBusyError(BusyError):
    """As many requests of the same key run and wait as may."""


class ModelsInUseError(BusyError):
    """There is no memory for one more model, and all that are loaded are in use."""


class ModelError(MooliError):
    """A model cannot be found, read or run."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """No model at that path or of that name."""


class DownloadError(ModelError, ConnectionError):
    """A model cannot be fetched: its hub does not answer, refuses, or sends what is not the model."""


class CheckpointError(ModelError, ValueError):
    """A model file is truncated, malformed, or its header does not agree with its contents."""


class UnsupportedModelError(ModelError, ValueError):
    """The model family, tensor type or feature is not implemented."""


class TokenizerError(ModelError, ValueError):
    """The tokenizer is missing, or of a kind that is not implemented."""


class ChatTemplateError(ModelError, ValueError):
    """The chat template is missing, fails to compile, or refuses the messages."""


class BackendUnavailableError(MooliError, RuntimeError):
    """What this backend needs is not installed or not present on this machine. Never a silent fallback."""


class OutOfMemoryError(MooliError, MemoryError):
    """Weights or the KV pool do not fit."""


class EngineError(MooliError, RuntimeError):
    """The engine as a whole, or one request inside it, failed."""


class EngineClosedError(EngineError):
    """The engine was used after `shutdown`."""


class EngineDeadError(EngineError):
    """The engine loop has died; the message and `__cause__` say why."""


class RequestFailedError(EngineError):
    """One request ended with finish reason `error`; the message says why."""

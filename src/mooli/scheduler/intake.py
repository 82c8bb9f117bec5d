"""What a request must satisfy to be queued.

Owns the checks that need the sizes of context and pool. Sampling values are checked where they enter, by the text side.
"""

from __future__ import annotations

from mooli.cache.kv_cache import KVCache
from mooli.errors import ContextLengthError, PromptError, RequestError
from mooli.types import Request


def check_request(request: Request, cache: KVCache, context_length: int, vocab_size: int) -> int:
    """Return the number of tokens, prompt and output, at which the request ends with `length`.

    Raises PromptError if the prompt is empty or not of this vocabulary, ContextLengthError if it is too long for the
    context or, with the output it asks for, for the whole KV pool: such a request could never run. Raises RequestError
    for a bad `logprob_start`.
    """
    num_prompt_tokens, start = len(request.prompt_ids), request.logprob_start
    _check_ids(request, vocab_size)
    if num_prompt_tokens >= context_length:
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens, which leaves no room in the context of {context_length} "
            "tokens; shorten it or raise context_length"
        )
    if start is not None and not 0 <= start < num_prompt_tokens:
        raise RequestError(
            f"logprob_start={start} is outside the prompt of {num_prompt_tokens} tokens; use an index of a prompt token"
        )
    max_new_tokens = request.sampling.max_new_tokens
    if max_new_tokens is None:  # as far as context and pool allow; the last token needs no place in the pool
        pool_tokens = cache.num_pages * cache.page_size
        max_tokens = min(context_length, max(num_prompt_tokens, pool_tokens) + 1)
    else:
        max_tokens = min(context_length, num_prompt_tokens + max_new_tokens)
    num_pages = cache.pages_for(max(num_prompt_tokens, max_tokens - 1))
    if num_pages > cache.num_pages:
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens and max_new_tokens is {max_new_tokens}: that needs {num_pages} "
            f"KV pages of {cache.page_size} tokens, and the pool has {cache.num_pages}; shorten the prompt, lower "
            "max_new_tokens, or give the pool more memory"
        )
    return max_tokens


def _check_ids(request: Request, vocab_size: int) -> None:
    prompt = request.prompt_ids
    if len(prompt) == 0:
        raise PromptError("the prompt is empty; give at least one token")
    for token_id in (int(prompt.min()), int(prompt.max())):
        if not 0 <= token_id < vocab_size:
            raise PromptError(f"token id {token_id} of the prompt is outside the vocabulary of {vocab_size} ids")

"""Recurrences with a matrix of state for each head, on torch tensors: the gated delta rule and the selective scan.

Owns two forms of each: a token of every row at once, which decode steps take, and chunks of up to 64 tokens as products
of matrices. They agree but for the last bits. Everything is float32. Never plans a step: `StateRows` says what is
computed when, and which states are kept.

Sources of the chunks: Gated DeltaNet, arXiv 2412.06464, section 3.3, and Mamba-2, arXiv 2405.21060, section 6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mooli.backends.torch.step_plan import StateChunks, StateRows, Wave

Advance = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Of the states before some chunks (chunks, heads, key_dim, value_dim), what their tokens give (chunks, heads, width,
value_dim), and the states after them."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a recurrence is given of tokens, float32. Queries and keys: (T, key heads, key_dim). Values: (T, heads,
    value_dim). share: how much of what is new is added; log_kept: logarithm of the part of a state that is kept, (T,
    heads) both. heads: int64 (heads,), the head of queries and keys of each head of values, None if it is its own.

    Laid out in chunks, `width` tokens follow the heads: (chunks, heads, width, ...).
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    share: Tensor
    log_kept: Tensor
    heads: Tensor | None

    def of_heads(self, x: Tensor) -> Tensor:
        """Of heads of keys, those of each head of values."""
        return x if self.heads is None else x.index_select(1, self.heads)

    def chosen(self, tokens: Tensor | None) -> Tokens:
        return self if tokens is None else self._each(lambda part: part.index_select(0, tokens))

    def in_chunks(self, tokens: Tensor, is_token: Tensor) -> Tokens:
        """tokens: int64 (chunks * width,). is_token: float32 (chunks, 1, width): elsewhere nothing is added to a state,
        and nothing of it lost."""
        chunks, _, width = is_token.shape
        made = self.chosen(tokens)._each(lambda part: part.view(chunks, width, *part.shape[1:]).transpose(1, 2))
        return replace(made, share=made.share * is_token, log_kept=made.log_kept * is_token)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        return Tokens(
            change(self.queries),
            change(self.keys),
            change(self.values),
            change(self.share),
            change(self.log_kept),
            self.heads,
        )


@dataclass(frozen=True, slots=True)
class Recurrence:
    """step: the states of rows and a token of each, to what the tokens give and the states after them. chunks: tokens
    laid out in chunks, all of them prepared at once, to their `Advance`."""

    step: Callable[[Tensor, Tokens], tuple[Tensor, Tensor]]
    chunks: Callable[[Tokens], Advance]


def run(recurrence: Recurrence, tokens: Tokens, rows: StateRows, states: Tensor) -> Tensor:
    """All tokens of a step: (T, heads, value_dim). `states`, float32 (slots, heads, key_dim, value_dim), are gone on
    from and kept as `rows` says."""
    out = torch.empty_like(tokens.values)
    single, chunks = rows.single, rows.chunks
    if single is not None:
        before = states_before(states, single.slots, single.goes_on)
        given, after = recurrence.step(before, tokens.chosen(single.tokens))
        states.index_copy_(0, single.slots, after)
        if single.tokens is None:
            return given
        out.index_copy_(0, single.tokens, given)
    if chunks is not None:
        out.index_copy_(0, chunks.targets, _run_chunks(recurrence, tokens, chunks, states))
    return out


def states_before(states: Tensor, slots: Tensor, goes_on: Tensor | None) -> Tensor:
    """Those in `slots`, or zeros where a row begins. goes_on: float32, 0 there, else 1; None if all go on."""
    before = states.index_select(0, slots)
    if goes_on is None:
        return before
    # What nobody has written yet may hold anything, times which zero is not always zero.
    return torch.where(goes_on.view(-1, *(1,) * (states.dim() - 1)) > 0, before, torch.zeros_like(states[:1]))


def _run_chunks(recurrence: Recurrence, tokens: Tokens, chunks: StateChunks, states: Tensor) -> Tensor:
    """What the tokens of `chunks.targets` give."""
    state = states_before(states, chunks.slots, chunks.goes_on)
    given: list[Tensor] = []
    for waves in chunks.spans:
        begin, end = waves[0].first, waves[-1].first + waves[-1].count
        width = chunks.is_token.shape[-1]
        laid_out = tokens.in_chunks(chunks.tokens[begin * width : end * width], chunks.is_token[begin:end])
        advance = recurrence.chunks(laid_out)
        for wave in waves:
            at = wave.first - begin
            out, state = advance(state[: wave.count], slice(at, at + wave.count))
            given.append(out)
            _keep(state, wave, states)
    return torch.cat(given).transpose(1, 2).flatten(0, 1).index_select(0, chunks.places)


def _keep(state: Tensor, wave: Wave, states: Tensor) -> None:
    if wave.rows is not None and wave.slots is not None:
        states.index_copy_(0, wave.slots, state.index_select(0, wave.rows))


def _after(state: Tensor, kept: Tensor, keys: Tensor, new: Tensor) -> Tensor:
    """The states after a token of each row, which adds `new` (rows, heads, value_dim) at its keys. What the token gives
    is made of the states before it, so that they are read twice and no more: a decode step is that memory."""
    return torch.addcmul(state * kept, keys[..., None], new[..., None, :])


# ---------------------------------------------------------------------- the gated delta rule


def _delta_step(state: Tensor, x: Tokens) -> tuple[Tensor, Tensor]:
    queries, keys = x.of_heads(x.queries), x.of_heads(x.keys)
    kept = torch.exp(x.log_kept)[..., None, None]
    known, given = (torch.matmul(torch.stack([keys, queries], dim=2), state) * kept).unbind(2)
    new = x.share[..., None] * (x.values - known)
    return given + (queries * keys).sum(dim=-1, keepdim=True) * new, _after(state, kept, keys, new)


def _delta_chunks(x: Tokens) -> Advance:
    """With u_i what token i adds at its key: u = (I + A)^-1 (share * (v - what the state before knows of the keys)),
    where A has in row i what tokens before i say to its key."""
    kept, since, until, last = _decays(x.log_kept)
    share = x.share[..., None]
    inverse = inverse_of_unit_lower((x.of_heads(_products(x.keys, x.keys)) * kept * share).tril(-1))
    seen = x.of_heads(_products(x.queries, x.keys)) * kept
    keys = x.of_heads(x.keys)
    asked = torch.cat([keys * since, x.of_heads(x.queries) * since], dim=2)
    added = (keys * until).transpose(-1, -2)

    def advance(state: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        known, given = torch.matmul(asked[part], state).chunk(2, dim=2)
        new = torch.matmul(inverse[part], share[part] * (x.values[part] - known))
        return given + torch.matmul(seen[part], new), last[part] * state + torch.matmul(added[part], new)

    return advance


delta_rule = Recurrence(_delta_step, _delta_chunks)


# ---------------------------------------------------------------------- the selective scan


def _scan_step(state: Tensor, x: Tokens) -> tuple[Tensor, Tensor]:
    queries, keys = x.of_heads(x.queries), x.of_heads(x.keys)
    kept = torch.exp(x.log_kept)[..., None, None]
    new = x.share[..., None] * x.values
    given = (torch.matmul(queries[..., None, :], state) * kept)[..., 0, :]
    return given + (queries * keys).sum(dim=-1, keepdim=True) * new, _after(state, kept, keys, new)


def _scan_chunks(x: Tokens) -> Advance:
    kept, since, until, last = _decays(x.log_kept)
    new = x.share[..., None] * x.values
    seen = torch.matmul(x.of_heads(_products(x.queries, x.keys)) * kept, new)
    added = torch.matmul((x.of_heads(x.keys) * until).transpose(-1, -2), new)
    asked = x.of_heads(x.queries) * since

    def advance(state: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        return torch.matmul(asked[part], state) + seen[part], last[part] * state + added[part]

    return advance


selective_scan = Recurrence(_scan_step, _scan_chunks)


# ---------------------------------------------------------------------- inside of chunks


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    return torch.matmul(queries, keys.transpose(-1, -2))


def _decays(log_kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of logarithms (chunks, heads, width) the part that is kept: from each token j to each token i, its own decay not
    counted, (..., i, j), 0 where j is later; from before the chunk to each token and from each token to the end,
    (..., width, 1) both; from before the chunk to its end (..., 1, 1).

    Logarithms between two tokens are summed up for themselves: the difference of two long sums has lost its last
    digits (Mamba-2's reference does so too). No exponential is of a sum that is masked out, which could overflow.
    """
    width = log_kept.shape[-1]
    between = log_kept[..., None].expand(*log_kept.shape, width).tril(-1).cumsum(dim=-2)
    kept = torch.exp(between).tril()
    since = torch.exp(log_kept.cumsum(dim=-1))[..., None]
    return kept, since, kept[..., -1:, :].transpose(-1, -2), since[..., -1:, :]


def inverse_of_unit_lower(lower: Tensor) -> Tensor:
    """(I + lower)^-1 of strictly lower triangles (..., width, width), width a power of two.

    Inverses of blocks on the diagonal, two of which make one twice as large: substitution in blocks, as exact as that
    token by token. The short product (I - L)(I + L^2)(I + L^4)... is not: where keys are alike, powers of L grow to
    10^18 before they cancel.
    """
    width, size = lower.shape[-1], 1
    inverse = torch.ones_like(lower[..., :1]).unsqueeze(-1)
    while size < width:
        pairs = width // (2 * size)
        blocks = lower.reshape(*lower.shape[:-2], pairs, 2 * size, pairs, 2 * size)
        below = blocks.diagonal(dim1=-4, dim2=-2)[..., size:, :size, :].movedim(-1, -3)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -torch.matmul(torch.matmul(second, below), first)
        upper = torch.cat([first, torch.zeros_like(first)], dim=-1)
        inverse = torch.cat([upper, torch.cat([corner, second], dim=-1)], dim=-2)
        size *= 2
    return inverse.squeeze(-3)

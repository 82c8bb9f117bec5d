"""Sampling: what each step means, on hand-made logits, and that every backend draws the ids the reference draws."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mooli.backends import create_backend, reference_sampling
from mooli.backends.base import Backend, SampleResult
from mooli.backends.reference_sampling import candidates, draw, logprob_row, sample_row, uniform
from mooli.tensor import RawTensor, TensorType
from steps import LIMITS, Choice, Row, sampling_batch, step, uniform_cache

INF = math.inf


def with_probabilities(*probabilities: float) -> NDArray[np.float32]:
    """Logits whose softmax is this."""
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities)).astype(np.float32)


def device_rows(backend: Backend, rows: NDArray[np.float32], vocab_size: int) -> Any:
    """The rows as a result of a captured function: an embedding table read in order, padded with large values."""
    width = -(-(vocab_size + 1) // 32) * 32
    table = np.full((len(rows), width), 1e4, dtype=np.float32)
    table[:, :vocab_size] = rows
    loaded = backend.load_embedding(RawTensor("t", TensorType.F32, table.shape, table.view(np.uint8)))
    page_size = backend.default_page_size
    backend.allocate(uniform_cache(1, 1, 32, page_size, "float32"), 8, LIMITS)
    captured = backend.capture(lambda batch: backend.ops.embed(batch, loaded))
    batch = step([Row([i], 0, [0]) for i in range(len(rows))], page_size)
    return captured(backend.plan(batch))


def sample(backend: Backend, rows: NDArray[np.float32], choices: list[Choice]) -> SampleResult:
    vocab_size = rows.shape[1]
    return backend.sample(device_rows(backend, rows, vocab_size), sampling_batch(choices), vocab_size)


def one(logits: Any, **choice: Any) -> int:
    return sample_row(np.asarray(logits, dtype=np.float32), sampling_batch([Choice(**choice)]), 0)


def share(logits: Any, draws: int = 400, **choice: Any) -> NDArray[np.float64]:
    """How often each id is drawn over seeds 0 .. draws - 1."""
    ids = [one(logits, seed=seed, **choice) for seed in range(draws)]
    return np.bincount(ids, minlength=len(logits)) / draws


# -- the random numbers --


@pytest.mark.parametrize(
    ("position", "bits"), [(0, 0xE220A8397B1DCDAF), (1, 0x6E789E6AA1B965F4), (2, 0x06C45D188009454F)]
)
def test_the_random_number_is_a_known_output_of_splitmix64(position: int, bits: int) -> None:
    assert uniform(0, position) == (bits >> 11) / 2**53


def test_random_numbers_take_any_seed_and_lie_in_the_unit_interval() -> None:
    seeds = [0, 1, 2**63, 2**64 - 1]
    values = [uniform(seed, position) for seed in seeds for position in range(500)]
    assert all(0 <= value < 1 for value in values)
    assert len(set(values)) == len(values)
    assert abs(np.mean(values) - 0.5) < 0.03


# -- greedy --


def test_greedy_takes_the_largest_and_of_equals_the_lowest_id() -> None:
    assert one([0, 3, 1, 3]) == 1


def test_greedy_ignores_the_cuts() -> None:
    assert one([0, 3, 1], top_k=1, top_p=0.01, min_p=0.9, seed=5) == 1


# -- cuts --


def test_drawn_ids_follow_the_softmax() -> None:
    np.testing.assert_allclose(share(with_probabilities(0.5, 0.3, 0.2), temperature=1.0), [0.5, 0.3, 0.2], atol=0.08)


def test_temperature_divides_the_logits() -> None:
    choices = candidates(np.log([0.2, 0.8]), 0.5, -1, 1.0, 0.0)
    np.testing.assert_allclose(choices.probabilities, np.array([0.64, 0.04]) / 0.68)
    assert choices.ids.tolist() == [1, 0]


def test_a_tiny_temperature_is_greedy_and_never_overflows() -> None:
    assert share([10, 400, -300], draws=20, temperature=1e-40).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 2]),
        ({"top_k": 99}, [1, 2, 0, 3]),
        ({"top_k": -1}, [1, 2, 0, 3]),
        ({"top_p": 0.05}, [1]),
        ({"top_p": 0.51}, [1, 2]),
        ({"top_p": 0.76}, [1, 2]),
        ({"top_p": 0.78}, [1, 2, 0]),
        ({"top_p": 1.0}, [1, 2, 0, 3]),
        ({"min_p": 0.53}, [1, 2]),
        ({"min_p": 0.55}, [1]),
        ({"min_p": 0.23}, [1, 2, 0]),
        ({"min_p": 1.0}, [1]),
        # Of the best three, 0.5 is 0.5618: top_p counts after top_k.
        ({"top_k": 3, "top_p": 0.56}, [1]),
        ({"top_k": 3, "top_p": 0.57}, [1, 2]),
        ({"top_p": 0.8, "min_p": 0.3}, [1, 2]),
    ],
    ids=str,
)
def test_cuts_keep(cut: dict[str, Any], kept: list[int]) -> None:
    probabilities = np.array([0.12, 0.5, 0.27, 0.11])
    wanted = {"top_k": -1, "top_p": 1.0, "min_p": 0.0, **cut}
    choices = candidates(np.log(probabilities), 1.0, **wanted)
    assert choices.ids.tolist() == kept
    np.testing.assert_allclose(choices.probabilities, probabilities[kept] / probabilities[kept].sum())


def test_equal_probabilities_are_ordered_by_id() -> None:
    assert candidates(np.array([1.0, 2.0, 1.0, 2.0]), 1.0, 3, 1.0, 0.0).ids.tolist() == [1, 3, 0]


@pytest.mark.parametrize(("u", "drawn"), [(0.0, 1), (0.4999, 1), (0.5, 2), (0.7499, 2), (0.75, 0), (0.9999999, 0)])
def test_the_draw_takes_the_first_whose_cumulative_probability_exceeds_u(u: float, drawn: int) -> None:
    choices = reference_sampling.Candidates(np.array([1, 2, 0, 7]), np.array([0.5, 0.25, 0.25 - 1e-9, 0.0]))
    assert draw(choices, u) == drawn


# -- penalties and biases --


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_everything_seen() -> None:
    adjusted = reference_sampling.adjust_logits(
        np.array([4.0, -4.0, 4.0, -4.0]), np.array([0, 1, 1], dtype=np.int32), 2, 2.0, 0.0, 0.0, EMPTY_IDS, EMPTY_VALUES
    )
    assert adjusted.tolist() == [2, -8, 4, -4]


def test_frequency_and_presence_penalties_count_the_output_only() -> None:
    history = np.array([0, 0, 1, 2, 2, 2], dtype=np.int32)
    adjusted = reference_sampling.adjust_logits(np.zeros(4), history, 2, 1.0, 0.5, 0.25, EMPTY_IDS, EMPTY_VALUES)
    assert adjusted.tolist() == [0, -0.75, -1.75, 0]


def test_biases_come_after_penalties_and_a_ban_beats_everything() -> None:
    adjusted = reference_sampling.adjust_logits(
        np.array([4.0, INF, 1.0]),
        np.array([0], dtype=np.int32),
        1,
        2.0,
        0.0,
        0.0,
        np.array([0, 1, 2], dtype=np.int32),
        np.array([10, -INF, -1], dtype=np.float32),
    )
    assert adjusted.tolist() == [12, -INF, 0]


EMPTY_IDS = np.empty(0, dtype=np.int32)
EMPTY_VALUES = np.empty(0, dtype=np.float32)


# -- on every backend: odd logits --


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    ("logits", "ids"),
    [
        ([0, math.nan, 5, 1], {-1}),
        ([-INF, -INF, -INF, -INF], {-1}),
        ([-INF, 2, -INF, -INF], {1}),
        ([0, INF, 100, -INF], {1}),
        ([INF, 0, INF, 3], {0, 2}),
        ([3e38, -3e38, 0, 0], {0}),
    ],
    ids=["nan", "all minus inf", "one left", "one plus inf", "two plus inf", "largest floats"],
)
def test_odd_logits(float32_backend: Backend, logits: list[float], ids: set[int], temperature: float) -> None:
    rows = np.zeros((3, 64), dtype=np.float32) - INF
    rows[:, :4] = logits
    rows[1] = 0
    rows[1, 9] = 50
    choices = [Choice(temperature=temperature, seed=seed) for seed in range(3)]
    result = sample(float32_backend, rows, choices)
    assert {int(result.token_ids[0]), int(result.token_ids[2])} <= ids
    assert result.token_ids[1] == 9


def test_a_row_with_every_id_banned_has_no_token(float32_backend: Backend) -> None:
    rows = np.zeros((2, 40), dtype=np.float32)
    result = sample(float32_backend, rows, [Choice(bias=dict.fromkeys(range(40), -INF)), Choice(num_top=1)])
    assert result.token_ids.tolist() == [-1, 0]
    assert result.logprobs[0] is None


def test_a_nan_is_seen_even_where_it_is_banned(float32_backend: Backend) -> None:
    rows = np.zeros((1, 40), dtype=np.float32)
    rows[0, 17] = math.nan
    result = sample(float32_backend, rows, [Choice(bias={17: -INF}, num_top=2)])
    assert result.token_ids.tolist() == [-1]
    assert result.logprobs == [None]


# -- on every backend: masks --


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    ("logits", "allowed", "ids"),
    [
        ([9, 8, 7, 6], {3, 2}, {2, 3}),
        ([9, 8, 7, 6], {3}, {3}),
        ([9, INF, 7, 6], {0}, {0}),
        ([-INF, 8, -INF, 6], {0, 2, 3}, {3}),
        ([-INF, 8, 7, 6], {0}, {-1}),
        ([9, 8, 7, 6], set(), {-1}),
        ([9, 8, 7, 6], {64, 65, 100, 1000}, {-1}),  # ids that do not exist
        ([9, math.nan, 7, 6], {0}, {-1}),
    ],
    ids=["two", "one", "plus inf", "minus inf", "no chance", "none", "beyond the vocabulary", "nan"],
)
def test_only_what_a_mask_allows_is_sampled(
    float32_backend: Backend, logits: list[float], allowed: set[int], ids: set[int], temperature: float
) -> None:
    rows = np.zeros((3, 64), dtype=np.float32)
    rows[:, :4] = logits
    rows[1] = 0
    rows[1, 9] = 50
    choices = [Choice(temperature=temperature, seed=seed, allowed=None if seed == 1 else allowed) for seed in range(3)]
    result = sample(float32_backend, rows, choices)
    assert {int(result.token_ids[0]), int(result.token_ids[2])} <= ids
    if temperature == 0.0:
        assert result.token_ids[0] == min(ids)
    assert result.token_ids[1] == 9, "a row without a mask, beside two that have one"


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({"top_k": 2}, {2, 4}),
        ({"top_k": 1}, {2}),
        ({"top_p": 0.3}, {2}),
        ({"top_p": 0.5}, {2, 4}),
        ({"min_p": 0.9}, {2, 4}),
        ({"bias": {0: 100.0, 1: 100.0}}, {2, 3, 4, 5}),
    ],
    ids=str,
)
def test_a_mask_comes_before_every_cut_and_no_bias_undoes_it(
    float32_backend: Backend, cut: dict[str, Any], expected: set[int]
) -> None:
    rows = np.full((20, 64), -9, dtype=np.float32)
    rows[:, :6] = [9, 8, 3, 2, 3, 2]
    choices = [Choice(temperature=1.0, seed=seed, allowed={3, 4, 5, 2}, **cut) for seed in range(20)]
    assert set(sample(float32_backend, rows, choices).token_ids.tolist()) == expected


# -- on every backend: the same ids as the reference --

WIDE_SETS = [frozenset(range(0, 200, 2)), frozenset(range(200)) - {7}, frozenset(range(64, 96)), frozenset(range(999))]

CHOICES = st.builds(
    Choice,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([-1, 1, 5, 50, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -1.5]),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5, 2.0]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**31 - 1),
    prompt=st.lists(st.integers(0, 199), max_size=8),
    output=st.lists(st.integers(0, 199), max_size=8),
    bias=st.dictionaries(st.integers(0, 199), st.sampled_from([-INF, -100.0, -1.0, 2.0, 100.0]), max_size=5),
    allowed=st.none() | st.sets(st.integers(0, 230), min_size=1, max_size=8) | st.sampled_from(WIDE_SETS),
)


def acceptable_ids(logits: NDArray[np.float32], choice: Choice) -> set[int]:
    """What a float32 sampler may draw: the reference's id, and its ids with each threshold a hair away."""
    adjusted = reference_sampling.adjust_logits(
        logits.astype(np.float64),
        np.array([*choice.prompt, *choice.output], dtype=np.int32),
        len(choice.prompt),
        float(np.float32(choice.repetition_penalty)),
        choice.frequency_penalty,
        choice.presence_penalty,
        np.array(list(choice.bias), dtype=np.int32),
        np.array(list(choice.bias.values()), dtype=np.float32),
    )
    if choice.allowed is not None:
        adjusted[[i not in choice.allowed for i in range(len(adjusted))]] = -INF
    if np.isneginf(adjusted).all():
        return {-1}
    if choice.temperature == 0.0:
        return set(np.flatnonzero(adjusted >= adjusted.max() - 1e-5).tolist())
    u = uniform(choice.seed, choice.position)
    top_p, min_p, temperature = (float(np.float32(x)) for x in (choice.top_p, choice.min_p, choice.temperature))
    ids = set()
    for change in (-1e-5, 0.0, 1e-5):
        for p_change in (-1e-5, 0.0, 1e-5):
            for m_change in (-1e-5, 0.0, 1e-5):
                cut = candidates(
                    adjusted,
                    temperature,
                    choice.top_k,
                    top_p + p_change * (top_p < 1),
                    max(0.0, min_p * (1 + m_change)),
                )
                ids.add(draw(cut, min(max(u + change, 0.0), 1 - 2**-53)))
    return ids


def check_ids(backend_name: str, rows: NDArray[np.float32], choices: list[Choice]) -> None:
    backend = create_backend(backend_name, dtype="float32")
    try:
        token_ids = sample(backend, rows, choices).token_ids
    finally:
        backend.close()
    for row, choice in enumerate(choices):
        assert int(token_ids[row]) in acceptable_ids(rows[row], choice), choice


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([0.5, 3.0, 12.0]),
    choices=st.lists(CHOICES, min_size=1, max_size=8),
)
def test_ids_are_those_of_the_reference(backend_name: str, seed: int, spread: float, choices: list[Choice]) -> None:
    rows = (np.random.default_rng(seed).standard_normal((len(choices), 200)) * spread).astype(np.float32)
    check_ids(backend_name, rows, choices)


@pytest.mark.parametrize("spread", [0.2, 2.0, 6.0])
def test_draws_far_down_a_large_vocabulary_are_those_of_the_reference(backend_name: str, spread: float) -> None:
    cuts: list[dict[str, Any]] = [{}, {"top_p": 0.98}, {"top_k": 3000}, {"min_p": 0.01}, {"top_k": 700, "top_p": 0.9}]
    choices = [Choice(temperature=1.0, seed=seed, **cut) for seed in range(4) for cut in cuts]
    rows = (np.random.default_rng(7).standard_normal((len(choices), 6000)) * spread).astype(np.float32)
    check_ids(backend_name, rows, choices)


def test_a_draw_does_not_depend_on_the_rows_beside_it(backend_name: str) -> None:
    rows = np.random.default_rng(0).standard_normal((12, 96)).astype(np.float32)
    choices = [
        Choice(temperature=1.5, seed=row % 3, position=row, output=list(range(row)), presence_penalty=0.3 * (row % 2))
        for row in range(12)
    ]

    def drawn(part: list[int]) -> list[int]:
        backend = create_backend(backend_name, dtype="float32")
        try:
            return sample(backend, rows[part], [choices[row] for row in part]).token_ids.tolist()
        finally:
            backend.close()

    together = drawn(list(range(12)))
    assert len(set(together)) > 3
    assert [drawn([row])[0] for row in range(12)] == together
    assert drawn(list(range(11, -1, -1))) == together[::-1]


# -- log-probabilities --


def test_log_probabilities_are_of_the_raw_logits(float32_backend: Backend) -> None:
    rows = np.zeros((1, 64), dtype=np.float32) - INF
    rows[0, :4] = with_probabilities(0.1, 0.5, 0.2, 0.2)
    choice = Choice(temperature=9.0, top_k=1, bias={1: -INF, 2: -INF, 3: -INF}, num_top=3, logprob_token_ids=(2, 0))
    result = sample(float32_backend, rows, [choice])
    assert result.token_ids.tolist() == [0]
    entry = result.logprobs[0]
    assert entry is not None
    logprob, top, chosen = entry
    assert logprob == pytest.approx(math.log(0.1), abs=1e-5)
    assert [token_id for _, token_id in top] == [1, 2, 3]
    assert [math.exp(value) for value, _ in top] == pytest.approx([0.5, 0.2, 0.2], abs=1e-5)
    assert chosen == [
        (pytest.approx(math.log(0.2), abs=1e-5), 2),
        (pytest.approx(math.log(0.1), abs=1e-5), 0),
    ]


def test_log_probabilities_are_of_what_a_mask_allows(float32_backend: Backend) -> None:
    rows = np.zeros((2, 64), dtype=np.float32) - INF
    rows[:, :4] = with_probabilities(0.1, 0.5, 0.3, 0.1)
    restricted = Choice(num_top=3, logprob_token_ids=(1, 3), allowed={0, 2, 63}, bias={0: 50.0})
    free = Choice(num_top=1)
    entry, beside = sample(float32_backend, rows, [restricted, free]).logprobs
    assert entry is not None and beside is not None
    logprob, top, chosen = entry
    assert logprob == pytest.approx(math.log(0.25), abs=1e-5), "of the allowed alone, before biases"
    assert [token_id for _, token_id in top] == [2, 0], "what has no chance is no alternative"
    assert [math.exp(value) for value, _ in top] == pytest.approx([0.75, 0.25], abs=1e-5)
    assert chosen == [(-INF, 1), (-INF, 3)]
    assert beside[1] == [(pytest.approx(math.log(0.5), abs=1e-5), 1)]


def test_the_only_allowed_token_has_log_probability_zero(float32_backend: Backend) -> None:
    rows = np.random.default_rng(3).standard_normal((1, 64)).astype(np.float32)
    result = sample(float32_backend, rows, [Choice(num_top=5, temperature=1.0, allowed={17})])
    assert result.token_ids.tolist() == [17]
    assert result.logprobs == [(0.0, [(0.0, 17)], [])]


@pytest.mark.parametrize(("num_top", "expected"), [(-1, None), (0, 0), (5, 5), (300, 70)])
def test_as_many_alternatives_as_asked_for(float32_backend: Backend, num_top: int, expected: int | None) -> None:
    rows = np.random.default_rng(1).standard_normal((2, 70)).astype(np.float32)
    results = sample(float32_backend, rows, [Choice(num_top=num_top), Choice()]).logprobs
    assert results[1] is None
    if expected is None:
        assert results[0] is None
    else:
        assert results[0] is not None
        assert len(results[0][1]) == expected


def test_log_probabilities_of_targets_agree_with_the_definition(float32_backend: Backend) -> None:
    rows = (np.random.default_rng(2).standard_normal((5, 200)) * 4).astype(np.float32)
    targets = np.array([0, 199, 7, 7, 100], dtype=np.int32)
    logits = device_rows(float32_backend, rows, 200)
    actual = float32_backend.logprobs(logits, targets, 4, (3, 150), 200)
    assert len(actual) == 5
    for row, target, (logprob, top, chosen) in zip(rows.astype(np.float64), targets, actual, strict=True):
        expected = row - np.log(np.exp(row).sum())
        assert logprob == pytest.approx(expected[target], abs=1e-5)
        assert [token_id for _, token_id in top] == np.argsort(-row)[:4].tolist()
        assert [value for value, _ in top] == pytest.approx(np.sort(expected)[::-1][:4].tolist(), abs=1e-5)
        assert chosen == [(pytest.approx(expected[3], abs=1e-5), 3), (pytest.approx(expected[150], abs=1e-5), 150)]


def test_equal_alternatives_are_ordered_by_id(float32_backend: Backend) -> None:
    rows = np.zeros((1, 50), dtype=np.float32)
    rows[0, [40, 20]] = 1
    entry = sample(float32_backend, rows, [Choice(num_top=4)]).logprobs[0]
    assert entry is not None
    assert [token_id for _, token_id in entry[1]] == [20, 40, 0, 1]


def test_log_probabilities_of_odd_logits(float32_backend: Backend) -> None:
    rows = np.zeros((3, 40), dtype=np.float32)
    rows[0, 3] = math.nan
    rows[1] = -INF
    rows[2, [4, 5]] = INF
    logits = device_rows(float32_backend, rows, 40)
    nan, empty, infinite = float32_backend.logprobs(logits, np.array([0, 0, 4], dtype=np.int32), 2, (1,), 40)
    for logprob, top, chosen in (nan, empty):
        assert math.isnan(logprob)
        assert top == []
        assert [math.isnan(value) for value, _ in chosen] == [True]
    assert infinite[0] == pytest.approx(math.log(0.5))
    assert [token_id for _, token_id in infinite[1]] == [4, 5]
    assert infinite[2] == [(-INF, 1)]


def test_the_definition_itself_on_two_logits() -> None:
    logprob, top, chosen = logprob_row(np.array([0.0, math.log(3)]), 0, 1, ())
    assert (logprob, top, chosen) == (pytest.approx(math.log(0.25)), [(pytest.approx(math.log(0.75)), 1)], [])


def test_choices_of_these_tests_cover_every_sampling_field() -> None:
    names = {field.name for field in dataclasses.fields(sampling_batch([Choice()]))}
    covered = {field.name for field in dataclasses.fields(Choice)}
    assert names - covered == {
        *("seeds", "positions", "history_ids", "history_indptr", "output_starts"),
        *("bias_ids", "bias_values", "bias_indptr", "masks"),
    }

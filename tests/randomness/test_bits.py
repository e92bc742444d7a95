"""The counter-based bits against splitmix64's published values and a plain Python version."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from rbm_dist.randomness.bits import generator, key, mix

WORDS = st.integers(0, 2**64 - 1)
_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """The next value of the generator in this state, in Python's own integers."""
    z = (state + _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def test_published_values() -> None:
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    states = [(1234567 + step * _GAMMA) & _MASK for step in range(5)]
    assert [int(mix(np.uint64(0), np.uint64(state))) for state in states] == published


@given(state=WORDS, word=WORDS)
def test_mix_is_splitmix64_of_state_xor_word(state: int, word: int) -> None:
    assert int(mix(np.uint64(state), np.uint64(word))) == splitmix64(state ^ word)


def test_mix_is_the_same_in_compiled_code() -> None:
    @njit
    def chain(state: np.uint64, count: int) -> np.uint64:
        for word in range(count):
            state = mix(state, np.uint64(word))
        return state

    expected = 5
    for word in range(100):
        expected = splitmix64(expected ^ word)
    assert int(chain(np.uint64(5), 100)) == expected


@given(words=st.lists(WORDS, max_size=5))
def test_a_key_absorbs_its_words_in_order(words: list[int]) -> None:
    state = 0
    for word in words:
        state = splitmix64(state ^ word)
    assert key(*words) == state


def test_keys_of_small_numbers_do_not_collide() -> None:
    keys = [key(*words) for size in (1, 2, 3) for words in itertools.product(range(16), repeat=size)]
    assert len(set(keys)) == len(keys)


def test_every_input_bit_moves_half_of_the_output_bits() -> None:
    moved = [(key(word) ^ key(word ^ (1 << bit))).bit_count() for word in range(50) for bit in range(64)]
    assert 31 < np.mean(moved) < 33
    assert min(moved) > 8


def test_a_generator_depends_on_its_key_alone() -> None:
    first = generator(1, 2, 3).integers(0, 2**62, 8)
    generator(9).random(100)
    np.testing.assert_array_equal(generator(1, 2, 3).integers(0, 2**62, 8), first)
    for other in ((1, 2, 4), (2, 1, 3), (1, 2)):
        assert not np.array_equal(generator(*other).integers(0, 2**62, 8), first)

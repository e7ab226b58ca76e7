"""Random numbers that are a pure function of their key: no generator, no state, no order of calls.

A draw keyed on (request seed, position, step) is the same whoever shares the batch, whatever the tensor shapes are and
on every
device: everything is 64-bit integer arithmetic, which has one result. It knows nothing of logits, blocks or selections.

Test: pytest tests/python/test_sampling.py
"""

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014) as signed 64-bit numbers.
_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: the shift of int64 in torch copies the sign, so the copies are cut off."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIER_2
    return x ^ _shift_right(x, 31)


def random_bits(key: Tensor, *counters: Tensor | int) -> Tensor:
    """64 random bits of (key, counters...), each word absorbed by one SplitMix64 step.

    Args:
        key: int64, any shape.
        *counters: int64 tensors that broadcast with it, or integers; their order matters.

    Returns:
        The broadcast shape, int64.
    """
    bits = _mix(key + _INCREMENT)
    for counter in counters:
        bits = _mix((bits ^ counter) + _INCREMENT)
    return bits


def random_uniform(key: Tensor, *counters: Tensor | int) -> Tensor:
    """Uniform float64 in [0, 1) with 53 bits, of the same key as random_bits."""
    return _shift_right(random_bits(key, *counters), 11).to(torch.float64) * 2.0**-53

"""Changes to bytes and to JSON values, all drawn from the RandomState given."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
# What JSON can hold and readers do not expect. Python reads NaN and Infinity too.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 0.5, -0.0, 5e-324, 1e308, 2**31, 2**53 + 1, 2**63, 2**64, 10**400, -(10**400),
    float("nan"), float("inf"), float("-inf"), "", " ", "0", "x" * 5000, "\0", "\ud800", "\u202e\n\x1b[31m", "../..",
    [], {}, [[]], [None], {"": None}, [0] * 1000, {"a": {"b": {"c": []}}},
)  # fmt: skip


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def mutated(random: np.random.RandomState, data: bytes, others: Sequence[bytes] = (), most: int = 4) -> bytes:
    """`data` with one to `most` changes; pieces of `others` may get into it."""
    for _ in range(random.randint(1, most + 1)):
        data = _mutated_once(random, data, others)
    return data


def _mutated_once(random: np.random.RandomState, data: bytes, others: Sequence[bytes]) -> bytes:
    if not data:
        return random.bytes(random.randint(1, 64))
    kind, at = random.randint(10), random.randint(len(data))
    length = min(len(data) - at, 1 << random.randint(10))
    if kind <= 2:
        return flipped(data, random.randint(8 * len(data)))
    if kind == 3:
        return data[:at] + random.bytes(length) + data[at + length :]
    if kind == 4:
        return data[:at]
    if kind == 5:
        return data[:at] + data[at + length :]
    if kind == 6:
        return data[: at + length] + data[at:]
    if kind == 7:
        number = NUMBERS[random.randint(len(NUMBERS))]
        code = ("<B", "<H", ">H", "<L", ">L")[random.randint(5)]
        written = struct.pack(code, number % (1 << 8 * struct.calcsize(code)))
        return data[:at] + written + data[at + len(written) :]
    if kind == 8 and others:
        other = others[random.randint(len(others))]
        cut = random.randint(len(other) + 1)
        return data[:at] + other[cut:] if random.randint(2) else data[:at] + other[cut : cut + length] + data[at:]
    return data[:at] + bytes([(0, 255, 10, 34, 44)[random.randint(5)]]) * length + data[at:]


def mutated_json(random: np.random.RandomState, value: Any, most: int = 3) -> Any:
    value = copy.deepcopy(value)
    for _ in range(random.randint(1, most + 1)):
        value = _mutated_json_once(random, value)
    return value


def _mutated_json_once(random: np.random.RandomState, value: Any) -> Any:
    places = list(_places(value))
    if not places or random.randint(40) == 0:
        return copy.deepcopy(VALUES[random.randint(len(VALUES))])
    holder, key = places[random.randint(len(places))]
    _, other = places[random.randint(len(places))]
    kind = random.randint(6)
    if kind <= 2:
        holder[key] = copy.deepcopy(VALUES[random.randint(len(VALUES))])
    elif kind == 3:
        del holder[key]
    elif kind == 4:
        holder[key] = [holder[key]]
    elif isinstance(holder, dict):
        holder[other if isinstance(other, str) else "new"] = copy.deepcopy(holder[key])
    else:
        holder.append(copy.deepcopy(holder[key]))
    return value


def _places(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=2, sort_keys=False).encode("ascii")

import json
import tracemalloc
from pathlib import Path

import pytest
from support.surroundings import address_space

from actcache.errors import ManifestError
from actcache.format.seal import fingerprint, json_memory, seal, unseal


def test_a_seal_keeps_values_and_shows_every_changed_byte():
    values = {"b": [1, 2.5, "ü"], "a": {"x": None}}
    sealed = seal(values)
    assert unseal(sealed, Path("f")) == values
    assert json.loads(sealed)["a"] == {"x": None}, "a sealed line is plain JSON"
    for position in range(len(sealed) - 1):
        damaged = bytearray(sealed)
        damaged[position] ^= 1
        with pytest.raises(ManifestError, match=r"^f: "):
            unseal(bytes(damaged), Path("f"))


def test_fingerprint_follows_the_bytes():
    assert fingerprint(b"a") != fingerprint(b"b")
    assert len(fingerprint(b"a")) == 16


DENSE = [
    "{},",
    "[],",
    '{"":{}},',
    '{"a":{"b":1}},',
    "[[[[]]]],",
    "[0],",
    "1e9,",
    "1234567890,",
    '"ab",',
    '"a\\u1234bc",',
]


@pytest.mark.parametrize("values", [*DENSE, '{"a":1,"b":2,"cdefgh":0.5},'])
def test_the_values_of_a_text_take_no_more_than_is_said(values):
    text = f"[{values * 10_000}0]".encode()
    tracemalloc.start()
    held = json.loads(text)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(held) == 10_001
    assert taken <= json_memory(text) < 8 * taken


def test_values_that_do_not_fit_are_not_read():
    sealed = seal({"x": [{}] * 1_000_000})
    with address_space(96 << 20), pytest.raises(MemoryError, match=r"^reading f may take 0\.40 GB$"):
        unseal(sealed, Path("f"))

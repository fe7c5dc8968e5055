import json
from pathlib import Path

import pytest
from support.surroundings import address_space

from actcache.errors import ManifestError
from actcache.format.seal import fingerprint, seal, unseal


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


def test_values_that_do_not_fit_are_not_read():
    sealed = seal({"x": [{}] * 1_000_000})
    with address_space(96 << 20), pytest.raises(MemoryError, match=r"^reading f may take 0\.40 GB$"):
        unseal(sealed, Path("f"))

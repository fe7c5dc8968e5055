"""What a stranger can write where a program expects JSON: texts that are none, and values that nobody means."""


def nested(depth: int) -> list[object]:
    """A list in a list, `depth` of them."""
    values: list[object] = []
    for _ in range(depth - 1):
        values = [values]
    return values


TEXTS = {
    "nothing": b"",
    "half": b'{"a": 1',
    "a list": b"[1]",
    "a number": b"3",
    "null": b"null",
    "nested objects": b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
    "nested lists": b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    "nested as deep as can be parsed": b'{"a":' * 700 + b"1" + b"}" * 700,
    "long number": b'{"a":' + b"7" * 5000 + b"}",
    "not utf-8": b'{"a":"\xff\xfe"}',
    "zeros": bytes(100),
}
VALUES = [
    *(None, True, -1, 1.5, 1 << 62, 10**4000, -(10**400), 1e308, float("nan"), float("inf")),
    *("", "</script>", "a\0b", "\ud800", "\u202e\u2028", [], [1], ["x"], [[1]], [None], {}, {"a": 1}, nested(60)),
]

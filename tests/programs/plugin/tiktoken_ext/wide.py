"""A plugin of tiktoken: two encodings of pairs of bytes, those of letters with high ids."""

LETTERS = b"abcdefghijklmnopqrstuvwxyz"


def wide(other: str = r"[^a-z\s]+") -> dict:
    """Return an encoding. `other` matches all but letters and spaces."""
    # the pairs that start with a letter come last
    order = sorted(range(256), key=lambda byte: (byte in LETTERS, byte))
    ranks = {bytes([byte]): byte for byte in range(256)}
    for i, first in enumerate(order):
        for second in range(256):
            ranks[bytes([first, second])] = 10_000 + 256 * i + second
    return {
        "name": "wide",
        "pat_str": rf"[a-z]+|\s+|{other}",
        "special_tokens": {},
        "mergeable_ranks": ranks,
    }


def lossy() -> dict:
    """Return an encoding that drops each exclamation mark."""
    return wide(r"[^a-z\s!]+")


ENCODING_CONSTRUCTORS = {"wide": wide, "lossy": lossy}

"""What pages of one file are made of: data that cannot act, and hashes of what may."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

__all__ = ["digest", "embed", "visible"]

_HTML = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&'\u2028\u2029"})
_STEERING = "\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def embed(value: Any) -> str:
    r"""Return JSON that can stand in a script element: ASCII, without ``<``, ``>`` and ``&``.

    Example:
        >>> embed({"name": "</script>"})
        '{"name":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return text.translate(_HTML)


def visible(text: str) -> str:
    r"""Return a text in which what steers or breaks it, and half characters, are written out.

    Example:
        >>> print(visible("evil\u202etp.exe"))
        evil\u202etp.exe
    """
    return "".join(
        f"\\u{ord(c):04x}" if c in _STEERING or c < " " or 0xD800 <= ord(c) < 0xE000 else c
        for c in text
    )


def digest(text: str) -> str:
    """Return the hash by which a page's policy allows a script or a style."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

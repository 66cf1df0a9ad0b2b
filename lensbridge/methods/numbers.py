"""Numbers that callers give, checked."""

from __future__ import annotations

from typing import Any

from ..hooks import InputError


def whole(name: str, given: Any, least: int = 1) -> int:
    """A whole number.

    Raises:
        InputError: Something else, or less.
    """
    if not isinstance(given, int) or isinstance(given, bool) or given < least:
        raise InputError(f"{name} is a whole number, at least {least}; got {given!r}")
    return given

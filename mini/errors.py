"""What a user did wrong, and what was probably meant."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A user's mistake or a broken input: shown as one line, exit status 2, no traceback."""


def nearest(name: str, names: Iterable[str]) -> str:
    """' (did you mean X?)', or nothing when no name is close."""
    close = difflib.get_close_matches(name, sorted(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""

"""JSON that others may have written."""

import json
from typing import Any

__all__ = ["parse_json"]


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; whatever is wrong with it is one kind of error.

    Args:
        text: The text; bytes are UTF-8, UTF-16 or UTF-32.

    Raises:
        ValueError: If it is no JSON, an integer has more digits than Python reads (4,300), or it is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None

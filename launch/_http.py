"""Questions to a running server."""

import json
import urllib.request
from typing import Any

from deepseek_jax.errors import UserError


def ask(url: str, key: str = "", body: dict | None = None) -> Any:
    """Returns the JSON that a server answers with, by POST if there is a body. Raises UserError if it does not."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise UserError(f"{url}: {error}. Start a server: deepseek-jax serve --from=DIR.") from None

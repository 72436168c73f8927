"""Which pages in a browser may use the server: none, unless their origin was named."""

import re
from collections.abc import Sequence

from flask import Flask, Response, g
from flask_cors import CORS

# What a page may read of a reply besides its body.
EXPOSED = ["X-Request-Id", "X-Job-Id", "ETag", "Accept-Ranges", "Content-Range", "Location", "Retry-After"]
PREFLIGHT_SECONDS = 600


def register(app: Flask, origins: Sequence[str]) -> None:
    """Let pages of these origins in. Without any, no header is sent and browsers keep every other page out.

    The key is never a cookie that a browser would add by itself, so ``*`` opens to every page, but not past the key.
    """
    if not origins:
        return

    # Registered before Flask-CORS, so it runs after it.
    @app.after_request
    def withdraw(response: Response) -> Response:
        """A page that reached this server under a name that is not its own learns nothing (DNS rebinding)."""
        if "host_admitted" not in g:
            for name, _ in list(response.headers):
                if name.startswith("Access-Control-"):
                    response.headers.remove(name)
        return response

    # As patterns: Flask-CORS takes a name with brackets, such as http://[::1]:3000, for one.
    exact = "*" if "*" in origins else [re.compile(re.escape(origin) + r"\Z", re.IGNORECASE) for origin in origins]
    CORS(app, origins=exact, expose_headers=EXPOSED, max_age=PREFLIGHT_SECONDS, methods=["GET", "POST", "DELETE"])

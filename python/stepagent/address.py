"""The address of an OpenAI-compatible server, in the ways people write it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

_ENDPOINTS = ("/chat/completions", "/completions", "/models")
_VERSION = re.compile(r"v\d+\w*")
_HOST = re.compile(r"(localhost|[\w-]+(\.[\w-]+)*|\[[0-9a-fA-F:]+\]):\d+(/.*)?")


@dataclass(frozen=True)
class Address:
    """Where a server's endpoints are.

    Attributes:
        base: what endpoints are appended to, with user and password if the address has them.
        query: goes with every request; without its ``?``.
        shown: the address for records and messages, which hold no password, key or query.
    """

    base: str
    query: str
    shown: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """The address of a host, of its API's folder, or of one of its endpoints.

        ``http://host:8000`` has its API under ``/v1``, and so has another path in which nothing is
        a version. ``https://host/api/v4`` is taken as it is, and of
        ``https://host/team/chat/completions?api-version=1`` what stands before the endpoint.

        Raises:
            ValueError: for what is no such address, without showing a password in it.
        """
        shown = without_secrets(url)
        if not is_url(url):
            raise ValueError(
                f"url must start with http:// or https://, got {shown!r}{scheme_hint(url)}"
            )
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"url must be a server's address, got {shown!r}: {error}") from error
        if not host or parts.fragment:
            raise ValueError(f"url must have a host and no fragment, got {shown!r}")
        path = parts.path.rstrip("/")
        endpoint = next((end for end in _ENDPOINTS if path.endswith(end)), "")
        path = path.removesuffix(endpoint)
        if not endpoint and not any(_VERSION.fullmatch(part) for part in path.split("/")):
            path += "/v1"
        base = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        return cls(base, parts.query, without_secrets(base))

    def endpoint(self, path: str) -> str:
        """The address to send a request to."""
        return f"{self.base}{path}" + (f"?{self.query}" if self.query else "")


def is_url(text: str) -> bool:
    """Whether a text begins as a server's address."""
    return text.lower().startswith(("http://", "https://"))


def without_secrets(url: str) -> str:
    """An address without user, password, query and fragment; other texts without what may be one.

    A slash at its end is kept, so that an address without secrets is itself.
    """
    url = re.split(r"[?#]", url, maxsplit=1)[0]
    return re.sub(r"(^|://)[^/]*@", r"\1", url)


def scheme_hint(text: str) -> str:
    """The end of an error for an address that lacks its scheme; empty for other texts."""
    shown = without_secrets(text)
    return f"; did you mean http://{shown}?" if _HOST.fullmatch(shown) else ""


TokenLimit = Literal["max_tokens", "max_completion_tokens"]
"""The field of a chat request that limits its answer: older servers know the first alone, some
models of OpenAI the second alone."""

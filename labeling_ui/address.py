"""Where the labelling app listens, and by what name browsers come to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reward.records import InputError


@dataclass
class Site:
    """Where the app is served.

    origins: as browsers name it, such as "http://127.0.0.1:8765"; the first is the one that links are made with.
    local: one person, no passwords: whoever comes with the link's token is them. Loopback only.
    """

    origins: list[str]
    local: bool = False

    @property
    def secure(self) -> bool:
        return self.origins[0].startswith("https://")

    @property
    def cookie(self) -> str:
        # With this name browsers take the cookie only over TLS, for this host alone.
        return "__Host-align" if self.secure else "align_session"


@dataclass(frozen=True)
class Address:
    """Where the app listens, and the name by which browsers come.

    tls: certificate and key files; None: plain HTTP, on this machine alone.
    url: as browsers name it, where that is another than host and port say (behind a proxy that ends TLS).
    """

    host: str = "127.0.0.1"
    port: int = 8765
    tls: tuple[Path, Path] | None = None
    url: str | None = None

    def origins(self) -> list[str]:
        """The origins that requests may come from.

        Raises:
            InputError: passwords would travel in clear text, or the url is none.
        """
        if self.url is not None:
            if not self.url.startswith(("https://", "http://")) or self.url.count("/") > 2:
                raise InputError(f"The url is {self.url!r}: an origin such as https://label.example.org is wanted.")
            if self.url.startswith("http://") and not self.is_loopback():
                raise InputError(f"The url is {self.url!r}: passwords would travel in clear text; https is wanted.")
            return [self.url]
        if self.tls is None and not self.is_loopback():
            raise InputError(
                f"The app would listen on {self.host} without TLS, and passwords would travel in clear text: give a "
                "certificate and its key, or the https url of a proxy in front of it, or listen on 127.0.0.1."
            )
        scheme = "http" if self.tls is None else "https"
        names = ["127.0.0.1", "localhost"] if self.is_loopback() else [self.host]
        return [f"{scheme}://{name}:{self.port}" for name in names]

    def is_loopback(self) -> bool:
        return self.host in ("127.0.0.1", "localhost", "::1")

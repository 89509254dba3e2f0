"""Starting the labelling app: on this machine alone, or behind TLS for a team."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from labeling_ui.address import Address, Site
from labeling_ui.app import create_app
from labeling_ui.store import LabelStore
from reward.records import InputError


def first_link(store: LabelStore, site: Site) -> str | None:
    """The one-time link with which the first person comes in; None where there is an admin already."""
    from labeling_ui.accounts import Accounts

    accounts = Accounts(store)
    if site.local:
        return f"{site.origins[0]}/local?token={accounts.invite('admin', seconds=24 * 3600)}"
    if accounts.has_admin():
        return None
    return f"{site.origins[0]}/join?token={accounts.invite('admin', seconds=24 * 3600)}"


@contextlib.contextmanager
def serving(
    store: LabelStore, address: Address, *, local: bool = False, make: Callable[[LabelStore, Site], Any] = create_app
) -> Iterator[Site]:
    """The app in a thread of its own, for the time of a block; `make` makes another one than that for labelling.

    Raises:
        InputError: the address is taken, or one person's app would be open to others.
    """
    import uvicorn

    if local and not address.is_loopback():
        raise InputError(f"--local asks for no password, so it listens on 127.0.0.1 alone, not on {address.host}.")
    site = Site(address.origins(), local=local)
    listener = _listen(address)
    options: dict[str, Any] = {"log_level": "warning", "lifespan": "on", "timeout_graceful_shutdown": 5}
    if address.tls:
        options |= {"ssl_certfile": str(address.tls[0]), "ssl_keyfile": str(address.tls[1])}
    if address.url:
        options |= {"proxy_headers": True, "forwarded_allow_ips": "127.0.0.1"}
    server = uvicorn.Server(uvicorn.Config(make(store, site), **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise InputError("The labelling app did not start; see above.")
            time.sleep(0.05)
        yield site
    finally:
        server.should_exit = True
        thread.join(timeout=15)
        listener.close()


def _listen(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
    except OSError as error:
        listener.close()
        raise InputError(
            f"The app cannot listen on {address.host}:{address.port} ({error.strerror}): give another port."
        ) from error
    return listener

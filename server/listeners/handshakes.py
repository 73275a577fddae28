"""TLS handshakes that fail: their peer is told why, and so is the coordinator's log.

asyncio 3.11 closes a connection without sending what OpenSSL has to say about it, and logs nothing. An
owner whose certificate has expired sees a closed connection then, like one whose coordinator is restarting.
"""

from __future__ import annotations

import asyncio
import ssl
from asyncio import selector_events, sslproto
from typing import Any, Final

HANDSHAKE_S: Final = 15.0
"""Longest TLS handshake."""


class PatientLoop(asyncio.SelectorEventLoop):
    """An event loop whose servers give up TLS handshakes after `HANDSHAKE_S`, and say why one fails.

    Assumes what `asyncio.selector_events` of Python 3.11 does in ``_make_ssl_transport``.
    """

    async def create_server(self, *arguments: Any, **options: Any) -> asyncio.Server:
        """Create a server as any event loop does."""
        if options.get("ssl") is not None:
            options.setdefault("ssl_handshake_timeout", HANDSHAKE_S)
        return await super().create_server(*arguments, **options)

    def _make_ssl_transport(
        self,
        rawsock: Any,
        protocol: Any,
        sslcontext: Any,
        waiter: Any = None,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        extra: Any = None,
        server: Any = None,
        **timeouts: Any,
    ) -> Any:
        wrapped: Any = _Explaining(
            self, protocol, sslcontext, waiter, server_side, server_hostname, **timeouts
        )
        transport: Any = selector_events
        transport._SelectorSocketTransport(self, rawsock, wrapped, extra=extra, server=server)
        return wrapped._app_transport


class _Explaining(sslproto.SSLProtocol):
    """Sends OpenSSL's alert before a failed handshake's connection is closed, and tells the app's protocol.

    A protocol that wants to know has the method ``handshake_failed(error, peername)``.
    """

    def _on_handshake_complete(self, handshake_exc: BaseException | None) -> None:
        this: Any = self
        if isinstance(handshake_exc, ssl.SSLError) and this._transport is not None:
            alert = this._outgoing.read()
            if alert:
                this._transport.write(alert)
            told = getattr(this._app_protocol, "handshake_failed", None)
            if told is not None:
                told(handshake_exc, this._transport.get_extra_info("peername"))
        super()._on_handshake_complete(handshake_exc)

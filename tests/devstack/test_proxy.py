"""The proxy that breaks the network: each way of being broken, as a client and a server behind it see it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from devstack.process import wait_until
from devstack.proxy import Network, Proxy

SOON_SECONDS = 10.0
SILENCE_SECONDS = 0.2


class Echo:
    """A server that answers every chunk with the same, and keeps what it got."""

    def __init__(self) -> None:
        self.received = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                while data := self._receive(connection):
                    if data == b"end":
                        return
                    self.received += data
                    connection.sendall(data)

    @staticmethod
    def _receive(connection: socket.socket) -> bytes:
        try:
            return connection.recv(1000)
        except ConnectionResetError:
            return b""

    def end(self) -> None:
        """Close it."""
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            client.sendall(b"end")
            self._thread.join()
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    """A server behind the proxy."""
    echo = Echo()
    yield echo
    echo.end()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    """The proxy in front of it."""
    with Proxy(echo.port) as proxy:
        yield proxy


@contextmanager
def connection(proxy: Proxy) -> Iterator[socket.socket]:
    """A client's."""
    with socket.create_connection(("127.0.0.1", proxy.port), SOON_SECONDS) as client:
        yield client


def test_everything_passes(proxy: Proxy) -> None:
    """Both ways, and after a time of silence too."""
    with connection(proxy) as client:
        for text in (b"one", b"two"):
            client.sendall(text)
            assert text == client.recv(1000)


def test_down(proxy: Proxy) -> None:
    """Open connections end in order, new ones too, until it is whole again."""
    with connection(proxy) as client:
        client.sendall(b"one")
        assert client.recv(1000)
        proxy.behave("down")
        assert b"" == client.recv(1000)
    with connection(proxy) as client:
        assert b"" == client.recv(1000)
    proxy.behave("whole")
    test_everything_passes(proxy)


def test_reset(proxy: Proxy) -> None:
    """The same, rudely."""
    with connection(proxy) as client:
        client.sendall(b"one")
        assert client.recv(1000)
        proxy.behave("reset")
        with pytest.raises(ConnectionResetError):
            client.recv(1000)
    proxy.behave("whole")
    test_everything_passes(proxy)


@pytest.mark.parametrize(("network", "arrives"), [("stalled", b""), ("mute", b"one")])
def test_silence(proxy: Proxy, echo: Echo, network: Network, arrives: bytes) -> None:
    """The connection stays, nothing is answered; what was held back comes when it is whole again."""
    with connection(proxy) as client:
        proxy.behave(network)
        client.sendall(b"one")
        wait_until(lambda: arrives == echo.received, "the server to have what it should", SOON_SECONDS)
        client.settimeout(SILENCE_SECONDS)
        with pytest.raises(TimeoutError):
            client.recv(1000)
        assert arrives == echo.received
        proxy.behave("whole")
        client.settimeout(SOON_SECONDS)
        assert b"one" == client.recv(1000)


def test_forgotten(proxy: Proxy, echo: Echo) -> None:
    """Nothing moves any more on what is open, whatever comes later."""
    with connection(proxy) as client:
        client.sendall(b"one")
        assert client.recv(1000)
        for network in ("forgotten", "whole"):
            proxy.behave(network)
            client.sendall(b"two")
            client.settimeout(SILENCE_SECONDS)
            with pytest.raises(TimeoutError):
                client.recv(1000)
    assert b"one" == echo.received


def test_no_answers(proxy: Proxy, echo: Echo) -> None:
    """The server has it, and the client will never know."""
    with connection(proxy) as client:
        proxy.behave("no answers")
        client.sendall(b"one")
        with pytest.raises(ConnectionResetError):
            client.recv(1000)
    assert b"one" == echo.received


def test_a_server_that_is_away(echo: Echo) -> None:
    """A client is hung up on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert echo.port != port
    with Proxy(port) as proxy, connection(proxy) as client:
        assert b"" == client.recv(1000)

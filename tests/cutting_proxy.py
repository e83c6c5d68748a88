"""A network that breaks: a TCP proxy that cuts a connection after so many bytes."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from typing import Literal

from tests.ports import free_ports

Direction = Literal["to_server", "to_client"]


class CuttingProxy:
    """Forwards 127.0.0.1:`port` to another port; does nothing else until it is told to cut."""

    def __init__(self, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        (self.port,) = free_ports(1)  # nobody is given it while the proxy is away
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._lock = threading.Lock()
        self.cut("to_client", times=0)
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, direction: Direction, *, after_bytes: int = 0, times: int = 1, with_reset: bool = True) -> None:
        """Let so many bytes pass in one direction, then end that connection; so many times.

        With a reset the other side sees ECONNRESET, without one an ordinary end of the connection.
        """
        with self._lock:
            self._direction, self._after_bytes, self._left_bytes = direction, after_bytes, after_bytes
            self._with_reset, self.cuts_left = with_reset, times

    def go_away(self) -> None:
        """Break what is connected at its next word and refuse new connections."""
        self.cut("to_server", times=1_000_000)
        self.close()

    def come_back(self) -> None:
        """Serve again, at the same port."""
        self.cut("to_client", times=0)
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        # A listener that is merely closed stays open while another thread waits in accept.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # One thread for both directions: a socket that another thread still reads from is not really closed.
        with client, socket.create_connection(self._target) as server, contextlib.suppress(OSError):
            other = {client: server, server: client}
            while True:
                for source in select.select(list(other), [], [])[0]:
                    data = source.recv(1 << 16)
                    num_passed = self._num_passed("to_server" if source is client else "to_client", len(data))
                    other[source].sendall(data[:num_passed])
                    if num_passed < len(data) and self._with_reset:  # a close that throws away what is unsent
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    if num_passed < len(data) or not data:
                        return

    def _num_passed(self, direction: Direction, num_bytes: int) -> int:
        with self._lock:
            if direction != self._direction or self.cuts_left == 0:
                return num_bytes
            if num_bytes <= self._left_bytes:
                self._left_bytes -= num_bytes
                return num_bytes
            num_passed = self._left_bytes
            self._left_bytes = self._after_bytes
            self.cuts_left -= 1
            return num_passed

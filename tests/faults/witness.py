"""Hears of what runs in slots from the slots themselves, however they are isolated: by datagrams on loopback."""

from __future__ import annotations

import socket
import threading

from history import History

_BUFFER = 8 << 20  # bytes


class Witness:
    """Writes down what commands tell, see :mod:`worker`, until it is closed."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            told = self._socket.recv(65536).decode()
            if not told:
                return
            what, call, stamp, *files = told.split()
            holder, part, _ = call.split(".")
            self._history.write("effect", what=what, holder=holder, part=int(part), call=call, stamp=float(stamp), files=files)

    def missed(self) -> int:
        """Datagrams that were lost: without them nothing is proved."""
        with open("/proc/net/udp") as table:
            rows = [line.split() for line in table][1:]
        return sum(int(row[-1]) for row in rows if int(row[1].rpartition(":")[2], 16) == self.port)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join()
        self._socket.close()

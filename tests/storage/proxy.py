"""An HTTP proxy of one address that lets requests through, or makes them go wrong as networks and servers do."""

import contextlib
import re
import socket
import threading
from collections.abc import Iterator

REFUSE, CLOSE, STALL, CUT, BUSY = "refuse", "close", "stall", "cut", "busy"
"""Close at once; after the request; say nothing more; end half way through the body; answer 503."""


class FaultyProxy:
    """In front of `target`; counts what is asked for, and the bytes that are answered."""

    def __init__(self, target: str):
        host, port = target.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.faults: list[str] = []
        """What happens to the next requests of `matching`, one after another; then they go through."""
        self.always: str | None = None
        self.matching = ""  # a pattern of the request line
        self.requests: list[str] = []
        self.bytes = 0
        self._held: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        for each in (self._server, *self._held):
            with contextlib.suppress(OSError):
                each.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        """One request, one connection: the server is told that the connection ends with its answer."""
        with contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (more := client.recv(1 << 16)):
                    return client.close()
                head += more
            head, _, body = head.partition(b"\r\n\r\n")
            line = head.split(b"\r\n")[0].decode()
            fault = self._fault(line)
            if fault == REFUSE:
                return _reset(client)
            if b"expect: 100-continue" in head.lower():
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            found = re.search(rb"(?i)content-length: *(\d+)", head)
            parts, size = [body], len(body)
            while found and size < int(found[1]):
                parts.append(client.recv(1 << 20))
                if not parts[-1]:
                    return client.close()
                size += len(parts[-1])
            if fault == STALL:
                return self._held.append(client)
            if fault == CLOSE:
                return _reset(client)
            if fault == BUSY:
                client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return client.close()
            head = re.sub(rb"(?i)\r\n(connection|expect):[^\r]*", b"", head) + b"\r\nConnection: close"
            with socket.create_connection(self._target) as server:
                server.sendall(head + b"\r\n\r\n" + b"".join(parts))
                answer = b"".join(iter(lambda: server.recv(1 << 16), b""))
            if fault == CUT:
                start = answer.index(b"\r\n\r\n") + 4
                answer = answer[: start + (len(answer) - start) // 2]
            self.bytes += len(answer)
            client.sendall(answer)
            client.close()

    def _fault(self, line: str) -> str | None:
        self.requests.append(line)
        if not re.search(self.matching, line):
            return None
        return self.faults.pop(0) if self.faults else self.always


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    client.close()


@contextlib.contextmanager
def faulty_proxy(target: str) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()

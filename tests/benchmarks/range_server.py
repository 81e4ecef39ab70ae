"""A fast static HTTP server with ranges and added latency: what an object store would be if its server cost nothing.

    python tests/benchmarks/range_server.py FOLDER --latency-ms 20

Prints its port. Serves `GET` and `HEAD` of files below the folder, so that an S3 client that addresses buckets by path
takes it for S3 (signatures are not looked at).
"""

import argparse
import os
import re
import socket
import threading
import time
from pathlib import Path
from urllib.parse import unquote


def serve(connection: socket.socket, root: Path, latency_s: float) -> None:
    """Answer requests on one connection until the client closes it."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection, connection.makefile("rb") as lines:
        while request := lines.readline():
            method, target, _ = request.decode("latin-1").split()
            span = None
            while (line := lines.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"range:"):
                    span = line.decode("latin-1").split("=")[1].strip()
            time.sleep(latency_s)
            path = root / unquote(target.split("?")[0]).lstrip("/")
            if not path.is_file():
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                continue
            size = path.stat().st_size
            first, last = _span(span, size)
            head = [
                f"HTTP/1.1 {'206 Partial Content' if span else '200 OK'}",
                f"Content-Length: {last - first + 1}",
                f'ETag: "{size}"',
                "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT",
                *([f"Content-Range: bytes {first}-{last}/{size}"] if span else []),
            ]
            connection.sendall(("\r\n".join(head) + "\r\n\r\n").encode())
            if method == "GET":
                with path.open("rb") as file:
                    while first <= last:
                        first += os.sendfile(connection.fileno(), file.fileno(), first, last - first + 1)


def _span(text: str | None, size: int) -> tuple[int, int]:
    """First and last byte of a Range header's value: `2-5`, `2-` or `-4`."""
    if text is None:
        return 0, size - 1
    start, end = re.fullmatch(r"(\d*)-(\d*)", text).groups()  # type: ignore[union-attr]
    if not start:
        return size - int(end), size - 1
    return int(start), min(int(end or size - 1), size - 1)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency-ms", type=float, default=0)
    arguments = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        work = (connection, arguments.folder, arguments.latency_ms / 1000)
        threading.Thread(target=serve, args=work, daemon=True).start()


if __name__ == "__main__":
    main()

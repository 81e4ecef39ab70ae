"""Real servers on loopback for tests: S3 as a process of its own, and a proxy before it that breaks things."""

import http.client
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("reset", "500", "503", "slow", "cut answer", "cut request", "lost answer")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int, seconds: float = 180) -> None:
    """Until a server answers there; a busy machine may take a minute to start one."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"no server at port {port} after {seconds:g} s")


@contextmanager
def s3_server() -> Iterator[str]:
    """moto's server as a process of its own. Yields its address."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_port(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@contextmanager
def mlflow_server(folder: Path, port: int, artifacts: str | None = None) -> Iterator[subprocess.Popen]:
    """MLflow's server on a SQLite file in the folder, as a process of its own."""
    database = f"sqlite:///{folder / 'server.db'}"
    line = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    line += ["--backend-store-uri", database, "--artifacts-destination", artifacts or str(folder / "artifacts")]
    with open(folder / "server.log", "a") as log:
        server = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for_port(port)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def range_server(folder: Path, latency_ms: float = 0) -> Iterator[str]:
    """The benchmarks' static server before a folder. Yields its address."""
    script = Path(__file__).parent / "benchmarks" / "range_server.py"
    line = [sys.executable, str(script), str(folder), "--latency-ms", str(latency_ms)]
    server = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
    finally:
        server.kill()
        server.communicate()


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables for the block."""
    saved = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def aws(endpoint: str) -> dict[str, str]:
    """What a client of that server needs in its environment."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


class FaultProxy:
    """Passes requests on to `upstream`, and breaks a share of them in one of FAULTS, drawn from a seed."""

    def __init__(self, upstream: str, share: float, seed: int = 0, slow_s: float = 1.5):
        self.host, self.share, self.slow_s = upstream.removeprefix("http://"), share, slow_s
        self.answer_all: int | None = None
        self.answer_body = b"<Error><Code>AccessDenied</Code></Error>"
        self.refused_path: str | None = None
        self.injected: Counter[str] = Counter()
        self._random, self._lock = random.Random(seed), threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self):
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

            def any(self):
                proxy.handle(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = any

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def draw(self) -> str | None:
        with self._lock:
            if self._random.random() >= self.share:
                return None
            fault = self._random.choice(FAULTS)
            self.injected[fault] += 1
            return fault

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        if self.answer_all is None and self.refused_path is not None and self.refused_path in request.path:
            request.rfile.read(int(request.headers.get("Content-Length", 0)))
            return self.answer(request, 403, [], b'{"error_code": "PERMISSION_DENIED", "message": "not yours"}')
        if self.answer_all is not None:
            request.rfile.read(int(request.headers.get("Content-Length", 0)))
            return self.answer(request, self.answer_all, [], self.answer_body)
        fault = self.draw()
        length = int(request.headers.get("Content-Length", 0))
        body = request.rfile.read(length)
        if fault == "reset":
            return self.reset(request)
        if fault in ("500", "503"):
            return self.answer(request, int(fault), [], b"<Error><Code>InternalError</Code></Error>")
        if fault == "slow":
            time.sleep(self.slow_s)
        upstream = http.client.HTTPConnection(self.host)
        upstream.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders()
        if fault == "cut request":
            upstream.send(body[: length // 2])
            upstream.close()
            return self.reset(request)
        upstream.send(body)
        reply = upstream.getresponse()
        data = reply.read()
        upstream.close()
        if fault == "lost answer":
            return self.reset(request)
        self.answer(request, reply.status, reply.getheaders(), data, cut=fault == "cut answer")

    def answer(self, request, status, headers, data, cut=False) -> None:
        request.send_response_only(status)
        given = {name.lower() for name, _ in headers}
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                request.send_header(name, value)
        length = dict((n.lower(), v) for n, v in headers).get("content-length", str(len(data)))
        request.send_header(
            "Content-Length", length if request.command == "HEAD" or "content-length" in given else str(len(data))
        )
        request.end_headers()
        if request.command == "HEAD":
            return
        if cut:
            request.wfile.write(data[: len(data) // 2])
            return self.reset(request)
        request.wfile.write(data)

    @staticmethod
    def reset(request) -> None:
        """Close so that the client sees a reset, not an orderly end."""
        request.wfile.flush()
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.close_connection = True
        request.connection.close()

"""A real MLflow server, and a door before it that counts, delays, asks for a password, or is shut."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def mlflow_server(folder: Path, *arguments: str, **environment: str):
    """The URL of an MLflow server on a fresh sqlite database in a folder; it ends with the block."""
    port, log = free_port(), folder / "server.log"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *arguments]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **environment}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, start_new_session=True, env=os.environ | environment, cwd=folder
        )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 300
        while not _healthy(url):
            assert process.poll() is None, f"the server ended: {log.read_text()[-2000:]}"
            assert time.monotonic() < until, f"the server did not start: {log.read_text()[-2000:]}"
            time.sleep(0.2)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


class Door:
    """Stands before a server and passes requests on.

    Attributes:
        url: where clients go.
        seen: (method, path) of every request, in order.
        latency: seconds before each is passed on.
        credential: the Authorization header it asks for; None lets everybody in.
        host: the Host header it passes on, instead of the server's own.
    """

    def __init__(self, server: str) -> None:
        self.server = server.removeprefix("http://")
        self.seen: list[tuple[str, str]] = []
        self.latency = 0.0
        self.credential: str | None = None
        self.host: str | None = None
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def _handler(door: Door) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            door.seen.append((self.command, self.path.partition("?")[0]))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            time.sleep(door.latency)
            if door.credential is not None and self.headers.get("Authorization") != door.credential:
                self.reply(401, {"WWW-Authenticate": "Basic"}, b"You are not authenticated.")
                return
            connection = http.client.HTTPConnection(door.server, timeout=120)
            headers = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")}
            connection.request(self.command, self.path, body, headers | {"Host": door.host or door.server})
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            self.reply(answer.status, {k: v for k, v in answer.getheaders() if k.lower() not in HOP}, content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

        def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
            with contextlib.suppress(ConnectionError):  # a client that waits no longer
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    return Handler

"""Servers of a build cache on the loopback address: moto's S3, and HTTP over a folder, with faults."""

import contextlib
import functools
import http.client
import http.server
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUCKET = "builds"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@contextlib.contextmanager
def s3() -> Iterator[dict[str, str]]:
    """The environment variables with which doit uses a bucket of a server that starts here."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(port)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request(
            "PUT", f"/{BUCKET}", headers={"Authorization": "AWS4-HMAC-SHA256 Credential=a/1/us-east-1/s3/"}
        )
        assert connection.getresponse().status == 200
        connection.close()
        yield {
            "BUILD_CACHE": f"s3://{BUCKET}/team",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.terminate()
        server.wait()


def wait_for_port(port: int, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, with a fault: see `over_http`."""

    fault = ""
    answers = 0

    def do_GET(self) -> None:
        type(self).answers += 1
        if self.fault == "error":
            self.send_error(500)
        elif self.fault == "redirects":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
        elif self.fault in ("another length", "only headers"):
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"{}")
            self.wfile.flush()
            if self.fault == "only headers":
                time.sleep(60)
        else:
            if self.fault == "late":
                time.sleep(0.1)
            super().do_GET()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        if "/blobs/" in self.path and self.fault == "dies":
            outputfile.write(source.read(20))
            outputfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        elif "/blobs/" in self.path and self.fault == "hangs":
            outputfile.write(source.read(20))
            outputfile.flush()
            time.sleep(60)
        else:
            super().copyfile(source, outputfile)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name in the base class
        pass


@contextlib.contextmanager
def over_http(folder: Path, fault: str = "") -> Iterator[str]:
    """The URL of a server of a folder.

    Args:
        fault: "dies" or "hangs" in the middle of a blob; "late" answers; every answer an "error" of the server,
            "redirects" to itself, of "another length", or "only headers".
    """
    handler = type("Faulty", (Handler,), {"fault": fault})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """The port of a server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield int(server.getsockname()[1])

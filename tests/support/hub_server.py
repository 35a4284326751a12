"""A loopback server that answers the requests of the Hugging Face hub's client, for files in memory.

    HEAD /owner/repository/resolve/revision/file   307 or 200, with X-Repo-Commit, ETag, X-Linked-Etag and X-Linked-Size
    GET  the same                                  302 to /cdn/<digest>, as the hub does for large files
    GET  /cdn/<digest>                             the bytes, also from an offset (Range)

Sources: huggingface_hub 1.x, file_download.py (get_hf_file_metadata) and utils/_http.py (hf_raise_for_status).
"""

import contextlib
import hashlib
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar
from urllib.parse import unquote

S = TypeVar("S", bound=ThreadingHTTPServer)
Revisions = dict[str, dict[str, bytes]]  # by the name of a revision: files by path


def commit_of(revision: str) -> str:
    """The commit that a revision stands for."""
    return hashlib.sha1(revision.encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    """The hub.

    Args:
        repositories: Revisions by "owner/repository".
        gated: Repositories that want the token TOKEN, and answer 401 without one, 403 with another.
        moving: Revisions whose commit is another one at every request, as a branch that is written to.
    """

    TOKEN = "hf_token_of_the_tests"
    daemon_threads = True

    def __init__(self, repositories: dict[str, Revisions], gated: tuple[str, ...] = (), moving: tuple[str, ...] = ()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.gated = gated
        self.moving = moving
        self.requests: Counter[str] = Counter()  # by "METHOD repository/file"
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.blobs = {
            hashlib.sha256(data).hexdigest(): data
            for revisions in repositories.values()
            for files in revisions.values()
            for data in files.values()
        }

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that close the connection."""


class Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(self.path.partition("?")[0]).lstrip("/")
        if path.startswith("cdn/"):
            return self.send_bytes(self.server.blobs[path.removeprefix("cdn/")])
        if "/resolve/" not in path:  # the client also asks the API about a repository that it did not find
            return self.begin(404, 0)
        repository, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        self.server.requests[f"{self.command} {repository}/{file}"] += 1
        if repository in self.server.gated and self.headers.get("Authorization") != f"Bearer {self.server.TOKEN}":
            status = 403 if "Authorization" in self.headers else 401
            text = f"Access to model {repository} is restricted."
            return self.begin(status, 0, {"X-Error-Code": "GatedRepo", "X-Error-Message": text})
        revisions = self.server.repositories.get(repository)
        if revisions is None:  # the hub does not say whether a repository exists
            return self.begin(401, 0, {"X-Error-Message": "Invalid username or password."})
        names = {**{name: name for name in revisions}, **{commit_of(name): name for name in revisions}}
        if revision not in names:
            return self.begin(
                404, 0, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev {revision}"}
            )
        commit = commit_of(names[revision])
        if names[revision] in self.server.moving and revision == names[revision]:
            moves = sum(self.server.requests.values())
            commit = commit_of(f"{revision} {moves}")
            revisions[f"{revision} {moves}"] = revisions[revision]
        data = revisions[names[revision]].get(file)
        if data is None:
            return self.begin(404, 0, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        digest = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{digest}"',
            **linked,
            "Location": f"http://localhost:{self.server.server_port}/cdn/{digest}",
        }
        return self.begin(302, 0, headers)

    def send_bytes(self, data: bytes) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        more = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.begin(206 if start else 200, len(data) - start, more)
        if self.command == "GET":
            self.wfile.write(data[start:])

    def begin(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, message: str, *args: object) -> None:
        """Print nothing."""


@contextlib.contextmanager
def serving(server: S) -> Iterator[S]:
    """Serve in a thread. It is for any server, of the hub or of others."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()

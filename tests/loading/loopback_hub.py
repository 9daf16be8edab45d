"""A stand-in for the Hugging Face hub on 127.0.0.1, so that tests reach "the hub" without a network.

    with LoopbackHub({"Org/Name": folder}) as hub:
        subprocess.run([sys.executable, "-c", code], env=hub.environ(tmp_path / "home"), check=True)
    assert hub.bytes_served["model.safetensors"] < 2000

It answers what `huggingface_hub` 1.33 and 2.4 ask for a download. The revisions are `main` and the current
commit. Folders are read again for every request: a test may change files while the hub runs.
"""

import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?")
RANGE = re.compile(r"bytes=(?:(\d+)-(\d*)|-(\d+))")
# What would lead a child process elsewhere: another cache, a token, offline mode, a proxy.
FOREIGN_VARIABLE = re.compile(r"(HF_|HUGGING|TRANSFORMERS_).*|.*_PROXY", re.IGNORECASE)
CHUNK = 1 << 16


class LoopbackHub:
    """Serves local folders as model repositories, counts what it sends, and fails on demand.

    Faults, set at any time, by a file's path in its repository: `truncate[path] = n` sends n bytes of each
    body (Content-Length promises all) and closes; `status[path] = 503` answers each request for the file with
    that status, 401 and 403 as a gated repository; a path in `ignore_ranges` is answered 200, whole.
    """

    def __init__(self, repos: Mapping[str, str | Path]) -> None:
        self.repos = {repo: Path(folder) for repo, folder in repos.items()}
        self.requests: list[tuple[str, str, str | None]] = []  # (method, URL path, Range header)
        self.bytes_served: Counter[str] = Counter()  # file path in its repository: body bytes sent
        self.truncate: dict[str, int] = {}
        self.status: dict[str, int] = {}
        self.ignore_ranges: set[str] = set()
        self.lock = threading.Lock()  # each request has its thread
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environ(self, home: str | Path) -> dict[str, str]:
        """A child process's environment (it is read at import) with this hub and `home` as HF_HOME."""
        kept = {name: value for name, value in os.environ.items() if not FOREIGN_VARIABLE.fullmatch(name)}
        switches = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        return kept | {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home)} | dict.fromkeys(switches, "1")

    def files(self, repo: str) -> dict[str, bytes]:
        """The repository's files by path."""
        folder = self.repos[repo]
        return {
            p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
        }

    def commit(self, repo: str) -> str:
        """40 hex digits that change with any file's name or content."""
        listing = [f"{_blob_id(content)} {path}" for path, content in self.files(repo).items()]
        return hashlib.sha1("\n".join(listing).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """One request to the hub, in HTTP/1.0: a connection kept alive would outlive the hub."""

    def __init__(self, hub: LoopbackHub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)  # handles the request, so `hub` comes first

    def log_message(self, *_: Any) -> None:
        """Says nothing: `LoopbackHub.requests` is the log."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, unquote(path), self.headers.get("Range")))
        file, api = RESOLVE.fullmatch(path), API.fullmatch(path)
        if not (match := file or api):
            return self._fail(404)
        repo, *rest = (unquote(part or "") for part in match.groups())
        if repo not in self.hub.repos:
            return self._fail(404, "RepoNotFound")
        commit, revision = self.hub.commit(repo), rest[0] if file else rest[1]
        if revision not in ("", "main", commit):
            return self._fail(404, "RevisionNotFound")
        if file:
            return self._send_file(repo, commit, path=rest[1])
        return self._describe(repo, commit, tree=rest[0] == "tree", folder=rest[2])

    def do_HEAD(self) -> None:
        self.do_GET()

    def _describe(self, repo: str, commit: str, tree: bool, folder: str) -> None:
        """The model's description, or the files under `folder`, at any depth, as a `tree`."""
        known = [(path, len(content), _blob_id(content)) for path, content in self.hub.files(repo).items()]
        if not tree:
            siblings = [{"rfilename": path, "size": size, "blobId": oid} for path, size, oid in known]
            answer: Any = {"id": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings}
        else:
            inside = [entry for entry in known if not folder or entry[0].startswith(f"{folder}/")]
            if not inside:
                return self._fail(404, "EntryNotFound", commit)
            answer = [{"type": "file", "path": path, "size": size, "oid": oid} for path, size, oid in inside]
        return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_file(self, repo: str, commit: str, path: str) -> None:
        if status := self.hub.status.get(path):
            return self._fail(status, "GatedRepo" if status in (401, 403) else "")
        if (body := self.hub.files(repo).get(path)) is None:
            return self._fail(404, "EntryNotFound", commit)
        headers = {"ETag": f'"{_blob_id(body)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        ranged = self.command == "GET" and path not in self.hub.ignore_ranges  # RFC 9110: HEAD knows no Range
        if (span := _span(self.headers.get("Range"), len(body)) if ranged else None) is None:
            return self._send(200, body, headers, path)
        start, stop = span
        if start >= stop:
            return self._send(416, b"", headers | {"Content-Range": f"bytes */{len(body)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
        return self._send(206, body[start:stop], headers, path)

    def _fail(self, status: int, code: str = "", commit: str = "") -> None:
        # The client tells errors apart by X-Error-Code, and remembers a missing file under X-Repo-Commit.
        headers = {"X-Error-Code": code} if code else {}
        self._send(status, b"", headers | ({"X-Repo-Commit": commit} if commit else {}))

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], path: str = "") -> None:
        """Sends an answer; `path`, if any, is the file that its body belongs to."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        sent = 0 if self.command == "HEAD" else self.hub.truncate.get(path, len(body))
        for start in range(0, min(sent, len(body)), CHUNK):
            chunk = body[start : min(start + CHUNK, sent)]
            if path:
                with self.hub.lock:  # before the bytes leave: whoever has them finds them counted
                    self.hub.bytes_served[path] += len(chunk)
            try:
                self.wfile.write(chunk)
            except ConnectionError:  # the client has read what it wanted
                return


def _span(header: str | None, size: int) -> tuple[int, int] | None:
    """[start, stop) that a Range header asks of `size` bytes, empty if none of them exist; None: all."""
    if not (match := RANGE.fullmatch(header or "")):
        return None
    first, last, suffix = match.groups()
    if suffix:
        return max(size - int(suffix), 0), size
    if last and int(last) < int(first):
        return None  # invalid, hence ignored (RFC 9110)
    return int(first), min(int(last) + 1, size) if last else size


def _blob_id(content: bytes) -> str:
    """Git's id of a file: the hub's ETag and `oid` for a file outside LFS."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

"""`huggingface_hub` takes the loopback hub for the hub, and its counts and faults are what they say."""

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from .loopback_hub import LoopbackHub

REPO, FAULTY = "Org/Small-Model", "Org/Faulty"
WEIGHTS = bytes(range(256)) * 1000
CONFIG = b'{"hidden_size": 8}\n'

# Everything that needs huggingface_hub, in one process; it judges nothing and prints what it saw as JSON.
CLIENT = """
import json, sys
from pathlib import Path
from unittest import mock

from huggingface_hub import hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import build_hf_headers, get_session

repo, faulty, stopped = sys.argv[1:]

def ranged(repo, file):
    headers = build_hf_headers() | {"Range": "bytes=70000-70299", "Accept-Encoding": "identity"}
    with get_session().stream("GET", hf_hub_url(repo, file), headers=headers, timeout=10) as answer:
        body = b"".join(answer.iter_bytes())
        return {"status": answer.status_code, "body": body.hex(), "range": answer.headers["Content-Range"]}

def caught(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__]

seen = {"config": hf_hub_download(repo, "config.json")}
seen["config_bytes"] = Path(seen["config"]).read_bytes().decode()
seen["ranged"] = ranged(repo, "vision/model.safetensors")
folder = snapshot_download(repo)
files = [path for path in Path(folder).rglob("*") if path.is_file()]
seen["snapshot"] = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
seen["snapshot_folder"] = folder
seen["missing_file"] = caught(hf_hub_download, repo, "absent.json")
seen["missing_repo"] = caught(hf_hub_download, "Org/Absent", "config.json")
seen["missing_revision"] = caught(hf_hub_download, repo, "config.json", revision="absent")
seen["gated"] = caught(hf_hub_download, faulty, "gated.bin")
seen["truncated"] = caught(ranged, faulty, "cut.bin")
with mock.patch("time.sleep"):  # the library's five retries would wait 23 s
    seen["stopped"] = caught(hf_hub_download, faulty, "config.json", endpoint=stopped)
print(json.dumps(seen))
"""


class Visit(NamedTuple):
    """What the client process saw, and the hub that served it."""

    seen: dict[str, Any]
    hub: LoopbackHub


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    root = tmp_path_factory.mktemp("hub")
    for path in ("small/config.json", "faulty/config.json"):
        (root / path).parent.mkdir()
        (root / path).write_bytes(CONFIG)
    (root / "small/vision").mkdir()
    for path in ("small/vision/model.safetensors", "faulty/cut.bin", "faulty/gated.bin"):
        (root / path).write_bytes(WEIGHTS)
    with LoopbackHub({}) as stopped:
        pass
    with LoopbackHub({REPO: root / "small", FAULTY: root / "faulty"}) as hub:
        hub.truncate["cut.bin"] = 100
        hub.status["gated.bin"] = 401
        command = [sys.executable, "-c", CLIENT, REPO, FAULTY, stopped.endpoint]
        environ = hub.environ(root / "home")
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        yield Visit(json.loads(done.stdout), hub)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    (tmp_path / "model.bin").write_bytes(WEIGHTS)
    with LoopbackHub({REPO: tmp_path}) as hub:
        yield hub


def ask(hub: LoopbackHub, path: str, bytes_range: str | None = None) -> tuple[int, bytes, str | None]:
    """(status, body, Content-Range) of a GET; `path` starts with a slash."""
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=10)
    connection.request("GET", path, headers={"Range": bytes_range} if bytes_range else {})
    answer = connection.getresponse()
    try:
        return answer.status, answer.read(), answer.headers["Content-Range"]
    finally:
        connection.close()


def test_a_file_lies_in_the_snapshot_folder_of_the_hubs_commit(visit: Visit) -> None:
    commit = visit.hub.commit(REPO)
    assert len(commit) == 40
    assert Path(visit.seen["config"]).parts[-3:] == ("snapshots", commit, "config.json")
    assert visit.seen["config_bytes"].encode() == CONFIG


def test_a_snapshot_brings_every_file_of_the_same_commit(visit: Visit) -> None:
    assert visit.seen["snapshot"] == {"config.json": len(CONFIG), "vision/model.safetensors": len(WEIGHTS)}
    assert Path(visit.seen["snapshot_folder"]).name == visit.hub.commit(REPO)


def test_a_ranged_get_returns_exactly_the_bytes_of_the_range(visit: Visit) -> None:
    ranged = visit.seen["ranged"]
    assert ranged["status"] == 206
    assert bytes.fromhex(ranged["body"]) == WEIGHTS[70000:70300]
    assert ranged["range"] == f"bytes 70000-70299/{len(WEIGHTS)}"
    url_path = f"/{REPO}/resolve/main/vision/model.safetensors"
    assert ("GET", url_path, "bytes=70000-70299") in visit.hub.requests


def test_what_is_missing_raises_the_librarys_own_errors(visit: Visit) -> None:
    assert "EntryNotFoundError" in visit.seen["missing_file"]
    assert visit.seen["missing_repo"][0] == "RepositoryNotFoundError"
    assert visit.seen["missing_revision"][0] == "RevisionNotFoundError"
    assert visit.seen["gated"][0] == "GatedRepoError"


def test_bytes_are_counted_once_for_each_time_they_are_sent(visit: Visit) -> None:
    # The snapshot took config.json from the cache: one download of each file, and one range of the weights.
    expected = {"config.json": len(CONFIG), "vision/model.safetensors": len(WEIGHTS) + 300, "cut.bin": 100}
    assert visit.hub.bytes_served == expected


def test_a_body_cut_short_is_an_error_of_the_http_client(visit: Visit) -> None:
    assert visit.seen["truncated"][0] == "RemoteProtocolError"
    assert "HTTPError" in visit.seen["truncated"]
    assert "OSError" not in visit.seen["truncated"]


def test_without_hub_and_cache_a_download_is_a_file_not_found(visit: Visit) -> None:
    assert visit.seen["stopped"][:2] == ["LocalEntryNotFoundError", "FileNotFoundError"]


@pytest.mark.parametrize(
    ("bytes_range", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=255990-", 255_990, 256_000),
        ("bytes=10-999999999", 10, 256_000),
        ("bytes=-5", 255_995, 256_000),
        ("bytes=-999999999", 0, 256_000),
    ],
)
def test_closed_open_and_suffix_ranges_are_answered_with_206(
    hub: LoopbackHub, bytes_range: str, start: int, stop: int
) -> None:
    answer = ask(hub, f"/{REPO}/resolve/main/model.bin", bytes_range)
    assert answer == (206, WEIGHTS[start:stop], f"bytes {start}-{stop - 1}/256000")
    assert hub.bytes_served["model.bin"] == stop - start


@pytest.mark.parametrize("bytes_range", ["bytes=256000-", "bytes=256000-256001", "bytes=-0"])
def test_a_range_that_holds_no_byte_is_answered_with_416(hub: LoopbackHub, bytes_range: str) -> None:
    assert ask(hub, f"/{REPO}/resolve/main/model.bin", bytes_range) == (416, b"", "bytes */256000")


@pytest.mark.parametrize("bytes_range", ["bytes=5-3", "bytes=-", "lines=1-2", "bytes=0-1,4-5"])
def test_an_invalid_range_is_answered_with_the_whole_file(hub: LoopbackHub, bytes_range: str) -> None:
    assert ask(hub, f"/{REPO}/resolve/main/model.bin", bytes_range) == (200, WEIGHTS, None)


def test_a_hub_that_ignores_ranges_sends_the_whole_file(hub: LoopbackHub) -> None:
    hub.ignore_ranges.add("model.bin")
    assert ask(hub, f"/{REPO}/resolve/main/model.bin", "bytes=0-7") == (200, WEIGHTS, None)
    assert hub.bytes_served["model.bin"] == len(WEIGHTS)


def test_a_status_set_for_a_file_is_answered_until_removed(hub: LoopbackHub) -> None:
    hub.status["model.bin"] = 503
    assert ask(hub, f"/{REPO}/resolve/main/model.bin")[0] == 503
    del hub.status["model.bin"]
    assert ask(hub, f"/{REPO}/resolve/main/model.bin")[0] == 200


def test_a_changed_file_is_a_new_commit_and_the_old_is_gone(hub: LoopbackHub, tmp_path: Path) -> None:
    before = hub.commit(REPO)
    assert ask(hub, f"/{REPO}/resolve/{before}/model.bin")[0] == 200
    (tmp_path / "model.bin").write_bytes(WEIGHTS[:-1] + b"x")
    assert hub.commit(REPO) != before
    assert ask(hub, f"/{REPO}/resolve/{before}/model.bin")[0] == 404


def test_the_model_api_lists_the_files_with_their_sizes(hub: LoopbackHub) -> None:
    commit = hub.commit(REPO)
    for path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/{commit}"):
        described = json.loads(ask(hub, path)[1])
        assert described["sha"] == commit
        assert [(file["rfilename"], file["size"]) for file in described["siblings"]] == [
            ("model.bin", 256_000)
        ]
    (entry,) = json.loads(ask(hub, f"/api/models/{REPO}/tree/main?recursive=true&expand=false")[1])
    assert (entry["type"], entry["path"], entry["size"]) == ("file", "model.bin", 256_000)
    assert ask(hub, f"/api/models/{REPO}/tree/main/absent%2Ffolder")[0] == 404


def test_no_file_outside_the_folder_is_served(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path.parent / "secret.txt").write_text("secret")
    for escape in ("../secret.txt", "%2e%2e%2fsecret.txt"):
        assert ask(hub, f"/{REPO}/resolve/main/{escape}")[0] == 404

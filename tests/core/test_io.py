"""Text files: every file is read as it is meant or refused in one line; provenance never fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_vision_bridge.io import json_lines, parse_object, provenance, read_json, write_image
from tests.conftest import made_how

ROWS = [{"id": "one", "prompt": "a\u2028b\u2029c\u0085d"}, {"id": "two", "prompt": "Größe 文字 😀"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def rows(path: Path) -> list[object]:
    return [parse_object(line, place) for place, line in json_lines(path)]


@pytest.mark.parametrize(
    "data", [JSONL, b"\xef\xbb\xbf" + JSONL, JSONL.replace(b"\n", b"\r\n"), b"\n \n" + JSONL]
)
def test_lines_end_at_line_feeds_alone(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    assert rows(path) == ROWS


def test_places_count_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" + JSONL)
    assert [place for place, _ in json_lines(path)] == [f"{path}, line 2", f"{path}, line 3"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ('{"id": "é"}'.encode("latin-1"), "not UTF-8"),
        (b'{"id": "\\ud83d"}', "half a surrogate pair"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"id": ' * 3000 + b"1" + b"}" * 3000, "not valid JSON"),
        (b'{"id": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b'{"id": "one"', "not valid JSON"),
        (b'["id"]', "holds a list"),
        (b"7", "holds a int"),
        ('{"id": 1}'.encode("utf-16"), "UTF-16"),
    ],
)
def test_what_is_no_object_is_one_line_with_its_place(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(data)
    for read in (read_json, lambda path: parse_object(path.read_bytes(), f"{path}, line 3")):
        with pytest.raises(ValueError, match=says) as caught:
            read(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse_object(b'{"id": "\\ud83d\\ude00"}', "here") == {"id": "😀"}


def test_lines_of_utf_16_are_refused_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(JSONL.decode().encode("utf-16"))
    with pytest.raises(ValueError, match=r"rows\.jsonl is UTF-16"):
        json_lines(path)


@pytest.mark.slow
def test_a_mutated_file_is_objects_or_one_line(tmp_path: Path) -> None:
    path, draw = tmp_path / "rows.jsonl", np.random.default_rng(0)
    objects, lines = [], []
    for _ in range(10_000):
        content = bytearray(JSONL)
        for place in draw.integers(0, len(content), draw.integers(1, 6)):
            content[place : place + int(draw.integers(0, 3))] = draw.bytes(int(draw.integers(0, 3)))
        path.write_bytes(bytes(content))
        try:
            objects += rows(path)
        except ValueError as error:
            lines.append(str(error))
    assert objects
    assert lines
    assert all(line.startswith(str(path)) and "\n" not in line for line in lines)


def test_provenance_says_unknown_for_a_package_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        if name in ("bitsandbytes", "qwen-vision-bridge"):
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", missing)
    versions = provenance([0], "cpu")["versions"]
    assert isinstance(versions, dict)
    assert {name for name, version in versions.items() if version == "unknown"} == {
        "bitsandbytes",
        "qwen-vision-bridge",
    }


def test_an_image_says_how_it_was_made_without_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/tool.py", "--image", "/home/me/secret/photo.jpg"])
    image = Image.new("RGB", (8, 8))
    plain = made_how(write_image(tmp_path / "plain.png", image))
    assert plain["command"] == "tool.py --image …/photo.jpg"
    assert plain["versions"]["torch"] == metadata.version("torch")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*", plain["date"])
    full = made_how(write_image(tmp_path / "full.png", image, {"seed": 3, "bridge": "~/runs/one/bridge"}))
    assert (full["seed"], full["bridge"]) == (3, "…/bridge")
    assert full.keys() == plain.keys() | {"seed", "bridge"}
    assert Image.open(write_image(tmp_path / "one.jpg", image)).size == (8, 8)  # which keeps no text


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_cannot_show_a_character_gets_another(encoding: str) -> None:
    script = "from qwen_vision_bridge.cli import run; run(lambda argv: print('8 × 8 → 😀'))"
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(encoding).strip() == ("8 ? 8 ? ?" if encoding == "ascii" else "8 × 8 ? ?")

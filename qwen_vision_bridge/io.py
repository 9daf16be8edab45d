"""Files on disk: provenance and digests of results, and files that are written whole or not at all.

Imports neither torch nor safetensors before a tensor is written.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import shlex
import stat
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .images import suffixes

if TYPE_CHECKING:
    import torch

MODEL_PACKAGES = ("qwen-vision-bridge", "torch", "transformers", "diffusers")
PACKAGES = (*MODEL_PACKAGES, "accelerate", "bitsandbytes")
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
FULL_HASH_LIMIT = 64 * 2**20  # bytes; smaller folders are identified by their whole content


def made_by() -> dict[str, object]:
    """How a file came to be, in short: command, versions, date."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": _model_versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def _model_versions() -> dict[str, str]:
    return {name: version_of(name) for name in MODEL_PACKAGES}


def provenance(seeds: Sequence[int], device: str, **models: object) -> dict[str, object]:
    """Describe a run for its results file: command, seeds, models, versions, device, date."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seeds": list(seeds),
        **models,
        "versions": {name: version_of(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "device": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def version_of(package: str) -> str:
    """A package's version; "unknown" where it has no metadata, such as this one in a bare checkout."""
    try:
        return metadata.version(package) or "unknown"
    except metadata.PackageNotFoundError:
        return "unknown"


def duration(seconds: float) -> str:
    """A time as people say it: `40 s`, `12 min`, `1.5 h`."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def digest_of(data: object) -> str:
    """Compute a short digest of plain data, for keys, and for seeds that must never change.

    Raises:
        TypeError: the data holds a function, a tensor or the like, whose content JSON cannot tell.
    """
    text = json.dumps(data, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be part of a key that results are kept under")


def folder_digest(folder: Path, files: Iterable[Path]) -> str:
    """Identify a folder's files by their content, or by sizes and modification times above 64 MB."""
    digest = hashlib.sha256()
    present = sorted(path for path in files if path.is_file())
    small = sum(path.stat().st_size for path in present) <= FULL_HASH_LIMIT
    for path in present:
        state = path.stat()
        digest.update(f"{path.relative_to(folder)}:{state.st_size}".encode())
        digest.update(path.read_bytes() if small else str(state.st_mtime_ns).encode())
    return f"local:{digest.hexdigest()[:16]}"


def first_difference(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Describe the first key in which two fingerprints differ; "" where none does."""
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            return f"{key} {before.get(key)!r}, now {now.get(key)!r}"
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: no such object in it; the file is named.
    """
    return parse_object(path.read_bytes(), str(path))


def json_lines(path: Path) -> list[tuple[str, bytes]]:
    r"""The lines of a JSONL file that are not blank, each with its place in words, for `parse_object`.

    Lines end at `\n` alone: inside strings JSON may hold U+2028 and the like, where `str.splitlines` breaks.

    Raises:
        ValueError: UTF-16, which has no such lines.
    """
    data = path.read_bytes()
    if data.startswith(UTF16_MARKS):
        raise ValueError(f"{path} is UTF-16: save it as UTF-8")
    lines = enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1)
    return [(f"{path}, line {number}", line) for number, line in lines if line.strip()]


def parse_object(data: bytes, place: str) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        place: where it is from, for messages.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, half a surrogate pair, or no object.
    """
    if data.startswith(UTF16_MARKS):
        raise ValueError(f"{place} is UTF-16: save it as UTF-8")
    try:
        value = json.loads(data.decode("utf-8-sig"))
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} has half a surrogate pair ({error.object[error.start]!r})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 (at byte {error.start}): save it as UTF-8") from error
    except (ValueError, RecursionError) as error:  # JSON's own errors, or numbers of thousands of digits
        raise ValueError(f"{place} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place} holds a {type(value).__name__}, needed is a JSON object")
    return value


def path_inside(folder: Path, relative: str) -> Path:
    """A path below a folder, as a file of the user's names it.

    Raises:
        ValueError: it leads out of the folder.
    """
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"the path {relative!r} leads out of {folder}")
    return path


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then rename it; missing folders are created.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{uuid4().hex[:8]}{path.suffix}")
    temporary.touch(exist_ok=False)
    mode = stat.S_IMODE(temporary.stat().st_mode)  # what the umask says
    try:
        write(temporary)
        temporary.chmod(mode)  # safetensors hides its files from others
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def usual_mode(path: Path) -> None:
    """Give a file the mode of a plain new one beside it: temporary and safetensors files hide from others."""
    plain = path.with_name(f".{uuid4().hex}")
    plain.touch(exist_ok=False)
    try:
        path.chmod(stat.S_IMODE(plain.stat().st_mode))
    finally:
        plain.unlink()


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text, whole or not at all."""
    return write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, data: object) -> Path:
    """Write indented JSON; NaN and infinity, which JSON does not know, are refused."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_text(path, text)


def check_image_path(path: str | Path) -> Path:
    """A path that an image can be written to.

    Raises:
        ValueError: a suffix that is not that of an image.
    """
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{path} is no name for an image: end it in .png, .jpg or .webp")
    return Path(path)


def write_image(path: str | Path, image: Image.Image, about: Mapping[str, object] | None = None) -> Path:
    """Write an image in the format of the path's suffix.

    Args:
        about: how it was made, beside command, versions and date; a PNG keeps it as JSON in the text
            `qwen_vision_bridge`, with absolute paths cut to their last part, since images are passed on.
    """
    options: dict[str, Any] = {}
    if Path(path).suffix.lower() == ".png":
        options["pnginfo"] = text = PngInfo()
        data = json.dumps({**made_by(), **(about or {})}, ensure_ascii=False, default=str)
        text.add_itxt("qwen_vision_bridge", without_folders(data))
    return write_whole(path, lambda file: image.save(file, **options))


def without_folders(text: str) -> str:
    """The text with every absolute path cut to its last part."""
    return re.sub(r"(?<![\w.:/~-])[~]?/(?:[^\s/\"']+/)+([^\s/\"']+)", r"…/\1", text)


def atomic_save(
    tensors: Mapping[str, torch.Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file, whole or not at all.

    Raises:
        OSError: the file cannot be written, for lack of space for example; nothing is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    on_cpu = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
    try:
        return write_whole(path, lambda file: save_file(on_cpu, file, dict(metadata) if metadata else None))
    except SafetensorError as error:  # how the library reports a failed write
        raise OSError(f"{path} could not be written ({error})") from error


class ImageList(NamedTuple):
    """The files below a folder."""

    names: list[str]
    """Images, as sorted paths relative to the folder."""
    left_out: dict[str, str]
    """What else there is, and why it is not read; bytes of a name that are no UTF-8 are escaped."""


def list_images(folder: Path) -> ImageList:
    """List the images below a folder by their suffixes, and what is left out.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of images: {folder}")
    names: list[str] = []
    left_out: dict[str, str] = {}

    def unreadable(error: OSError) -> None:
        left_out[_printable(os.path.relpath(error.filename, folder))] = f"cannot be listed: {error.strerror}"

    for root, folders, files in os.walk(folder, onerror=unreadable):
        below = Path(root).relative_to(folder)
        for name in folders:
            if (Path(root) / name).is_symlink():
                left_out[_printable((below / name).as_posix())] = "a link to a folder: links are not followed"
        for name in files:
            path = (below / name).as_posix()
            if reason := _reason_to_leave_out(folder / path):
                left_out[_printable(path)] = reason
            else:
                names.append(path)
    if not names:
        only = "".join(f", only {name} ({reason})" for name, reason in sorted(left_out.items())[:1])
        raise FileNotFoundError(f"{folder} holds no image{only}")
    return ImageList(sorted(names), dict(sorted(left_out.items())))


def _reason_to_leave_out(path: Path) -> str:
    if _printable(path.name) != path.name:
        return "its name is not UTF-8: rename it"
    if path.suffix.lower() not in suffixes():
        heic = path.suffix.lower() in (".heic", ".heif")
        return "HEIC needs the package `pillow-heif`" if heic else "not a suffix of an image"
    return "" if path.is_file() else "not a file"


def _printable(name: str) -> str:
    r"""A file name as text; bytes that are no UTF-8 become `\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")

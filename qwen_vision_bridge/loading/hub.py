"""Files and byte ranges of the hub, with the client's errors in one line of what failed and what to do."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

TIMEOUT = 10.0  # seconds until a silent hub counts as out of reach
RESUMES = 3


def hub_file(repo: str, name: str, subfolder: str = "", revision: str | None = None) -> Path:
    """Download a file, or find it in huggingface_hub's cache where the hub cannot be reached.

    Raises:
        FileNotFoundError: the repository has no such file.
        OSError: no such repository, or no connection and no copy.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        with hub_errors(f"{repo}: {name}"):
            found = hf_hub_download(
                repo,
                name,
                subfolder=subfolder or None,
                revision=revision,
                local_files_only=not _answers(repo, name, subfolder, revision),
            )
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{repo} has no {name} on the hub: give another model") from error
    return Path(found)


def hub_range(
    repo: str, name: str, subfolder: str, revision: str | None, start: int, end: int
) -> Iterator[bytes]:
    """Fetch bytes [start, end) of a file on the hub; a broken transfer goes on where it stopped, a few times.

    Raises:
        FileNotFoundError: the repository has no such file.
        OSError: no connection, a transfer that keeps breaking, or a server that ignores ranges.
    """
    from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError

    transport_error, position = HfHubHTTPError.__bases__[0], start
    for attempt in range(RESUMES + 1):
        with hub_errors(f"{repo}: {name}"):
            try:
                for chunk in _stream(hub_url(repo, name, subfolder, revision), position, end):
                    position += len(chunk)
                    yield chunk
            except RemoteEntryNotFoundError as error:
                raise FileNotFoundError(
                    f"{repo}: {name} is not on the hub, although the model's index names it: try again "
                    "later, or give another revision"
                ) from error
            except transport_error as error:
                answered_no = isinstance(error, HfHubHTTPError)
                if answered_no or attempt == RESUMES:
                    raise
        if position == end:
            return
        time.sleep(0.5 * 2**attempt)
    raise OSError(f"{repo}: {name}: {position - start} of {end - start} bytes arrived: try again")


def hub_size(repo: str, name: str, subfolder: str, revision: str | None) -> int:
    """Size of a file on the hub in bytes; 0 where the hub does not say."""
    from huggingface_hub import get_hf_file_metadata

    with hub_errors(f"{repo}: {name}"):
        return get_hf_file_metadata(hub_url(repo, name, subfolder, revision), timeout=TIMEOUT).size or 0


def hub_url(repo: str, name: str, subfolder: str = "", revision: str | None = None) -> str:
    """Address of a file on the hub."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repo, name, subfolder=subfolder or None, revision=revision)


def folder_or_hub_file(location: str, name: str, options: Mapping[str, str | bool | None]) -> Path:
    """A safetensors model's file, from the folder or hub repository that holds it.

    Raises:
        FileNotFoundError, OSError: no such file, no connection.
        ValueError: a file instead of a folder, or pickled weights.
    """
    from huggingface_hub import hf_hub_download

    folder = Path(location).expanduser()
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the folder that holds {name}")
    if not folder.is_dir():
        with hub_errors(f"{location}: {name}"):
            return Path(hf_hub_download(location, name, **options))
    if (folder / name).is_file():
        return folder / name
    pickles = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
    if pickled := sorted(path.name for path in folder.iterdir() if path.suffix in pickles):
        raise ValueError(
            f"{folder} offers pickled weights ({pickled[0]}), which are never loaded: save as safetensors"
        )
    raise FileNotFoundError(f"{folder} has no {name}: give a folder that `save_pretrained` wrote")


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Turn the hub client's errors into an OSError that says what to do; a missing file passes as it is."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    transport_error = HfHubHTTPError.__bases__[0]  # the HTTP client's own; its package differs by version
    try:
        yield
    except RemoteEntryNotFoundError:
        raise
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise OSError(
            f"{where}: not in the local cache, and the hub cannot be reached: connect, or give a local folder"
        ) from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{where}: the hub has no such model, or it is private: check the name, or run `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise OSError(f"{where}: neither a folder nor a hub id") from error
    except transport_error as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(
            f"{where}: the hub did not deliver ({lines[0]}): try again, or give a local folder"
        ) from error


def _stream(url: str, start: int, end: int) -> Iterator[bytes]:
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:  # before the body: a 200 would bring the whole file
            raise OSError(f"{url}: the server answered {response.status_code} to a byte range, needed is 206")
        yield from response.iter_bytes()


def _answers(repo: str, name: str, subfolder: str, revision: str | None) -> bool:
    """Ask the hub once for a file's metadata; `hf_hub_download` would retry for half a minute offline."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        get_hf_file_metadata(hub_url(repo, name, subfolder, revision), timeout=TIMEOUT)
    except (RepositoryNotFoundError, OfflineModeIsEnabled) as error:
        if isinstance(error, OfflineModeIsEnabled):
            return False
        raise
    except HfHubHTTPError as error:
        return error.response.status_code < 500
    except HfHubHTTPError.__bases__[0]:
        return False
    return True

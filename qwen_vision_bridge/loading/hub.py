"""Files and byte ranges of the hub; the client's errors become one line that names failure and remedy."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

TIMEOUT = 10.0  # seconds until a silent hub counts as out of reach
RESUMES = 3
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


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
            offline = not _answers(repo, name, subfolder, revision)
            return Path(
                hf_hub_download(
                    repo, name, subfolder=subfolder or None, revision=revision, local_files_only=offline
                )
            )
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{repo} has no {name} on the hub: give another model") from error


def hub_range(
    repo: str, name: str, subfolder: str, revision: str | None, start: int, end: int
) -> Iterator[bytes]:
    """Fetch bytes [start, end) of a file on the hub; a broken transfer resumes a few times.

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
                if isinstance(error, HfHubHTTPError) or attempt == RESUMES:
                    raise
        if position == end:
            return
        time.sleep(0.5 * 2**attempt)
    raise OSError(f"{repo}: {name}: {position - start} of {end - start} bytes arrived: try again")


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

    from .checks import refuse_pickles  # imports torch, which the rest of this module must not

    folder = Path(location).expanduser()
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the folder that holds {name}")
    if not folder.is_dir():
        with hub_errors(f"{location}: {name}"):
            return Path(hf_hub_download(location, name, **options))
    if (folder / name).is_file():
        return folder / name
    refuse_pickles(folder)
    raise FileNotFoundError(f"{folder} has no {name}: give a folder that `save_pretrained` wrote")


def hub_files(repo: str, suffix: str) -> list[str]:
    """The files of a repository whose names end so; of its copy in the cache where the hub cannot be reached.

    Raises:
        OSError: no such repository, or no connection and no copy.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    with hub_errors(repo):
        try:
            names = HfApi().list_repo_files(repo)
        except HfHubHTTPError:
            raise
        except (OfflineModeIsEnabled, HfHubHTTPError.__bases__[0]):  # no connection
            folder = Path(snapshot_download(repo, local_files_only=True))
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in names if name.endswith(suffix))


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub repository, `owner/name`."""
    return HUB_ID.fullmatch(name) is not None


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Turn the hub client's errors into an OSError that names the remedy; a missing file's error passes."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RemoteEntryNotFoundError:
        raise
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        reason = (
            "not in the local cache, and the hub cannot be reached: connect, give a local folder, or use the "
            'shipped miniature (--models miniature, family="miniature")'
        )
        raise OSError(f"{where}: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        reason = "the hub has no such model, or it is private: check the name, or run `hf auth login`"
        raise OSError(f"{where}: {reason}") from error
    except errors.HFValidationError as error:
        raise OSError(f"{where}: neither a folder nor a hub id") from error
    except errors.HfHubHTTPError.__bases__[
        0
    ] as error:  # the HTTP client's own; its package differs by version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"{where}: the hub did not deliver ({reason}): try again, or give a local folder"
        raise OSError(message) from error


def _stream(url: str, start: int, end: int) -> Iterator[bytes]:
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:  # checked before the body, which would be the whole file
            raise OSError(f"{url}: the server answered {response.status_code} to a byte range, needed is 206")
        yield from response.iter_bytes()


def _answers(repo: str, name: str, subfolder: str, revision: str | None) -> bool:
    """Ask the hub once for a file's metadata; `hf_hub_download` would retry for half a minute offline."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        get_hf_file_metadata(hub_url(repo, name, subfolder, revision), timeout=TIMEOUT)
    except OfflineModeIsEnabled:
        return False
    except RepositoryNotFoundError:
        raise
    except HfHubHTTPError as error:
        return error.response.status_code < 500
    except HfHubHTTPError.__bases__[0]:
        return False
    return True

"""The processors of checkpoints: images to pixels, and with a tokenizer prompts to tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoints import locate
from .hub import hub_file


def load_processor(
    repo: str, subfolder: str = "", revision: str | None = None, images_only: bool = True
) -> Any:
    """A checkpoint's image processor, or its whole processor with tokenizer and chat template.

    Raises:
        OSError: the folder has none, or the hub cannot be reached.
    """
    from transformers import AutoImageProcessor, AutoProcessor

    loader = AutoImageProcessor if images_only else AutoProcessor
    location = locate(repo)
    if not Path(location).is_dir():
        hub_file(repo, "preprocessor_config.json", subfolder, revision)  # fails at once where the hub is away
    try:
        return loader.from_pretrained(location, subfolder=subfolder, revision=revision or "main")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"no processor could be loaded from {repo}/{subfolder} ({reason})") from error

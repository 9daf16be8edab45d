"""Refuse weights that are missing, misshapen, pickled or not finite, with an error that names the first."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .memory import is_out_of_memory

if TYPE_CHECKING:
    from torch import nn

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def check_tensors(location: str | Path, report: Mapping[str, Iterable[object] | None]) -> None:
    """Refuse a model whose tensors are not exactly those of its checkpoint: what is missing is random.

    Args:
        location: of the checkpoint, or the part of an editor, for the message.
        report: `missing_keys`, `unexpected_keys`, `mismatched_keys` (names, or tuples that begin with one)
            and `error_msgs`, as transformers and diffusers return them with `output_loading_info=True`:
            without tied weights and what a class allows to be absent.

    Raises:
        ValueError: how many are wrong, and the first of them.
    """
    faults = []
    for kind, words in (
        ("missing", "missing"),
        ("unexpected", "unexpected"),
        ("mismatched", "of another shape"),
    ):
        keys = report.get(f"{kind}_keys") or ()
        names = sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in keys)
        if names:
            faults.append(f"{len(names)} {words} (first: {names[0]})")
    faults += [" ".join(str(message).split()) for message in report.get("error_msgs") or ()]
    if faults:
        raise ValueError(
            f"{location}: its tensors do not fit its config: {', '.join(faults)}: copy or download it again"
        )


@contextmanager
def without_loading_reports() -> Iterator[None]:
    """Silence the libraries' tables of missing tensors, which `check_tensors` reports in one line."""
    loggers = [logging.getLogger(f"{name}.modeling_utils") for name in ("transformers", "diffusers.models")]
    try:
        for each in loggers:  # no level is set: transformers does more at a higher one
            each.addFilter(_drop)
        yield
    finally:
        for each in loggers:
            each.removeFilter(_drop)


@contextmanager
def without_adapter_reports() -> Iterator[None]:
    """Silence what diffusers and peft say of an adapter while they load it; the caller checks what landed."""
    loaders = [logging.getLogger(name) for name in ("diffusers.loaders.peft", "diffusers.utils.peft_utils")]
    levels = [each.level for each in loaders]
    try:
        for each in loaders:
            each.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            yield
    finally:
        for each, level in zip(loaders, levels, strict=True):
            each.setLevel(level)


def _drop(_record: logging.LogRecord) -> bool:
    return False


@contextmanager
def one_line_errors(name: str, location: str) -> Iterator[None]:
    """Turn what the libraries raise of broken files into an OSError of one line; lack of memory passes."""
    try:
        yield
    except Exception as error:  # they raise nearly anything
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"{name} could not be loaded from {location}: {reason}") from error


def refuse_pickles(folder: Path) -> None:
    """Raise where a folder offers pickled weights, which could run code when they are opened.

    Raises:
        ValueError: names the first such file.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLE_SUFFIXES:
            raise ValueError(
                f"{folder} has only pickled weights ({path.name}), which are never loaded: "
                "convert them to safetensors"
            )


def broken_weight(models: Mapping[str, nn.Module]) -> str | None:
    """The first weight with NaN or infinity, as `model.weight`; None where all weights are finite.

    It reads every weight, so call it only once an output is not finite.
    """
    import torch

    for role, model in models.items():
        for name, weight in model.named_parameters():
            readable = weight.is_floating_point() and weight.itemsize > 1 and not weight.is_meta
            if readable and not torch.isfinite(weight).all():
                return f"{role}.{name}"
    return None


def not_finite(what: str, models: Mapping[str, nn.Module]) -> ValueError:
    """The error for an output with NaN or infinity; it names the cause.

    Outputs are checked and not all weights: they are small, and a weight that matters shows in them.
    """
    if broken := broken_weight(models):
        cause = f"so does the weight {broken}; copy or download that checkpoint again"
    else:
        cause = "the weights are finite, so the model overflows in its dtype; use bfloat16 or float32"
    return ValueError(f"{what} hold NaN or infinity: {cause}")

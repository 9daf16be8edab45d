"""Images as the toolkit takes them: a PIL image, a path, or a list of either, checked and made RGB.

Imports only Pillow and numpy, so that a wrong path is refused before anything heavy is loaded.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

logger = logging.getLogger(__name__)

ImageLike = Image.Image | str | Path
Images = ImageLike | Sequence[ImageLike]
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
MAX_ASPECT_RATIO = 200  # the Qwen processors refuse anything longer
FLOAT_RANGE = (-1.0, 2.0)  # beyond it floating-point pixels are evidently not from 0 to 1
TIFF_BITS_PER_SAMPLE = 258


def load_images(image: Images, smallest_side: int = 1) -> list[Image.Image]:
    """Open, check and convert one image or several to 8-bit RGB, upright by their EXIF orientation.

    Greyscale, palette, CMYK and 16-bit images are converted, transparency is laid over white, and of an
    animation the first frame is taken (with a log line). Deep greyscale is scaled by the range of its format,
    never by its content, so that a dark image stays dark: see `_to_eight_bit`.

    Args:
        image: a PIL image, a path, or a list of either.
        smallest_side: px of one vision token; an image with a shorter side is refused.

    Raises:
        TypeError: something that is no image and no path.
        FileNotFoundError: no such file.
        OSError: a file that is empty, truncated or not an image.
        ValueError: an empty list, an image below one token, longer than 200:1, or too large to open safely;
            deep greyscale with NaN, infinity or values outside the range of its format.
    """
    images = [image] if isinstance(image, Image.Image | str | Path) else image
    if not isinstance(images, list | tuple):
        raise TypeError(f"an image is a PIL image or a path, not {type(image).__name__}")
    if not images:
        raise ValueError("no image given: pass a PIL image, a path, or a list of at least one")
    return [_load_one(image, smallest_side) for image in images]


def list_images(folder: Path) -> list[str]:
    """List the images below a folder, as sorted paths relative to it.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of images: {folder}")
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    if not names:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))})")
    return names


def on_grids(images: Sequence[Image.Image], grids: Sequence[tuple[int, int]], px: int) -> list[Image.Image]:
    """Resize images so that each has its grid (gh, gw) of tokens, `px` pixels a side."""
    return [
        image.resize((columns * px, rows * px), Image.Resampling.BICUBIC)
        for image, (rows, columns) in zip(images, grids, strict=True)
    ]


def image_digest(image: Image.Image) -> str:
    """SHA-256 of an RGB image's size and pixels, whatever file it came from."""
    digest = hashlib.sha256(f"{image.mode}:{image.width}x{image.height}:".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def _load_one(image: ImageLike, smallest_side: int) -> Image.Image:
    if isinstance(image, Image.Image):
        name = "the image"
        _check_size(image, name, smallest_side)
        return _to_rgb(image, name)
    if not isinstance(image, str | Path):
        raise TypeError(f"an image is a PIL image or a path, not {type(image).__name__}")
    path = Path(image).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no such image: {path}")
    if not path.is_file():
        raise OSError(f"{path} is not a file: give the path of one image")
    if path.stat().st_size == 0:
        raise OSError(f"{path} is empty (0 bytes): give an image file")
    return _decode(path, smallest_side)


def _decode(path: Path, smallest_side: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                _check_size(opened, str(path), smallest_side)
                return _to_rgb(opened, str(path))
    except UnidentifiedImageError as error:
        raise OSError(
            f"{path} is not an image that Pillow can read (PNG, JPEG, WebP, TIFF, GIF, …)"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = Image.MAX_IMAGE_PIXELS
        raise ValueError(
            f"{path} has more than {limit:,} pixels, so Pillow fears a decompression bomb: scale it down"
        ) from error
    except (SyntaxError, EOFError, OSError) as error:  # Pillow raises SyntaxError for broken PNG chunks
        raise OSError(f"{path} is damaged or cut short: {error}") from error


def _check_size(image: Image.Image, name: str, smallest_side: int) -> None:
    width, height = image.size
    if min(width, height) < smallest_side:
        raise ValueError(
            f"{name} is {width}×{height} px, smaller than one vision token "
            f"({smallest_side}×{smallest_side} px): give a larger image"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"{name} is {width}×{height} px, longer than the models' {MAX_ASPECT_RATIO}:1: crop it"
        )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if (frames := getattr(image, "n_frames", 1)) > 1:
        logger.warning("%s is animated (%d frames): the first frame is used", name, frames)
        image.seek(0)
    image.load()
    white = _white_level(image)
    upright = ImageOps.exif_transpose(image)  # a copy without the TIFF's tags
    if white is not None:
        upright = _to_eight_bit(upright, white, name)
    if upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return upright.convert("RGB")


def _white_level(image: Image.Image) -> float | None:
    """The value of white in a deep greyscale image's format; None for all other images.

    Pillow gives 16-bit files as `I;16`, which several formats and older versions widen to `I`, so `I` counts
    as 16-bit too; a 12-bit TIFF keeps its own values in `I;16`.
    """
    if image.mode == "F":
        return 1.0
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return None
    bits = getattr(image, "tag_v2", {}).get(TIFF_BITS_PER_SAMPLE, (16,))[0]
    return 4095.0 if bits == 12 else 65535.0


def _to_eight_bit(image: Image.Image, white: float, name: str) -> Image.Image:
    """Scale a deep greyscale image, 0 to `white`, to 8 bits; Pillow's own conversion would clip it to white.

    Floating-point values from `FLOAT_RANGE` are taken and clipped to 0 to 1, since resampling overshoots.

    Raises:
        ValueError: NaN, infinity, or values outside the range, which belong to another one.
    """
    values = np.asarray(image, dtype=np.float64)
    low, high = FLOAT_RANGE if image.mode == "F" else (0.0, white)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has pixels that are NaN or infinite: give finite values from 0 to 1")
    if values.min() < low or values.max() > high:
        accepted = (
            "floating-point values from 0 to 1"
            if image.mode == "F"
            else f"whole numbers from 0 to {white:.0f}"
        )
        raise ValueError(
            f"{name} has values from {values.min():g} to {values.max():g}; needed: {accepted}, 0 black and "
            f"{white:.0f} white: rescale it"
        )
    return Image.fromarray(np.rint(values.clip(0.0, white) * (255.0 / white)).astype(np.uint8))

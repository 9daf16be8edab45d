"""Images as the toolkit takes them, from PIL images to paths and tensors, checked and made RGB.

Imports only Pillow and numpy, so that a wrong path is refused before anything heavy is loaded.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ImageLike: TypeAlias = "Image.Image | str | Path | bytes | BinaryIO | np.ndarray | torch.Tensor"
Images: TypeAlias = "ImageLike | Sequence[ImageLike]"
ACCEPTED = "a PIL image, a path, bytes, an open file, an array or a tensor"
MAX_ASPECT_RATIO = 200  # the Qwen processors refuse anything longer
FLOAT_RANGE = (-1.0, 2.0)  # beyond it floating-point pixels are evidently not from 0 to 1
TIFF_BITS_PER_SAMPLE = 258
STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows their headers, not their pixels
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → the turn that makes an image upright."""


def load_images(image: Images, smallest_side: int = 1) -> list[Image.Image]:
    """Open, check and convert one image or several to 8-bit sRGB, upright by their EXIF orientation.

    Greyscale, palette, CMYK and 16-bit images are converted, colours of an embedded ICC profile become sRGB,
    transparency is laid over white, and of an animated file the first frame is taken (with a log line).
    Metadata that cannot be read never costs an image: it is ignored with a log line. Deep greyscale is scaled
    by the range of its format, never by its content, so that a dark image stays dark: see `_to_eight_bit`.

    Args:
        image: a PIL image, which stays as it is and is taken at its current frame; a path; a file's bytes or
            an open file; an array (H, W), (H, W, 3) or (H, W, 4), or a tensor (3, H, W), of whole numbers to
            255 or floats from 0 to 1; or a list of these.
        smallest_side: px of one vision token; an image with a shorter side is refused.

    Raises:
        TypeError: something else.
        FileNotFoundError: no such file.
        OSError: a file that is empty, truncated or not an image.
        ValueError: an empty list, an image below one token, longer than 200:1, or too large to open safely;
            pixels with NaN, infinity or values outside their range; an array of another shape.
    """
    images = image if isinstance(image, list | tuple) else [image]
    if not images:
        raise ValueError(f"no image given: pass {ACCEPTED}, or a list of at least one")
    return [_load_one(image, smallest_side) for image in images]


@cache
def suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the formats that are read; HEIC where `pillow-heif` is installed."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    known = Image.registered_extensions()  # loads every plugin
    return frozenset(suffix for suffix, kind in known.items() if kind in Image.OPEN and kind not in STUBS)


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


class _RefusedError(ValueError):
    """A sound image that is not taken."""


class _Decoded(NamedTuple):
    """Pixels, and what decides how they are shown."""

    pixels: Image.Image
    orientation: int
    """By EXIF, from 1."""
    white: float | None
    """The value of white in a deep greyscale image's format; None for all other images."""


def _load_one(image: Any, smallest_side: int) -> Image.Image:
    if isinstance(image, Image.Image):
        return _opened_image(image, smallest_side)
    if hasattr(image, "cpu"):  # a torch tensor, without importing torch
        values = image.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
        channels_last = np.moveaxis(values, 0, -1) if values.ndim == 3 else values
        return _opened_image(_from_array(channels_last), smallest_side)
    if isinstance(image, np.ndarray):
        return _opened_image(_from_array(image), smallest_side)
    if isinstance(image, str | Path):
        name = str(Path(image).expanduser())
        if str(image).startswith(("http://", "https://")):
            raise ValueError(f"{image} is an address: download the image, and give its path")
        data = _file_content(Path(name))
    elif isinstance(image, bytes | bytearray) or hasattr(image, "read"):
        name = str(getattr(image, "name", "the image"))
        data = bytes(image) if isinstance(image, bytes | bytearray) else image.read()
    else:
        raise TypeError(f"an image is {ACCEPTED}, not {type(image).__name__}")
    if not data:
        raise OSError(f"{name} is empty (0 bytes): give an image file")
    suffixes()  # registers HEIC
    try:
        decoded = _decode_data(data, name, smallest_side)
    except _RefusedError:
        raise
    except UnidentifiedImageError as error:
        raise OSError(f"{name} is not an image that Pillow can read (PNG, JPEG, WebP, …)") from error
    except Exception as error:  # decoders raise nearly anything
        raise OSError(f"{name} is damaged or cut short: {_reason(error)}") from error
    return _to_rgb(decoded, name)


def _file_content(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file: give the path of one image")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such image: {path}") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from error


def _opened_image(image: Image.Image, smallest_side: int) -> Image.Image:
    """The caller's image at its current frame; a copy is worked on."""
    _check_size(image, "the image", smallest_side)
    try:
        decoded = _Decoded(image.copy(), _orientation(image, "the image"), _white_level(image))
    except Exception as error:  # one that was opened and not yet read raises what a file does
        raise OSError(f"the image cannot be read: {_reason(error)}") from error
    return _to_rgb(decoded, "the image")


def _from_array(array: np.ndarray) -> Image.Image:
    """An image from pixels (H, W), (H, W, 3) or (H, W, 4): whole numbers to 255, or floats from 0 to 1.

    Raises:
        ValueError: another shape, or values outside that range.
    """
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ValueError(
            f"an array of shape {array.shape} is no image: needed is (H, W), (H, W, 3) or (H, W, 4), as a "
            "torch tensor (3, H, W); several images are a list"
        )
    white = 1.0 if np.issubdtype(array.dtype, np.floating) else 255.0
    values = np.asarray(array, np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > white:
        raise ValueError(
            f"an array of {array.dtype} has values from {values.min():g} to {values.max():g}; needed: 0 to "
            f"{white:g}"
        )
    return Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8))


def _decode_data(data: bytes, name: str, smallest_side: int) -> _Decoded:
    """The first frame; PNG metadata that Pillow chokes on is left out."""
    try:
        return _decode(io.BytesIO(data), name, smallest_side)
    except _RefusedError:
        raise
    except Exception:  # decoders raise nearly anything; without a barer file it is raised again
        if (bare := _without_metadata(data)) is None:
            raise
    decoded = _decode(io.BytesIO(bare), name, smallest_side)
    logger.warning("%s has metadata that cannot be read: ignored", name)
    return decoded


def _decode(file: io.BytesIO, name: str, smallest_side: int) -> _Decoded:
    limit = Image.MAX_IMAGE_PIXELS or np.inf
    too_large = f"{name} has more than {limit:,} pixels, maybe a decompression bomb: scale it down"
    try:
        opened = Image.open(file)
    except Image.DecompressionBombError as error:
        raise _RefusedError(too_large) from error
    with opened:
        if opened.width * opened.height > limit:
            raise _RefusedError(too_large)
        _check_size(opened, name, smallest_side)
        if (frames := getattr(opened, "n_frames", 1)) > 1:
            logger.warning("%s is animated (%d frames): the first frame is used", name, frames)
            opened.seek(0)
        opened.load()
        return _Decoded(opened, _orientation(opened, name), _white_level(opened))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _without_metadata(data: bytes) -> bytes | None:
    """A PNG with nothing but the chunks of its pixels; None for another format.

    Pillow refuses a whole image for compressed text or a colour profile above 1 MB.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    kept, place = [data[:8]], 8
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _orientation(image: Image.Image, name: str) -> int:
    """The EXIF orientation, 1 where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of broken EXIF Pillow raises nearly anything
        logger.warning("%s has EXIF data that cannot be read: ignored", name)
        return 1


def _check_size(image: Image.Image, name: str, smallest_side: int) -> None:
    width, height = image.size
    if min(width, height) < smallest_side:
        raise _RefusedError(
            f"{name} is {width}×{height} px, smaller than one vision token "
            f"({smallest_side}×{smallest_side} px): give a larger image"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise _RefusedError(
            f"{name} is {width}×{height} px, longer than the models' {MAX_ASPECT_RATIO}:1: crop it"
        )


def _to_rgb(decoded: _Decoded, name: str) -> Image.Image:
    image, profile = decoded.pixels, decoded.pixels.info.get("icc_profile")
    if decoded.orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[decoded.orientation])
    if decoded.white is not None:
        image = _to_eight_bit(image, decoded.white, name)
    alpha = None
    if image.mode in ("La", "RGBa"):  # premultiplied, which converts to nothing else
        image = image.convert(image.mode.upper())
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    image = _to_srgb(image, profile, name) if profile else image.convert("RGB")
    if alpha is None:
        return image
    image.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """RGB pixels whose colours are those that the ICC profile says; one that cannot be read is ignored."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image.convert("RGB")
        space = source.profile.xcolor_space.strip()
        fitting = {"CMYK": ("CMYK",), "1": ("GRAY", "RGB"), "L": ("GRAY", "RGB")}.get(image.mode, ("RGB",))
        if space not in fitting:
            raise ValueError(f"a profile of {space} in an image of mode {image.mode}")
        converted = ImageCms.profileToProfile(
            image.convert("L" if space == "GRAY" else space),
            source,
            ImageCms.createProfile("sRGB"),
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            "RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        assert converted is not None  # it is None for work in place only
        return converted
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("%s has a colour profile that cannot be used: ignored (%s)", name, _reason(error))
        return image.convert("RGB")


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
        kind = "floating-point values" if image.mode == "F" else "whole numbers"
        raise ValueError(
            f"{name} has values from {values.min():g} to {values.max():g}; needed: {kind} from 0 to "
            f"{white:.0f}, which is white: rescale it"
        )
    return Image.fromarray(np.rint(values.clip(0.0, white) * (255.0 / white)).astype(np.uint8))

"""Images: what must work works, and everything else ends in one clear line."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_vision_bridge.images import image_digest, load_images

GRADIENT = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16", "I", "F"])
def test_every_mode_becomes_eight_bit_rgb_of_the_same_size(mode: str) -> None:
    grey = Image.fromarray(GRADIENT)
    if mode == "I;16":
        image = Image.fromarray(GRADIENT.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(GRADIENT.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(GRADIENT.astype(np.float32) / 255)
    else:
        image = grey.convert(mode)
    (loaded,) = load_images(image)
    assert (loaded.mode, loaded.size) == ("RGB", (64, 48))


def test_sixteen_bit_greyscale_keeps_its_gradient(tmp_path: Path) -> None:
    deep = Image.fromarray(GRADIENT.astype(np.uint16) * 257)
    (loaded,) = load_images(saved(tmp_path / "deep.png", deep))
    assert np.abs(np.asarray(loaded)[..., 0].astype(int) - GRADIENT).max() <= 1


def grey_levels(image: Image.Image | Path) -> np.ndarray:
    return np.asarray(load_images(image)[0])[..., 0].astype(int)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
@pytest.mark.parametrize("top", [255, 4095, 65535])
def test_a_16_bit_file_is_divided_by_257_however_dark(tmp_path: Path, top: int, ending: str) -> None:
    """Pillow gives a 16-bit PGM as mode `I`, the others as `I;16`."""
    deep = np.linspace(0, top, 64 * 48).reshape(48, 64).astype(np.uint16)
    path = tmp_path / f"deep.{ending}"
    if ending == "pgm":
        path.write_bytes(b"P5 64 48 65535\n" + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep).save(path)
    assert np.array_equal(grey_levels(path), np.rint(deep / 257))


def test_32_bit_integers_count_as_16_bit_and_no_others_pass(tmp_path: Path) -> None:
    values = np.linspace(0, 300, 64 * 48).reshape(48, 64).astype(np.int32)
    assert np.array_equal(grey_levels(Image.fromarray(values)), np.rint(values / 257))
    for wrong in (values - 1, values + 65_300):
        path = saved(tmp_path / "wrong.tif", Image.fromarray(wrong))
        with pytest.raises(ValueError, match=r"wrong\.tif has values from .* whole numbers from 0 to 65535"):
            load_images(path)


def test_a_12_bit_tiff_is_scaled_by_its_4095_levels(tmp_path: Path) -> None:
    """Two levels, 4095 and 2048, in three bytes; Pillow reads such files and does not write them."""
    entries = [
        (256, 4, 32),
        (257, 4, 32),
        (258, 3, 12),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 122),
        (277, 3, 1),
        (278, 4, 32),
        (279, 4, 32 * 48),
    ]
    tags = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    path = tmp_path / "twelve.tif"
    header = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    path.write_bytes(header + tags + bytes(4) + b"\xff\xf8\x00" * 512)
    assert sorted(set(grey_levels(path).flatten().tolist())) == [128, 255]


def test_floats_are_from_0_to_1_and_overshoot_is_clipped(tmp_path: Path) -> None:
    values = np.linspace(-0.2, 1.2, 64 * 48, dtype=np.float32).reshape(48, 64)
    path = saved(tmp_path / "float.tif", Image.fromarray(values))
    assert np.array_equal(grey_levels(path), np.rint(values.astype(float).clip(0, 1) * 255))
    dark = Image.fromarray(np.full((48, 64), 0.01, np.float32))
    assert np.all(grey_levels(dark) == 3)


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf, 255.0, 2.1, -1.1])
def test_one_pixel_that_is_nan_or_out_of_range_is_refused(tmp_path: Path, strange: float) -> None:
    values = np.full((48, 64), 0.5, np.float32)
    values[3, 4] = strange
    path = saved(tmp_path / "strange.tif", Image.fromarray(values))
    with pytest.raises(ValueError, match=r"strange\.tif has .* from 0 to 1") as caught:
        load_images(path)
    assert "\n" not in str(caught.value)


def test_transparency_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    assert load_images(clear)[0].getpixel((5, 5)) == (255, 255, 255)


def test_exif_orientation_turns_the_image_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90°
    path = saved(tmp_path / "phone.jpg", Image.fromarray(GRADIENT).convert("RGB"), exif=exif)
    assert load_images(path)[0].size == (48, 64)


def test_an_animation_gives_its_first_frame_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    path = saved(tmp_path / "moving.gif", frames[0], save_all=True, append_images=frames[1:])
    assert load_images(path)[0].getpixel((1, 1)) == (255, 0, 0)
    assert "animated (2 frames)" in caplog.text


def test_equal_pixels_have_equal_digests_whatever_the_file(tmp_path: Path) -> None:
    image = Image.fromarray(GRADIENT).convert("RGB")
    from_png = load_images(saved(tmp_path / "a.png", image))[0]
    from_bmp = load_images(saved(tmp_path / "b.bmp", image))[0]
    assert image_digest(from_png) == image_digest(from_bmp) != image_digest(image.rotate(180))


def bad_files(folder: Path) -> dict[str, Path]:
    good = saved(folder / "good.png", Image.fromarray(GRADIENT))
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not an image")
    (folder / "cut.png").write_bytes(good.read_bytes()[:120])
    jpeg = saved(folder / "good.jpg", Image.fromarray(GRADIENT))
    (folder / "cut.jpg").write_bytes(jpeg.read_bytes()[: jpeg.stat().st_size // 2])
    return {name: folder / name for name in ("empty.png", "text.png", "cut.png", "cut.jpg")}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty.png", "is empty"),
        ("text.png", "not an image"),
        ("cut.png", "cut short"),
        ("cut.jpg", "cut short"),
    ],
)
def test_broken_files_are_os_errors_that_name_the_file(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(OSError, match=says) as caught:
        load_images(bad_files(tmp_path)[name])
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such image"):
        load_images(tmp_path / "absent.png")
    with pytest.raises(OSError, match="is not a file"):
        load_images(tmp_path)


def test_images_below_one_token_or_beyond_200_to_1_are_refused() -> None:
    with pytest.raises(ValueError, match=r"5×40 px, smaller than one vision token \(28×28 px\)"):
        load_images(Image.new("RGB", (5, 40)), 28)
    with pytest.raises(ValueError, match="200:1"):
        load_images(Image.new("RGB", (28 * 201, 28)), 28)
    assert load_images(Image.new("RGB", (28 * 200, 28)), 28)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = saved(tmp_path / "bomb.png", Image.new("1", (64, 64)))
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 100_000, 100_000)  # the header claims 10 gigapixels
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="decompression bomb"):
        load_images(path)


@pytest.mark.parametrize("given", [None, 3, b"bytes", [None]])
def test_other_types_are_type_errors(given: object) -> None:
    with pytest.raises(TypeError, match="PIL image or a path"):
        load_images(given)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="no image given"):
        load_images([])

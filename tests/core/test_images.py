"""Images: what must work works, and everything else ends in one clear line."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vision_bridge.images import image_digest, load_images
from qwen_vision_bridge.io import list_images

GRADIENT = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "La", "RGBa", "CMYK", "1", "I;16", "I", "F"])
def test_every_mode_becomes_eight_bit_rgb_of_the_same_size(mode: str) -> None:
    grey = Image.fromarray(GRADIENT)
    if mode == "I;16":
        image = Image.fromarray(GRADIENT.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(GRADIENT.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(GRADIENT.astype(np.float32) / 255)
    else:
        image = (grey.convert(mode.upper()) if mode in ("La", "RGBa") else grey).convert(mode)
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
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="decompression bomb"):
        load_images(path)


@pytest.mark.parametrize("value", [None, 3, {"a": 1}, [None]])
def test_other_types_are_type_errors(value: object) -> None:
    with pytest.raises(TypeError, match="PIL image, a path"):
        load_images(value)


def test_bytes_open_files_arrays_and_tensors_are_images(tmp_path: Path) -> None:
    colours = np.stack([GRADIENT, GRADIENT[::-1], GRADIENT[:, ::-1]], -1)
    wanted = colours.tobytes()
    path = saved(tmp_path / "a.png", Image.fromarray(colours))
    with path.open("rb") as opened:
        same = [
            path.read_bytes(),
            bytearray(path.read_bytes()),
            opened,
            colours,
            colours.astype(np.int64),
            colours / 255.0,
            torch.from_numpy(colours).permute(2, 0, 1),
            torch.from_numpy(colours).permute(2, 0, 1) / 255,
            (torch.from_numpy(colours).permute(2, 0, 1) / 255).requires_grad_(),
        ]
        assert [image.tobytes() for image in load_images(same)] == [wanted] * len(same)
    grey = [GRADIENT, GRADIENT[..., None], torch.from_numpy(GRADIENT)[None]]
    assert all(np.array_equal(np.asarray(image)[..., 0], GRADIENT) for image in load_images(grey))
    clear = np.zeros((40, 50, 4), np.uint8)
    assert load_images(clear)[0].getpixel((9, 9)) == (255, 255, 255)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 40, 50, 3), np.uint8),
        np.zeros((40, 50, 2), np.uint8),
        np.zeros((0, 50), np.uint8),
        np.full((40, 50), 256),
        np.full((40, 50), -1),
        np.full((40, 50), 1.5),
        np.full((40, 50), np.nan),
        torch.zeros(40, 50, 3),
    ],
)
def test_an_array_of_another_shape_or_range_is_refused(array: object) -> None:
    with pytest.raises(ValueError, match="array of"):
        load_images(array)


def test_an_address_is_refused_as_it_was_given() -> None:
    with pytest.raises(ValueError, match=r"^https://example\.org/a\.png is an address"):
        load_images("https://example.org/a.png")


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="no image given"):
        load_images([])


def display_p3() -> bytes:
    """A Display P3 profile: its primaries adapted to D50, and sRGB's curve (ICC.1:2010, section 8.3)."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    gamma = fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    name = b"desc" + bytes(4) + struct.pack(">I", 11) + b"Display P3\0" + bytes(78)
    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + gamma
    tags = {
        b"desc": name,
        b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249),
        b"rXYZ": b"XYZ " + bytes(4) + fixed(0.51512, 0.2412, -0.00105),
        b"gXYZ": b"XYZ " + bytes(4) + fixed(0.29198, 0.69225, 0.04189),
        b"bXYZ": b"XYZ " + bytes(4) + fixed(0.1571, 0.06657, 0.78407),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", start + len(data), len(content))
        data += content
    header = struct.pack(">I4sI4s4s4s", start + len(data), b"", 0x04200000, b"mntr", b"RGB ", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + table + data


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_colours_of_an_embedded_profile_become_srgb(tmp_path: Path, ending: str) -> None:
    wide = Image.new("RGB", (64, 48), (255, 60, 40))
    options = {"quality": 100} if ending in ("jpg", "webp") else {}
    path = saved(tmp_path / f"wide.{ending}", wide, icc_profile=display_p3(), **options)
    assert np.allclose(load_images(path)[0].getpixel((9, 9)), (255, 16, 0), atol=3)
    assert np.allclose(load_images(Image.open(path))[0].getpixel((9, 9)), (255, 16, 0), atol=3)


def test_a_profile_leaves_transparency_alone(tmp_path: Path) -> None:
    wide = Image.new("RGBA", (64, 48), (255, 60, 40, 255))
    wide.putpixel((0, 0), (255, 60, 40, 0))
    (loaded,) = load_images(saved(tmp_path / "wide.png", wide, icc_profile=display_p3()))
    assert [loaded.getpixel(place) for place in ((0, 0), (9, 9))] == [(255, 255, 255), (255, 16, 0)]


@pytest.mark.parametrize("profile", [b"not a profile", display_p3()[:200], bytes(1_200_000)])
def test_a_profile_that_cannot_be_used_is_a_warning(
    tmp_path: Path, profile: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path / "a.png", Image.new("RGB", (64, 48), (255, 60, 40)), icc_profile=profile)
    assert load_images(path)[0].getpixel((9, 9)) == (255, 60, 40)
    assert "a.png" in caplog.text


def test_a_profile_of_other_channels_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ink = Image.new("CMYK", (64, 48), (0, 200, 200, 0))
    path = saved(tmp_path / "ink.jpg", ink, icc_profile=display_p3(), quality=100)
    assert load_images(path)[0].getpixel((9, 9)) == Image.open(path).convert("RGB").getpixel((9, 9))
    assert "a profile of RGB in an image of mode CMYK" in caplog.text


def png_with_chunk(folder: Path, kind: bytes, content: bytes) -> Path:
    data = saved(folder / "plain.png", Image.fromarray(GRADIENT)).read_bytes()
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    path = folder / "chunk.png"
    path.write_bytes(data[:33] + chunk + data[33:])  # behind the header
    return path


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 1_500_000)),
        (b"iCCP", b"huge\0\0" + zlib.compress(bytes(range(256)) * 6000)),
        (b"tEXt", b"Raw profile type exif\0\nexif\n    4\nnot hexadecimal\n"),
        (b"eXIf", b"no header of a TIFF"),
    ],
)
def test_metadata_never_costs_an_image(
    tmp_path: Path, kind: bytes, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = png_with_chunk(tmp_path, kind, content)
    assert np.array_equal(grey_levels(path), GRADIENT)
    assert "chunk.png has" in caplog.text
    assert "ignored" in caplog.text


def test_exif_with_a_number_that_is_none_still_turns_the_image(tmp_path: Path) -> None:
    entries = struct.pack(">HHHIHH", 2, 0x0112, 3, 1, 6, 0) + struct.pack(">HHII", 0x011A, 12, 1, 38)
    exif = b"Exif\0\0MM\0*" + struct.pack(">I", 8) + entries + bytes(4) + struct.pack(">d", float("nan"))
    path = saved(tmp_path / "phone.jpg", Image.fromarray(GRADIENT), exif=exif)
    assert load_images(path)[0].size == (48, 64)


def test_the_callers_image_stays_as_it_is(tmp_path: Path) -> None:
    colours = ["red", "blue", "lime"]
    frames = [Image.new("RGB", (32, 32), colour) for colour in colours]
    opened = Image.open(saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:]))
    opened.seek(2)
    assert load_images(opened)[0].getpixel((1, 1)) == (0, 255, 0)
    assert opened.tell() == 2
    deep = Image.fromarray(GRADIENT.astype(np.uint16) * 257)
    before = deep.tobytes()
    load_images(deep)
    assert (deep.mode, deep.tobytes()) == ("I;16", before)


def test_a_closed_image_is_one_line(tmp_path: Path) -> None:
    opened = Image.open(saved(tmp_path / "a.png", Image.fromarray(GRADIENT)))
    opened.close()
    with pytest.raises(OSError, match="the image cannot be read"):
        load_images(opened)


def test_every_format_below_a_folder_is_listed_or_named(tmp_path: Path) -> None:
    image = Image.fromarray(GRADIENT).convert("RGB")
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for each in (folder / "below", elsewhere):
        each.mkdir(parents=True)
    names = ["a.avif", "a.jfif", "a.jp2", "a.ppm", "a.tga", "below/A.PNG"]
    for name in names:
        image.save(folder / name, "JPEG" if name.endswith("jfif") else None)
    image.save(folder / os.fsdecode(b"caf\xe9.png"), "PNG")
    (folder / "linked").symlink_to(elsewhere, target_is_directory=True)
    (folder / "gone.png").symlink_to(elsewhere / "absent.png")
    (folder / "notes.txt").touch()
    (folder / "drawing.eps").touch()
    listed = list_images(folder)
    assert listed.names == names
    assert set(listed.left_out) == {"caf\\xe9.png", "linked", "gone.png", "notes.txt", "drawing.eps"}
    assert all(load_images(folder / name)[0].size == (64, 48) for name in names)
    (elsewhere / "absent.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"holds no image, only absent\.txt"):
        list_images(elsewhere)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "gif", "bmp", "avif", "jp2"])
def test_a_mutated_file_is_an_image_or_one_line(tmp_path: Path, ending: str) -> None:
    """1 250 mutations a format: bytes changed, cut out, doubled or cut off, metadata included."""
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if ending in ("png", "jpg", "webp", "tif") else {}
    whole = saved(
        tmp_path / f"whole.{ending}", Image.fromarray(GRADIENT).convert("RGB"), **options
    ).read_bytes()
    path, draw = tmp_path / f"mutated.{ending}", np.random.default_rng(0)
    images, lines = [], []
    for _ in range(1250):
        path.write_bytes(mutated(whole, draw))
        try:
            images += load_images(path, 8)
        except (OSError, ValueError) as error:
            lines.append(str(error))
    assert images
    assert lines
    assert all(path.name in line and "\n" not in line for line in lines)


def mutated(data: bytes, draw: np.random.Generator) -> bytes:
    """One to eight changes of a file's bytes."""
    content = bytearray(data)
    for _ in range(draw.integers(1, 9)):
        place, kind = int(draw.integers(max(1, len(content)))), draw.integers(4)
        span = int(draw.integers(1, 9))
        if kind == 0:
            content[place : place + 1] = draw.bytes(1)
        elif kind == 1:
            del content[place : place + span]
        elif kind == 2:
            content[place:place] = content[place : place + span]
        else:
            content = content[: max(1, place)] if draw.random() < 0.2 else content
    return bytes(content)


def test_heic_is_read(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    folder = tmp_path / "phone"
    folder.mkdir()
    assert list_images(Path(__file__).parents[2] / "assets").names  # registers the format
    colours = Image.merge("RGB", [Image.fromarray(GRADIENT)] * 3)
    saved(folder / "photo.heic", colours, quality=90)
    assert list_images(folder).names == ["photo.heic"]
    (loaded,) = load_images(folder / "photo.heic")
    assert loaded.size == (64, 48)
    assert np.abs(np.asarray(loaded)[..., 0].astype(int) - GRADIENT).mean() < 4

"""Synthetic images as plain data, and their rendering.

A scene is a textured background, a few flat shapes and a few words. All lengths scale with the side.
Positions and lengths are pixels, (x, y) from the top left corner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ..case import RGB, Scene, SceneObject, TextBlock


def _palette(listing: str) -> dict[str, RGB]:
    pairs = (entry.split(" #") for entry in listing.split(", "))
    return {name: _rgb(code) for name, code in pairs}


def _rgb(code: str) -> RGB:
    red, green, blue = ImageColor.getrgb(f"#{code}")[:3]
    return red, green, blue


def _darker(colour: RGB) -> RGB:
    red, green, blue = (level * 55 // 100 for level in colour)
    return red, green, blue


# Vivid shapes on muted backgrounds: any two shape colours are 36 or more CIE76 units apart, and a shape
# is 33 or more from every background, its texture included, so colour alone tells objects from the rest.
COLOURS = _palette(
    "red #d22, orange #f81, yellow #fd2, green #294, cyan #1bc, blue #15d, purple #82a, pink #f6b"
)
BACKDROPS = _palette(
    "grey #bbb, beige #dca, light blue #9be, mint #adb, rose #ebb, brown #754, dark grey #555, navy #236"
)
PLATES = _palette("white #fff, cream #fed, charcoal #223")
RELIEF = 17  # half the swing of a texture, in 8-bit grey levels: seen at 128 px, harmless to a word on top
FONTS = {
    "sans": "DejaVuSans-Bold",
    "serif": "DejaVuSerif-Bold",
    "mono": "DejaVuSansMono-Bold",
    "slanted": "DejaVuSans-BoldOblique",
}
CAP_HEIGHT = 0.729  # em, of every one of these fonts


def ink_on(behind: RGB) -> RGB:
    """Nearly black or nearly white, whichever is read on the colour behind."""
    return (26, 28, 34) if sum(behind) > 384 else (252, 252, 250)


# Each takes the plane (u, v) in image sides and a frequency f; values in [-1, 1].
_PATTERNS: dict[str, Callable[..., np.ndarray]] = {
    "stripes": lambda u, v, f: np.tanh(3 * np.sin(2 * np.pi * f * u)),
    "checks": lambda u, v, f: np.tanh(5 * np.sin(np.pi * f * u) * np.sin(np.pi * f * v)),
    "dots": lambda u, v, f: np.tanh(12 * (0.27 - np.hypot((f * u) % 1 - 0.5, (f * v) % 1 - 0.5))),
    "waves": lambda u, v, f: np.tanh(2 * np.sin(2 * np.pi * (f * v + 0.4 * np.sin(5 * np.pi * u)))),
    "marble": lambda u, v, f: np.sin(f * u + 3 * np.sin(f * v + 2 * np.sin(0.9 * f * u) + np.sin(2 * f * v))),
    "wood": lambda u, v, f: np.sin(2 * np.pi * (f * u + 0.6 * np.sin(4 * v) + 0.3 * np.sin(9 * u + 7 * v))),
    "bricks": lambda u, v, f: 1.4 * (((f * u + np.floor(f * v)) % 2 < 0.2) | (f * v % 1 < 0.15)) - 0.4,
}
TEXTURES = tuple(_PATTERNS)


def _paint_background(scene: Scene) -> Image.Image:
    rng = np.random.default_rng(scene.texture_seed)
    y, x = (np.mgrid[0 : scene.size, 0 : scene.size] + 0.5) / scene.size
    angle, frequency, (du, dv) = rng.uniform(0, np.pi), rng.uniform(5.5, 9), rng.uniform(0, 1, 2)
    cos, sin = (1.0, 0.0) if scene.texture == "bricks" else (np.cos(angle), np.sin(angle))
    pattern = _PATTERNS[scene.texture](cos * x + sin * y + du, cos * y - sin * x + dv, frequency)
    levels = np.array(BACKDROPS[scene.backdrop]) + RELIEF * pattern[..., None]  # (S, S, 3)
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


def _outline(turns: int, degrees: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Corners (K, 2): a motif of (clockwise angle from the top, distance) repeated `turns` times around."""
    angles = np.radians(np.add.outer(np.arange(turns) * 360 / turns, degrees)).ravel()
    return np.stack([np.sin(angles), -np.cos(angles)], axis=1) * np.tile(radii, turns)[:, None]


# Around their centre of area, the farthest corner at distance 1.
_OUTLINES: dict[str, np.ndarray] = {
    "circle": _outline(48, [0], [1]),
    "square": _outline(4, [45], [1]),
    "triangle": _outline(3, [0], [1]),
    "star": _outline(5, [0, 36], [1, 0.45]),
    "diamond": _outline(4, [0], [1]) * (0.68, 1),
    "cross": _outline(4, [-22, 22, 45], [1, 1, 0.53]),
}
SHAPES = tuple(_OUTLINES)


def _stripes(degrees: float) -> tuple[np.ndarray, ...]:
    """Three parallel stripes, together about round; upright at 0 degrees, clockwise."""
    pitch, reach = 0.3, 0.47  # as wide as they are long, out of focus
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    stripes = []
    for x in (-pitch, 0.0, pitch):
        left, right = x - pitch / 4, x + pitch / 4
        y = np.sqrt(reach**2 - x**2)
        upright = np.array([(left, -y), (right, -y), (right, y), (left, y)])
        stripes.append(upright @ np.array([(cos, sin), (-sin, cos)]))
    return tuple(stripes)


def _dots(count: int) -> tuple[np.ndarray, ...]:
    """Dots in a row: as wide together, and as much ink, however many they are."""
    circle = _OUTLINES["circle"] * 0.18 / np.sqrt(count)
    return tuple(circle + np.array([x, 0]) for x in np.linspace(-0.42, 0.42, count))


# In a shape's radius. Told apart by what is finer than 5 px of 128 alone: a reduced image hardly shows it.
MARKS: dict[str, tuple[np.ndarray, ...]] = {
    "vertical stripes": _stripes(0),
    "horizontal stripes": _stripes(90),
    "slanted stripes": _stripes(45),
    "two dots": _dots(2),
    "three dots": _dots(3),
    "four dots": _dots(4),
}


def corners_of(item: SceneObject) -> np.ndarray:
    """The corners (K, 2) of a shape, px; a circle has 48."""
    return _OUTLINES[item.kind] * item.radius + item.centre


@lru_cache(maxsize=256)
def _font(name: str, pixels: float) -> ImageFont.FreeTypeFont:
    import matplotlib  # only for the fonts it ships; half a second to import

    path = f"{matplotlib.get_data_path()}/fonts/ttf/{FONTS[name]}.ttf"
    return ImageFont.truetype(path, pixels, layout_engine=ImageFont.Layout.BASIC)


def text_width(words: Sequence[str], font: str, font_px: float) -> float:
    """Width of the widest of the words, px."""
    return max(_font(font, 100.0).getlength(word) for word in words) * font_px / 100


def _fill(canvas: Image.Image, points: np.ndarray, colour: RGB) -> None:
    """Fill the polygon `points` (K, 2) with `colour`; smooth rims come from drawing it four times larger."""
    (left, top), (right, bottom) = points.min(0).astype(int) - 1, points.max(0).astype(int) + 3
    stencil = Image.new("L", (4 * int(right - left), 4 * int(bottom - top)))
    corners = (points - (left, top)) * 4 - 0.5
    ImageDraw.Draw(stencil).polygon([tuple(corner) for corner in corners.tolist()], fill=255)
    canvas.paste(colour, (int(left), int(top)), stencil.reduce(4))


def _draw_text(canvas: Image.Image, block: TextBlock) -> None:
    left, top, right, bottom = block.box
    centre, reach = np.array([left + right, top + bottom]) / 2, np.array([right - left, bottom - top]) / 2
    if block.plate is not None:
        corner = _outline(24, [7.5], [1])  # a ring of points, pulled apart into four rounded corners
        plate = PLATES[block.plate]  # its rim keeps its colour when the word is painted
        for colour, inset in ((ink_on(plate), 0.0), (plate, 0.07)):
            rounded = corner * (0.36 - inset) * reach[1] + np.sign(corner) * (reach - 0.36 * reach[1])
            _fill(canvas, rounded + centre, colour)
    baseline = centre[1] + CAP_HEIGHT / 2 * block.font_px  # capitals in the middle of the box
    font = _font(block.font, block.font_px)
    ImageDraw.Draw(canvas).text((centre[0], baseline), block.text, block.ink, font, anchor="ms")


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of (size, size) pixels; equal scenes give equal bytes."""
    canvas = _paint_background(scene)
    for item in scene.objects:
        colour, smaller = COLOURS[item.colour], replace(item, radius=0.92 * item.radius)
        _fill(canvas, corners_of(item), _darker(colour))
        _fill(canvas, corners_of(smaller), colour)  # the dark rim keeps yellow visible on beige
        for outline in MARKS.get(item.mark, ()):
            _fill(canvas, outline * item.radius + item.centre, _darker(colour))
    for block in scene.texts:
        _draw_text(canvas, block)
    return canvas


def edit_mask(before: Scene, after: Scene) -> np.ndarray:
    """Where turning one scene into the other, of the same size, may change pixels: bool (H, W), True around
    each object and text that only one of them has, and wherever a changed background shows."""
    y, x = np.mgrid[0 : before.size, 0 : before.size] + 0.5
    margin = 0.015 * before.size
    mask = np.zeros(x.shape, dtype=bool)
    for item in set(before.objects) ^ set(after.objects):
        mask |= np.hypot(x - item.centre[0], y - item.centre[1]) <= item.radius + margin
    for left, top, right, bottom in (block.box for block in set(before.texts) ^ set(after.texts)):
        inside_x = (x >= left - margin) & (x <= right + margin)
        mask |= inside_x & (y >= top - margin) & (y <= bottom + margin)
    if replace(before, objects=(), texts=()) != replace(after, objects=(), texts=()):
        mask |= (np.asarray(render(before)) != np.asarray(render(after))).any(axis=-1)
    return mask

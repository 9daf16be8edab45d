"""The synthetic pictures and instructions with known answers: scenes, their rendering and evaluation cases.

A scene is a textured background, a few flat shapes and at most one word, as plain data; an edit is a pair of
scenes, so the right result and the pixels it may touch are known exactly. All follows from a seed, and all
lengths scale with the side. Positions and lengths are pixels, (x, y) from the top left corner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

RGB = tuple[int, int, int]
Rng = np.random.Generator


def _palette(listing: str) -> dict[str, RGB]:
    pairs = (entry.split(" #") for entry in listing.split(", "))
    return {name: ImageColor.getrgb(f"#{code}") for name, code in pairs}


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
_LISTED = """
ART BUS CAT CUP DAY FOX HAT KEY MAP OAK PEN RED SKY SUN TEA VAN BAND BIRD BOAT CAFE CITY CLUB DUCK EXIT
FARM FISH GATE GOLD HOME LAMP LEAF MILK MOON OPEN PARK RAIN SHOP SNOW STAR TAXI WOLF APPLE BREAD CHAIR HOTEL
LEMON MUSIC OCEAN PIANO RIVER STONE TIGER BRIDGE GARDEN MARKET ORANGE
"""
WORDS = tuple(_LISTED.split())
LETTERS = "ABCDEFGHKLMNPRSTUVWXYZ"  # without I, J, O and Q, which are easily taken for other signs
PLACES = {"left": "left side", "right": "right side", "top": "top", "bottom": "bottom", "centre": "centre"}
KINDS: dict[str, tuple[str, ...]] = {
    "ocr": ("change_text", "remove_text", "replace_letter"),
    "space": (*(f"move_{place}" for place in PLACES), "swap"),
    "detail": ("recolour_object", "remove_object", "recolour_background"),
}
GROUPS = tuple(KINDS)
_PHRASINGS = """
change_text: Change the text to "{new}". | Replace the word "{old}" with "{new}". | Make it read "{new}".
remove_text: Remove the text, change nothing else. | Erase the word "{old}". | Take away the word "{old}".
replace_letter: Replace the letter "{old}" with "{new}". | Change the "{old}" to "{new}", keep the rest.
move: Move the {name} to the {place}. | Put the {name} at the {place}. | Bring the {name} to the {place}.
swap: Swap the {name} and the {other}. | Exchange the {name} and the {other}. | Switch {name} and {other}.
recolour_object: Change the colour of the {name} to {new}. | Make the {name} {new}. | Paint the {name} {new}.
remove_object: Remove the {name}. | Erase the {name}, keep everything else. | Delete the {name}.
recolour_background: Make the background {new}, keep its texture. | Recolour the background to {new}.
"""
_ENTRIES = (line.split(": ", 1) for line in _PHRASINGS.strip().splitlines())
PHRASINGS = {kind: tuple(variants.split(" | ")) for kind, variants in _ENTRIES}


@dataclass(frozen=True)
class SceneObject:
    """A flat shape: `kind` of SHAPES, `colour` of COLOURS, centre of its area, distance of its tips."""

    kind: str
    colour: str
    centre: tuple[float, float]
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class TextBlock:
    """A word in capitals centred in `box` (left, top, right, bottom); an empty text leaves a blank plate."""

    text: str
    box: tuple[float, float, float, float]
    font_px: float
    ink: RGB
    plate: str | None = None  # of PLATES; None sets the word straight on the background


@dataclass(frozen=True)
class Scene:
    """A square picture of `size` pixels a side as data. Texts lie on objects, objects on the background."""

    size: int
    texture: str  # of TEXTURES
    backdrop: str  # of BACKDROPS
    texture_seed: int
    objects: tuple[SceneObject, ...] = ()
    texts: tuple[TextBlock, ...] = ()


@dataclass(frozen=True, eq=False)
class Case:
    """One picture, one instruction and what a right edit looks like. `edit_mask` is bool (H, W), True where
    it may change pixels; elsewhere `image` and `target` agree. `source_text` and `expected_text` are the word
    before and after ("" when it must be gone, None when there never was one). `expected_objects` are the
    shapes of the target, those the edit concerns first."""

    case_id: str
    group: str
    kind: str
    prompt: str
    image: Image.Image
    target: Image.Image
    edit_mask: np.ndarray
    source_text: str | None
    expected_text: str | None
    expected_objects: tuple[SceneObject, ...]
    seed: int


# Each takes the plane (u, v) in picture sides and a frequency f; values in [-1, 1].
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


@lru_cache(maxsize=256)
def _font(pixels: float) -> ImageFont.FreeTypeFont:
    import matplotlib  # only for the font it ships; half a second to import

    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf"
    return ImageFont.truetype(path, pixels, layout_engine=ImageFont.Layout.BASIC)


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
        for colour, inset in ((block.ink, 0.0), (PLATES[block.plate], 0.07)):
            rounded = corner * (0.36 - inset) * reach[1] + np.sign(corner) * (reach - 0.36 * reach[1])
            _fill(canvas, rounded + centre, colour)
    # Capitals of DejaVu Sans Bold are 0.729 em high, so this baseline puts them in the middle.
    baseline = centre[1] + 0.729 / 2 * block.font_px
    font = _font(block.font_px)
    ImageDraw.Draw(canvas).text((centre[0], baseline), block.text, block.ink, font, anchor="ms")


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of (size, size) pixels; equal scenes give equal bytes."""
    canvas = _paint_background(scene)
    for item in scene.objects:
        colour, outline = COLOURS[item.colour], _OUTLINES[item.kind] * item.radius
        _fill(canvas, outline + item.centre, tuple(level * 55 // 100 for level in colour))
        _fill(canvas, outline * 0.92 + item.centre, colour)  # the dark rim keeps yellow visible on beige
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


def _pick(rng: Rng, options: Iterable[str], *without: str) -> str:
    left = [option for option in options if option not in without]
    return left[int(rng.integers(len(left)))]


def _place(rng: Rng, size: int, radii: Sequence[float], taken: Sequence[tuple] = ()) -> list[tuple]:
    """Discs (x, y, radius) clear of each other and of `taken`: boxes (left, top, right, bottom, margin)."""
    gap = 0.03 * size
    for _ in range(20_000):
        blocked = list(taken)
        for r in radii:
            x, y = rng.uniform(r + gap, size - r - gap, 2).tolist()
            sides = ((max(a - x, x - c, 0), max(b - y, y - d, 0), margin) for a, b, c, d, margin in blocked)
            if any(np.hypot(aside, above) < r + margin + gap for aside, above, margin in sides):
                break
            blocked.append((x, y, x, y, r))
        else:
            return [(x, y, r) for x, y, _, _, r in blocked[len(taken) :]]
    raise RuntimeError(f"no room for discs of radii {list(radii)} in {size} px beside {taken}")


def _objects(rng: Rng, discs: Sequence[tuple]) -> tuple[SceneObject, ...]:
    """One object a disc; no two share a colour or a kind, so that a name means one of them only."""
    kinds, colours = (rng.permutation(list(names)).tolist() for names in (SHAPES, COLOURS))
    return tuple(SceneObject(kinds[i], colours[i], (x, y), r) for i, (x, y, r) in enumerate(discs))


def _ink(behind: RGB) -> RGB:
    return (26, 28, 34) if sum(behind) > 384 else (252, 252, 250)


def _text_block(rng: Rng, size: int, backdrop: str, words: Sequence[str]) -> TextBlock:
    """The first of `words` on a plate or straight on the backdrop, in a type that every one of them fits."""
    width, height = rng.uniform(0.62, 0.8) * size, rng.uniform(0.2, 0.25) * size
    left, top = (rng.uniform(0.04 * size, 0.96 * size - length) for length in (width, height))
    widest = max(_font(100.0).getlength(word) for word in words) / 100  # em
    font_px = min(0.86 * width / widest, 0.62 * height / 0.729)
    plate = _pick(rng, PLATES) if rng.random() < 0.6 else None
    ink = _ink(BACKDROPS[backdrop] if plate is None else PLATES[plate])
    return TextBlock(words[0], (left, top, left + width, top + height), font_px, ink, plate)


def _scene(rng: Rng, size: int, objects: int, words: Sequence[str] = ()) -> Scene:
    scene = Scene(size, _pick(rng, TEXTURES), _pick(rng, BACKDROPS), int(rng.integers(2**31)))
    texts = (_text_block(rng, size, scene.backdrop, words),) if words else ()
    radii = (rng.uniform(0.09, 0.125, objects) * size).tolist()
    discs = _place(rng, size, radii, [(*block.box, 0) for block in texts])
    return replace(scene, objects=_objects(rng, discs), texts=texts)


def _ocr_edit(rng: Rng, kind: str, size: int) -> tuple[dict[str, str], Scene, Scene]:
    """As its siblings below: the names its instruction mentions, the scene before and the scene after."""
    source = old = _pick(rng, WORDS)
    expected = new = _pick(rng, WORDS, source) if kind == "change_text" else ""
    if kind == "replace_letter":
        old = _pick(rng, [letter for letter in source if source.count(letter) == 1])
        new = _pick(rng, LETTERS, *source)
        expected = source.replace(old, new)
    before = _scene(rng, size, int(rng.integers(1, 3)), (source, expected))
    return {"old": old, "new": new}, before, replace(before, texts=(replace(before.texts[0], text=expected),))


def _space_edit(rng: Rng, kind: str, size: int) -> tuple[dict[str, str], Scene, Scene]:
    scene, r = _scene(rng, size, 0), rng.uniform(0.1, 0.13) * size
    others = (rng.uniform(0.09, 0.125, 2) * size).tolist()
    if kind == "swap":  # of two equally large objects, so that either fits in both places
        first, second, third = before = _objects(rng, _place(rng, size, [r, r, others[0]]))
        after = (replace(first, centre=second.centre), replace(second, centre=first.centre), third)
        names = {"name": first.name, "other": second.name}
    else:
        place, near, far, apart = kind.removeprefix("move_"), 0.17 * size, 0.83 * size, 0.0
        while apart < 0.3 * size:  # a move too short to see is no test
            ((x, y, _),) = _place(rng, size, [r])
            goals = {"left": (near, y), "right": (far, y), "top": (x, near), "bottom": (x, far)}
            goal = goals.get(place, (size / 2, size / 2))
            apart = np.hypot(x - goal[0], y - goal[1])
        taken = [(x, y, x, y, r), (*goal, *goal, r)]
        before = _objects(rng, [(x, y, r), *_place(rng, size, others, taken)])
        after = (replace(before[0], centre=goal), *before[1:])
        names = {"name": before[0].name, "place": PLACES[place]}
    return names, replace(scene, objects=before), replace(scene, objects=after)


def _detail_edit(rng: Rng, kind: str, size: int) -> tuple[dict[str, str], Scene, Scene]:
    words = (_pick(rng, WORDS),) if rng.random() < 0.4 else ()
    before = _scene(rng, size, int(rng.integers(2, 4)), words)
    first, *rest = before.objects
    if kind == "recolour_background":  # a word on it must stay legible, so light stays light and dark dark
        alike = [name for name, rgb in BACKDROPS.items() if _ink(rgb) == _ink(BACKDROPS[before.backdrop])]
        new = _pick(rng, alike, before.backdrop)
        return {"new": new}, before, replace(before, backdrop=new)
    if kind == "remove_object":
        return {"name": first.name}, before, replace(before, objects=tuple(rest))
    new = _pick(rng, COLOURS, *(item.colour for item in before.objects))
    after = replace(before, objects=(replace(first, colour=new), *rest))
    return {"name": first.name, "new": new}, before, after


def make_cases(group: str, count: int, seed: int = 0, size: int = 128) -> list[Case]:
    """`count` cases of one of GROUPS, its KINDS in turn, in pictures of `size` pixels a side.

    Case i depends on (group, seed, i) alone: a longer list begins with the shorter, another size shows the
    same scenes. ValueError for an unknown group, a count below 1, a negative seed or a size below 64.
    """
    if group not in GROUPS:
        raise ValueError(f"unknown group {group!r}; needed: one of {', '.join(GROUPS)}")
    for name, given, least in (("count", count, 1), ("size", size, 64), ("seed", seed, 0)):
        if given < least:
            raise ValueError(f"{name} is {given}; needed: at least {least}")
    draw = {"ocr": _ocr_edit, "space": _space_edit, "detail": _detail_edit}[group]
    kinds, cases = KINDS[group], []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        case_seed = int(np.random.SeedSequence([GROUPS.index(group), seed, index]).generate_state(1)[0])
        rng = np.random.default_rng(case_seed)
        names, before, after = draw(rng, kind, size)
        prompt = _pick(rng, PHRASINGS[kind if kind in PHRASINGS else "move"]).format(**names)
        pictures = render(before), render(after), edit_mask(before, after)
        words = (scene.texts[0].text if scene.texts else None for scene in (before, after))
        case_id = f"{group}-{size}px-seed{seed}-{index:04d}-{kind}"
        cases.append(Case(case_id, group, kind, prompt, *pictures, *words, after.objects, case_seed))
    return cases


def sample_picture(size: int = 448, seed: int = 0) -> Image.Image:
    """A picture with a word, three shapes and a texture: the examples' default input, (size, size) RGB."""
    if size < 64:
        raise ValueError(f"size is {size}; needed: at least 64")
    rng = np.random.default_rng(seed)
    return render(_scene(rng, size, 3, (_pick(rng, WORDS),)))

"""Random scenes: words, colours and places drawn from a seed, with some kept away from all training.

Held out whole are a sixth of all words and, for every kind of shape and texture, one colour: the `novel`
split is made of them alone, and no other split has one.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from ..case import Scene, SceneObject, TextBlock
from .scene import BACKDROPS, CAP_HEIGHT, COLOURS, FONTS, PLATES, SHAPES, TEXTURES, ink_on, text_width

_LISTED = """
ART BUS CAT CUP DAY FOX HAT KEY MAP OAK PEN RED SKY SUN TEA VAN BAND BIRD BOAT CAFE CITY CLUB DUCK EXIT
FARM FISH GATE GOLD HOME LAMP LEAF MILK MOON OPEN PARK RAIN SHOP SNOW STAR TAXI WOLF APPLE BREAD CHAIR HOTEL
LEMON MUSIC OCEAN PIANO RIVER STONE TIGER BRIDGE GARDEN MARKET ORANGE
"""
WORDS = tuple(_LISTED.split())
LETTERS = "ABCDEFGHKLMNPRSTUVWXYZ"  # without I, J, O and Q, which are easily taken for other signs
LOOK_ALIKES = ("BDEFPR", "CG", "HKMNW", "UVY", "SZ", "LT", "AVX")
PAIR_COLOURS = {kind: list(COLOURS)[(3 * i + 1) % 8] for i, kind in enumerate(SHAPES)}
PAIR_BACKDROPS = {texture: list(BACKDROPS)[(5 * i + 2) % 8] for i, texture in enumerate(TEXTURES)}
Disc = tuple[float, float, float]  # x, y, radius
TRIES = 300  # layouts drawn before a scene is given up


class NoRoomError(RuntimeError):
    """What a scene should hold does not fit into it; another draw may."""


def is_held_out_word(word: str) -> bool:
    """Whether a word belongs to the novel split; single letters and digits never do."""
    return len(word) > 1 and zlib.crc32(word.encode()) % 6 == 0


def is_held_out(scene: Scene) -> bool:
    """Whether a scene has a held-out word, a held-out shape and colour or a held-out texture and colour."""
    pairs = any(PAIR_COLOURS[item.kind] == item.colour for item in scene.objects)
    words = any(is_held_out_word(block.text) for block in scene.texts)
    return pairs or words or PAIR_BACKDROPS[scene.texture] == scene.backdrop


@dataclass
class Draw:
    """One stream of random choices for scenes of `size` px; a novel one picks what is held out."""

    rng: np.random.Generator
    size: int
    novel: bool = False
    zoom: float = 1.0  # of the smallest type, which training also shows larger

    def pick(self, options: Iterable[str], *without: str) -> str:
        left = [option for option in options if option not in without]
        return left[int(self.rng.integers(len(left)))]

    @overload
    def between(self, low: float, high: float) -> float: ...
    @overload
    def between(self, low: float, high: float, count: int) -> np.ndarray: ...
    def between(self, low: float, high: float, count: int | None = None) -> np.ndarray | float:
        """Uniform lengths, as shares of the side; px."""
        return self.rng.uniform(low, high, count) * self.size

    def word(self, least: int = 3, most: int = 6, *without: str) -> str:
        """A listed word now and then, mostly random letters."""
        while True:
            if self.rng.random() < 0.25:
                word = self.pick(WORDS)
            else:
                length = int(self.rng.integers(least, most + 1))
                word = "".join(self.rng.choice(list(LETTERS), length))
            fits = least <= len(word) <= most and word not in without
            if fits and is_held_out_word(word) == self.novel:
                return word

    def near_miss(self, word: str) -> str:
        """The word with one letter exchanged, half of the time for one of similar form."""
        while True:
            place = int(self.rng.integers(len(word)))
            alike = [letter for group in LOOK_ALIKES if word[place] in group for letter in group]
            letter = self.pick(alike if alike and self.rng.random() < 0.5 else LETTERS, word[place])
            missed = word[:place] + letter + word[place + 1 :]
            if len(word) == 1 or is_held_out_word(missed) == self.novel:
                return missed

    def background(self) -> Scene:
        texture = self.pick(TEXTURES)
        backdrop = PAIR_BACKDROPS[texture] if self.novel else self.pick(BACKDROPS, PAIR_BACKDROPS[texture])
        return Scene(self.size, texture, backdrop, int(self.rng.integers(2**31)))

    def looks(self, count: int, kinds: Sequence[str] = SHAPES) -> list[tuple[str, str]]:
        """(kind, colour) of `count` shapes; no two share a kind or a colour."""
        while True:
            chosen = self.rng.permutation(list(kinds))[:count].tolist()
            if self.novel:
                return [(kind, PAIR_COLOURS[kind]) for kind in chosen]
            colours = self.rng.permutation(list(COLOURS))[:count].tolist()
            if all(PAIR_COLOURS[kind] != colour for kind, colour in zip(chosen, colours, strict=True)):
                return list(zip(chosen, colours, strict=True))

    def alike(self, count: int, kinds: Sequence[str] = SHAPES) -> list[tuple[str, str]]:
        """(kind, colour) of `count` shapes of one kind in different colours."""
        kind = self.pick(kinds)
        if self.novel:  # one held-out pair is all that a kind has
            others = self.rng.permutation([name for name in COLOURS if name != PAIR_COLOURS[kind]])
            return [(kind, colour) for colour in (PAIR_COLOURS[kind], *others[: count - 1].tolist())]
        colours = [name for name in COLOURS if name != PAIR_COLOURS[kind]]
        return [(kind, colour) for colour in self.rng.permutation(colours)[:count].tolist()]

    def colour_for(self, kind: str, *without: str) -> str:
        """Another colour for a shape of this kind."""
        if self.novel and PAIR_COLOURS[kind] not in without:
            return PAIR_COLOURS[kind]
        return self.pick(COLOURS, *without, *(() if self.novel else (PAIR_COLOURS[kind],)))

    def discs(self, radii: Sequence[float], taken: Sequence[tuple] = ()) -> list[Disc]:
        """Discs clear of each other and of `taken`: boxes (left, top, right, bottom, margin)."""
        gap = 0.03 * self.size
        for _ in range(TRIES):
            blocked = list(taken)
            for r in radii:
                x, y = self.rng.uniform(r + gap, self.size - r - gap, 2).tolist()
                sides = ((max(a - x, x - c, 0), max(b - y, y - d, 0), m) for a, b, c, d, m in blocked)
                if any(np.hypot(aside, above) < r + margin + gap for aside, above, margin in sides):
                    break
                blocked.append((x, y, x, y, r))
            else:
                return [(x, y, r) for x, y, _, _, r in blocked[len(taken) :]]
        raise NoRoomError(f"no room for discs of radii {list(radii)} in {self.size} px beside {taken}")

    def is_clear(self, discs: Sequence[Disc]) -> bool:
        """Whether discs lie inside the image and apart from each other."""
        inside = all(min(x, y, self.size - x, self.size - y) > r for x, y, r in discs)
        pairs = ((a, b) for i, a in enumerate(discs) for b in discs[:i])
        apart = (np.hypot(a[0] - b[0], a[1] - b[1]) > a[2] + b[2] + 0.01 * self.size for a, b in pairs)
        return inside and all(apart)

    def texts(
        self, backdrop: str, choices: Sequence[Sequence[str]], capitals: tuple[float, float], plates: float
    ) -> tuple[TextBlock, ...]:
        """One block for each of `choices`, showing its first word and large enough for all of them.

        All blocks share type and look, so that only reading and place tell them apart.

        Args:
            capitals: least and greatest height of capitals, as shares of the side.
            plates: how often they stand on plates.
        """
        font, plate = self.pick(FONTS), self.pick(PLATES) if self.rng.random() < plates else None
        ink = ink_on(BACKDROPS[backdrop] if plate is None else PLATES[plate])
        for _ in range(TRIES):
            em = self.between(*capitals) / CAP_HEIGHT
            widest = max(text_width(words, font, em) for words in choices)
            em *= min(1.0, 0.84 * self.size / widest)
            capital, boxes = em * CAP_HEIGHT, []
            for words in choices:
                width, height = text_width(words, font, em) + 0.6 * capital, 1.55 * capital
                left = self.rng.uniform(0.02 * self.size, 0.98 * self.size - width)
                top = self.rng.uniform(0.02 * self.size, 0.98 * self.size - height)
                boxes.append((left, top, left + width, top + height))
            # Rows apart, so that "at the top" means one word only.
            rows = sorted((top + bottom) / 2 for _, top, _, bottom in boxes)
            height = 1.65 * capital
            if all(low + height < high for low, high in itertools.pairwise(rows)):
                break
        else:
            raise NoRoomError(f"no room for words {list(choices)} in {self.size} px")
        return tuple(
            TextBlock(words[0], box, em, ink, plate, font) for words, box in zip(choices, boxes, strict=True)
        )

    def objects(self, count: int, texts: Sequence[TextBlock] = ()) -> tuple[SceneObject, ...]:
        """Shapes of different kinds and colours, clear of the texts."""
        radii = self.between(0.09, 0.125, count).tolist()
        discs = self.discs(radii, [(*block.box, 0) for block in texts])
        return objects_at(self.looks(count), discs)


def objects_at(looks: Sequence[tuple[str, str]], discs: Sequence[Disc]) -> tuple[SceneObject, ...]:
    return tuple(
        SceneObject(kind, colour, (x, y), r) for (kind, colour), (x, y, r) in zip(looks, discs, strict=True)
    )

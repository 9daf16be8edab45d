"""Words of nine kinds of writing to change in an image: cases for models that know them all.

Fonts come from matplotlib (DejaVu) and from Debian's `fonts-noto-core` and `fonts-noto-cjk`; a script whose
font lacks a letter, or is not there, is left out with a word and never drawn as boxes. Arabic and Hindi are
shaped by Pillow's raqm. The miniature knows capitals without accents alone and has its own cases in `world`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from ..case import Case
from ..specs import Family, check_seed
from .cases import make_cases
from .sampler import Draw
from .scene import BACKDROPS, PLATES, ink_on, render

SYSTEM_FONTS = Path("/usr/share/fonts")
DEJAVU, CJK = "DejaVuSans-Bold.ttf", "NotoSansCJK-Bold.ttc"


@dataclass(frozen=True)
class Script:
    """One kind of writing."""

    words: tuple[str, ...]
    font: str
    """File name."""
    package: str
    """What ships the font."""
    face: int = 0
    """Which font of the file."""
    shaped: bool = False
    """Whether letters change with their neighbours."""


def _script(words: str, font: str, package: str, face: int = 0, shaped: bool = False) -> Script:
    return Script(tuple(words.split()), font, package, face, shaped)


SCRIPTS = {
    "latin": _script(
        "Garden Bread Window Museum River Market Summer Station Coffee Bridge Forest Library",
        DEJAVU,
        "matplotlib",
    ),
    "accented": _script(
        "Größe Façade Señal Łódź Crème Málaga Übung Höhle Garçon Niño Žižka Dvořák", DEJAVU, "matplotlib"
    ),
    "cyrillic": _script(
        "Музей Хлеб Окно Привет Река Рынок Лето Вокзал Кофе Мост Лес Книга", DEJAVU, "matplotlib"
    ),
    "greek": _script(
        "Θάλασσα Ψωμί Ουρανός Κήπος Μουσείο Ποτάμι Αγορά Καλοκαίρι Σταθμός Καφές Γέφυρα Δάσος",
        DEJAVU,
        "matplotlib",
    ),
    "chinese": _script(
        "图书馆 你好 博物馆 面包 花园 窗户 河流 市场 夏天 车站 咖啡 森林",
        CJK,
        "Debian's fonts-noto-cjk",
        face=2,
    ),
    "japanese": _script(
        "こんにちは カフェ 図書館 ありがとう さくら ホテル 市場 夏休み 駅前 コーヒー 森林",
        CJK,
        "Debian's fonts-noto-cjk",
    ),
    "korean": _script(
        "안녕하세요 도서관 빵집 정원 창문 박물관 시장 여름 기차역 커피 다리 숲길",
        CJK,
        "Debian's fonts-noto-cjk",
        face=1,
    ),
    "arabic": _script(
        "مرحبا مكتبة خبز حديقة نافذة متحف نهر سوق صيف محطة قهوة غابة", DEJAVU, "matplotlib", shaped=True
    ),
    "hindi": _script(
        "नमस्ते पुस्तकालय रोटी बगीचा खिड़की संग्रहालय नदी बाज़ार गर्मी स्टेशन कॉफ़ी जंगल",
        "NotoSansDevanagari-Bold.ttf",
        "Debian's fonts-noto-core",
        shaped=True,
    ),
}


def cases_for(family: Family, group: str, count: int, seed: int = 0) -> tuple[list[Case], list[str]]:
    """`count` synthetic cases of a group at the family's resolution, and in words what they leave out.

    Outside the miniature half of the OCR cases are multi-lingual.
    """
    size, several = family.image_size, count // 2
    if group != "ocr" or not several:
        return list(make_cases(group, count, seed, size)), []
    if family.synthetic_only:
        alone = "other writing than Latin capitals: the miniature knows no other, so its words keep to them"
        return list(make_cases(group, count, seed, size)), [alone]
    cases, left_out = language_cases(several, seed, size)
    return [*make_cases(group, count - several, seed, size), *cases], left_out


def language_cases(count: int, seed: int = 0, size: int = 448) -> tuple[list[Case], list[str]]:
    """`count` cases, the scripts that can be drawn here in turn, and in words what is left out and why.

    Case i depends on (seed, i) and on which scripts can be drawn. Every second round of scripts is hard.

    Raises:
        TypeError, ValueError: a count below 1, a size below 128, a seed that `check_seed` refuses.
    """
    check_seed(seed)
    for name, value, least in (("count", count, 1), ("size", size, 128)):
        if value < least:
            raise ValueError(f"{name} is {value}; needed: at least {least}")
    drawable = {name: find_font(name) for name in SCRIPTS}
    names = [name for name, font in drawable.items() if font is not None]
    left_out = [
        f"{name}: no font with all of its letters here, or no shaping; {SCRIPTS[name].package} ships one"
        for name, font in drawable.items()
        if font is None
    ]
    return [_case(names[i % len(names)], i, i // len(names) % 2, seed, size) for i in range(count)], left_out


@lru_cache(maxsize=16)
def find_font(name: str) -> Path | None:
    """A font with every letter of a script's words, or None."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    script = SCRIPTS[name]
    if script.shaped and not features.check("raqm"):
        return None
    for folder in (Path(matplotlib.get_data_path()) / "fonts" / "ttf", SYSTEM_FONTS):
        for path in sorted(folder.rglob(script.font)):
            glyphs = FT2Font(str(path))
            if all(glyphs.get_char_index(ord(letter)) for letter in set("".join(script.words))):
                return path
    return None


def _case(name: str, index: int, hard: int, seed: int, size: int) -> Case:
    rng = np.random.default_rng([101, seed, index])
    script, draw = SCRIPTS[name], Draw(rng, size)
    old, new, other = rng.permutation(script.words)[:3].tolist()
    scene = draw.background()
    em = float(draw.between(0.085, 0.13))
    widest = max(_extent(name, word, em)[0] for word in (old, new, other))
    em *= min(1.0, 0.8 * size / widest)
    boxes = _boxes(draw, name, em, (old, new, other), 1 + hard)
    plate = draw.pick(PLATES) if rng.random() < 0.7 else None
    ground, ink = render(scene), ink_on(BACKDROPS[scene.backdrop] if plate is None else PLATES[plate])
    place = int(rng.integers(1 + hard))
    before = [old, other][: 1 + hard] if place == 0 else [other, old]
    after = [new if word == old else word for word in before]
    image, target = ground.copy(), ground.copy()
    for canvas, words in ((image, before), (target, after)):
        for word, box in zip(words, boxes, strict=True):
            _draw_word(canvas, name, word, box, em, plate, ink)
    mask: np.ndarray = np.zeros((size, size), bool)
    left, top, right, bottom = boxes[place]
    mask[max(top - 4, 0) : bottom + 4, max(left - 4, 0) : right + 4] = True
    verb = f'Replace the word "{old}" with "{new}"' if hard else f'Change the text to "{new}"'
    return Case(
        f"ocr-{size}px-{name}-seed{seed}-{index:04d}",
        "ocr",
        name,
        verb,
        image,
        target,
        mask,
        " ".join(before),
        " ".join(after),
        "hard" if hard else "easy",
        alphabet="".join(sorted(set("".join(script.words)))),
        reply_text="/".join(before),
    )


def _boxes(
    draw: Draw, name: str, em: float, words: tuple[str, ...], count: int
) -> list[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) px, one below the other, each large enough for any of the words."""
    extents = [_extent(name, word, em) for word in words]
    width, height = (int(max(extent[axis] for extent in extents) + 0.8 * em) for axis in (0, 1))
    rows = draw.size // count
    boxes = []
    for row in range(count):
        left = int(draw.rng.integers(4, max(draw.size - width - 4, 5)))
        top = rows * row + int(draw.rng.integers(4, max(rows - height - 4, 5)))
        boxes.append((left, top, left + width, top + height))
    return boxes


@lru_cache(maxsize=64)
def _font(name: str, em: float) -> ImageFont.FreeTypeFont:
    script = SCRIPTS[name]
    engine = ImageFont.Layout.RAQM if script.shaped else ImageFont.Layout.BASIC
    font = find_font(name)
    if font is None:
        raise FileNotFoundError(f"no font for {name} on this machine: make_cases leaves such words out")
    return ImageFont.truetype(font, em, index=script.face, layout_engine=engine)


def _extent(name: str, word: str, em: float) -> tuple[float, float]:
    """Width and height of a word's ink, px."""
    left, top, right, bottom = _font(name, em).getbbox(word)
    return right - left, bottom - top


def _draw_word(
    canvas: Image.Image,
    name: str,
    word: str,
    box: tuple[int, int, int, int],
    em: float,
    plate: str | None,
    ink: tuple[int, int, int],
) -> None:
    pen, font = ImageDraw.Draw(canvas), _font(name, em)
    if plate is not None:
        pen.rounded_rectangle(box, radius=int(0.25 * em), fill=PLATES[plate], outline=ink, width=2)
    left, top, right, bottom = font.getbbox(word)
    middle = ((box[0] + box[2] - left - right) / 2, (box[1] + box[3] - top - bottom) / 2)
    pen.text(middle, word, ink, font)

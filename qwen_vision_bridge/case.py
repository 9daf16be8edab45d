"""The one `Case`: an image, an instruction and what is known of a right edit, with the scenes behind it.

Synthetic cases know everything, since they are drawn from scenes; cases from files know what their file
says. A field that is None or empty is unknown, and nothing that needs it is measured.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .specs import check_prompt

RGB = tuple[int, int, int]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom; px."""
GROUPS = ("ocr", "space", "detail", "consistency")
OTHER = "other"
"""The group of cases from files that name none."""
SAFE_ID = re.compile(r"[\w][\w.-]*")
MAX_ID_BYTES = 120  # of UTF-8: with an arm's name it must stay a file name
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
"""Names that are no files on Windows, whatever their suffix."""


@dataclass(frozen=True)
class SceneObject:
    """A flat shape of a synthetic scene."""

    kind: str
    """One of `scene.SHAPES`."""
    colour: str
    """One of `scene.COLOURS`."""
    centre: tuple[float, float]
    """Of its area, (x, y) px."""
    radius: float
    """Distance of its tips from the centre, px."""
    mark: str = ""
    """What is drawn on its middle: one of `scene.MARKS`, or nothing."""

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class TextBlock:
    """A word in capitals, centred in its box; an empty text leaves a blank plate."""

    text: str
    box: Box
    font_px: float
    ink: RGB
    plate: str | None = None
    """One of `scene.PLATES`; None sets the word straight on what lies behind."""
    font: str = "sans"
    """One of `scene.FONTS`."""

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """A square image as data. Texts lie on objects, objects on the background."""

    size: int
    """px a side."""
    texture: str
    """One of `scene.TEXTURES`."""
    backdrop: str
    """One of `scene.BACKDROPS`."""
    texture_seed: int
    objects: tuple[SceneObject, ...] = ()
    texts: tuple[TextBlock, ...] = ()


@dataclass(frozen=True)
class Edit:
    """One instruction with the scenes before and after it."""

    prompt: str
    before: Scene
    after: Scene
    """What the edit concerns comes first among its objects."""
    answer: str
    """Where and what is meant, as the miniature's language models learn to reply."""
    explicit_prompt: str | None = None
    """Of a hard edit: the same request with nothing left to see."""
    references: tuple[Scene, ...] = ()
    """Earlier images of the same prompt."""


@dataclass(frozen=True, eq=False)
class Case:
    """One image to edit, one instruction, and what is known of a right edit.

    Raises:
        TypeError, ValueError: an id that is no file name, a prompt that `check_prompt` refuses, an unknown
            group or difficulty, a target or mask of another size than the image.
    """

    case_id: str
    """Unique in a run, and usable as a file name."""
    group: str
    """One of `GROUPS`, or `OTHER`."""
    kind: str
    """What is asked: a kind of the synthetic world, a script, or a task of a public dataset."""
    prompt: str
    image: Image.Image
    """What is edited, RGB."""
    target: Image.Image | None = None
    """The right edit, of the size of `image`."""
    edit_mask: np.ndarray | None = None
    """Bool (H, W), True where the edit may change pixels; elsewhere `image` and `target` agree."""
    source_text: str | None = None
    """The words of `image`, from top to bottom with spaces between; None where there are none."""
    expected_text: str | None = None
    """The words of a right edit; "" where they must be gone, None where there are none or nobody knows."""
    difficulty: str = "easy"
    """`easy` or `hard`: whether the instruction says all, or needs seeing."""
    references: tuple[Image.Image, ...] = ()
    """Images that come before `image` in the prompt."""
    edit: Edit | None = None
    """The scenes behind a synthetic case."""
    boxes: tuple[tuple[str, Box], ...] = ()
    """Colour and place of shapes that a right edit shows."""
    alphabet: str = ""
    """Letters that the words are drawn from, where a reader may not know them all."""
    reply_text: str | None = None
    """The words of `image` as a language model is asked for them, where no scene says so."""
    text_is_part: bool = False
    """Whether the image says more than the text that is to change."""
    dataset: str = ""
    """What a case from files was read from: `own`, `photo`, `textedit`, `pie` or `gedit`."""

    def __post_init__(self) -> None:
        if not SAFE_ID.fullmatch(self.case_id) or self.case_id.split(".")[0].casefold() in DEVICES:
            raise ValueError(f"the id {self.case_id!r} is no file name of letters, digits, '.', '_' and '-'")
        if (size := len(self.case_id.encode())) > MAX_ID_BYTES:
            raise ValueError(f"the id {self.case_id!r} has {size} bytes, a file name takes {MAX_ID_BYTES}")
        check_prompt(self.prompt)
        if self.group not in (*GROUPS, OTHER) or self.difficulty not in ("easy", "hard"):
            raise ValueError(f"group is one of {', '.join((*GROUPS, OTHER))}, difficulty easy or hard")
        if self.target is not None and self.target.size != self.image.size:
            raise ValueError(f"the target is {self.target.size} px, its image {self.image.size}")
        if self.edit_mask is not None and self.edit_mask.shape != self.image.size[::-1]:
            raise ValueError(f"the mask is {self.edit_mask.shape[::-1]} px, its image {self.image.size}")

    @property
    def images(self) -> list[Image.Image]:
        """All images of the prompt; the last one is edited."""
        return [*self.references, self.image]

    @property
    def shown(self) -> Image.Image | list[Image.Image]:
        """What an edit takes: the image alone where there is one, as the first edit pipeline has it."""
        return self.images if self.references else self.image

    @property
    def expected_objects(self) -> tuple[SceneObject, ...]:
        """The shapes of a right edit, those that the edit concerns first; empty where they are not known."""
        return () if self.edit is None else self.edit.after.objects

    @property
    def has_unknown_text(self) -> bool:
        """Whether nobody says what a right edit reads; a synthetic case without text simply has none."""
        return bool(self.dataset) and self.expected_text is None


def normalise_text(text: str) -> str:
    """Text as it is compared: without spaces, case-folded, in Unicode form NFKC (full-width as plain)."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact_text(read: str, expected: str) -> float:
    """1.0 where both are equal after `normalise_text`, else 0.0: word accuracy, ICDAR 2015 task 4.3."""
    return float(normalise_text(read) == normalise_text(expected))

"""Reading the text in an image, by an OCR package that carries its models.

They know Latin letters with and without accents, Chinese and Japanese, and no Cyrillic, Hangul, Arabic or
Devanagari; Greek without accents and the final sigma. `can_read` asks the models' own alphabet.
"""

from __future__ import annotations

import os
import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from rapidocr import RapidOCR

ImageOrArray = Image.Image | np.ndarray
# Threads of the OCR engine: as many as torch is told to use, else the engine chooses (-1).
OCR_THREADS = int(os.environ.get("OMP_NUM_THREADS", "-1").split(",")[0])


def pixels_of(image: ImageOrArray, name: str = "image") -> np.ndarray:
    """The image as uint8 (H, W, 3)."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray):
        raise TypeError(f"{name} is a {type(image).__name__}; needed: a PIL image or uint8 (H, W, 3)")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{name} is {image.dtype} {image.shape}; needed: a PIL image or uint8 (H, W, 3)")
    return image


@lru_cache(maxsize=1)
def _ocr_engine() -> RapidOCR:
    from rapidocr import RapidOCR

    threads = {"EngineConfig.onnxruntime.intra_op_num_threads": OCR_THREADS}
    return RapidOCR(params={"Global.log_level": "critical", **threads})


def read_boxes(image: ImageOrArray) -> list[tuple[str, np.ndarray]]:
    """Every text that is found, with the corners of its box, (4, 2) px.

    PP-OCRv6 through rapidocr 3.10, detection and recognition, with the models inside its wheel (offline);
    the first call builds the engine, about 1 s. Small images are passed as they are, since the detector
    enlarges them itself.
    """
    reading = _ocr_engine()(np.ascontiguousarray(pixels_of(image)[..., ::-1]), use_cls=False)  # takes BGR
    return list(zip(reading.txts, reading.boxes, strict=True)) if reading.txts else []


def read_text(image: ImageOrArray) -> str:
    """The text in an image, see `in_order`; "" where there is none."""
    return in_order(read_boxes(image))


def in_order(boxes: list[tuple[str, np.ndarray]]) -> str:
    """The texts of boxes from top to bottom and left to right, with spaces between.

    Boxes with fewer than two letters or digits are left out: a lone sign is what the reader makes of a star,
    a cross or a wave.
    """
    words = [(text, corners) for text, corners in boxes if sum(map(str.isalnum, text)) >= 2]
    lines: list[list[tuple[str, np.ndarray]]] = []
    for text, corners in sorted(words, key=lambda word: word[1][:, 1].mean()):
        # A box stays on the line while its middle is above the lower edge of the line's first one.
        if lines and corners[:, 1].mean() < lines[-1][0][1][:, 1].max():
            lines[-1].append((text, corners))
        else:
            lines.append([(text, corners)])
    ordered = (sorted(line, key=lambda word: word[1][:, 0].min()) for line in lines)
    return " ".join(text for line in ordered for text, _ in line)


@lru_cache(maxsize=1)
def alphabet() -> frozenset[str]:
    """Every character that the recognition model can give."""
    return frozenset(_ocr_engine()._load_rec_model().postprocess_op.character)  # it has no public way


def can_read(text: str) -> bool:
    """Whether `read_text` can give this text at all: whether every letter is in the models' alphabet."""
    return set(unicodedata.normalize("NFC", "".join(text.split()))) <= alphabet()

"""A case that cannot be evaluated is refused when it is made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vision_bridge.case import Case

IMAGE = Image.new("RGB", (20, 10))


def case(**changes: Any) -> Case:
    return Case(**{"case_id": "a", "group": "ocr", "kind": "own", "prompt": "x", "image": IMAGE, **changes})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"case_id": "../up"}, "up"),
        ({"case_id": "字" * 110}, "has 330 bytes"),
        ({"case_id": "con"}, "no file name"),
        ({"case_id": "NUL.a"}, "no file name"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "Remove <|vision_start|>."}, r"<\|vision_start\|>"),
        ({"prompt": "half \udc00"}, "surrogate"),
        ({"group": "sound"}, "group"),
        ({"difficulty": "odd"}, "difficulty"),
        ({"target": Image.new("RGB", (10, 20))}, r"\(10, 20\)"),
        ({"edit_mask": np.ones((20, 10), bool)}, r"\(10, 20\)"),
    ],
)
def test_a_case_that_cannot_be_measured_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        case(**changes)


def test_an_edit_takes_one_image_or_all_of_its_prompt() -> None:
    other = Image.new("RGB", (5, 5))
    assert case().shown is IMAGE
    assert case(references=(other,)).shown == [other, IMAGE]


def test_only_cases_from_files_can_have_an_unknown_text() -> None:
    assert not case().has_unknown_text
    assert case(dataset="own").has_unknown_text
    assert not case(dataset="own", expected_text="").has_unknown_text

"""Multi-lingual cases: every letter is drawn by a font that has it, and only what can be read is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_vision_bridge.evaluation.arms import Arm
from qwen_vision_bridge.evaluation.evaluate import evaluate
from qwen_vision_bridge.evaluation.metrics import text
from qwen_vision_bridge.evaluation.metrics.ocr import can_read
from qwen_vision_bridge.evaluation.metrics.registry import is_readable
from qwen_vision_bridge.evaluation.report.html import write_page
from qwen_vision_bridge.evaluation.report.tables import kind_rows, write_results
from qwen_vision_bridge.evaluation.scoring import measure, unmeasured
from qwen_vision_bridge.loading.registry import FAMILIES
from qwen_vision_bridge.synthetic import multilingual as languages
from qwen_vision_bridge.synthetic.multilingual import SCRIPTS, cases_for, find_font, language_cases
from qwen_vision_bridge.synthetic.questions import questions_of
from tests.conftest import STOCK

READ = {"latin", "accented", "chinese", "japanese"}


@pytest.mark.slow
def test_only_scripts_that_can_be_read_get_a_verdict() -> None:
    cases, _ = language_cases(9)
    drawn = {case.kind for case in cases}
    assert {name for name, script in SCRIPTS.items() if can_read("".join(script.words))} == READ
    assert drawn >= {"latin", "accented", "cyrillic", "greek"}  # matplotlib's fonts are always there
    for case in cases:
        scores = measure(case, case.target)
        assert scores["edited_ssim"] == pytest.approx(1)
        assert is_readable(case) == (case.kind in READ)
        if is_readable(case):
            assert scores["right"] == scores["exact_text"] == 1, case.case_id
            assert measure(case, case.image)["right"] == 0
        else:
            assert not {"right", "exact_text"} & scores.keys()
            assert measure(case, case.image)["edited_ssim"] < 0.9
    assert any("no edit is judged" in line and "cyrillic" in line for line in unmeasured(cases))


def test_only_the_edited_word_changes_and_its_prompt_names_it() -> None:
    for case in language_cases(18, seed=4)[0]:
        differ = (np.asarray(case.image) != np.asarray(case.target)).any(-1)
        assert differ.any()
        assert not (differ & ~case.edit_mask).any()
        old, new = set(case.source_text.split()), set(case.expected_text.split())
        assert len(old - new) == len(new - old) == 1
        assert all(f'"{word}"' in case.prompt for word in new - old)
        assert len(old) == (2 if case.difficulty == "hard" else 1)
        (question,) = questions_of(case)
        assert set(question.answer.split("/")) == old


def test_cases_depend_on_their_seed_and_number_alone() -> None:
    first, longer = language_cases(2, seed=3)[0], language_cases(4, seed=3)[0]
    assert [case.case_id for case in first] == [case.case_id for case in longer[:2]]
    assert np.array_equal(np.asarray(first[1].target), np.asarray(longer[1].target))
    assert not np.array_equal(np.asarray(first[0].image), np.asarray(language_cases(1, seed=5)[0][0].image))


def test_a_script_without_its_font_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_font.cache_clear()
    monkeypatch.setattr(languages, "SYSTEM_FONTS", tmp_path)
    cases, left_out = language_cases(9)
    find_font.cache_clear()
    assert {case.kind for case in cases} == {"latin", "accented", "cyrillic", "greek", "arabic"}
    assert [line for line in left_out if line.startswith("korean: no font with all of its letters")]
    assert "fonts-noto-core" in " ".join(left_out)


def test_a_font_that_lacks_a_letter_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    find_font.cache_clear()
    monkeypatch.setitem(SCRIPTS, "latin", languages._script("Garden 图", languages.DEJAVU, "matplotlib"))
    assert find_font("latin") is None
    find_font.cache_clear()


def test_arabic_letters_and_hindi_vowels_are_shaped() -> None:
    """A shaped word is narrower than its letters one by one, or not as wide: raqm is at work."""
    for name, word in (("arabic", "مكتبة"), ("hindi", "नदी")):
        if find_font(name) is not None:
            whole = languages._extent(name, word, 60.0)[0]
            apart = sum(languages._extent(name, letter, 60.0)[0] for letter in word)
            assert whole < 0.9 * apart


def test_only_released_families_get_multilingual_cases() -> None:
    cases, _ = cases_for(FAMILIES["qwen"], "ocr", 8)
    assert len(cases) == 8
    assert sum(bool(case.alphabet) for case in cases) == 4
    assert {case.image.size for case in cases} == {(448, 448)}
    small, says = cases_for(FAMILIES["miniature"], "ocr", 8)
    assert not any(case.alphabet for case in small)
    assert "the miniature knows no other" in says[0]
    assert cases_for(FAMILIES["qwen"], "space", 2)[1] == []
    with pytest.raises(ValueError, match="count is 0"):
        language_cases(0)


def test_words_read_in_another_unicode_form_are_the_same_words() -> None:
    assert text.exact_text("Größe", "Gro\u0308ße") == 1


@pytest.mark.slow
def test_a_run_has_multilingual_cases_of_both_sorts(editor: Any, tmp_path: Path) -> None:
    editor.family = STOCK  # cases of another size than the edits are refused
    cases, _ = language_cases(3, size=128)  # latin, accented, cyrillic
    arms = [Arm("baseline"), Arm("on", editor.bridge, "random")]
    found = evaluate(editor, cases, tmp_path, arms, num_inference_steps=2)
    write_results(tmp_path, found)
    write_page(tmp_path, found)
    assert not [record["error"] for record in found.records if record["error"]]
    metric = {row.kind: row.metric for row in kind_rows(found) if row.level == "edit"}
    assert metric == {"latin": "right", "accented": "right", "cyrillic": "edited_ssim"}
    asked = [record for record in found.records if record["level"] == "perception"]
    assert {record["answer"] for record in asked} == {case.reply_text for case in cases}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "no edit is judged right or wrong" in page
    assert cases[2].expected_text in page

"""The registry names every metric once, and each is measured where its needs are met."""

from __future__ import annotations

from qwen_vision_bridge.evaluation.metrics.registry import (
    HEADLINES,
    METRICS,
    STATED,
    EditedImage,
    facts_of,
    measured,
    verdict_of,
)
from qwen_vision_bridge.synthetic.cases import GROUPS, make_cases
from qwen_vision_bridge.synthetic.questions import REPLY_FORMS

OTHERS = {"question", *REPLY_FORMS, "another edit", "boxes", "text region", "unknown text", "unknown result"}


def test_every_need_is_a_fact_of_some_case() -> None:
    facts = {fact for group in GROUPS for case in make_cases(group, 2) for fact in facts_of(case)}
    needs = {need for metric in METRICS.values() for need in metric.needs}
    assert needs <= facts | OTHERS | {"pie"}
    assert {*HEADLINES.values(), *STATED} <= set(METRICS)


def test_an_edit_gets_the_metrics_whose_needs_are_met_alone() -> None:
    (case,) = make_cases("space", 1, kinds=("swap",))
    edit = EditedImage(case, case.target)
    assert set(measured(edit, frozenset({"target"}))) == {"target_difference"}
    assert measured(edit, frozenset()) == {}
    assert "exact_text" not in measured(edit, facts_of(case))


def test_a_verdict_needs_all_that_a_case_states() -> None:
    assert verdict_of({"right": 0.0, "exact_text": 1.0}) == 0
    assert verdict_of({"exact_text": 1.0, "drift_shift_px": 3.0}) == 1
    assert verdict_of({"exact_text": 0.0}) == 0
    for other in STATED[1:]:  # text is not all that is asked of such an edit
        assert verdict_of({"exact_text": 1.0, other: 1.0}) is None
    assert verdict_of({"change_from_input": 0.0}) is None

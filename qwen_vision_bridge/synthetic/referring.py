"""Instructions that refer to a word, a shape or an earlier image, found by reading or comparing alone.

Every image has near misses: words one letter apart, sizes a fifth apart, places a few pixels apart. What is
then done to it is easy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..case import Edit, Scene, SceneObject, TextBlock
from .instructions import (
    LARGE,
    PLACES,
    SMALL,
    goal_of,
    phrase,
    recolour_background,
    retext,
    sample,
    square,
    the,
    with_words,
)
from .sampler import LETTERS, PAIR_COLOURS, Disc, Draw, objects_at
from .scene import BACKDROPS, CAP_HEIGHT, COLOURS, MARKS, corners_of, ink_on

ROWS = {2: ("at the top", "at the bottom"), 3: ("at the top", "in the middle", "at the bottom")}
PLAIN = ("circle", "square")  # shapes with room for a letter


def which_word(draw: Draw, kind: str) -> Edit:
    """One of two or three words, mostly one letter apart, is to be erased, kept or painted."""
    count, named = int(draw.rng.integers(2, 4)), draw.word(3, 5)
    words = [named]
    while len(words) < count:
        near = 0.7 if draw.zoom == 1 else 0.35
        other = draw.near_miss(named) if draw.rng.random() < near else draw.word(3, 5)
        if other not in words:
            words.append(other)
    capitals = SMALL[0] * draw.zoom, SMALL[1] * draw.zoom
    before = with_words(draw, [(word,) for word in words], capitals)
    chosen, *others = before.texts
    row = sum(block.centre[1] < chosen.centre[1] for block in others)
    new = draw.pick(COLOURS)
    after = {
        "remove_word": (replace(chosen, text=""), *others),
        "keep_word": (chosen, *(replace(block, text="") for block in others)),
        "recolour_word": (replace(chosen, ink=COLOURS[new]), *others),
    }[kind]
    asked, explicit = _both(draw, kind, f'the word "{named}"', f"the word {ROWS[count][row]}", new=new)
    answer = f'{square(draw, chosen.centre)}"{named}"'
    return Edit(asked, before, replace(before, texts=after), answer, explicit)


def _both(draw: Draw, kind: str, asked: str, explicit: str, **names: str) -> tuple[str, str]:
    """The request in the same phrasing, as asked and with what is meant made explicit."""
    seed = int(draw.rng.integers(2**31))
    first, second = (
        phrase(Draw(np.random.default_rng(seed), draw.size), kind, what=what, **names)
        for what in (asked, explicit)
    )
    return first, second


@dataclass(frozen=True)
class ReferringTarget:
    """Objects, the first of which is meant by the description; labels lie on them, in their order."""

    objects: tuple[SceneObject, ...]
    description: str
    labels: tuple[TextBlock, ...] = ()


def which_shape(draw: Draw, kind: str) -> Edit:
    """One of three or four shapes, meant by a description, is to be moved, erased or painted."""
    referring_target = _REFERRING_TARGETS[kind](draw)
    first, *others = referring_target.objects
    before = replace(draw.background(), objects=referring_target.objects, texts=referring_target.labels)
    places = [place for place in ("left", "right", "top", "bottom") if _can_go(draw, referring_target, place)]
    action = draw.pick(("move", "remove_object", "recolour_object") if places else ("remove_object",))
    names, objects, labels = {}, [first, *others], list(referring_target.labels)
    if action == "move":
        place = draw.pick(places)
        goal = goal_of(draw, place, *first.centre)
        names["place"] = PLACES[place]
        objects[0] = replace(first, centre=goal)
        if labels:
            labels[0] = _label(labels[0].text, objects[0], labels[0].font_px)
    elif action == "recolour_object":
        names["new"] = draw.colour_for(first.kind, *(item.colour for item in referring_target.objects))
        objects[0] = replace(first, colour=names["new"])  # a letter on it keeps its ink
    else:
        objects, labels = objects[1:], labels[1:]
    after = replace(before, objects=tuple(objects), texts=tuple(labels))
    asked, explicit = _both(draw, action, referring_target.description, the(first), **names)
    return Edit(asked, before, after, f"{square(draw, first.centre)} {first.name}", explicit)


def _can_go(draw: Draw, referring_target: ReferringTarget, place: str) -> bool:
    first, *others = referring_target.objects
    goal = goal_of(draw, place, *first.centre)
    far = np.hypot(goal[0] - first.centre[0], goal[1] - first.centre[1]) > 0.25 * draw.size
    return bool(far) and draw.is_clear([(*goal, first.radius), *((*o.centre, o.radius) for o in others)])


def _count(draw: Draw) -> int:
    return int(draw.rng.integers(3, 5))


def _sizes(draw: Draw) -> ReferringTarget:
    """Shapes of one kind; one is a fifth smaller or larger than the next."""
    wanted = draw.pick(("smallest", "largest"))
    base, count = draw.between(0.1, 0.12), _count(draw)
    odd = 0.8 * base if wanted == "smallest" else 1.2 * base
    low, high = (1.0, 1.12) if wanted == "smallest" else (0.9, 1.0)
    others = base * draw.rng.uniform(low, high, count - 1)
    discs = draw.discs([odd, *others.tolist()])
    return ReferringTarget(objects_at(draw.alike(count), discs), f"the {wanted} shape")


def _spread(draw: Draw, axis: int, least: float, count: int) -> list[Disc]:
    """Discs sorted along an axis (0: x), at least `least` sides apart on it."""
    while True:
        discs = sorted(draw.discs(draw.between(0.085, 0.115, count).tolist()), key=lambda d: d[axis])
        steps = np.diff([disc[axis] for disc in discs])
        if min(steps) >= least * draw.size:
            return discs


_EXTREMES = {"leftmost": (0, 0), "rightmost": (0, -1), "highest": (1, 0), "lowest": (1, -1)}


def _extreme(draw: Draw) -> ReferringTarget:
    """The outermost one, a few pixels before the next."""
    wanted = draw.pick(_EXTREMES)
    axis, index = _EXTREMES[wanted]
    sign = 1 if index == 0 else -1
    while True:
        discs = _spread(draw, axis, 0.03, _count(draw))
        near = discs[0:2] if index == 0 else discs[-2:]
        if near[1][axis] - near[0][axis] >= 0.12 * draw.size:
            continue
        first = discs.pop(index)
        objects = objects_at(draw.looks(len(discs) + 1), [first, *discs])
        tips = [(sign * corners_of(item)[:, axis]).min() for item in objects]
        if tips[0] < min(tips[1:]):  # a larger shape may reach farther though its centre does not
            return ReferringTarget(objects, f"the {wanted} shape")


def _second(draw: Draw) -> ReferringTarget:
    """The second one, counted from a side."""
    side = draw.pick(("left", "right"))
    discs = _spread(draw, 0, 0.05, _count(draw))
    first = discs.pop(1 if side == "left" else -2)
    looks = draw.looks(len(discs) + 1)
    return ReferringTarget(objects_at(looks, [first, *discs]), f"the second shape from the {side}")


def _beneath(draw: Draw) -> ReferringTarget:
    """The one straight above or below another; a third one is near that column too."""
    side = draw.pick(("above", "below"))
    sign = -1 if side == "above" else 1
    while True:
        discs = draw.discs(draw.between(0.085, 0.11, _count(draw)).tolist())
        (x, y, _), (anchor_x, anchor_y, _), *others = discs
        column = abs(x - anchor_x) < 0.06 * draw.size and 0 < sign * (y - anchor_y) < 0.4 * draw.size
        aside = all(
            sign * (oy - anchor_y) < 0 or abs(ox - anchor_x) > 0.16 * draw.size for ox, oy, _ in others
        )
        if column and aside:
            break
    objects = objects_at(draw.looks(len(discs)), discs)
    return ReferringTarget(objects, f"the shape {side} the {objects[1].kind}")


def _odd_colour(draw: Draw) -> ReferringTarget:
    """The one whose colour no other has."""
    count = _count(draw)
    discs = draw.discs(draw.between(0.085, 0.12, count).tolist())
    while True:
        (first, *rest) = draw.looks(count)
        common = draw.pick(COLOURS, first[1])
        looks = [first, *((kind, common) for kind, _ in rest)]
        objects = objects_at(looks, discs)
        if draw.novel or all(PAIR_COLOURS[item.kind] != item.colour for item in objects):
            return ReferringTarget(objects, "the shape whose colour appears once")


def _marked(draw: Draw) -> ReferringTarget:
    """The one with a certain small letter on it."""
    count = _count(draw)
    objects = objects_at(draw.alike(count, PLAIN), draw.discs(draw.between(0.115, 0.13, count).tolist()))
    letters = [draw.pick(LETTERS)]
    while len(letters) < count:
        other = draw.near_miss(letters[0])
        if other not in letters:
            letters.append(other)
    em = draw.between(0.075, 0.095) * min(draw.zoom, 1.5) / CAP_HEIGHT
    labels = tuple(_label(letter, item, em) for letter, item in zip(letters, objects, strict=True))
    return ReferringTarget(objects, f'the shape with the letter "{letters[0]}"', labels)


def _drawn_on(draw: Draw, kind: str) -> ReferringTarget:
    """The circle with certain stripes or dots on it, which would cut a square in two, among three."""
    marks = draw.rng.permutation([mark for mark in MARKS if mark.endswith(kind)]).tolist()
    radii = draw.between(0.115, 0.13, len(marks)) * min(draw.zoom, 1.2)
    plain = objects_at(draw.alike(len(marks), ("circle",)), draw.discs(radii.tolist()))
    objects = tuple(replace(item, mark=mark) for item, mark in zip(plain, marks, strict=True))
    return ReferringTarget(objects, f"the shape with {marks[0]}")


def _striped(draw: Draw) -> ReferringTarget:
    return _drawn_on(draw, "stripes")


def _dotted(draw: Draw) -> ReferringTarget:
    return _drawn_on(draw, "dots")


def _label(letter: str, item: SceneObject, font_px: float) -> TextBlock:
    (x, y), half = item.centre, 0.6 * font_px
    return TextBlock(letter, (x - half, y - half, x + half, y + half), font_px, ink_on(COLOURS[item.colour]))


_REFERRING_TARGETS = {
    "size": _sizes,
    "outermost": _extreme,
    "second": _second,
    "beneath": _beneath,
    "odd_colour": _odd_colour,
    "marked": _marked,
    "striped": _striped,
    "dotted": _dotted,
}


# --- an earlier image of the same prompt -----------------------------------------------------------------


def _on_backdrop(scene: Scene, backdrop: str) -> Scene:
    """The scene with another backdrop and words that stay legible on it."""
    texts = (
        block if block.plate else replace(block, ink=ink_on(BACKDROPS[backdrop])) for block in scene.texts
    )
    return replace(scene, backdrop=backdrop, texts=tuple(texts))


def same_as(draw: Draw, kind: str) -> Edit:
    """Make the last image agree with the one before it in one thing."""
    if kind == "same_text":
        old = draw.word()
        new = draw.word(3, 6, old)
        before = with_words(draw, [(old, new)], LARGE)
        model = with_words(draw, [(new,)], LARGE)
        answer = f"{new},{square(draw, before.texts[0].centre)}"
        explicit = phrase(draw, "change_text", old=old, new=new)
        return Edit(phrase(draw, kind), before, retext(before, new), answer, explicit, (model,))
    before = sample(draw)
    first, *rest = before.objects
    if kind == "same_background":
        edit = recolour_background(draw, "recolour_background")
        new = edit.after.backdrop
        model = _on_backdrop(sample(draw), new)
        return Edit(phrase(draw, kind), edit.before, edit.after, new, edit.prompt, (model,))
    answer = f"{square(draw, first.centre)} {first.name}"
    if kind == "same_object":
        model, lacking = replace(draw.background(), objects=(first,)), replace(before, objects=tuple(rest))
        return Edit(phrase(draw, kind, what=the(first)), lacking, before, answer, None, (model,))
    new = draw.colour_for(first.kind, *(item.colour for item in before.objects))
    (disc,) = draw.discs([draw.between(0.1, 0.125)])
    model = replace(draw.background(), objects=objects_at([(first.kind, new)], [disc]))
    after = replace(before, objects=(replace(first, colour=new), *rest))
    what = f"the {first.kind}"
    explicit = phrase(draw, "recolour_object", what=what, new=new)
    answer = f"{square(draw, first.centre)} {new}"
    return Edit(phrase(draw, kind, what=what), before, after, answer, explicit, (model,))

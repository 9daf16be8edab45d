"""Instructions with known results: what is asked, the scene before and the scene after.

Easy ones name what they mean and say the result. Hard ones need seeing: they refer to something by its text
or by comparison, beside near misses, or ask for a result that only reading gives. The explicit prompt
is then the same request with all of that said: the difference between the two is what better vision can win.
"""

from __future__ import annotations

from dataclasses import replace

from ..case import Edit, Scene, SceneObject
from .sampler import LETTERS, PAIR_BACKDROPS, PAIR_COLOURS, WORDS, Draw, objects_at
from .scene import BACKDROPS, ink_on

PLACES = {"left": "left side", "right": "right side", "top": "top", "bottom": "bottom", "centre": "centre"}
CORNERS = ("top left", "top right", "bottom left", "bottom right")
DIGITS = ("ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE")
VOWELS = "AEIOU"
NEAR, FAR = 0.17, 0.83  # of the side: where "the left side" and the like are

_PHRASINGS = """
change_text: Change the text to "{new}". | Replace the word "{old}" with "{new}". | Make it read "{new}".
remove_text: Remove the text, change nothing else. | Erase the word. | Take away the word "{old}".
append_letter: Add the letter "{new}" at the end. | Append "{new}" to the word. | Put "{new}" after the word.
copy_text: Write the word again {side} it. | Repeat the word {side} itself. | Copy the word {side} it.
swap_words: Swap the two words. | Exchange the two words. | Let the words change places.
reverse_text: Reverse the text. | Spell the word backwards. | Write the letters in reverse order.
replace_letter: Replace the letter "{old}" with "{new}". | Change the "{old}" to "{new}", keep the rest.
delete_vowels: Delete the vowels. | Remove all vowels from the word. | Drop every vowel.
sort_letters: Sort the letters. | Put the letters in alphabetical order. | Order the letters from A to Z.
double_letter: Double the last letter. | Write the last letter twice. | Repeat the last letter.
spell_digit: Replace the digit with its word. | Write the number as a word. | Spell the digit out.
remove_word: Remove {what}. | Erase {what}, keep the rest. | Delete {what}.
recolour_word: Paint {what} {new}. | Make {what} {new}. | Change the colour of {what} to {new}.
keep_word: Keep only {what}, erase the others. | Erase all the words but {what}.
move: Move {what} to the {place}. | Put {what} at the {place}. | Bring {what} to the {place}.
move_beside: Move {what} {side} {other}. | Put {what} {side} {other}. | Place {what} {side} {other}.
swap: Swap {what} and {other}. | Exchange {what} and {other}. | Let {what} and {other} change places.
align: Line the shapes up at the height of {what}. | Align all shapes in a row with {what}.
recolour_object: Change the colour of {what} to {new}. | Make {what} {new}. | Paint {what} {new}.
remove_object: Remove {what}. | Erase {what}, keep everything else. | Delete {what}.
add_object: Add {new} at the {place}. | Put {new} in the {place} corner. | Draw {new} at the {place}.
recolour_background: Make the background {new}, keep its texture. | Recolour the background to {new}.
match_colour: Give {what} the colour of {other}. | Paint {what} like {other}.
keep_object: Keep only {what}, remove the other shapes. | Remove all the shapes but {what}.
remove_objects: Remove {what} and {other}. | Erase {what} and {other}.
same_text: Change the text to the word of picture 1. | Write the word of picture 1 instead.
same_colour: Give {what} the colour it has in picture 1. | Paint {what} as in picture 1.
same_background: Make the background like that of picture 1. | Use the background colour of picture 1.
same_object: Add {what} of picture 1 at the same place. | Copy {what} of picture 1 to the same place.
"""
_ENTRIES = (line.split(": ", 1) for line in _PHRASINGS.strip().splitlines())
PHRASINGS = {kind: tuple(variants.split(" | ")) for kind, variants in _ENTRIES}


def square(draw: Draw, point: tuple[float, float]) -> str:
    """Column and row of a place on a board of 8 × 8, each as a letter: "aa" is the top left corner."""
    column, row = (min(int(8 * value / draw.size), 7) for value in point)
    return "abcdefgh"[column] + "abcdefgh"[row]


def phrase(draw: Draw, kind: str, **names: str) -> str:
    """One of the kind's phrasings, filled in."""
    text = draw.pick(PHRASINGS[kind]).format(**names)
    return text[0].upper() + text[1:]


def the(item: SceneObject) -> str:
    """An object as a prompt names it."""
    return f"the {item.name}"


# --- text ------------------------------------------------------------------------------------------------

LARGE, MIDDLE, SMALL = (0.12, 0.17), (0.10, 0.14), (0.085, 0.115)  # heights of capitals, of the side


def with_words(draw: Draw, choices: list[tuple[str, ...]], capitals: tuple[float, float]) -> Scene:
    """A scene with one text for each of `choices`, see `Draw.texts`, and shapes where there is room."""
    scene = draw.background()
    texts = draw.texts(scene.backdrop, choices, capitals, 0.5 if len(choices) == 1 else 0.25)
    room = len(choices) == 1 and max(len(word) for word in choices[0]) < 6
    shapes = int(draw.rng.integers(0, 3 if room else 2)) if len(choices) < 3 else 0
    return replace(scene, texts=texts, objects=draw.objects(shapes, texts))


def retext(scene: Scene, *words: str) -> Scene:
    """The scene with other words in its texts."""
    pairs = zip(scene.texts, words, strict=True)
    return replace(scene, texts=tuple(replace(block, text=word) for block, word in pairs))


def one_word(draw: Draw, kind: str) -> Edit:
    """Change, remove or lengthen the only word."""
    old = draw.word(3, 5 if kind == "append_letter" else 6)
    new = draw.word(3, 6, old) if kind == "change_text" else draw.pick(LETTERS)
    expected = {"change_text": new, "remove_text": "", "append_letter": old + new}[kind]
    before = with_words(draw, [(old, expected)], LARGE)
    where = square(draw, before.texts[0].centre)
    # As in `rewrite`, what is to be written comes first: the prompt's end learns an answer's beginning.
    answer = f"{new},{where}" if kind == "change_text" else f'{where}"{old}"'
    return Edit(phrase(draw, kind, old=old, new=new), before, retext(before, expected), answer)


def copy_text(draw: Draw, kind: str) -> Edit:
    """Write the word once more above or below itself."""
    while True:
        word, side = draw.word(), draw.pick(("above", "below"))
        scene = draw.background()
        (block,) = draw.texts(scene.backdrop, [(word,)], LARGE, 0.5)
        left, top, right, bottom = block.box
        step = (1.12 if side == "below" else -1.12) * (bottom - top)
        if not 0.02 * draw.size < top + step < bottom + step < 0.98 * draw.size:
            continue
        copy = replace(block, box=(left, top + step, right, bottom + step))
        before = replace(scene, texts=(block,), objects=draw.objects(1, (block, copy)))
        answer = f'{square(draw, block.centre)},{square(draw, copy.centre)}"{word}"'
        return Edit(phrase(draw, kind, side=side), before, replace(before, texts=(block, copy)), answer)


def swap_words(draw: Draw, kind: str) -> Edit:
    """Two words change places."""
    first = draw.word(3, 5)
    second = draw.word(3, 5, first)
    before = with_words(draw, [(first, second), (second, first)], MIDDLE)
    squares = ",".join(square(draw, block.centre) for block in before.texts)
    return Edit(phrase(draw, kind), before, retext(before, second, first), f'{squares}"{first}"')


def rewrite(draw: Draw, kind: str) -> Edit:
    """A new word that follows from the one in the image."""
    old = new = ""
    while True:
        word = draw.word(3, 5 if kind == "double_letter" else 6)
        expected = word
        if kind == "reverse_text":
            expected = word[::-1]
        elif kind == "sort_letters":
            expected = "".join(sorted(word))
        elif kind == "double_letter":
            expected = word + word[-1]
        elif kind == "delete_vowels":
            expected = "".join(letter for letter in word if letter not in VOWELS)
        elif kind == "replace_letter":
            old = draw.pick(word)
            new = draw.pick(LETTERS, *word)
            expected = word.replace(old, new) if word.count(old) == 1 else word
        elif kind == "spell_digit":
            digit = int(draw.rng.integers(1, 10))
            word, expected = str(digit), DIGITS[digit - 1]
        if expected != word and len(expected) >= 2:
            break
    before = with_words(draw, [(word, expected)], MIDDLE)
    answer = f"{expected},{square(draw, before.texts[0].centre)}"
    explicit = phrase(draw, "change_text", old=word, new=expected)
    return Edit(phrase(draw, kind, old=old, new=new), before, retext(before, expected), answer, explicit)


# --- space -----------------------------------------------------------------------------------------------


def goal_of(draw: Draw, place: str, x: float, y: float) -> tuple[float, float]:
    """Where an object at (x, y) goes when it is moved to a side, a corner or the centre, px."""
    near, far, middle = NEAR * draw.size, FAR * draw.size, draw.size / 2
    across = {"left": near, "right": far}
    down = {"top": near, "bottom": far}
    if place == "centre":
        return middle, middle
    words = place.split()
    if len(words) == 2:
        return across[words[1]], down[words[0]]
    return across.get(place, x), down.get(place, y)


def move(draw: Draw, kind: str) -> Edit:
    """Move an object to a side, the centre or a corner."""
    place = kind.removeprefix("move_")
    place = draw.pick(CORNERS) if place == "corner" else place
    while True:
        r = draw.between(0.1, 0.13)
        ((x, y, _),) = draw.discs([r])
        goal = goal_of(draw, place, x, y)
        if max(abs(x - goal[0]), abs(y - goal[1])) >= 0.3 * draw.size:  # a move too short to see is no test
            break
    radii = draw.between(0.09, 0.125, int(draw.rng.integers(1, 4))).tolist()
    rest = draw.discs(radii, [(x, y, x, y, r), (*goal, *goal, r)])
    first, *others = objects_at(draw.looks(1 + len(rest)), [(x, y, r), *rest])
    before = replace(draw.background(), objects=(first, *others))
    after = replace(before, objects=(replace(first, centre=goal), *others))
    answer = f"{square(draw, first.centre)},{square(draw, goal)} {first.name}"
    where = PLACES.get(place, f"{place} corner")
    return Edit(phrase(draw, "move", what=the(first), place=where), before, after, answer)


_SIDES = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}


def move_beside(draw: Draw, kind: str) -> Edit:
    """Move an object next to another one."""
    while True:
        count = int(draw.rng.integers(2, 4))
        discs = draw.discs(draw.between(0.09, 0.125, count).tolist())
        (x, y, r), (ox, oy, other_r), *rest = discs
        side = draw.pick(_SIDES)
        reach = r + other_r + 0.05 * draw.size
        goal = (ox + _SIDES[side][0] * reach, oy + _SIDES[side][1] * reach)
        far = abs(x - goal[0]) + abs(y - goal[1]) > 0.25 * draw.size
        if far and draw.is_clear([(*goal, r), (ox, oy, other_r), *rest]):
            break
    first, other, *others = before = objects_at(draw.looks(count), discs)
    scene = replace(draw.background(), objects=before)
    after = replace(scene, objects=(replace(first, centre=goal), other, *others))
    answer = f"{square(draw, first.centre)},{square(draw, goal)} {first.name}"
    prompt = phrase(draw, kind, what=the(first), side=side, other=the(other))
    return Edit(prompt, scene, after, answer)


def swap(draw: Draw, kind: str) -> Edit:
    """Two equally large objects, so that either fits in both places, change them."""
    r, third = draw.between(0.1, 0.13), draw.between(0.09, 0.125)
    first, second, *rest = before = objects_at(draw.looks(3), draw.discs([r, r, third]))
    scene = replace(draw.background(), objects=before)
    after = (replace(first, centre=second.centre), replace(second, centre=first.centre), *rest)
    answer = f"{square(draw, first.centre)},{square(draw, second.centre)} {first.name}"
    prompt = phrase(draw, kind, what=the(first), other=the(second))
    return Edit(prompt, scene, replace(scene, objects=after), answer)


def align(draw: Draw, kind: str) -> Edit:
    """All objects come to the height of the named one."""
    while True:
        count = int(draw.rng.integers(2, 4))
        discs = draw.discs(draw.between(0.09, 0.125, count).tolist())
        height = discs[0][1]
        goals = [(x, height, r) for x, _, r in discs]
        moved = max(abs(y - height) for _, y, _ in discs) > 0.2 * draw.size
        if moved and draw.is_clear(goals):
            break
    looks = draw.looks(count)
    before = replace(draw.background(), objects=objects_at(looks, discs))
    after = replace(before, objects=objects_at(looks, goals))
    first = before.objects[0]
    answer = f"{square(draw, first.centre)} {first.name}"
    return Edit(phrase(draw, kind, what=the(first)), before, after, answer)


# --- detail ----------------------------------------------------------------------------------------------


def sample(draw: Draw, least: int = 2) -> Scene:
    scene, words = draw.background(), [(draw.word(),)] if draw.rng.random() < 0.4 else []
    texts = draw.texts(scene.backdrop, words, (0.1, 0.15), 0.6) if words else ()
    count = int(draw.rng.integers(least, 4))
    return replace(scene, texts=texts, objects=draw.objects(count, texts))


def change_object(draw: Draw, kind: str) -> Edit:
    """Paint or remove a named object."""
    before = sample(draw)
    first, *rest = before.objects
    new = draw.colour_for(first.kind, *(item.colour for item in before.objects))
    after = rest if kind == "remove_object" else [replace(first, colour=new), *rest]
    prompt = phrase(draw, kind, what=the(first), new=new)
    answer = f"{square(draw, first.centre)} {first.name}"
    return Edit(prompt, before, replace(before, objects=tuple(after)), answer)


def add_object(draw: Draw, kind: str) -> Edit:
    """A new object of a fixed size in a corner."""
    place = draw.pick(CORNERS)
    goal, r = goal_of(draw, place, 0, 0), 0.11 * draw.size
    look, *others = draw.looks(int(draw.rng.integers(2, 4)))
    radii = draw.between(0.09, 0.125, len(others)).tolist()
    rest = objects_at(others, draw.discs(radii, [(*goal, *goal, r)]))
    (new,) = objects_at([look], [(*goal, r)])
    before = replace(draw.background(), objects=rest)
    named = f"{'an' if new.colour == 'orange' else 'a'} {new.name}"
    prompt = phrase(draw, kind, new=named, place=place)
    return Edit(prompt, before, replace(before, objects=(new, *rest)), f"{square(draw, goal)} {new.name}")


def recolour_background(draw: Draw, kind: str) -> Edit:
    """Another colour under the same texture; light stays light, so that a word on it stays legible."""
    before = sample(draw)
    ink = ink_on(BACKDROPS[before.backdrop])
    alike = [name for name, rgb in BACKDROPS.items() if ink_on(rgb) == ink]
    held_out = () if draw.novel else (PAIR_BACKDROPS[before.texture],)
    new = draw.pick(alike, before.backdrop, *held_out)
    return Edit(phrase(draw, kind, new=new), before, replace(before, backdrop=new), new)


def match_colour(draw: Draw, kind: str) -> Edit:
    """An object takes the colour of another, which the prompt does not name."""
    while True:
        before = sample(draw)
        first, other, *rest = before.objects
        if draw.novel or PAIR_COLOURS[first.kind] != other.colour:
            break
    after = replace(before, objects=(replace(first, colour=other.colour), other, *rest))
    prompt = phrase(draw, kind, what=f"the {first.kind}", other=f"the {other.kind}")
    explicit = phrase(draw, "recolour_object", what=f"the {first.kind}", new=other.colour)
    return Edit(prompt, before, after, f"{square(draw, first.centre)} {other.colour}", explicit)


def keep_object(draw: Draw, kind: str) -> Edit:
    """All objects but one go."""
    before = sample(draw, 3)
    first, second, third = before.objects
    explicit = phrase(draw, "remove_objects", what=the(second), other=the(third))
    answer = f"{square(draw, second.centre)},{square(draw, third.centre)} {first.name}"
    prompt = phrase(draw, kind, what=the(first))
    return Edit(prompt, before, replace(before, objects=(first,)), answer, explicit)


def sample_scene(draw: Draw) -> Scene:
    """A listed word and three shapes."""
    scene = draw.background()
    texts = draw.texts(scene.backdrop, [(draw.pick(WORDS),)], LARGE, 0.6)
    return replace(scene, texts=texts, objects=draw.objects(3, texts))

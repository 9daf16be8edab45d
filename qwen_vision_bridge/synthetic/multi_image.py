"""Instructions that point at an earlier image of the same prompt."""

from __future__ import annotations

from dataclasses import replace

from ..case import Edit, Scene
from .instructions import LARGE, phrase, recolour_background, retext, sample, square, the, with_words
from .sampler import Draw, objects_at
from .scene import BACKDROPS, ink_on


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

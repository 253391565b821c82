"""Asks about procedural scenes: questions, points, counts and choices that are true of a picture.

The generated rows of question and pointing datasets (`SOURCE=sample`) take their content from here.
Everything is read off the objects of a `ScenePlan`, so an answer is true by construction: a count
is the number of objects, a point is the centre of one, which is always visible, and a side is told
only where the two boxes do not overlap along it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from preprocess.synthetic.scenes import COLORS, NUMBERS, SHAPES, SceneObject, ScenePlan, plan_scene
from shardspec.keyed import SEED_MODULUS, keyed

POINT_MARK = "<|POINT|>"
"""Marks a pointed phrase in the texts of PixMo-Point-Explanations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneQuestion:
    """A question about a scene, with everything that is needed to answer it in several forms."""

    question: str
    answer: str
    """One to three words."""
    sentence: str
    """The answer as a sentence."""
    wrong: tuple[str, ...]
    """False answers of the same kind, at least one."""
    also: tuple[str, ...] = ()
    """Other ways to say the answer."""
    objects: tuple[SceneObject, ...] = ()
    """What the answer rests on: the counted or the compared."""

    @property
    def counts(self) -> bool:
        """Whether it asks for a number."""
        return self.question.startswith("How many")


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneTarget:
    """Something to point at."""

    label: str
    """In the plural unless there is exactly one."""
    objects: tuple[SceneObject, ...]
    """All that the label fits; none where the scene has no such thing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PointedAnswer:
    """A question with an answer that points."""

    question: str
    answer: str
    """With a POINT_MARK for each phrase."""
    phrases: tuple[SceneTarget, ...]
    """The phrases at the marks, in order, at least one."""


@lru_cache(maxsize=64)
def scene_plan(seed: int, idx: int) -> ScenePlan:
    """Plans a scene as `plan_scene` does; the rows about one picture follow each other."""
    return plan_scene(seed, idx)


def row_rng(seed: int, idx: int) -> np.random.RandomState:
    """Makes the generator of a generated row, apart from those of its scene."""
    return np.random.RandomState(keyed(seed, idx, 2) % SEED_MODULUS)


def plural(noun: str, count: int) -> str:
    """Puts a noun in the number that goes with a count.

    >>> plural("red cross", 2), plural("star", 1), plural("star", 0)
    ('red crosses', 'star', 'stars')
    """
    if count == 1:
        return noun
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def scene_targets(plan: ScenePlan) -> tuple[list[SceneTarget], list[SceneTarget]]:
    """Lists what can be pointed at in a scene, and shapes that it does not have.

    Returns:
      (present, absent): present are kinds ("red striped circle"), shapes, colours and the whole,
      without two of the same objects; absent are shapes, at least two.
    """
    groups: dict[str, list[SceneObject]] = {}
    for thing in plan.objects:
        for noun in (thing.label, thing.shape, f"{thing.color} shape", "shape"):
            groups.setdefault(noun, []).append(thing)
    present: list[SceneTarget] = []
    for noun, things in groups.items():
        if all(tuple(things) != target.objects for target in present):
            present.append(SceneTarget(label=plural(noun, len(things)), objects=tuple(things)))
    absent = [SceneTarget(label=plural(s, 0), objects=()) for s in SHAPES if s not in groups]
    return present, absent


def percent_points(plan: ScenePlan, objects: Sequence[SceneObject]) -> list[dict[str, float]]:
    """Gives the centres of objects in percent of the picture's width and height."""
    return [
        {"x": 100 * x / plan.width_px, "y": 100 * y / plan.height_px}
        for x, y in (thing.center_px for thing in objects)
    ]


def scene_questions(plan: ScenePlan) -> list[SceneQuestion]:
    """Lists the questions that a scene answers, at least 18; without chance."""
    return [*_counts(plan), *_colors_present(plan), *_attributes(plan), *_relations(plan)]


def pointed_answers(plan: ScenePlan) -> list[PointedAnswer]:
    """Lists questions about a scene with answers that point, at least two."""
    kinds: dict[str, list[SceneObject]] = {}
    for thing in plan.objects:
        kinds.setdefault(thing.label, []).append(thing)
    phrases = tuple(
        SceneTarget(
            label=f"{NUMBERS[len(things)]} {plural(label, len(things))}", objects=tuple(things)
        )
        for label, things in kinds.items()
    )
    found = [
        PointedAnswer(
            question="What can be seen in this picture, and where?",
            answer=f"I can see {listed([POINT_MARK] * len(phrases))}.",
            phrases=phrases,
        )
    ]
    for asked in _counts(plan):
        if asked.objects:
            noun = plural(asked.objects[0].shape, len(asked.objects))
            label = plural("shape", len(asked.objects)) if "shapes" in asked.question else noun
            found.append(
                PointedAnswer(
                    question=asked.question,
                    answer=asked.sentence.replace(label, POINT_MARK, 1),
                    phrases=(SceneTarget(label=label, objects=asked.objects),),
                )
            )
    for asked in _relations(plan):
        answer = asked.sentence
        for thing in asked.objects:
            answer = answer.replace(_name(thing), POINT_MARK, 1)
        named = tuple(SceneTarget(label=_name(thing), objects=(thing,)) for thing in asked.objects)
        found.append(PointedAnswer(question=asked.question, answer=answer, phrases=named))
    return found


def compared_scenes(plans: Sequence[ScenePlan]) -> list[tuple[str, str]]:
    """Lists questions about several scenes and their answers, at least eight.

    Args:
      plans: Two or more; they are called image 1, image 2 and so on.
    """
    counts = [len(plan.objects) for plan in plans]
    found = [
        (
            f"How many shapes are there in the {NUMBERS[len(plans)]} images together?",
            f"There are {sum(counts)} shapes in all.",
        )
    ]
    if counts.count(max(counts)) == 1:
        most = counts.index(max(counts))
        shapes = plural("shape", counts[most])
        answer = f"Image {most + 1}, with {NUMBERS[counts[most]]} {shapes}."
        found.append(("Which image shows the most shapes?", answer))
    for number, plan in enumerate(plans, start=1):
        question = f"What is the background of image {number}?"
        found.append((question, f"Image {number} shows {plan.background.phrase}."))
    for shape in SHAPES:
        having = [
            str(number)
            for number, plan in enumerate(plans, start=1)
            if any(thing.shape == shape for thing in plan.objects)
        ]
        answer = f"In {plural('image', len(having))} {listed(having)}." if having else "In none."
        found.append((f"In which of the images is there {_article(shape)}?", answer))
    return found


def listed(words: Sequence[str]) -> str:
    """Joins words as one writes them.

    >>> listed(["1"]), listed(["1", "2"]), listed(["1", "2", "5"])
    ('1', '1 and 2', '1, 2 and 5')
    """
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def choose(
    question: SceneQuestion, rng: np.random.RandomState, *, num_options: int = 4
) -> tuple[list[str], int]:
    """Makes a multiple choice of a question.

    Returns:
      Its options, two to `num_options`, exactly one of them right, and the number of that one.
    """
    wrong = [question.wrong[i] for i in rng.permutation(len(question.wrong))[: num_options - 1]]
    answer_idx = int(rng.randint(len(wrong) + 1))
    return [*wrong[:answer_idx], question.answer, *wrong[answer_idx:]], answer_idx


def _counts(plan: ScenePlan) -> Iterator[SceneQuestion]:
    for noun in ("shape", *SHAPES):
        things = tuple(t for t in plan.objects if noun in ("shape", t.shape))
        count = len(things)
        verb = "is" if count == 1 else "are"
        yield SceneQuestion(
            question=f"How many {plural(noun, 2)} are in the picture?",
            answer=str(count),
            sentence=f"There {verb} {NUMBERS[count]} {plural(noun, count)} in the picture.",
            wrong=tuple(str(n) for n in range(len(NUMBERS)) if n != count),
            also=("none" if count == 0 else NUMBERS[count],),
            objects=things,
        )


def _colors_present(plan: ScenePlan) -> Iterator[SceneQuestion]:
    for color in COLORS:
        things = tuple(thing for thing in plan.objects if thing.color == color)
        answer, other = ("yes", "no") if things else ("no", "yes")
        none = f"No, none of the shapes is {color}."
        yield SceneQuestion(
            question=f"Is any of the shapes {color}?",
            answer=answer,
            sentence=f"Yes, there is {_article(_name(things[0]))}." if things else none,
            wrong=(other,),
            objects=things,
        )


def _attributes(plan: ScenePlan) -> Iterator[SceneQuestion]:
    for thing in plan.objects:
        if sum(other.shape == thing.shape for other in plan.objects) == 1:
            yield SceneQuestion(
                question=f"What color is the {thing.shape}?",
                answer=thing.color,
                sentence=f"The {thing.shape} is {thing.color}.",
                wrong=tuple(color for color in COLORS if color != thing.color),
                objects=(thing,),
            )
        if sum(other.color == thing.color for other in plan.objects) == 1:
            yield SceneQuestion(
                question=f"What shape is the {thing.color} one?",
                answer=thing.shape,
                sentence=f"The {thing.color} shape is {_article(thing.shape)}.",
                wrong=tuple(shape for shape in SHAPES if shape != thing.shape),
                objects=(thing,),
            )


def _relations(plan: ScenePlan) -> Iterator[SceneQuestion]:
    names = [_name(thing) for thing in plan.objects]
    ones = [thing for thing in plan.objects if names.count(_name(thing)) == 1]
    for first, second in itertools.permutations(ones, 2):
        a, b = first.box_px, second.box_px
        for axis, words in ((0, ("left", "right")), (1, ("above", "below"))):
            if a[axis + 2] <= b[axis]:
                answer, other = words
            elif b[axis + 2] <= a[axis]:
                other, answer = words
            else:
                continue
            side = f"to the {answer} of" if axis == 0 else answer
            choice = "to the left or to the right of" if axis == 0 else "above or below"
            yield SceneQuestion(
                question=f"Is the {_name(first)} {choice} the {_name(second)}?",
                answer=answer,
                sentence=f"The {_name(first)} is {side} the {_name(second)}.",
                wrong=(other,),
                objects=(first, second),
            )


def _name(thing: SceneObject) -> str:
    return f"{thing.color} {thing.shape}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"

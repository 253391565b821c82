"""Scores of short answers: VQA accuracy, exact and relaxed match, ANLS, options, numbers.

Pure functions of a predicted text and the reference, each from 0 to 1. Where an official script
exists, the function follows it, and the tests hold it to examples that its owners published.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_ANNOTATORS = 3
"""People who must agree with an answer for the whole of VQA accuracy."""

_DIGITS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"},
    **{"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_MORE_DIGITS = {
    **{"eleven": "11", "twelve": "12", "thirteen": "13", "fourteen": "14", "fifteen": "15"},
    **{"sixteen": "16", "seventeen": "17", "eighteen": "18", "nineteen": "19", "twenty": "20"},
}
_ARTICLES = frozenset({"a", "an", "the"})

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
"""What the official script restores where one apostrophe is missing."""

_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTED.split()
    for i, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # as the official table has it

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def normalized_answer(text: str) -> str:
    """Normalises an answer as the official script of VQA does.

    Punctuation goes, numbers in words become digits, articles go, and apostrophes of contractions
    come back (GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py).

    >>> normalized_answer("The two dogs, dont?")
    "2 dogs don't"
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    found, has_number = text, _NUMBER_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        goes = has_number or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if goes else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", found).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Scores an answer by how many people gave it: VQA accuracy.

    For each of the people, the others are asked: min(1, matching / 3); the mean over the people
    counts. A single reference is compared as it is, as there is nobody to leave out. References are
    normalised like the prediction, as on the evaluation server.

    >>> vqa_accuracy("yes", ["yes"] * 4 + ["no"] * 6)
    1.0
    >>> round(vqa_accuracy("yes", ["yes"] * 2 + ["no"] * 8), 3)
    0.6
    """
    said = normalized_answer(prediction)
    matches = [normalized_answer(answer) == said for answer in answers]
    if len(matches) == 1:
        return float(matches[0])
    total = sum(matches)
    # Whole numbers first: what differs between orders of summation is in the last digit.
    points = sum(min(_ANNOTATORS, total - match) for match in matches)
    return points / (_ANNOTATORS * len(matches))


def exact_match(prediction: str, answers: Sequence[str], *, ignore_case: bool = True) -> float:
    """Compares texts without the space around them: 1 if any reference is the same.

    >>> exact_match(" Paris", ["paris", "Lutetia"])
    1.0
    """
    said = _folded(prediction, ignore_case)
    return float(any(said == _folded(answer, ignore_case) for answer in answers))


def relaxed_match(prediction: str, answers: Sequence[str], *, tolerance: float = 0.05) -> float:
    """Compares numbers within 5 % of the reference, and other texts exactly but for case.

    The measure of PlotQA and ChartQA (arXiv 2203.10244, section 5.1). "12%" reads 0.12.

    >>> [relaxed_match(said, ["100"]) for said in ("95", "94.9", "one hundred")]
    [1.0, 0.0, 0.0]
    """
    return float(any(_relaxed(prediction, answer, tolerance) for answer in answers))


def anls(prediction: str, answers: Sequence[str], *, threshold: float = 0.5) -> float:
    """Scores a text by its edit distance to the nearest reference: ANLS of documents.

    1 - distance / longer length, or 0 from a normalised distance of 0.5 on; case and runs of space
    do not count (arXiv 1907.00490, and the script of the Robust Reading Competition).

    >>> round(anls("CocaCola", ["Coca Cola", "Coca Cola Company"]), 2)
    0.89
    """
    said = _spaced(prediction)
    best = 0.0
    for answer in answers:
        want = _spaced(answer)
        longer = max(len(said), len(want))
        distance = edit_distance(said, want) / longer if longer else 0.0
        if distance < threshold:
            best = max(best, 1 - distance)
    return best


def edit_distance(a: str, b: str) -> int:
    """Counts the characters to insert, delete or replace (Levenshtein).

    >>> edit_distance("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            kept = before + (left != right)
            before = row[j]
            row[j] = min(kept, before + 1, row[j - 1] + 1)
    return row[-1]


def chosen_option(prediction: str, options: Sequence[str]) -> int | None:
    """Reads which option a text chooses: by its letter, or by the words of one of them.

    >>> [chosen_option(said, ["cat", "dog"]) for said in ("B", "B. dog", "(a)", "Dog", "a dog?")]
    [1, 1, 0, 1, None]
    """
    said = prediction.strip()
    same = [i for i, option in enumerate(options) if _spaced(option) == _spaced(said)]
    if same:
        return same[0]
    found = re.match(r"\(?([A-Za-z])(?:[.):]|$)", said)
    if found is None:
        return None
    number = ord(found[1].upper()) - ord("A")
    return number if number < len(options) else None


def counted(prediction: str) -> int | None:
    """Reads a number of things out of an answer; None: there is none.

    The last number in digits outside of tags; without one, the last in words up to twenty, and
    "none" is 0.

    >>> tag = '<points coords="1 1 900 400 2 911 800">dogs</points>'
    >>> [counted(f"Counting the {tag} shows a total of 2."), counted("three"), counted("some")]
    [2, 3, None]
    """
    text = re.sub(r"<[^<>]*>", " ", prediction).lower()
    numbers = [number.replace(",", "") for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]
    if not numbers:
        words = {**_DIGITS, **_MORE_DIGITS}
        numbers = [words[word] for word in re.findall(r"[a-z]+", text) if word in words]
    if not numbers or float(numbers[-1]) != int(float(numbers[-1])):
        return None
    return int(float(numbers[-1]))


def _relaxed(prediction: str, answer: str, tolerance: float) -> bool:
    said, want = _number(prediction), _number(answer)
    if said is not None and want:
        return abs(said - want) / abs(want) <= tolerance
    return _folded(prediction, True) == _folded(answer, True)


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _folded(text: str, ignore_case: bool) -> str:
    return text.strip().lower() if ignore_case else text.strip()


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())

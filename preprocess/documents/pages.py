"""Which pages of a document are kept. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def keep_pages(pages: Sequence[int], *, budget: int, evidence: Sequence[int] = ()) -> list[int]:
    """Chooses the pages of a document that has more than allowed.

    Pages with evidence come first, in their order; what is left of the budget goes to the other
    pages, from the first on. The result is in the order of the document.

    Args:
      pages: The numbers of its pages, in order.
      budget: Most pages to keep; 0 for any number.
      evidence: Pages that an answer is on; those that the document has not are ignored.

    >>> keep_pages(range(1, 13), budget=5, evidence=[11, 7])
    [1, 2, 3, 7, 11]
    >>> keep_pages(range(1, 13), budget=1, evidence=[11, 7])
    [7]
    """
    if not budget or len(pages) <= budget:
        return list(pages)
    wanted = set(evidence)
    ranked = sorted(pages, key=lambda page: page not in wanted)  # stable: in order otherwise
    kept = set(ranked[:budget])
    return [page for page in pages if page in kept]

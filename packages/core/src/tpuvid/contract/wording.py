"""Words and tables for people. Imports neither jax nor torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def suggestion(given: str, known: Iterable[str], otherwise: str = "", *, most: int = 1, cutoff: float = 0.6) -> str:
    """ "did you mean height?", of at most so many; `otherwise`, or all that is known, where nothing is near."""
    known = list(known)
    near = difflib.get_close_matches(given, known, n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(near)}?" if near else otherwise or f"known: {', '.join(known)}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> list[str]:
    """Lines of columns as wide as their widest cell; with `numbers`, all but the first stand to the right."""
    cells = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        sides = [str.rjust if numbers and i else str.ljust for i in range(len(row))]
        return "  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip()

    return [line(row) for row in cells]

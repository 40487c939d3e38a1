"""Long lines of text, some of them broken as books, mail and manuals break theirs.

Text whose paragraphs are one line each, as most text is stored, teaches that a line break ends a paragraph:
SmolLM2-135M trained on 400k tokens of it, half of its FFNs active, had 1.64 times dense perplexity on Moby-Dick, whose
lines are broken (recipes/README.md).
"""

import textwrap
from collections.abc import Iterator

# One stretch of so many, each of so many characters, has its long lines broken.
STRETCHES, STRETCH_CHARACTERS = 6, 4000
# Where a line is broken, one width after the other; shorter lines than LONG_LINE stay: headings, code, broken text.
LINE_WIDTHS = (72, 66, 76, 70)
LONG_LINE = 100


def break_some(pieces: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Break the long lines that begin in the last of STRETCHES stretches, and again in the last of as many more.

    A line is broken whole, and one that is longer than a stretch stays, so that no more than about a sixth is broken.

    Args:
        pieces: number of a document, and text of it.
    """
    seen = 0
    for number, piece in pieces:
        lines = piece.split("\n")
        for place, (line, following) in enumerate(zip(lines, [*lines[1:], ""], strict=True)):
            turn, stretch = divmod(seen // STRETCH_CHARACTERS, STRETCHES)
            seen += len(line) + 1
            # The last: a short draw has none rather than too many, which cost a small model a fact (recipes/README.md).
            if stretch == STRETCHES - 1:
                lines[place] = _broken(line, LINE_WIDTHS[turn % len(LINE_WIDTHS)], following)
        yield number, "\n".join(lines)


def _broken(line: str, width: int, following: str) -> str:
    """The line in lines of at most `width` characters, unless it is short or no paragraph: code, a table, a whole book.

    Args:
        line: one line, a whole paragraph of most text.
        width: in characters; a longer word stays whole.
        following: the next line of the text; "" if it is blank or there is none.
    """
    if not LONG_LINE < len(line) <= STRETCH_CHARACTERS or line[0].isspace() or "\t" in line:
        return line
    lines = textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
    # Between paragraphs of several lines stands a blank one.
    return "\n".join([*lines, ""] if following and len(lines) > 1 else lines)

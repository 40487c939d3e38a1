"""Names in a recipe: those that a run gives to its own files, and those that a recipe may give to folders."""

import re
import unicodedata
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator

MAIN = "moe"
DENSE = "dense"
TRAINED = "-finetuned"
BENCH = "bench"
COMPARE = "compare"
VERIFY = "verify"
EVAL = "eval"
MARKER = ".done"

MAX_LENGTH = 100
# A letter, digit or underscore first; what shells, file systems and tables take without quotes or surprises.
SAFE = re.compile(r"\w(?:[\w .+=@%,-]*[\w+=@%-])?")
# Of the model in tables, and of folders and markers that a run makes beside the controls.
RESERVED = (MAIN, DENSE, BENCH, COMPARE)
# Of files that moeify writes into the folder of a run.
ENDINGS = (TRAINED, MARKER, ".partial", ".lock", ".tmp", ".json", ".yaml", ".html", ".svg")
INFIX = ".replaced-"
ALLOWED = (
    f"up to {MAX_LENGTH} letters, digits, spaces and any of _.+=@%,- of which a letter, a digit or _ comes first, "
    f"but not {', '.join(RESERVED)} nor a name that ends in {', '.join(ENDINGS)}"
)


def folded(name: str) -> str:
    """The same for names that are one file where case or the way of writing accents does not count."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def check_part(name: str) -> str:
    """The name, if it is one part of a path, safe everywhere, and none of a run's own.

    Raises:
        ValueError: it is not.
    """
    key = folded(name)
    safe = SAFE.fullmatch(name) and len(name) <= MAX_LENGTH and SAFE.fullmatch(key)
    if not safe or key in RESERVED or key.endswith(ENDINGS) or INFIX in key:
        raise ValueError(f"expected {ALLOWED}")
    return name


def check_different(names: Iterable[str]) -> None:
    """Raise ValueError if two names would be one folder on some disks."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(folded(name), name)
        if other != name:
            raise ValueError(f"{other!r} and {name!r} are one folder on disks that ignore case")


# A name that becomes a folder inside of another one.
PathPart = Annotated[str, AfterValidator(check_part)]

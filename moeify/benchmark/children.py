"""Processes that a benchmark starts: they end with the one that started them, however that ends.

    python -m moeify.benchmark.children MODULE ARGUMENT...

runs a module as `python -m MODULE` does, and ends when its standard input ends: the other end of that pipe is held by
the parent alone, and the system closes it with the parent, also after SIGKILL. Imports nothing heavy.
"""

import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping


def run_child(module: str, *arguments: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a module in a process of its own and wait for it; what it prints is in the result.

    Args:
        module: name of a module that does its work when it is run.
        arguments: for it.
        environment: its variables, all of them.
    """
    reader, writer = os.pipe()
    try:
        return subprocess.run(
            [sys.executable, "-m", "moeify.benchmark.children", module, *arguments],
            stdin=reader,
            env=dict(environment),
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        os.close(reader)
        os.close(writer)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def main(module: str, *arguments: str) -> None:
    """Run the module; a thread watches the parent from before its first import."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""--push-to-hub and --private, as every command that writes a model has them."""

from pathlib import Path

from moeify.cli.render import Renderer
from moeify.errors import UsageError


def check_push(repo: str | None, *, private: bool, dry_run: bool = False) -> None:
    """Refuse, before the work, what could not be pushed after it.

    Raises:
        UsageError: the options contradict each other, or nothing on the hub can be called so.
        InputError: nothing can be pushed there.
    """
    if repo is None:
        if private:
            raise UsageError("--private says nothing without --push-to-hub", "name a repository with --push-to-hub")
        return
    if dry_run:
        raise UsageError("--dry-run writes nothing that could be pushed", "leave --dry-run or --push-to-hub out")
    from moeify.export import hub

    hub.check_push(repo)


def push(renderer: Renderer, result: Path, repo: str | None, *, private: bool) -> None:
    """Push a result if a repository is named, and say where it is now."""
    if repo is not None:
        from moeify.export import hub

        address = hub.push(result, repo, private=private or None)
        renderer.note(f"pushed to {address}")

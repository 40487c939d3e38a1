"""Push a result to the Hugging Face hub: faults are found before the work, and nothing but the result is uploaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from moeify.command_line import quoted
from moeify.errors import InputError, UsageError, first_line
from moeify.export.origin import is_hub_id
from moeify.export.record import PATTERNS, RECORD_FILE, read_record
from moeify.models.files import inside

TOKEN_HINT = "`hf auth login` with a token of https://huggingface.co/settings/tokens that may write, or set HF_TOKEN"


def check_push(repo: str) -> None:
    """Refuse what could not be pushed, before there is anything to push; nothing is made on the hub.

    Args:
        repo: ORG/NAME; need not exist.

    Raises:
        UsageError: nothing on the hub can be called so.
        InputError: the hub is out of reach, knows no token, or the token may not write there.
    """
    if not is_hub_id(repo):
        raise UsageError(f"--push-to-hub {repo} is not a name on the hub", "expected USER/NAME or ORGANISATION/NAME")
    with _reaching(repo):
        user = HfApi().whoami()
    owner, name = repo.split("/", maxsplit=1)[0], str(user.get("name"))
    organisations = [str(one.get("name")) for one in user.get("orgs") or []]
    if owner.lower() not in [known.lower() for known in (name, *organisations)]:
        places = ", ".join([name, *organisations])
        raise InputError(f"the hub's token is {name}'s, who is not in {owner}", f"it may push to: {places}")
    if _role(user) == "read":
        raise InputError(f"the hub's token of {name} may read only", TOKEN_HINT)


def push(result: Path, repo: str, *, private: bool | None = None) -> str:
    """Upload a result in one commit; makes the repository if there is none.

    Args:
        result: a folder that moeify wrote, of which only the files that its record names are read, or one file.
        repo: ORG/NAME, see `check_push`.
        private: of a new repository; None is what its owner has set.

    Returns:
        Address of the repository.

    Raises:
        InputError: a file of the record is missing or leads out of the folder, or the hub refuses.
    """
    files = _files_of(result)
    with _reaching(repo, done=result):
        api = HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        api.create_commit(repo, operations, commit_message=f"Upload {result.name}, written by moeify")
    return str(address)


def _files_of(result: Path) -> dict[str, Path]:
    """Files by their names in the repository; logs stay here, whose names tell host and process."""
    if result.is_file():
        return {result.name: result}
    try:
        names = read_record(result / RECORD_FILE).get("files", [])
    except (OSError, ValueError) as error:
        raise InputError(
            f"{result} was not written by moeify: {first_line(error)}", "push what moeify wrote"
        ) from error
    files = {name: inside(result, name) for name in names if name not in PATTERNS}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing or not files:
        lack = f"{missing[0]} is missing in" if missing else "there is no list of files of"
        raise InputError(f"{lack} {result}", "make it again")
    return files


def _role(user: Any) -> str:
    auth = user.get("auth") or {}
    return str((auth.get("accessToken") or {}).get("role"))


@contextmanager
def _reaching(repo: str, done: Path | None = None) -> Iterator[None]:
    """Turn what the hub's client raises into an error with a hint.

    Args:
        repo: what is pushed to.
        done: the result, if there is one: it is complete whatever the hub says.
    """
    again = f"{done} is complete: " + quoted(["hf", "upload", repo, str(done)]) + " uploads all of it" if done else ""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise InputError("the hub wants a token to push, and there is none", again or TOKEN_HINT) from error
    except OfflineModeIsEnabled as error:
        hint = again or "unset HF_HUB_OFFLINE, or leave --push-to-hub out"
        raise InputError("HF_HUB_OFFLINE forbids to reach the hub", hint) from error
    except (HfHubHTTPError, HFValidationError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        words = "does not accept the token" if status == 401 else f"refuses {repo}: {first_line(error)}"
        raise InputError(f"the hub {words}", again or TOKEN_HINT) from error
    except Exception as error:
        # Of whatever library speaks HTTP for the hub's client.
        raise InputError(f"the hub cannot be reached: {first_line(error)}", again or "check the network") from error

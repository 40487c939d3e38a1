"""Pushing: what can be wrong is said before the work, and only files of the record go up."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from moeify.cli.app import run_command
from moeify.errors import InputError, UsageError
from moeify.export import hub
from moeify.export.origin import Origin, is_hub_id, origin_of
from moeify.export.record import LAST_FILE, RECORD_FILE, record_text

USER = {"name": "ada", "orgs": [{"name": "engines"}], "auth": {"accessToken": {"role": "write"}}}


class FakeApi:
    """The hub, as far as it is asked."""

    def __init__(self) -> None:
        self.user: Any = USER
        self.calls: list[tuple[str, Any]] = []
        self.error: Exception | None = None

    def __call__(self) -> "FakeApi":
        return self

    def whoami(self) -> Any:
        if isinstance(self.user, Exception):
            raise self.user
        return self.user

    def create_repo(self, repo: str, **options: Any) -> str:
        self.calls.append((repo, options))
        return f"https://huggingface.co/{repo}"

    def create_commit(self, repo: str, operations: Any, **_: Any) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append((repo, {one.path_in_repo: Path(one.path_or_fileobj).read_text() for one in operations}))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi()
    monkeypatch.setattr(hub, "HfApi", fake)
    return fake


@pytest.fixture
def result(tmp_path: Path) -> Path:
    folder = tmp_path / "moe"
    (folder / "logs").mkdir(parents=True)
    files = {"config.json": "{}", "a[b].txt": "x", "chat_template.jinja": "{{ messages }}"}
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / RECORD_FILE).write_text(record_text({}, [*files, "logs/*/events.out.tfevents.*"], {}))
    (folder / LAST_FILE).write_text("card")
    (folder / "private-notes.txt").write_text("secret")
    return folder


def refused(status: int, words: str) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(words, response=response)


def test_only_files_of_the_record_are_pushed(api: FakeApi, result: Path) -> None:
    hub.check_push("ada/moe")
    assert api.calls == []
    assert hub.push(result, "ada/moe", private=True) == "https://huggingface.co/ada/moe"
    (made, options), (repo, files) = api.calls
    assert (made, repo, options) == ("ada/moe", "ada/moe", {"private": True, "exist_ok": True})
    assert files.keys() == {"config.json", "a[b].txt", "chat_template.jinja", RECORD_FILE, LAST_FILE}
    file = result / "model.gguf"
    file.write_text("GGUF")
    hub.push(file, "engines/moe")
    assert api.calls[-1] == ("engines/moe", {"model.gguf": "GGUF"})


@pytest.mark.parametrize("repo", ["moe", "a/b/c", "ada/", "/moe", "ada/mo e", "../moe", "ada/a--b", "ada/moe.git"])
def test_a_name_that_the_hub_cannot_have_is_wrong_usage(repo: str, api: FakeApi) -> None:
    with pytest.raises(UsageError, match="not a name on the hub") as caught:
        hub.check_push(repo)
    assert "USER/NAME" in caught.value.hint


@pytest.mark.parametrize(
    ("user", "words", "hint"),
    [
        (LocalTokenNotFoundError("none"), "wants a token to push, and there is none", "hf auth login"),
        (OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE forbids", "unset HF_HUB_OFFLINE"),
        (refused(401, "Invalid"), "does not accept the token", "hf auth login"),
        (refused(503, "busy"), "refuses ada/moe: busy", "hf auth login"),
        (RuntimeError("no route"), "cannot be reached: RuntimeError: no route", "check the network"),
        ({**USER, "name": "eve", "orgs": None}, "eve's, who is not in ada", "it may push to: eve"),
        ({**USER, "auth": {"accessToken": {"role": "read"}}}, "may read only", "may write"),
    ],
)
def test_what_could_not_be_pushed_is_refused_before_the_work(user: Any, words: str, hint: str, api: FakeApi) -> None:
    api.user = user
    with pytest.raises(InputError, match=words) as caught:
        hub.check_push("ada/moe")
    assert hint in caught.value.hint
    assert api.calls == []


@pytest.mark.parametrize("command", [["split", "builtin"], ["finetune", "moe", "--teacher", "builtin"]])
def test_a_command_asks_the_hub_first(
    command: list[str], api: FakeApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.user = LocalTokenNotFoundError("none")
    out = tmp_path / "out"
    assert run_command([*command, "-o", str(out), "--push-to-hub", "ada/moe"]) == 3
    assert "there is none" in capsys.readouterr().err
    assert not out.exists()
    assert run_command([*command, "-o", str(out), "--push-to-hub", "moe"]) == 2
    assert run_command([*command, "-o", str(out), "--private"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_split_is_pushed(
    api: FakeApi, make_dense: Callable[..., Path], calibration_file: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    options = ["--calibration", str(calibration_file), "--tokens", "1024", "-o", str(out)]

    def create_commit(repo: str, operations: Any, **_: Any) -> None:
        api.calls.append((repo, {one.path_in_repo for one in operations}))

    api.create_commit = create_commit  # type: ignore[method-assign]
    code = run_command(["split", str(make_dense("llama")), *options, "--json", "--push-to-hub", "ada/moe", "--private"])
    assert code == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["schema"] == "moeify.split/1"
    assert "pushed to https://huggingface.co/ada/moe" in said.err
    assert api.calls[0][1]["private"]
    assert api.calls[1][1] == {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    api.calls.clear()
    file = tmp_path / "m.gguf"
    assert run_command(["export", str(out), "--gguf", str(file), "--push-to-hub", "ada/moe"]) == 0
    assert api.calls[1][1] == {"m.gguf"}
    # A result that is complete is not lost when the hub fails.
    api.create_commit = lambda *_, **__: (_ for _ in ()).throw(refused(500, "down"))  # type: ignore[method-assign]
    assert run_command(["split", str(make_dense("llama")), *options, "--overwrite", "--push-to-hub", "ada/moe"]) == 3
    assert f"hf upload ada/moe {out}" in capsys.readouterr().err
    assert (out / LAST_FILE).is_file()


def test_what_moeify_did_not_write_is_not_pushed(api: FakeApi, result: Path) -> None:
    (result / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        hub.push(result, "ada/moe")
    (result / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="outside"):
        hub.push(result, "ada/moe")
    (result / RECORD_FILE).unlink()
    with pytest.raises(InputError, match="not written by moeify"):
        hub.push(result, "ada/moe")
    assert api.calls == []


def card(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(text)
    return folder


def test_the_origin_is_an_address_only_of_what_was_opened_on_the_hub(tmp_path: Path) -> None:
    head = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nbase_model: evil/parent\n---\n# x"
    snapshot = card(tmp_path / "models--Org--SmolLM2-135M" / "snapshots" / "0abc", head)
    licence = {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    assert origin_of(snapshot) == Origin("Org/SmolLM2-135M", licence)
    local = card(tmp_path / "Org" / "Name", head)
    assert origin_of(local) == Origin("", licence)
    # What moeify wrote passes on what it was made from.
    (local / RECORD_FILE).write_text("{}")
    assert origin_of(local).base_model == "evil/parent"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no head",
        "---\nlicense: [a\n---",
        "---\n- a\n---",
        "---\nlicense: 5\n---",
        "---\nlicense: 'a\\nb'\n---",
        "---\nlicense: !!python/object/apply:os.system ['true']\n---",
        "---\nbase_model: /home/me/model\n---",
        "---\nlicense: mit",
        "\udcff",
        "---\n" + "[" * 3000 + "\n---",
    ],
)
def test_a_card_that_says_nothing_usable_gives_no_origin(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / RECORD_FILE).write_text("{}")
    assert origin_of(tmp_path) == Origin()


def test_names_of_the_hub() -> None:
    assert is_hub_id("a/b.c-d_e")
    assert not any(map(is_hub_id, ("gpt2", "", None, 5, "a/b/c", "a//b", "/a", "~/a", "./a")))

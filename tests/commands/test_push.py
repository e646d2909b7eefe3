"""`--push_to_hub` uploads what was written through huggingface_hub itself, to a stand-in for the Hub."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub import constants

from lora_lightning.__main__ import main
from lora_lightning.checkpoint import read_manifest
from lora_lightning.texts.model_card import CARD_NAME
from tests.commands.language_models import save_language_model, save_lm_checkpoint
from tests.hub import Repo, running

REPO = "me/my-adapter"
pytestmark = pytest.mark.filterwarnings("ignore:The files name the base by a path")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    save_language_model(folder / "base")
    save_lm_checkpoint(folder / "base", folder / "x.ckpt")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.endpoint + "".join(template[1:]))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield served
        huggingface_hub.close_session()


def run(lm, out, *more, command="export"):
    return main([command, f"--ckpt_path={lm / 'x.ckpt'}", f"--output_dir={out}", f"--push_to_hub={REPO}", *more])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("has_xet", [True, False])
@pytest.mark.parametrize(("command", "more"), [("export", []), ("export", ["--to=merged"]), ("merge", ["--private"])])
def test_the_repository_holds_what_the_folder_holds(lm, hub, tmp_path, capsys, monkeypatch, command, more, has_xet):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not has_xet)
    assert run(lm, tmp_path / "out", *more, command=command) == 0
    repo = hub.repos[REPO]
    assert repo.files == contents(tmp_path / "out")
    assert repo.private is ("--private" in more)
    assert hub.tokens == {"Bearer hf_test"}
    assert f"Uploaded {tmp_path / 'out'} to {hub.endpoint}/{REPO}." in capsys.readouterr().out
    assert read_manifest(tmp_path / "out").step == 0


def test_control_nothing_is_uploaded_unless_asked(lm, hub, tmp_path):
    assert main(["export", f"--ckpt_path={lm / 'x.ckpt'}", f"--output_dir={tmp_path / 'out'}"]) == 0
    assert hub.repos == {}


def test_a_public_repository_gets_nothing_where_private_was_asked(lm, hub, tmp_path, capsys):
    hub.repos[REPO] = Repo(private=False)
    assert run(lm, tmp_path / "out", "--private") == 2
    error = capsys.readouterr().err
    assert f"{REPO} is public already" in error
    assert str(tmp_path / "out") in error
    assert hub.repos[REPO].files == {}
    hub.repos[REPO] = Repo(private=True)  # negative control
    assert run(lm, tmp_path / "out2", "--private") == 0
    assert hub.repos[REPO].files


def test_weights_of_an_earlier_upload_go_and_other_files_stay(lm, hub, tmp_path):
    stale = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}"}
    others = {"notes.md": b"mine", "old/model.safetensors": b"2", "training.safetensors": b"3"}
    hub.repos[REPO] = Repo(files={**stale, **others, "model.safetensors": b"old"})
    assert run(lm, tmp_path / "out", command="merge") == 0
    assert hub.repos[REPO].files == {**others, **contents(tmp_path / "out")}


def test_a_model_card_of_somebody_else_stays(lm, hub, tmp_path):
    hub.repos[REPO] = Repo(files={CARD_NAME: b"# Mine"})
    assert run(lm, tmp_path / "out") == 0
    assert hub.repos[REPO].files == {**contents(tmp_path / "out"), CARD_NAME: b"# Mine"}
    hub.repos[REPO] = Repo(files={CARD_NAME: (tmp_path / "out" / CARD_NAME).read_bytes()})
    assert run(lm, tmp_path / "merged", command="merge") == 0  # negative control: an untouched one is replaced
    assert hub.repos[REPO].files == contents(tmp_path / "merged")


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("repos/create", 403, "You don't have the rights to create a model under the namespace me"),
        ("repos/create", 401, "Invalid username or password."),
        ("/commit/", 403, "Forbidden: pass a token with write access"),
        ("/preupload/", 413, "The repository is full"),
    ],
)
def test_a_refusal_is_a_sentence_and_the_folder_stays(lm, hub, tmp_path, capsys, path, status, message):
    hub.refuses[path] = (status, message)
    assert run(lm, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lora-lightning: error: {tmp_path / 'out'} was written and stays, but {REPO} did not take")
    assert f"{status}" in error
    assert message.rstrip(".") in error
    assert f"hf upload {REPO} {tmp_path / 'out'}" in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_hub_that_is_away_is_a_sentence(lm, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert run(lm, tmp_path / "out") == 2
    assert "was written and stays" in capsys.readouterr().err
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--push_to_hub=adapter"], "push_to_hub is 'adapter': expected owner/name"),
        (["--push_to_hub=a/b/c"], "push_to_hub is 'a/b/c': expected owner/name"),
        (["--push_to_hub=me/my..adapter"], "push_to_hub is 'me/my..adapter': expected owner/name"),
        (["--private"], "private is for push_to_hub"),
    ],
)
def test_a_mistake_shows_before_anything_is_written(lm, hub, tmp_path, capsys, arguments, words):
    for command in ("merge", "export"):
        given = [f"--ckpt_path={lm / 'x.ckpt'}", f"--output_dir={tmp_path / 'out'}"]
        assert main([command, *given, *arguments]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_no_account_and_no_network_show_before_anything_is_written(lm, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert run(lm, tmp_path / "out") == 2
    assert "run `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run(lm, tmp_path / "out") == 2
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_that_others_cannot_load_is_pointed_out(lm, hub, tmp_path):
    with pytest.warns(UserWarning, match=r"name the base by a path of this machine \(.*base\)"):
        run(lm, tmp_path / "out")

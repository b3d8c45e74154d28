"""Detectors go to the hub and come back as they are; nothing else is sent or fetched."""

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import get_session

from vlm_steer import cli, load_tiny
from vlm_steer.detection import FittedDetector, build_detector, fit_logistic, made_for
from vlm_steer.errors import ConfigError, DataError


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A hub that is a folder."""
    root = tmp_path / "hub"

    class Api:
        def create_repo(self, repo, *, private, exist_ok):
            if repo.startswith("stranger/"):
                raise OSError("403 Forbidden")
            if repo.startswith("far/"):
                client = importlib.import_module(type(get_session()).__module__.partition(".")[0])
                raise client.ConnectError("Name or service not known")
            assert exist_ok
            (root / repo).mkdir(parents=True, exist_ok=True)
            (root / repo / "private").write_text(str(private))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}: {commit_message}")

    def download(repo, *, revision, allow_patterns):
        assert allow_patterns == ["detector.json", "detector.safetensors"]
        if not (root / repo).is_dir() or revision not in (None, "main"):
            raise OSError(f"404: {repo} at {revision}\nmore")
        return str(root / repo)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return root


@pytest.fixture(scope="module")
def fitted() -> FittedDetector:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 36, generator=generator).double()
    weights = fit_logistic(x, (x[:, 0] > 0).long(), strength=0.1)
    detector = build_detector("svar", {"heads": "each", "layers": "all"})
    about = {"n_units": 60, "base_rate": 0.25}
    return FittedDetector(detector, weights, made_for=made_for(*load_tiny()), made_of=about)


def test_a_detector_comes_back_from_the_hub_as_it_went(hub, fitted):
    assert fitted.push_to_hub("me/svar", message="First") == "https://hub/me/svar: First"
    x = torch.randn(5, 36)
    model, processor = load_tiny()
    found = FittedDetector.from_pretrained("me/svar", model, processor, revision="main")
    assert found.raw(x).equal(fitted.raw(x))
    sent = {path.name for path in (hub / "me/svar").iterdir()}
    assert sent == {"detector.json", "detector.safetensors", "README.md", "private"}
    card = (hub / "me/svar/README.md").read_text()
    assert 'from_pretrained("me/svar", model, processor)' in card
    assert "60 labelled parts of texts, of which 25.0 % were hallucinated" in card


def test_a_folder_comes_before_the_hub(hub, fitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted.save_pretrained("me/svar")
    assert FittedDetector.from_pretrained("me/svar").detector == fitted.detector
    with pytest.raises(ConfigError, match="revision main has no effect on the folder"):
        FittedDetector.from_pretrained("me/svar", revision="main")


def test_what_the_hub_refuses_is_told(hub, fitted):
    with pytest.raises(DataError, match=r"me/other is no folder here.*\(404: me/other at None\)"):
        FittedDetector.from_pretrained("me/other")
    with pytest.raises(DataError, match=r"holds no detector\.json"):
        FittedDetector.from_pretrained("not-a-folder")
    with pytest.raises(ConfigError, match="403 Forbidden"):
        fitted.push_to_hub("stranger/svar")
    with pytest.raises(ConfigError, match=r"not known.*look at the network"):
        fitted.push_to_hub("far/svar")
    for name in ("svar", "a/b/c", "../up", ""):
        with pytest.raises(ConfigError, match="OWNER/NAME"):
            fitted.push_to_hub(name)


def test_detectors_are_pushed_from_the_command_line(hub, fitted, tmp_path, capsys):
    fitted.save_pretrained(tmp_path / "svar")
    with pytest.raises(SystemExit) as caught:
        cli.main(["detect", "push", str(tmp_path / "svar"), "me/svar", "--private"])
    assert not caught.value.code
    assert "https://hub/me/svar" in capsys.readouterr().out
    assert (hub / "me/svar/private").read_text() == "True"

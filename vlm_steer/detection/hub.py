"""Fitted detectors on the Hugging Face hub; nothing is fetched before it is asked for."""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_steer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlm_steer.detection.store import FittedDetector

__all__ = ["FILES", "fetched", "is_hub_name", "is_place", "push"]

FILES = ("detector.json", "detector.safetensors")
"""What a detector is stored in."""

_CARD = """---
library_name: vlm_steer
tags:
- hallucination-detection
---

# {detector}

A detector of words that the image does not support, for models of this shape: {shape}.
It was fitted on {n_units} labelled parts of texts, of which {base_rate} % were hallucinated.

```python
from vlm_steer.detection import FittedDetector

detector = FittedDetector.from_pretrained("{repo}", model, processor)
```

`detector.json` names the images that it was fitted on, so that it is not judged on them.
"""


def is_hub_name(source: str) -> bool:
    """Whether a text could name a repository: an owner, a slash and a name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None


def is_place(source: str) -> bool:
    """Whether a text names a folder or a repository rather than a detector."""
    return "/" in source or os.sep in source or Path(source).exists()


def fetched(repo: str, revision: str | None = None) -> Path:
    """The folder of a detector on the hub, downloaded unless it is there already.

    Raises:
        DataError: There is no such repository or revision, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{repo} is no folder here, and the Hugging Face hub does not give it "
            f"({_reason(error)}). Check the name; a private repository needs `hf auth login`."
        ) from error


def push(detector: "FittedDetector", repo: str, *, private: bool | None, message: str) -> str:
    """Write a detector and a card into a repository, made where there is none.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: The name is none of a repository, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, get_session

    if not is_hub_name(repo):
        raise ConfigError(f"{repo!r} cannot name a repository; write OWNER/NAME")
    api = HfApi()
    # Without a network, the client's own error comes through; which client depends on the release.
    client = sys.modules[type(get_session()).__module__.partition(".")[0]]
    unreachable: type[Exception] = getattr(client, "HTTPError", OSError)
    with tempfile.TemporaryDirectory() as folder:
        detector.save_pretrained(folder)
        Path(folder, "README.md").write_text(_card(detector, repo), encoding="utf-8")
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            commit: Any = api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=message
            )
        except (OSError, ValueError, unreachable) as error:
            raise ConfigError(
                f"the Hugging Face hub does not take {repo} ({_reason(error)}). Log in with `hf "
                "auth login`, write to an owner that you may write to, and look at the network."
            ) from error
    return str(commit.commit_url)


def _card(detector: "FittedDetector", repo: str) -> str:
    shape = ("family", "layers", "heads", "hidden_size")
    known = {name: detector.made_for[name] for name in shape if name in detector.made_for}
    rate = detector.made_of.get("base_rate")
    return _CARD.format(
        detector=detector.detector.name,
        shape=json.dumps(known),
        n_units=detector.made_of.get("n_units", "unknown"),
        base_rate="unknown" if rate is None else f"{100 * rate:.1f}",
        repo=repo,
    )


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

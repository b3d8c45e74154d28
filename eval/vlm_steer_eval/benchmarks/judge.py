"""Judges: whoever answers a prompt about an answer with a text.

A judge is a recorded file, a language model on this machine, or an endpoint that speaks the OpenAI
protocol. Every reply of the latter two is kept in a file under the prompt and the judge's name, so
that scoring again asks nothing, costs nothing and gives the same result.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from vlm_steer.errors import ConfigError, DataError
from vlm_steer_eval.running.fingerprint import model_fingerprint
from vlm_steer_eval.running.genlog import GenerationLog, content_key

from .questions import list_some, load_texts

__all__ = [
    "CachedJudge",
    "EndpointJudge",
    "Judge",
    "LocalJudge",
    "RecordedJudge",
    "load_judge",
    "load_local_judge",
]

_KEY_VARIABLE = "VLM_STEER_JUDGE_KEY"
_SECONDS = 120


class Judge(Protocol):
    """Answers prompts."""

    @property
    def name(self) -> str:
        """What the results call it."""
        ...

    def ask(self, prompts: Mapping[str, str]) -> dict[str, str]:
        """Replies by item id.

        Raises:
            DataError: a reply is missing, or the judge cannot be reached.
        """
        ...


@dataclass(frozen=True)
class RecordedJudge:
    """Replies from a file, whatever the prompts are.

    Attributes:
        path: rows with `id` and `reply` (or `text`).
    """

    path: Path

    @property
    def name(self) -> str:
        """The file's name."""
        return f"recorded:{self.path.name}"

    def ask(self, prompts: Mapping[str, str]) -> dict[str, str]:
        """Replies by item id."""
        replies = load_texts(self.path, ("id", "question_id"), ("reply", "text", "answer"))
        missing = [name for name in prompts if name not in replies]
        if missing:
            raise DataError(
                f"{self.path} has no reply for {len(missing)} of the {len(prompts)} items "
                f"({list_some(missing)}); record them, or give a judge that can be asked"
            )
        return {name: replies[name] for name in prompts}


@dataclass(frozen=True)
class EndpointJudge:
    """A chat model behind an OpenAI-compatible address, asked at temperature 0.

    Attributes:
        url: the address up to `/chat/completions`.
        model: the model's name there.
        key: sent as bearer token; empty for none.
    """

    url: str
    model: str
    key: str = ""

    @property
    def name(self) -> str:
        """The model's name; the address may hold secrets."""
        return f"endpoint:{self.model}"

    def ask(self, prompts: Mapping[str, str]) -> dict[str, str]:
        """Replies by item id, one request each."""
        return {name: self._reply(prompt) for name, prompt in prompts.items()}

    def _reply(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": prompt}],
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
                reply: Any = json.load(answer)["choices"][0]["message"]["content"]
        except (urllib.error.URLError, TimeoutError) as error:
            raise DataError(
                f"the judge {self.model} cannot be reached ({error}); every reply so far is kept: "
                "check the address and the key, and run the same command again"
            ) from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"the judge {self.model} did not answer in the OpenAI format; check the address"
            ) from error
        if not isinstance(reply, str):
            raise DataError(f"the judge {self.model} gave no text; choose a chat model")
        return reply


@dataclass(frozen=True)
class LocalJudge:
    """A language model on this machine, asked greedily.

    Attributes:
        model: a causal language model.
        tokenizer: its tokenizer, whose chat template is used where there is one.
        label: what the user calls it.
        max_new_tokens: longest reply, > 0.
    """

    model: Any
    tokenizer: Any
    label: str
    max_new_tokens: int = 512

    @cached_property
    def name(self) -> str:
        """The model's name and the beginning of the hash of its weights."""
        return f"hf:{self.label}@{model_fingerprint(self.model, self.label)['content'][:8]}"

    def ask(self, prompts: Mapping[str, str]) -> dict[str, str]:
        """Replies by item id, one generation each."""
        return {name: self._reply(prompt) for name, prompt in prompts.items()}

    def _reply(self, prompt: str) -> str:
        import torch

        if self.tokenizer.chat_template:
            inputs = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        else:
            inputs = self.tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = self.model.generate(
                **inputs.to(self.model.device),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=self.max_new_tokens,
            )
        answer = output[0, inputs["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip()


def load_local_judge(name: str) -> LocalJudge:
    """A causal language model from a folder or the hub, where `accelerate` finds room for it.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load: Any = AutoModelForCausalLM.from_pretrained
    read: Any = AutoTokenizer.from_pretrained
    try:
        tokenizer = read(name)
        model = load(name, dtype="auto", device_map="auto")
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"--judge hf:{name}: no causal language model could be loaded ({reason}); give the "
            "folder or the hub id of one"
        ) from error
    return LocalJudge(model.eval(), tokenizer, name.rstrip("/").rpartition("/")[2])


@dataclass(frozen=True)
class CachedJudge:
    """A judge that is asked every prompt once.

    Attributes:
        judge: who is asked.
        path: where replies are kept; each is written as soon as it is there.
    """

    judge: Judge
    path: Path

    @property
    def name(self) -> str:
        """The judge's own name."""
        return self.judge.name

    def ask(self, prompts: Mapping[str, str]) -> dict[str, str]:
        """Replies by item id, from the file where it has them."""
        replies: dict[str, str] = {}
        with GenerationLog(self.path) as log:
            for name, prompt in prompts.items():
                key = content_key({"judge": self.judge.name, "prompt": prompt})
                if key not in log.records:
                    reply = self.judge.ask({name: prompt})[name]
                    log.append([{"key": key, "judge": self.judge.name, "reply": reply}])
                replies[name] = str(log.records[key]["reply"])
        return replies


def load_judge(spec: str, cache: Path) -> Judge:
    """The judge that an option names.

    Args:
        spec: `recorded:FILE`; `hf:MODEL`, a folder or hub id; or `endpoint:MODEL@URL`, whose key
            is read from the environment variable VLM_STEER_JUDGE_KEY.
        cache: where the replies of the latter two are kept.

    Raises:
        ConfigError: the specification is none of these, or the model cannot be loaded.
    """
    kind, _, rest = spec.partition(":")
    if kind == "recorded" and rest:
        return RecordedJudge(Path(rest))
    if kind == "hf" and rest:
        return CachedJudge(load_local_judge(rest), cache)
    model, _, url = rest.partition("@")
    if kind == "endpoint" and model and url.startswith(("http://", "https://")):
        return CachedJudge(EndpointJudge(url, model, os.environ.get(_KEY_VARIABLE, "")), cache)
    raise ConfigError(
        f"--judge {spec!r} is unknown; give recorded:FILE, hf:MODEL or endpoint:MODEL@URL, such "
        "as endpoint:my-model@http://localhost:8000/v1"
    )

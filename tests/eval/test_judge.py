"""Judges, recorded and asked, and what MMHal-Bench makes of their replies."""

import io
import json
import urllib.error
import urllib.request

import pytest

from vlm_steer.cli import main
from vlm_steer.errors import ConfigError, DataError
from vlm_steer_eval.benchmarks.judge import CachedJudge, EndpointJudge, RecordedJudge, load_judge
from vlm_steer_eval.benchmarks.mmhal import read_rating, score_mmhal


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(n):
    return [
        {
            "question": f"What is on picture {i}?",
            "gt_answer": "A cat.",
            "model_answer": "A dog.",
            "image_content": ["Cat"],
            "image_id": str(i),
            "question_type": ("attribute", "holistic")[i % 2],
        }
        for i in range(n)
    ]


def test_ratings_are_read_and_added_up_as_published(golden, tmp_path):
    case = golden("mmhal.json")
    for item in case["parse"]:
        assert read_rating(item["reply"], "official") == item["score"], item["reply"]
    for run in case["cases"]:
        responses = [
            row | {"question_type": str(i % 8)} for i, row in enumerate(_rows(len(run["replies"])))
        ]
        replies = [{"id": str(i), "reply": text} for i, text in enumerate(run["replies"])]
        result = score_mmhal(
            _write(tmp_path / "responses.jsonl", responses),
            RecordedJudge(_write(tmp_path / "replies.jsonl", replies)),
            reading="official",
            n_resamples=5,
        )
        assert result["metrics"]["rating"]["value"] == pytest.approx(run["average"])
        assert result["metrics"]["hallucination_rate"]["value"] == pytest.approx(
            run["hallucination_rate"]
        )
        for i, value in enumerate(run["per_type"]):
            metrics = result["categories"][str(i)]["metrics"]
            assert metrics["rating"]["value"] == pytest.approx(value)


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: 4", 4),
        ("Rating:6", 6),
        ("**Rating**: **2**, since", 2),
        ("rating : 0", 0),
        ("Rating: 3. Rating: 3", 3),
        ("Rating: 2 or Rating: 5", None),
        ("Rating: 65", None),
        ("Rating: 7", None),
        ("Score 4", None),
        ("", None),
    ],
)
def test_a_rating_is_never_guessed(reply, rating):
    assert read_rating(reply) == rating


class Server:
    """Stands in for an endpoint."""

    def __init__(self, monkeypatch, replies):
        self.requests = []
        self._replies = iter(replies)
        monkeypatch.setattr(urllib.request, "urlopen", self)

    def __call__(self, request, timeout):
        self.requests.append(request)
        reply = next(self._replies)
        if isinstance(reply, Exception):
            raise reply
        return io.BytesIO(json.dumps(reply).encode())


def _said(text):
    return {"choices": [{"message": {"content": text}}]}


def test_an_endpoint_is_asked_once_per_prompt_and_judge(monkeypatch, tmp_path):
    server = Server(monkeypatch, [_said("Rating: 5"), _said("Rating: 1"), _said("Rating: 2")])
    path = tmp_path / "judge.jsonl"
    judge = CachedJudge(EndpointJudge("http://here/v1/", "m", "secret"), path)
    assert judge.ask({"a": "first", "b": "second"}) == {"a": "Rating: 5", "b": "Rating: 1"}
    assert judge.ask({"x": "second"}) == {"x": "Rating: 1"}
    assert len(server.requests) == 2
    request = server.requests[0]
    assert request.full_url == "http://here/v1/chat/completions"
    assert request.get_header("Authorization") == "Bearer secret"
    assert json.loads(request.data)["messages"][0]["content"] == "first"
    assert json.loads(request.data)["temperature"] == 0
    other = CachedJudge(EndpointJudge("http://here/v1", "other"), path)
    assert other.ask({"a": "first"}) == {"a": "Rating: 2"}
    assert "secret" not in path.read_text()


def test_replies_before_a_failure_are_kept(monkeypatch, tmp_path):
    responses = _write(tmp_path / "responses.jsonl", _rows(3))
    judge = load_judge("endpoint:m@http://here/v1", tmp_path / "judge.jsonl")
    Server(monkeypatch, [_said("Rating: 5"), urllib.error.URLError("refused")])
    with pytest.raises(DataError, match="run the same command again"):
        score_mmhal(responses, judge)
    server = Server(monkeypatch, [_said("Rating: 1"), _said("nothing")])
    result = score_mmhal(responses, judge, n_resamples=5)
    assert len(server.requests) == 2
    assert result["metrics"]["rating"]["value"] == 3
    assert result["metrics"]["unrated"]["value"] == 1


@pytest.mark.parametrize("reply", [{}, {"choices": []}, _said(None), []])
def test_an_endpoint_that_says_something_else_is_named(monkeypatch, reply):
    Server(monkeypatch, [reply])
    with pytest.raises(DataError, match="judge m"):
        EndpointJudge("http://here", "m").ask({"a": "?"})


def test_judges_are_named_by_kind(tmp_path):
    assert load_judge("recorded:r.jsonl", tmp_path).name == "recorded:r.jsonl"
    assert load_judge("endpoint:org/m@https://x/v1", tmp_path).name == "endpoint:org/m"
    for wrong in ("gpt", "endpoint:m", "recorded:", "endpoint:m@file:///etc"):
        with pytest.raises(ConfigError, match="--judge"):
            load_judge(wrong, tmp_path)


def test_a_model_on_this_machine_judges_once_per_prompt(tiny, tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny[1].tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    judge = load_judge(f"hf:{tmp_path / 'model'}", tmp_path / "judge.jsonl")
    assert judge.name.startswith("hf:model@")
    first = judge.ask({"a": "Is there a dog?"})
    assert judge.judge.ask({"b": "Is there a dog?"}) == {"b": first["a"]}
    monkeypatch.setattr(type(judge.judge), "ask", None)
    assert judge.ask({"c": "Is there a dog?"}) == {"c": first["a"]}
    with pytest.raises(ConfigError, match="no causal language model"):
        load_judge(f"hf:{tmp_path / 'nothing'}", tmp_path / "judge.jsonl")


def test_missing_replies_and_answers_are_named(tmp_path):
    responses = _write(tmp_path / "responses.jsonl", _rows(3))
    replies = _write(tmp_path / "replies.jsonl", [{"id": "0", "reply": "Rating: 3"}])
    with pytest.raises(DataError, match="no reply for 2 of the 3"):
        score_mmhal(responses, RecordedJudge(replies))
    _write(responses, [row | {"model_answer": ""} for row in _rows(1)])
    with pytest.raises(DataError, match="model_answer"):
        score_mmhal(responses, RecordedJudge(replies))


def test_the_command_writes_scores_and_says_what_was_not_rated(tmp_path, capsys):
    responses = _write(tmp_path / "responses.jsonl", _rows(2))
    replies = _write(
        tmp_path / "replies.jsonl", [{"id": "0", "reply": "Rating: 2"}, {"id": "1", "reply": "?"}]
    )
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(
            ["score", "mmhal", "--responses", str(responses), "--judge", f"recorded:{replies}",
             "--output", str(output)]
        )  # fmt: skip
    assert not stop.value.code
    assert "1 replies hold no rating" in capsys.readouterr().err
    scores = json.loads((output / "scores.json").read_text())
    assert scores["metrics"]["hallucination_rate"]["value"] == 1
    assert scores["judge"] == "recorded:replies.jsonl"

"""Steered models in other harnesses, against those harnesses where they are installed."""

import base64
import importlib
import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import vlm_steer
from vlm_steer.errors import ConfigError, DataError
from vlm_steer.generation import encode, render_prompt, without_prompt
from vlm_steer_eval.adapters.steered import SteeredModel, file_hash
from vlm_steer_eval.running.generation import Settings
from vlm_steer_eval.running.pipeline import run_benchmark
from vlm_steer_eval.running.sources import local_pope

ROOT = Path(__file__).parents[2]
QUESTION = "Is there a car in the image?"
STEER = {"method": "pai", "alpha": 2.0, "gamma": 1.0}


@pytest.fixture(scope="module")
def steered():
    return SteeredModel("tiny", STEER)


def _chat(image, text=QUESTION):
    return [
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": text}],
        }
    ]


def _expected(tiny, images, spec, tokens=4):
    model, processor = tiny
    prompts = [render_prompt(processor, QUESTION)] * len(images)
    inputs = encode(processor, prompts, images)
    with vlm_steer.steer(model, spec):
        output = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    answers = without_prompt(output, inputs["input_ids"])
    return [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]


@pytest.fixture
def pictures(image_folder):
    return sorted(image_folder.iterdir())


def test_conversations_get_the_answers_of_the_steered_model(steered, tiny, pictures):
    images = [Image.open(path).convert("RGB") for path in pictures]
    expected = _expected(tiny, images, STEER)
    chats = [_chat(path) for path in map(str, pictures)]
    assert steered.answer(chats, max_new_tokens=4) == expected
    assert [steered.answer([_chat(i)], max_new_tokens=4)[0] for i in images] == expected
    texts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    mixed = steered.answer([chats[0], texts], max_new_tokens=4)
    assert mixed[0] == expected[0]
    whole = steered.answer(chats[:1], max_new_tokens=4)[0]
    first = whole.split()[0]
    assert steered.answer(chats[:1], max_new_tokens=4, stop=[whole[len(first) :] or first])[0] in (
        first, "",
    )  # fmt: skip
    with pytest.raises(DataError, match="a path or a picture"):
        steered.answer([_chat(3)], max_new_tokens=1)


def test_a_closed_model_is_what_it_was(tiny, pictures):
    image = Image.open(pictures[0]).convert("RGB")
    closed = SteeredModel("tiny", "vcd")
    closed.close()
    inputs = encode(tiny[1], [render_prompt(tiny[1], QUESTION)], [image])
    assert torch.equal(closed.model(**inputs).logits, tiny[0](**inputs).logits)


def test_a_file_is_known_by_its_content(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: var")
    first = file_hash(str(path))
    path.write_text("method: vcd")
    assert len(first) == 12
    assert file_hash(str(path)) != first
    assert file_hash("var+vcd") is None
    assert file_hash(None) is None
    with pytest.raises(ConfigError, match="cannot be read"):
        file_hash("nothing.yaml")


# -- lmms-eval --------------------------------------------------------------------------------
def _lmms():
    return pytest.importorskip("lmms_eval.models", reason="lmms-eval is not installed")


def test_lmms_eval_finds_the_model_through_its_entry_point():
    registry = _lmms()
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    value = project["entry-points"]["lmms_eval.models"]["vlm_steer"]
    module, _, name = value.partition(":")
    manifest = getattr(__import__(module, fromlist=[name]), name)()
    own = ModelRegistryV2()
    own.register_manifest(manifest)
    assert own.get_model_class("vlm_steer").__name__ == "SteeredLmms"
    assert registry is not None


@pytest.fixture
def lmms_requests(pictures):
    _lmms()
    from lmms_eval.api.instance import Instance

    docs = [{"image": Image.open(path).convert("RGB")} for path in pictures]

    def to_messages(doc):
        return [
            {
                "role": "user",
                "content": [
                    {"type": "image", "url": doc["image"]},
                    {"type": "text", "text": QUESTION},
                ],
            }
        ]

    def make(**options):
        return docs, [
            Instance(
                request_type="generate_until",
                arguments=("", to_messages, options, index, "toy", "test"),
                idx=0,
                metadata={"task": "toy", "doc_id": index, "repeats": 1},
            )
            for index in range(len(docs))
        ]

    return make


def test_lmms_eval_gets_the_answers_of_the_steered_model(lmms_requests, tiny, tmp_path):
    from vlm_steer_eval.adapters.lmms_eval_model import SteeredLmms

    spec = tmp_path / "steer.yaml"
    spec.write_text(json.dumps(STEER))
    docs, requests = lmms_requests(max_new_tokens=4, until=["\n\n"], temperature=0)
    arguments = f"pretrained=tiny,steer={spec},batch_size=3"
    with pytest.raises(ConfigError, match=f"steer_hash={file_hash(str(spec))}"):
        SteeredLmms.create_from_arg_string(arguments)
    model = SteeredLmms.create_from_arg_string(f"{arguments},steer_hash={file_hash(str(spec))}")
    model.task_dict = {"toy": {"test": docs}}
    expected = _expected(tiny, [doc["image"] for doc in docs], STEER)
    assert model.generate_until(requests) == expected
    short = [r.args[1:] for r in requests]  # as the guide documents them
    for request, arguments in zip(requests, short, strict=True):
        request.arguments = arguments
    assert model.generate_until(requests) == expected
    for options, message in (
        ({"temperature": 0.7}, "samples"),
        ({"do_sample": True}, "samples"),
        ({"logprobs": 3}, "no option logprobs"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.generate_until(lmms_requests(**options)[1])
    with pytest.raises(ConfigError, match="unknown speed"):
        SteeredLmms(pretrained="tiny", speed=3)


# -- inspect_ai -------------------------------------------------------------------------------
def test_inspect_ai_reads_the_exported_logs(tiny, question_file, image_folder, tmp_path):
    log = pytest.importorskip("inspect_ai.log", reason="inspect_ai is not installed")
    from vlm_steer_eval.adapters.inspect_ai import export_run

    run_benchmark(
        local_pope([question_file], image_folder), "none,vcd", *tiny, model_name="tiny",
        settings=Settings(max_new_tokens=2), batch_size=8, output=tmp_path / "run", n_resamples=20,
    )  # fmt: skip
    paths = export_run(tmp_path / "run", tmp_path / "logs")
    assert [path.name for path in paths] == ["00-none.json", "01-vcd.json"]
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    for path, arm in zip(paths, ("none", "vcd"), strict=True):
        read = log.read_eval_log(str(path))
        assert read.status == "success"
        assert len(read.samples) == 8
        (result,) = [score for score in read.results.scores if score.name == "random"]
        accuracy = scores["arms"][arm]["random"]["metrics"]["accuracy"]
        assert result.metrics["accuracy"].value == accuracy["value"]
        assert result.metrics["accuracy"].metadata["ci95"] == accuracy["ci95"]
        right = sum(sample.scores["vlm_steer"].value == "C" for sample in read.samples)
        assert right / 8 == accuracy["value"]
        assert {sample.target for sample in read.samples} == {"yes", "no"}
    assert (
        log.read_eval_log(str(paths[1])).eval.model_args["steer"]["methods"][0]["method"] == "vcd"
    )


def test_an_unfinished_run_is_not_exported(tmp_path):
    pytest.importorskip("inspect_ai.log", reason="inspect_ai is not installed")
    from vlm_steer_eval.adapters.inspect_ai import export_run

    with pytest.raises(DataError, match="holds no scores"):
        export_run(tmp_path, tmp_path / "logs")


# -- VLMEvalKit -------------------------------------------------------------------------------
class _BaseModel:
    """What VLMEvalKit 0.2's `BaseModel` does between a data set and a model."""

    allowed_types = ("text", "image", "video")

    def __init__(self):
        self.dump_image_func = None

    def generate(self, message, dataset=None):
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)

    def chat(self, messages, dataset=None):
        return self.chat_inner(messages, dataset=dataset)


@pytest.fixture
def steered_vlm(monkeypatch):
    """The class on the base of VLMEvalKit, or on a stand-in for it."""
    try:
        import vlmeval.vlm.base  # noqa: F401
    except ImportError:
        for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["vlmeval.vlm.base"].BaseModel = _BaseModel
    monkeypatch.delitem(sys.modules, "vlm_steer_eval.adapters.vlmevalkit", raising=False)
    module = importlib.import_module("vlm_steer_eval.adapters.vlmevalkit")
    monkeypatch.delitem(sys.modules, "vlm_steer_eval.adapters.vlmevalkit")
    return module.SteeredVLM


def _parts(picture, text=QUESTION):
    return [{"type": "image", "value": str(picture)}, {"type": "text", "value": text}]


def test_vlmevalkit_gets_the_answers_of_the_steered_model(steered_vlm, steered, tiny, pictures):
    model = steered_vlm(model="tiny", steer=STEER, max_new_tokens=4, use_vllm=False)
    image = Image.open(pictures[0]).convert("RGB")
    first = model.generate(_parts(pictures[0]), dataset="POPE")
    assert first == _expected(tiny, [image], STEER)[0]
    turns = [
        {"role": "user", "content": _parts(pictures[0])},
        {"role": "assistant", "content": [{"type": "text", "value": first}]},
        {"role": "user", "content": [{"type": "text", "value": "And a dog?"}]},
    ]
    told = [
        *_chat(str(pictures[0])),
        {"role": "assistant", "content": [{"type": "text", "text": first}]},
        {"role": "user", "content": [{"type": "text", "text": "And a dog?"}]},
    ]
    assert [model.chat(turns)] == steered.answer([told], max_new_tokens=4)
    with pytest.raises(DataError, match="not video"):
        model.generate_inner([{"type": "video", "value": "a.mp4"}])
    with pytest.raises(ConfigError, match="leave vLLM out"):
        steered_vlm(model="tiny", use_vllm=True)


def test_vlmevalkit_runs_the_steered_model_on_a_table(tiny, pictures, tmp_path, monkeypatch):
    pytest.importorskip("vlmeval.inference", reason="VLMEvalKit is not installed")
    from vlmeval.dataset.image_vqa import CustomVQADataset
    from vlmeval.inference import infer_data_job
    from vlmeval.smp import load

    from vlm_steer_eval.adapters.vlmevalkit import SteeredVLM

    rows = ["index\timage\tquestion\tanswer"]
    for n, picture in enumerate(pictures[:2]):
        rows.append(f"{n}\t{base64.b64encode(picture.read_bytes()).decode()}\t{QUESTION}\tyes")
    (tmp_path / "two.tsv").write_text("\n".join(rows) + "\n")
    monkeypatch.setenv("LMUData", str(tmp_path))
    monkeypatch.setenv("PRED_FORMAT", "tsv")
    data = CustomVQADataset(dataset="two")
    infer_data_job(
        SteeredVLM(model="tiny", steer=STEER, max_new_tokens=4), str(tmp_path), "tiny_pai", data
    )
    found = load(str(tmp_path / "tiny_pai_two.tsv"))
    images = [Image.open(path).convert("RGB") for path in pictures[:2]]
    assert list(found["prediction"]) == _expected(tiny, images, STEER)

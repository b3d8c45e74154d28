"""DeCoRe where its effect is known in advance, and the files of head scores."""

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import vlm_steer
from tests.contract.settings import heads_for
from tests.contract.test_contract import assert_close, generate, two_rows
from tests.families import zoo
from vlm_steer import functional as F
from vlm_steer.commands.head_scores import _lengths, image_files, visual_heads
from vlm_steer.errors import ConfigError, DataError, UnsupportedModelError
from vlm_steer.heads import read_head_scores, write_head_scores

HEADS = [(0, 0), (1, 0), (2, 0)]
"""The best three of the file that the contract tests use."""


def silence(tensor: Tensor, head: int, rows: int) -> Tensor:
    """``[batch, length, heads * head_dim]`` with one head zero in the last rows."""
    tensor = tensor.clone()
    tensor[:, -rows:, head * zoo.HEAD_DIM : (head + 1) * zoo.HEAD_DIM] = 0
    return tensor


def masked_logits(family: zoo.Family, batch: dict[str, Tensor], rows: int, mask_by: str) -> Tensor:
    """Logits of one forward without a cache in which the heads are masked in the last rows."""

    def before(module: nn.Module, args: tuple[Tensor, ...], head: int) -> tuple[Tensor]:
        return (silence(args[0], head, rows),)

    def after(module: nn.Module, args: object, output: Tensor, head: int) -> Tensor:
        return silence(output, head, rows)

    with ExitStack() as hooks, torch.no_grad():
        for layer, head in HEADS:
            attention = family.model.get_decoder().layers[layer].self_attn
            handle = (
                attention.o_proj.register_forward_pre_hook(partial(before, head=head))
                if mask_by == "zero"
                else attention.q_proj.register_forward_hook(partial(after, head=head))
            )
            hooks.callback(handle.remove)
        logits: Tensor = family.model(**batch).logits[:, -1].float()
    return logits


@pytest.mark.parametrize("mask_by", ["zero", "uniform"])
@pytest.mark.parametrize("backend", ["paired", "separate"])
def test_the_masked_stream_is_a_forward_without_a_cache_with_masked_heads(
    mask_by: str, backend: str
) -> None:
    family = zoo.load("llava")
    batch = family.batch([family.inputs(seed=2)])
    spec = {"method": "decore", "head_file": heads_for("llava"), "n_heads": 3, "mask_by": mask_by}
    with vlm_steer.steer(family.model, spec, backend=backend):
        logits = generate(family, batch, max_new_tokens=3)
    for step in range(3):
        with torch.no_grad():
            base = family.model(**batch).logits[:, -1].float()
        masked = masked_logits(family, batch, 1 + step, mask_by)
        expected = F.decore_logits(base, masked).logits
        shift = (logits[:, step] - expected).mean()
        torch.testing.assert_close(logits[:, step] - shift, expected, atol=2e-4, rtol=1e-4)
        assert not torch.allclose(base, masked, atol=1e-2)
        token = logits[:, step].argmax(dim=-1, keepdim=True)
        batch["input_ids"] = torch.cat([batch["input_ids"], token], dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])


@pytest.mark.parametrize("span", ["decode", "all"])
def test_the_prompt_is_passed_once_unless_heads_are_masked_in_it(span: str) -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    length, seen = batch["input_ids"].shape[1], []

    def count(module: nn.Module, args: object, kwargs: dict[str, Tensor]) -> None:
        seen.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    family.model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    spec = {"method": "decore", "head_file": heads_for("llava"), "n_heads": 3, "span": span}
    with vlm_steer.steer(family.model, spec):
        generate(family, batch, max_new_tokens=3)
    over_prompt = [(2, length), (2, 1)] if span == "decode" else [(4, length)]
    assert seen == [*over_prompt, (4, 1), (4, 1)]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_a_shared_prompt_gives_what_a_prompt_of_its_own_gives(name: str) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    spec = {"method": "decore", "head_file": heads_for(name), "n_heads": 3}
    with vlm_steer.steer(family.model, spec):
        shared = generate(family, batch)
    # A method that acts on the prompt, here with no effect, makes the stream pass it by itself.
    idle = {"method": "vaf", "alpha": 1e-9, "beta": 0.0}
    with vlm_steer.steer(family.model, [spec, idle]):
        own = generate(family, batch)
    assert_close(shared, own)


def test_the_stream_of_another_contrast_keeps_its_heads() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    decore = {"method": "decore", "head_file": heads_for("llava"), "n_heads": 3, "alpha": 0.5}
    vcd = {"method": "vcd", "alpha": 0.5, "beta": 0.0}
    steps = {}
    for name, spec in {"none": None, "d": decore, "v": vcd, "d+v": [decore, vcd]}.items():
        with vlm_steer.steer(family.model, spec):
            steps[name] = generate(family, batch, max_new_tokens=1)
    expected = steps["d"] + steps["v"] - steps["none"]
    torch.testing.assert_close(steps["d+v"], expected, atol=2e-4, rtol=1e-4)


def test_a_share_of_heads_is_a_share_of_all_heads() -> None:
    family = zoo.load("llava")
    spec = {"method": "decore", "head_file": heads_for("llava"), "n_heads": 0.25}
    with vlm_steer.steer(family.model, spec) as steering:
        status = steering.status()["methods"][0]
    assert status["notes"] == ["masked heads: 0-0, 1-0, 2-0, 3-0"]
    spec["layers"] = [0, 2]
    with vlm_steer.steer(family.model, spec) as steering:
        status = steering.status()["methods"][0]
    assert (status["notes"], status["layers"]) == (["masked heads: 0-0, 0-1, 1-0, 1-1"], [0, 1])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "vlm-steer build decore"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"n_heads": 1.5}, "n_heads is 1.5"),
        ({"alpha": -1.0}, "alpha"),
        ({"beta": 2.0}, "beta"),
        ({"alpha": 0.0, "mask_by": "zero"}, "mask_by has no effect"),
        ({"scope": "all"}, "scope has no effect"),
        ({"head_file": "FILE", "n_heads": 17}, "17 heads are to be masked"),
    ],
)
def test_what_cannot_be_masked_is_refused(options: dict[str, object], why: str) -> None:
    if "head_file" in options:
        options = {**options, "head_file": heads_for("llava")}
    with pytest.raises(ConfigError, match=why):
        vlm_steer.attach(zoo.load("llava").model, {"method": "decore", **options})


def test_heads_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    write_head_scores(path, {(0, 0): [0.1], (30, 2): [0.9]})
    with pytest.raises(ConfigError, match="head 30-2, but this model has 4 layers of 4 heads"):
        vlm_steer.attach(zoo.load("llava").model, {"method": "decore", "head_file": str(path)})


def test_head_scores_are_read_as_published_best_first(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.write_text('{"0-3": [0, 0.2], "14-1": [0.5, 1.0], "2-0": [0.1]}')
    assert read_head_scores(path) == {(14, 1): 0.75, (0, 3): 0.1, (2, 0): 0.1}
    assert list(read_head_scores(path)) == [(14, 1), (0, 3), (2, 0)]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"a": [1]}', '{"1-2": []}', '{"1-2": 3}', '{"1-2": [NaN]}']
)
def test_files_that_hold_no_head_scores_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "heads.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"heads\.json"):
        read_head_scores(path)
    with pytest.raises(DataError, match="do not exist"):
        read_head_scores(tmp_path / "no.json")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    from PIL import Image

    path = tmp_path / "a.png"
    Image.new("RGB", (48, 48), (200, 10, 30)).save(path)
    return path


def test_visual_heads_are_those_whose_favourite_key_is_an_image_token(picture: Path) -> None:
    from vlm_steer.generation import encode, render_prompt
    from vlm_steer.images import open_image

    model, processor = vlm_steer.load_tiny()
    scores = visual_heads(model, processor, [picture, picture], "What is there?", max_new_tokens=1)
    inputs = encode(processor, [render_prompt(processor, "What is there?")], [open_image(picture)])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions
    is_image = inputs["input_ids"][0] == model.config.image_token_id
    for layer, heads in enumerate(weights):
        favourite = is_image[heads[0, :, -1].argmax(dim=-1)].float()
        for head, looks in enumerate(favourite.tolist()):
            assert scores[layer, head] == [looks, looks]
    assert len({values[0] for values in scores.values()}) == 2


def test_tokens_after_the_end_of_an_answer_do_not_count() -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2, 3]))
    new = torch.tensor([[5, 2, 2, 2], [5, 6, 7, 3], [5, 6, 7, 8], [3, 0, 0, 0]])
    assert _lengths(new, model) == [2, 4, 4, 1]


def test_a_model_with_cross_attention_has_no_visual_heads_to_detect(picture: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        visual_heads(zoo.load("mllama").model, None, [picture], "What?")


def test_folders_stand_for_the_images_in_them(picture: Path) -> None:
    (picture.parent / "notes.txt").write_text("no image")
    assert image_files([picture.parent]) == [picture]
    assert image_files([picture, picture.parent]) == [picture, picture]
    with pytest.raises(DataError, match="does not exist"):
        image_files([picture.parent / "no.png"])
    picture.unlink()
    with pytest.raises(DataError, match="no images"):
        image_files([picture.parent])


def test_head_scores_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    write_head_scores(path, {(3, 1): [0.5, 0.25]})
    assert json.loads(path.read_text()) == {"3-1": [0.5, 0.25]}
    assert read_head_scores(path) == {(3, 1): 0.375}

"""Every family steers as the committed table says, and unusual ones as their cases demand."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers
from torch import Tensor

import vlm_steer
from tests.contract.settings import CI_FAMILIES, HOOKS, EditedHidden, EveryRow
from tests.families import extra, report, zoo
from vlm_steer.commands.models import checked, families, markdown
from vlm_steer.engine.hooks import At, Attends, Method, Rows
from vlm_steer.engine.model import inspect_model
from vlm_steer.engine.plan import make_plan
from vlm_steer.errors import UnsupportedModelError
from vlm_steer.registry import list_methods

ATTACHING = (*zoo.FAMILIES, *zoo.extra_families())
SAME_VERSION = checked()["transformers"] == transformers.__version__
pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")


def rarely(names: tuple[str, ...], *, ci: tuple[str, ...]) -> list[object]:
    """Names as parameters; those outside the CI subset carry the ``matrix`` mark."""
    return [n if n in ci else pytest.param(n, marks=pytest.mark.matrix) for n in names]


@pytest.mark.skipif(not SAME_VERSION, reason="the table was made with another transformers")
@pytest.mark.parametrize("name", rarely((*ATTACHING, *extra.REFUSED), ci=CI_FAMILIES))
def test_a_family_is_what_the_table_says(name: str) -> None:
    known, seen = checked(), report.examine(name)
    expected = known["families"][name]
    assert seen["attaches"] == expected["attaches"] == (name not in extra.REFUSED)
    if not seen["attaches"]:
        assert extra.REFUSED[name] in seen["why"]
        return
    methods = set(known["methods"]) & set(list_methods())
    hint = f"run python -m tests.families.report {name}"
    assert set(seen.pop("refuses")) & methods == set(expected.pop("refuses")) & methods, hint
    assert seen == expected, hint


def test_the_page_is_the_table() -> None:
    assert report.DOCS.read_text() == markdown(checked()), "run python -m tests.families.report"


@pytest.mark.skipif(not SAME_VERSION, reason="the table was made with another transformers")
def test_the_table_has_every_family_and_most_of_them_steer_with_pixels() -> None:
    rows = checked()["families"]
    assert set(rows) == set(families())
    attached = [row for row in rows.values() if row["attaches"]]
    assert sum(bool(row["steered"]["images per prompt"]) for row in attached) >= 60
    assert {name for name, row in rows.items() if row["attaches"] is False} == set(extra.REFUSED)


@pytest.mark.matrix
def test_the_table_knows_every_method() -> None:
    assert set(checked()["methods"]) == set(list_methods())


@pytest.mark.parametrize("name", rarely(ATTACHING, ci=("inkling2", "llama4", "glm5_next")))
def test_every_kind_of_hook_acts_on_every_family(name: str) -> None:
    family = zoo.load(name)
    images = 0 if zoo.unsupported(name, 1) else 1
    batch = report._two_rows(family, images)
    base = generated(family, batch)
    forced = generated(family, batch, EveryRow())
    assert float((forced - base).abs().nan_to_num().max()) < 1e-4
    has_mlps = bool(inspect_model(family.model).mlps)
    for hook, method in HOOKS.items():
        if hook == "mlp" and not has_mlps:
            with pytest.raises(UnsupportedModelError, match="none was found"):
                vlm_steer.attach(family.model, method)
            continue
        if hook == "taps" or (not images and hook in ("branches", "mask")):
            continue  # readouts have a list of their own; these act on images
        steered = generated(family, batch, method)
        if not (name == "mllama" and hook == "mask"):
            assert not torch.equal(steered, base), hook
        assert steered.isfinite().any(dim=-1).all(), hook


def generated(family: zoo.Family, batch: zoo.Inputs, spec: object = None) -> Tensor:
    """Raw logits of a short greedy generation, ``[rows, steps, vocabulary]``."""
    with vlm_steer.steer(family.model, spec):
        output = family.model.generate(
            **batch,
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(output.logits, dim=1)


# The cases that are not uniform.


def test_attention_methods_act_in_the_attention_layers_of_a_hybrid_and_say_so() -> None:
    family = zoo.load("qwen3_5")
    with vlm_steer.steer(family.model, {"method": "pai", "alpha": 0.5, "gamma": 1.0}) as steering:
        generated(family, report._two_rows(family, 1))
    assert inspect_model(family.model).n_layers == zoo.LAYERS
    with vlm_steer.steer(family.model, {"method": "vhr", "layers": "all"}) as steering:
        (status,) = steering.status()["methods"]
    assert status["layers"] == [1, 3]
    assert "no attention to act on in layers [0, 2]" in status["notes"]


def test_a_method_without_an_attention_layer_is_refused_with_those_there_are() -> None:
    model = zoo.load("qwen3_5").model
    with pytest.raises(UnsupportedModelError, match=r"Choose among layers \[1, 3\]"):
        vlm_steer.attach(model, {"method": "vhr", "layers": {"indices": [0, 2]}})


def test_hidden_states_of_a_hybrid_are_edited_in_every_layer() -> None:
    family = zoo.load("qwen3_5")
    with vlm_steer.steer(family.model, EditedHidden()) as steering, torch.no_grad():
        family.model(**report._two_rows(family, 1))
        effect = steering.effect()
    assert sorted(effect["editedhidden"]["layers"]) == [0, 1, 2, 3]


@dataclass(frozen=True, kw_only=True)
class Watching(Method):
    """Keeps what a mask hook sees."""

    name: ClassVar[str] = "watching"
    rows: ClassVar[Rows] = "all"
    attends: ClassVar[Attends] = "image"
    seen: list[tuple[Tensor, At]] = dataclasses.field(default_factory=list)

    def mask(self, allowed: Tensor, at: At) -> Tensor:
        self.seen.append((allowed, at))
        return allowed


def watched(family: zoo.Family, batch: zoo.Inputs) -> list[tuple[Tensor, At]]:
    watching = Watching()
    with vlm_steer.steer(family.model, watching), torch.no_grad():
        family.model(**batch)
    return watching.seen


def test_image_rows_of_gemma3_see_their_whole_image_and_text_rows_nothing_ahead() -> None:
    family = zoo.load("gemma3")
    allowed, at = watched(family, family.inputs())[-1]
    ahead = allowed[0] & ~torch.ones_like(allowed[0]).tril()
    is_image = at.columns.is_image[0]
    assert ahead[is_image][:, is_image].any()
    assert not ahead[~is_image].any()


def test_the_prompt_of_paligemma_is_a_prefix() -> None:
    family = zoo.load("paligemma")
    allowed, at = watched(family, family.inputs())[0]
    assert allowed.all()
    assert not at.columns.is_system.any()  # the image comes first


def test_cross_attention_layers_of_mllama_hold_the_image_alone() -> None:
    family = zoo.load("mllama")
    with vlm_steer.steer(family.model, report.OnImage()) as steering, torch.no_grad():
        family.model(**family.inputs())
        (status,) = steering.status()["methods"]
        effect = steering.effect()
    assert status["layers"] == [1, 3] == sorted(effect["onimage"]["layers"])


def test_queries_of_a_q_former_have_no_grid_and_are_image_tokens_that_come_first() -> None:
    family = zoo.load("instructblip")
    info = inspect_model(family.model)
    assert "learned queries" in info.geometry.unknown
    _, at = watched(family, family.inputs())[0]
    assert int(at.columns.is_image.sum()) == 6
    assert not at.columns.is_system.any()


def test_video_frames_are_images() -> None:
    family = zoo.load("qwen2_5_vl")
    image = family.inputs()
    video = {
        "input_ids": torch.where(image["input_ids"] == zoo.IMAGE, zoo.VIDEO, image["input_ids"]),
        "attention_mask": image["attention_mask"],
        "mm_token_type_ids": image["mm_token_type_ids"] * 2,
        "pixel_values_videos": image["pixel_values"],
        "video_grid_thw": image["image_grid_thw"],
    }
    base = generated(family, video)
    _, at = watched(family, video)[0]
    assert torch.equal(at.columns.is_image, image["input_ids"] == zoo.IMAGE)
    for spec in (report.OnImage(), "vcd"):
        assert not torch.equal(generated(family, video, spec), base)


def test_a_bias_and_a_sink_in_the_scores_are_repeated() -> None:
    family = zoo.load("inkling2")
    assert inspect_model(family.model).score_options == {"position_bias", "sinks"}
    batch = report._two_rows(family, 1)
    forced = generated(family, batch, EveryRow())
    torch.testing.assert_close(forced, generated(family, batch), rtol=0, atol=1e-4)


def test_an_unknown_term_of_the_scores_is_refused_at_attach_for_methods_that_need_rows() -> None:
    known = inspect_model(zoo.load("llava").model)
    info = dataclasses.replace(known, score_options=frozenset({"tilt"}))
    with pytest.raises(UnsupportedModelError, match="takes tilt, whose meaning"):
        make_plan([report.LastRow()], info)
    assert make_plan([EditedHidden()], info).bounds

"""VTI and VISTA where their effect is known in advance, and the files of directions."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import vlm_steer
from tests.contract.settings import directions_for
from tests.contract.test_contract import assert_close, generate, two_rows
from tests.families import zoo
from tests.methods.views import IMAGE, INSTRUCTION, SYSTEM, view
from vlm_steer import functional as F
from vlm_steer.commands.directions import from_pairs, read_pairs
from vlm_steer.directions import Directions
from vlm_steer.engine.hooks import Reference
from vlm_steer.engine.pictures import with_masked_patches
from vlm_steer.engine.steer import last_hidden_states
from vlm_steer.errors import ConfigError, DataError
from vlm_steer.methods.vista import VISTA
from vlm_steer.methods.vti import VTI

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")


def text_only(family: zoo.Family, row: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prompt of one row without its image."""
    kept = ~family.expected_image_mask(row)[0]
    ids = row["input_ids"][:, kept]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def states(family: zoo.Family, row: dict[str, Tensor]) -> Tensor:
    """``[batch, layers, hidden]`` after every layer at the last token, by plain hooks."""
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda m, a, out: seen.append(out[:, -1]))
        for layer in family.model.get_decoder().layers
    ]
    with torch.no_grad():
        family.model(**row)
    for handle in handles:
        handle.remove()
    return torch.stack(seen, dim=1)


def test_vista_turns_what_mlps_write_towards_what_the_image_adds() -> None:
    family = zoo.load("llava")
    row = family.batch([family.inputs(seed=3)])
    vectors = states(family, row) - states(family, text_only(family, row))
    with vlm_steer.steer(family.model, VISTA(gamma=0.0)):
        steered = generate(family, row, max_new_tokens=1)
    handles = [
        layer.mlp.register_forward_hook(
            lambda m, a, out, v=vectors[:, i, None]: F.vsv_shift(out, v, strength=0.17)
        )
        for i, layer in enumerate(family.model.get_decoder().layers)
    ]
    expected = generate(family, row, max_new_tokens=1)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(steered, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(steered, generate(family, row, max_new_tokens=1), atol=1e-2)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_vectors_of_a_padded_batch_are_those_of_its_rows(name: str) -> None:
    family = zoo.load(name)
    seen: list[Tensor] = []

    class Looks(VISTA):
        def prepare(self, reference: Reference) -> object:
            prepared = super().prepare(reference)
            seen.append(torch.stack([prepared[layer] for layer in sorted(prepared)], dim=1))
            return prepared

    with vlm_steer.steer(family.model, Looks(gamma=0.0)):
        generate(family, two_rows(family), max_new_tokens=1)
    for index, n_text in enumerate((5, 9)):
        row = family.inputs(n_text=n_text, seed=index)
        expected = states(family, row) - states(family, text_only(family, row))
        torch.testing.assert_close(seen[0][index], expected[0], atol=1e-4, rtol=1e-4)


def test_vista_without_a_shift_is_sla() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    with vlm_steer.steer(family.model, {"method": "vista", "strength": 0.0}):
        steered = generate(family, batch)
    with vlm_steer.steer(family.model, "sla"):
        assert torch.equal(generate(family, batch), steered)


def test_vti_turns_states_by_a_tenth_of_its_strength() -> None:
    vectors = torch.tensor([[0.0, 3.0]])
    plan = Directions(vectors=vectors, method="vti", family="", made_of={})
    output = torch.tensor([[[2.0, 0.0], [0.0, -4.0]]])
    shifted = VTI(strength=1.0).mlp(output, view([SYSTEM, IMAGE, INSTRUCTION], rows=2, plan=plan))
    torch.testing.assert_close(shifted.norm(dim=-1), output.norm(dim=-1))
    assert float(shifted[0, 0, 1] / shifted[0, 0, 0]) == pytest.approx(0.1)
    torch.testing.assert_close(shifted[0, 1], output[0, 1])  # it points the other way exactly


@pytest.mark.parametrize("site", ["mlp", "residual"])
def test_vti_acts_at_one_site(site: str) -> None:
    family = zoo.load("llava")
    path = directions_for("llava")
    direction = Directions.load(path).vectors[2]
    batch = two_rows(family)
    with vlm_steer.steer(
        family.model, {"method": "vti", "directions": path, "site": site, "layers": [2, 3]}
    ) as steering:
        steered = generate(family, batch, max_new_tokens=1)
        assert "directions of" in steering.status()["methods"][0]["notes"][0]
    layer = family.model.get_decoder().layers[2]
    module = layer.mlp if site == "mlp" else layer
    handle = module.register_forward_hook(lambda m, a, o: F.vti_shift(o, direction, strength=0.9))
    expected = generate(family, batch, max_new_tokens=1)
    handle.remove()
    assert_close(steered, expected)


def test_directions_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    made = Directions(
        vectors=torch.randn(4, 8),
        method="vti",
        family="llava",
        made_of={"pairs": 3, "form": "mean"},
    )
    made.save(path)
    read = Directions.load(path)
    assert torch.equal(read.vectors, made.vectors)
    assert (read.method, read.family, read.made_of) == ("vti", "llava", made.made_of)


@pytest.mark.parametrize("other", ["qwen2_vl", "gemma3"])
def test_directions_of_another_model_are_refused(other: str) -> None:
    with pytest.raises(ConfigError, match="made for vti on llava"):
        vlm_steer.attach(
            zoo.load(other).model, {"method": "vti", "directions": directions_for("llava")}
        )


def test_directions_of_another_size_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "d.safetensors")
    Directions(vectors=torch.randn(3, 32), method="vti", family="llava", made_of={}).save(path)
    with pytest.raises(ConfigError, match="3 layers of 32"):
        vlm_steer.attach(zoo.load("llava").model, {"method": "vti", "directions": path})


def test_vti_without_directions_says_how_to_make_them() -> None:
    with pytest.raises(ConfigError, match="vlm-steer build vti"):
        vlm_steer.attach(zoo.load("llava").model, "vti")


def test_files_that_hold_no_directions_are_refused(tmp_path: Path) -> None:
    missing = tmp_path / "no.safetensors"
    foreign, damaged = tmp_path / "foreign.safetensors", tmp_path / "damaged.safetensors"
    save_file({"weight": torch.ones(2, 2)}, foreign)
    damaged.write_bytes(b"\x00" * 40)
    nan = tmp_path / "nan.safetensors"
    vectors = torch.full((4, 32), torch.nan)
    Directions(vectors=vectors, method="vti", family="llava", made_of={}).save(nan)
    for path, why in (
        (missing, "do not exist"),
        (foreign, "holds no directions"),
        (damaged, "no safetensors file"),
        (nan, "not finite"),
    ):
        with pytest.raises(DataError, match=why):
            Directions.load(path)


def test_last_hidden_states_are_the_models_own_whatever_is_attached() -> None:
    family = zoo.load("llava")
    row = family.inputs()
    expected = states(family, row)
    with vlm_steer.steer(family.model, "pai"):
        assert torch.equal(last_hidden_states(family.model, row), expected)
    assert "generate" not in vars(family.model)


@pytest.mark.parametrize(
    ("cls", "options", "word"),
    [
        (VTI, {"strength": -1.0}, "strength"),
        (VTI, {"strength": 0.0, "site": "residual"}, "site has no effect"),
        (VISTA, {"strength": float("nan")}, "strength"),
        (VISTA, {"gamma": 1.5}, "gamma"),
        (VISTA, {"gamma": 0.0, "early": (0.5, None)}, "early has no effect"),
        (VISTA, {"strength": 0.0, "layers": (0, 1)}, "layers has no effect"),
        (VISTA, {"early": "most"}, "early"),
    ],
)
def test_options_outside_their_range_are_refused(
    cls: type, options: dict[str, object], word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        cls(**options)


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    from PIL import Image

    lines = []
    for i in range(3):
        Image.new("RGB", (48, 48), (80 * i, 10, 200)).save(tmp_path / f"{i}.png")
        line = {"image": f"{i}.png", "question": "What is there?"}
        lines.append(json.dumps(line | {"value": "a cat", "h_value": "a red dog and a ball"}))
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_directions_are_the_mean_difference_at_the_last_token(pairs_file: Path) -> None:
    from vlm_steer.generation import encode, render_prompt
    from vlm_steer.images import open_image

    model, processor = vlm_steer.load_tiny()
    pairs = read_pairs(pairs_file, pairs_file.parent)
    made = from_pairs(model, processor, pairs, form="mean", batch_size=2)
    differences = []
    for pair in pairs:
        states = []
        for caption in (pair.correct, pair.hallucinated):
            prompt = f"{render_prompt(processor, pair.question)} {caption}"
            inputs = encode(processor, [prompt], [open_image(pair.image)])
            with torch.no_grad():
                hidden = model(**inputs, output_hidden_states=True).hidden_states
            states.append(torch.stack([h[0, -1] for h in hidden[1:-1]]))
        differences.append(states[0] - states[1])
    expected = torch.stack(differences).mean(0)
    torch.testing.assert_close(made.vectors[:-1], expected, atol=1e-4, rtol=1e-4)
    assert (made.family, made.made_of["pairs"]) == (model.config.model_type, 3)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("{", ":1: not JSON"),
        ('{"image": "0.png", "question": "What?", "value": "a"}', "h_value is missing"),
        ('{"image": "9.png", "question": "q", "value": "a", "h_value": "b"}', "does not exist"),
    ],
)
def test_pairs_that_cannot_be_read_are_named_by_line(pairs_file: Path, text: str, why: str) -> None:
    pairs_file.write_text(text)
    with pytest.raises(DataError, match=why):
        read_pairs(pairs_file, pairs_file.parent)


@pytest.mark.parametrize("site", ["mlp", "residual"])
def test_the_visual_half_turns_what_the_vision_tower_writes(site: str) -> None:
    family = zoo.load("llava")
    row = family.batch([family.inputs(seed=3)])
    path = directions_for("llava")
    visual = Directions.load(path).visual
    assert visual is not None
    options = {"method": "vti", "directions": path, "strength": 0.0, "site": site}
    with vlm_steer.steer(family.model, {**options, "visual_alpha": 2.0}) as steering:
        steered = generate(family, row, max_new_tokens=2)
        effect = steering.effect()["vti"]
    base = generate(family, row, max_new_tokens=2)
    handles = []
    layers = family.model.model.vision_tower.encoder.layers
    for direction, layer in zip(visual, layers, strict=True):
        module = layer.mlp if site == "mlp" else layer
        handles.append(
            module.register_forward_hook(
                lambda m, a, out, d=direction: F.vti_shift(out, d, strength=2.0), prepend=True
            )
        )
    expected = generate(family, row, max_new_tokens=2)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(steered, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(steered, base, atol=1e-2)
    assert effect["vision_states"] == 2 * 17  # layers, patches and the class token
    assert effect["layers"] == {}


def test_a_branch_sees_the_image_as_it_is_unless_the_scope_says_so() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    vti = {"method": "vti", "directions": directions_for("llava"), "strength": 0.0}
    seen: dict[str, Tensor] = {}

    class Looks(vlm_steer.get_method("vcd")):  # type: ignore[misc]
        def logits(self, logits: Tensor, at: object) -> Tensor:
            seen[scope] = at.branches["noised"]  # type: ignore[attr-defined]
            return super().logits(logits, at)  # type: ignore[no-any-return]

    for scope in ("none", "positive", "all"):
        methods = [] if scope == "none" else [vti | {"visual_alpha": 2.0, "scope": scope}]
        with vlm_steer.steer(family.model, [*methods, Looks()]):
            generate(family, batch, max_new_tokens=1)
    torch.testing.assert_close(seen["positive"], seen["none"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(seen["all"], seen["none"], atol=1e-2)


def test_directions_without_a_visual_half_are_refused_where_it_is_needed(tmp_path: Path) -> None:
    family = zoo.load("llava")
    made = Directions.load(directions_for("llava"))
    path = tmp_path / "d.safetensors"
    options = {"method": "vti", "directions": str(path), "visual_alpha": 0.9}
    for visual, why in ((None, "--visual-trials"), (torch.ones(3, 32), "this one has 2")):
        Directions(made.vectors, "vti", made.family, {}, visual).save(path)
        with pytest.raises(ConfigError, match=why):
            vlm_steer.attach(family.model, options)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_masked_patches_become_the_mean_colour_of_their_image(name: str) -> None:
    family = zoo.load(name)
    batch = family.batch([family.inputs(images=2)])
    generator = torch.Generator().manual_seed(1)
    masked = with_masked_patches(batch, zoo.PATCH, share=0.75, generator=generator)["pixel_values"]
    pixels = batch["pixel_values"]
    if name == "llava":
        is_new = (masked != pixels).any(dim=1)
        cells = is_new.reshape(2, 4, 8, 4, 8).float().mean(dim=(2, 4))
        assert cells.sum(dim=(1, 2)).tolist() == [12, 12]
        means = pixels.mean(dim=(2, 3), keepdim=True).expand_as(pixels)
    else:
        is_new = (masked != pixels).any(dim=1)
        assert int(is_new.sum()) == 36
        colours = pixels.reshape(2, 24, 3, -1).mean(dim=(1, 3))
        means = colours.repeat_interleave(24, dim=0).repeat_interleave(128, dim=1)
    where = is_new[:, None].expand_as(pixels)
    torch.testing.assert_close(masked[where], means[where])

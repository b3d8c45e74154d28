"""AGLA against the model itself with parts of the image blanked by hand, and what it matches by."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

import vlm_steer
from tests.contract.test_contract import assert_close, two_rows
from tests.families import zoo
from tests.methods.streams import recorded
from vlm_steer.engine.grid import grid_of, grids_among
from vlm_steer.engine.layout import Layout
from vlm_steer.engine.model import inspect_model
from vlm_steer.engine.pictures import blanked, check_places, pictures_by_row, shapes_of
from vlm_steer.errors import ConfigError, UnsupportedModelError
from vlm_steer.generation import encode, render_prompt
from vlm_steer.matching import Matcher
from vlm_steer.methods.agla import AGLA

QUESTIONS = ["Is there a red circle in the image?", "What is there?"]


def shapes_in(family: zoo.Family, batch: dict[str, Tensor]) -> list[tuple[int, int]]:
    info = inspect_model(family.model)
    layout = Layout.from_ids(batch["input_ids"], batch["attention_mask"], info.image_token_ids)
    return shapes_of(grid_of(info.geometry, layout.prompt, grids_among(batch), 1), 1)


def looked_at(family: zoo.Family, batch: dict[str, Tensor]) -> Tensor:
    """Attention from behind the image in the middle layers, ``[batch, tokens]``."""
    model = zoo.load("llava", attn_implementation="eager").model
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions
    is_image = family.expected_image_mask(batch)
    is_behind = (is_image.cumsum(dim=1) > 0) & ~is_image
    paid = torch.stack([layer.mean(dim=1) for layer in weights[1:3]]).mean(dim=0)
    return (paid * is_behind[:, :, None]).sum(dim=1)[is_image].reshape(len(paid), -1)


@pytest.mark.parametrize(
    ("backend", "keep", "count"), [("paired", 0.5, 8), ("separate", 0.5, 8), ("paired", None, 12)]
)
def test_the_stream_is_the_model_on_the_image_without_what_the_question_ignores(
    backend: str, keep: float | None, count: int
) -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    method = AGLA(alpha=1.0, keep=keep, blank="mean")
    tokens, seen = recorded(family, method, batch, backend=backend, max_new_tokens=3)
    kept = torch.zeros(2, 16, dtype=torch.bool)
    kept.scatter_(1, looked_at(family, batch).topk(count).indices, True)
    mask = kept.reshape(2, 1, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    changed = batch | {"pixel_values": batch["pixel_values"] * mask}
    changed["input_ids"] = torch.cat([batch["input_ids"], tokens[:, :2]], dim=1)
    changed["attention_mask"] = torch.cat(
        [batch["attention_mask"], torch.ones_like(tokens[:, :2])], dim=1
    )
    with torch.no_grad():
        expected = family.model(**changed).logits[:, -1:].float()
    assert_close(seen[2]["relevant"][:, None], expected)


def test_all_of_the_image_kept_is_the_image() -> None:
    family = zoo.load("llava")
    _, seen = recorded(family, AGLA(keep=1.0, blank="mean"), two_rows(family), max_new_tokens=2)
    for step in seen:
        torch.testing.assert_close(step["relevant"], step[None], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "idefics3", "gemma3"])
def test_pixels_lie_where_the_grid_says(name: str) -> None:
    family = zoo.load(name)
    batch = family.batch([family.inputs(images=2), family.inputs(n_text=9, size=(32, 64))])
    check_places(family.model, batch, shapes_in(family, batch))


def test_a_model_that_orders_its_patches_otherwise_is_refused() -> None:
    family = zoo.load("qwen2_vl")
    batch = two_rows(family)
    encode_images = family.model.get_image_features

    def shuffled(pixel_values: Tensor, image_grid_thw: Tensor) -> list[Tensor]:
        return [part.flip(0) for part in encode_images(pixel_values, image_grid_thw).pooler_output]

    family.model.get_image_features = shuffled
    with (
        vlm_steer.steer(family.model, AGLA(blank="mean")),
        pytest.raises(UnsupportedModelError, match="could not be verified"),
    ):
        family.model.generate(**batch, max_new_tokens=1)


def test_pictures_are_what_went_into_the_image_processor() -> None:
    numbers = np.random.default_rng(0)
    picture = Image.fromarray(numbers.integers(0, 255, (32, 48, 3), dtype=np.uint8))
    family = zoo.load("qwen2_vl")
    process = zoo.processor("Qwen2VLImageProcessorPil", patch_size=zoo.PATCH, min_pixels=1)
    pixels = process([picture, picture.rotate(180)])
    row = family.inputs(images=2)
    batch = family.batch([row | dict(pixels)])
    info = inspect_model(family.model)
    kinds = Layout.from_ids(batch["input_ids"], None, info.image_token_ids).prompt
    grid = grid_of(info.geometry, kinds, grids_among(batch), 1)
    known = SimpleNamespace(image_mean=[0.48145466, 0.4578275, 0.40821073])
    known.image_std = [0.26862954, 0.26130258, 0.27577711]
    ((first, second),) = pictures_by_row(batch, grid, 1, known)
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    torch.testing.assert_close(first, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(second, expected.flip(1, 2), atol=2e-3, rtol=0)


def test_blanked_tiles_of_padding_stay_padding() -> None:
    pixels = torch.ones(1, 2, 3, 4, 4)
    pixels[0, 1] = 0
    is_blank = torch.tensor([True, False, False, False])
    changed = blanked({"pixel_values": pixels}, is_blank, [(2, 2)], (-1.0, -2.0, -3.0))
    tile = changed["pixel_values"][0, 0]
    assert torch.equal(
        tile[:, :2, :2], torch.tensor([-1.0, -2.0, -3.0])[:, None, None].expand(3, 2, 2)
    )
    assert (tile[:, 2:] == 1).all()
    assert (tile[:, :, 2:] == 1).all()
    assert (changed["pixel_values"][0, 1] == 0).all()


def test_a_tile_that_is_blanked_altogether_is_not_taken_for_padding() -> None:
    family = zoo.load("idefics3")
    batch = family.batch([family.inputs()])
    _, seen = recorded(family, AGLA(keep=0.05, blank="mean"), batch, max_new_tokens=1)
    assert seen[0]["relevant"].isfinite().all()


# -- a dual encoder as the matcher ------------------------------------------------------------
@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP with the tokenizer of the embedded model."""
    folder = tmp_path_factory.mktemp("clip")
    _, processor = vlm_steer.load_tiny()
    tokenizer = processor.tokenizer
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    part |= {"num_attention_heads": 2, "projection_dim": 8, "initializer_factor": 20.0}
    config = CLIPConfig(
        text_config=part
        | {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
        | {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
        vision_config=part | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return folder


def test_relevance_is_the_gradient_of_the_similarity_and_keeps_the_aspect_ratio(clip: Path) -> None:
    matcher = Matcher.load(clip)
    picture = torch.rand(3, 16, 32)
    with torch.inference_mode():
        match = matcher.match([picture], "a red circle", [(2, 4)])
    model = CLIPModel.from_pretrained(clip)
    mean, std = (torch.tensor(x)[:, None, None] for x in (matcher.mean, matcher.std))
    square = torch.zeros(3, 32, 32)
    square[:, :16] = (picture - mean) / std
    states = []
    layer = model.vision_model.encoder.layers[1]
    layer.register_forward_pre_hook(lambda _, args: states.append(args[0]) or args[0].retain_grad())
    seen = model.get_image_features(pixel_values=square[None]).pooler_output
    text = matcher.tokenizer(
        "a red circle", padding="max_length", max_length=24, return_tensors="pt"
    )
    read = model.get_text_features(text["input_ids"], text["attention_mask"]).pooler_output
    similarity = torch.cosine_similarity(seen, read)
    similarity.backward()
    assert match.similarity == pytest.approx(similarity.item(), abs=1e-5)
    expected = (states[0].grad * states[0]).sum(-1).relu()[0, 1:].reshape(4, 4)
    (found,) = match.relevance
    assert found.shape == (2, 4)
    # The picture fills the upper half of the square; cells lie on patches, smoothed at the edges.
    correlation = torch.corrcoef(torch.stack([found.flatten(), expected[:2].flatten()]))[0, 1]
    assert correlation > 0.9
    assert expected[:2].std() > 0


def prompts(processor: object, sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
    images = [Image.new("RGB", size, (200, 10 + 90 * i, 30)) for i, size in enumerate(sizes)]
    for image in images:
        image.paste((10, 10, 200), (5, 5, 20, 20))
    texts = [render_prompt(processor, question) for question in QUESTIONS[: len(sizes)]]
    return dict(encode(processor, texts, images))


def test_a_batch_with_a_dual_encoder_equals_its_rows_under_beams_too(clip: Path) -> None:
    model, processor = vlm_steer.load_tiny()
    batch = prompts(processor, [(48, 48), (60, 40)])
    spec = {"method": "agla", "matcher": str(clip), "beta": 0.0}
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with vlm_steer.steer(model, spec, processor=processor):
        together = model.generate(**batch, **options, output_logits=True)
        beams = model.generate(**batch, **options, num_beams=2)
        for row in range(2):
            is_token = batch["attention_mask"][row].bool()
            alone = {name: value[row : row + 1] for name, value in batch.items()}
            alone |= {name: alone[name][:, is_token] for name in ("input_ids", "attention_mask")}
            logits = model.generate(**alone, **options, output_logits=True).logits
            assert_close(torch.stack(together.logits, 1)[row : row + 1], torch.stack(logits, 1))
    with vlm_steer.steer(model, spec, processor=processor, backend="separate"):
        assert torch.equal(
            model.generate(**batch, **options, num_beams=2).sequences, beams.sequences
        )


def test_the_more_similar_the_image_the_less_of_it_stays(clip: Path) -> None:
    model, processor = vlm_steer.load_tiny()
    batch = prompts(processor, [(48, 48)])
    handle = vlm_steer.attach(model, {"method": "agla", "matcher": str(clip)}, processor=processor)
    (bound,) = handle.plan.bounds
    asked: list[str] = []
    for similarity, share in ((0.0, 1.0), (0.5, 0.75), (1.0, 0.5)):

        def match(pictures: object, text: str, shapes: list[tuple[int, int]]) -> object:
            asked.append(text)
            relevance = tuple(torch.rand(shape) for shape in shapes)
            return SimpleNamespace(relevance=relevance, similarity=similarity)  # noqa: B023

        object.__setattr__(bound, "constants", SimpleNamespace(match=match))
        model.generate(**batch, max_new_tokens=1)
        kept = handle._last.positive.prepared[bound.index]
        is_image = batch["input_ids"] == model.config.image_token_id
        assert int(kept.sum()) == int(share * int(is_image.sum()))
    handle.detach()
    assert asked == [QUESTIONS[0]] * 3


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({}, "processor is needed to tell what black is"),
        ({"matcher": "no/such folder"}, "with the model's processor"),
        ({"keep": 0.0}, "keep is 0"),
        ({"matcher": ""}, "matcher is empty"),
        ({"matcher": "x", "layers": [0, 2]}, "layers has no effect"),
        ({"alpha": 0.0, "keep": 0.5}, "keep has no effect"),
    ],
)
def test_what_cannot_work_is_refused_when_attaching(spec: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        vlm_steer.attach(zoo.load("llava").model, {"method": "agla", **spec})


def test_a_folder_that_holds_no_dual_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no matching model could be loaded"):
        Matcher.load(tmp_path)

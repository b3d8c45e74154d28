"""What every method promises on every family.

``pytest`` runs four families; ``pytest -m matrix`` runs the others.
"""

import copy
import threading
import warnings

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.contract.settings import (
    ACTIVE,
    HOOKS,
    NEUTRAL,
    OBSERVERS,
    REFUSALS,
    WITHOUT_BEAMS,
    WITHOUT_EFFECT,
    EveryRow,
    families,
    spec_for,
)
from tests.families import zoo
from vlm_steer.errors import SteerWarning, UnsupportedModelError

N_NEW = 5
FAMILIES = families()
ALL_FAMILIES = families(ci=tuple(zoo.FAMILIES))

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")


def generate(family: zoo.Family, batch: dict[str, Tensor], **options: object) -> Tensor:
    """Tokens and raw logits of a short greedy generation, ``[rows, steps, vocabulary]``."""
    options = {"max_new_tokens": N_NEW, "do_sample": False} | options
    output = family.model.generate(
        **batch, output_logits=True, return_dict_in_generate=True, **options
    )
    return torch.stack(output.logits, dim=1)


def hooks_of_ours(model: torch.nn.Module) -> list[object]:
    """Forward hooks of vlm_steer on a model; transformers has some of its own."""
    hooks = [
        h
        for m in model.modules()
        for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ]
    return [h for h in hooks if getattr(h, "__module__", "").startswith("vlm_steer")]


def two_rows(family: zoo.Family, **options: object) -> dict[str, Tensor]:
    """A left-padded batch of two prompts of different lengths."""
    return family.batch(
        [family.inputs(n_text=5, seed=0, **options), family.inputs(n_text=9, seed=1, **options)]
    )


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Compare steps up to the first one where a near tie may send greedy decoding elsewhere."""
    steps = min(actual.shape[1], expected.shape[1])
    for row in range(expected.shape[0]):
        for step in range(steps):
            scale = expected[row, step][expected[row, step].isfinite()].abs().max().clamp(min=1)
            is_kept = expected[row, step].isfinite()
            edge = is_kept ^ actual[row, step].isfinite()
            assert edge.sum() == 0, f"row {row} step {step}: other tokens are masked"
            difference = (actual[row, step] - expected[row, step])[is_kept].abs().max()
            assert difference <= tolerance * scale, f"row {row} step {step}: {difference:.2e}"
            top = expected[row, step].topk(2).values
            if top[0] - top[1] <= 1e-3:
                break


@pytest.mark.parametrize("setting", NEUTRAL)
@pytest.mark.parametrize("name", FAMILIES)
def test_neutral_parameters_are_bitwise_the_base(name: str, setting: str) -> None:
    if (name, setting) in REFUSALS:
        pytest.skip("refused")
    family = zoo.load(name)
    batch = two_rows(family)
    base = generate(family, batch)
    with vlm_steer.steer(family.model, NEUTRAL[setting]):
        steered = generate(family, batch)
    assert torch.equal(steered, base)


@pytest.mark.parametrize("setting", ACTIVE)
@pytest.mark.parametrize("name", FAMILIES)
def test_active_parameters_act_and_detach_restores_the_base_bitwise(
    name: str, setting: str
) -> None:
    family = zoo.load(name)
    spec = spec_for(name, setting)
    batch = two_rows(family)
    config = copy.deepcopy(family.model.config.to_dict())
    base = generate(family, batch)
    with vlm_steer.steer(family.model, spec) as steering:
        steered = generate(family, batch)
        effect = steering.effect()
    is_idle = setting in OBSERVERS or (name, setting) in WITHOUT_EFFECT
    assert torch.equal(steered, base) == is_idle
    assert bool(effect)
    assert torch.equal(generate(family, batch), base)
    assert family.model.config.to_dict() == config
    assert "generate" not in vars(family.model)
    assert hooks_of_ours(family.model) == []


@pytest.mark.parametrize(("name", "setting"), REFUSALS)
def test_refusals_are_raised_at_attach_with_the_reason(name: str, setting: str) -> None:
    family = zoo.load(name)
    with pytest.raises(UnsupportedModelError, match=REFUSALS[name, setting]):
        vlm_steer.attach(family.model, ACTIVE[setting])
    assert "generate" not in vars(family.model)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_exception_in_a_forward_leaves_no_residue(name: str) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    base = generate(family, batch)

    def fail(*args: object) -> None:
        raise RuntimeError("planted")

    handle = vlm_steer.attach(family.model, "pai")
    planted = family.model.get_decoder().register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="planted"):
            generate(family, batch)
    finally:
        planted.remove()
    steered = generate(family, batch)
    handle.detach()
    assert torch.equal(generate(family, batch), base)
    with vlm_steer.steer(family.model, "pai"):
        assert torch.equal(generate(family, batch), steered)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_the_forced_path_at_neutral_strength_is_the_eager_model(name: str) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    base = generate(family, batch)
    with vlm_steer.steer(family.model, EveryRow()):
        forced = generate(family, batch)
    assert_close(forced, base, tolerance=1e-5)


@pytest.mark.parametrize("setting", ACTIVE)
@pytest.mark.parametrize("name", FAMILIES)
def test_left_padded_batch_equals_single_runs(name: str, setting: str) -> None:
    family = zoo.load(name)
    spec = spec_for(name, setting)
    rows = [family.inputs(n_text=5, seed=0), family.inputs(n_text=9, seed=1)]
    with vlm_steer.steer(family.model, spec):
        together = generate(family, family.batch(rows))
        for index, row in enumerate(rows):
            alone = generate(family, family.batch([row]))
            assert_close(together[index : index + 1], alone)


@pytest.mark.parametrize("setting", ACTIVE)
@pytest.mark.parametrize("name", FAMILIES)
def test_cached_decoding_equals_full_recomputation(name: str, setting: str) -> None:
    if name == "instructblip":
        pytest.skip("transformers loses the image embeddings without a cache")
    family = zoo.load(name)
    spec = spec_for(name, setting)
    batch = two_rows(family)
    with vlm_steer.steer(family.model, spec):
        assert_close(generate(family, batch), generate(family, batch, use_cache=False))


@pytest.mark.parametrize("setting", [name for name in ACTIVE if name not in WITHOUT_BEAMS])
@pytest.mark.parametrize("name", FAMILIES)
def test_beams_equal_beams_without_a_cache(name: str, setting: str) -> None:
    if name == "instructblip":
        pytest.skip("transformers loses the image embeddings without a cache")
    family = zoo.load(name)
    spec = spec_for(name, setting)
    batch = two_rows(family)
    options = {"num_beams": 3, "max_new_tokens": N_NEW, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    with vlm_steer.steer(family.model, spec):
        cached = family.model.generate(**batch, **options)
        uncached = family.model.generate(**batch, **options, use_cache=False)
    torch.testing.assert_close(
        cached.sequences_scores, uncached.sequences_scores, rtol=1e-3, atol=1e-3
    )
    assert torch.equal(cached.sequences, uncached.sequences)


@pytest.mark.parametrize("setting", ["pai", "vcd", "vhr", "mma", "var"])
@pytest.mark.parametrize("name", FAMILIES)
def test_two_images_are_one_union(name: str, setting: str) -> None:
    family = zoo.load(name)
    spec = spec_for(name, setting)
    if (name, 2) in zoo.UNSUPPORTED:
        pytest.skip(zoo.UNSUPPORTED[name, 2])
    batch = two_rows(family, images=2)
    base = generate(family, batch)
    with vlm_steer.steer(family.model, spec):
        steered = generate(family, batch)
    assert torch.equal(steered, base) == ((name, setting) in WITHOUT_EFFECT)
    assert steered.isfinite().any(dim=-1).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_without_an_image_is_the_base_and_warns(name: str) -> None:
    if (name, 0) in zoo.UNSUPPORTED:
        pytest.skip(zoo.UNSUPPORTED[name, 0])
    family = zoo.load(name)
    batch = family.batch([family.inputs(images=0)])
    base = generate(family, batch)
    with (
        pytest.warns(SteerWarning, match="no image tokens"),
        vlm_steer.steer(family.model, ["pai", "vhr"]),
    ):
        steered = generate(family, batch)
    assert_close(steered, base, tolerance=1e-5)


@pytest.mark.parametrize("backend", ["paired", "separate"])
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_contrast_backends_agree(name: str, backend: str) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    with vlm_steer.steer(family.model, "vcd", backend="separate"):
        expected = generate(family, batch)
    with vlm_steer.steer(family.model, "vcd", backend=backend):
        assert_close(generate(family, batch), expected)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_every_kind_of_hook_acts_equally_cached_and_padded(name: str, hook: str) -> None:
    family = zoo.load(name)
    rows = [family.inputs(n_text=5, seed=0), family.inputs(n_text=9, seed=1)]
    batch = family.batch(rows)
    base = generate(family, batch)
    with vlm_steer.steer(family.model, HOOKS[hook]):
        together = generate(family, batch)
        alone = generate(family, family.batch(rows[:1]))
        uncached = together if name == "instructblip" else generate(family, batch, use_cache=False)
    if not (name == "mllama" and hook == "mask"):
        assert not torch.equal(together, base)
    assert_close(together[:1], alone)
    assert_close(together, uncached)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("setting", ACTIVE)
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_stays_finite_and_in_its_dtype(
    name: str, setting: str, dtype: torch.dtype
) -> None:
    spec = spec_for(name, setting)
    family = zoo.load(name, dtype=dtype)
    batch = two_rows(family)
    with vlm_steer.steer(family.model, spec), torch.no_grad():
        output = family.model(**batch)
        assert generate(family, batch).isfinite().any(dim=-1).all()
    assert output.logits.dtype == dtype


@pytest.mark.parametrize("setting", ["pai", "vhr", "var", "vcd"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_plain_forward_is_steered_like_the_first_step_of_generate(
    name: str, setting: str
) -> None:
    family = zoo.load(name)
    spec = spec_for(name, setting)
    batch = two_rows(family)
    with vlm_steer.steer(family.model, spec), torch.no_grad():
        generated = generate(family, batch)[:, 0]
        plain = family.model(**batch).logits[:, -1].float()
    assert_close(plain[:, None], generated[:, None])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_inner_block_wins_and_the_outer_comes_back(name: str) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    base = generate(family, batch)
    with vlm_steer.steer(family.model, "vhr"):
        outer = generate(family, batch)
        with vlm_steer.steer(family.model, ACTIVE["pai"]):
            inner = generate(family, batch)
        with vlm_steer.steer(family.model, None):
            assert torch.equal(generate(family, batch), base)
        assert torch.equal(generate(family, batch), outer)
    with vlm_steer.steer(family.model, ACTIVE["pai"]):
        assert torch.equal(generate(family, batch), inner)


@pytest.mark.parametrize("name", FAMILIES)
def test_four_threads_with_four_steerings_each_get_their_own_result(name: str) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    specs = [None, ACTIVE["pai"], ACTIVE["vhr"], ACTIVE["vcd"]]
    if name.startswith("qwen"):
        # Two plain generations at once already disturb each other through model.rope_deltas.
        specs = [spec for spec in specs if spec is not ACTIVE["vcd"]]
    serial = []
    for spec in specs:
        with vlm_steer.steer(family.model, spec):
            serial.append(generate(family, batch))
    results: dict[int, list[Tensor]] = {i: [] for i in range(len(specs))}
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for _ in range(3):
                with vlm_steer.steer(family.model, specs[index]):
                    results[index].append(generate(family, batch))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(specs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    for index, expected in enumerate(serial):
        assert len(results[index]) == 3
        assert all(torch.equal(result, expected) for result in results[index])


@pytest.mark.parametrize("name", FAMILIES)
def test_two_models_that_share_a_configuration_stay_apart(name: str) -> None:
    family = zoo.load(name)
    twin = copy.deepcopy(family.model)
    batch = two_rows(family)
    base = generate(family, batch)

    def of_twin() -> Tensor:
        output = twin.generate(
            **batch,
            max_new_tokens=N_NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(output.logits, dim=1)

    with vlm_steer.steer(family.model, ACTIVE["pai"]):
        steered = generate(family, batch)
        assert torch.equal(of_twin(), base)
        with vlm_steer.steer(twin, ACTIVE["pai"]):
            assert torch.equal(of_twin(), steered)
        assert torch.equal(of_twin(), base)
    assert torch.equal(generate(family, batch), base)

"""Attaching, what is reported, and the ways in which people call a model."""

import copy
import threading
import warnings
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer

import vlm_steer
from tests.contract.settings import ACTIVE
from tests.contract.test_contract import assert_close, generate, two_rows
from tests.families import zoo
from vlm_steer.errors import (
    CompositionError,
    ConfigError,
    SteerError,
    SteerWarning,
    UnsupportedModelError,
)

PAI = {"method": "pai", "alpha": 0.5, "gamma": 1.0}


@pytest.fixture
def family() -> zoo.Family:
    return zoo.load("llava")


def test_status_names_model_methods_and_layers(family: zoo.Family) -> None:
    handle = vlm_steer.attach(family.model, [PAI, {"method": "vhr", "alpha": 1.0}])
    status = handle.status()
    handle.detach()
    assert status["family"] == "llava"
    assert status["attention"] == "sdpa"
    assert status["methods"][0]["name"] == "pai"
    assert status["methods"][0]["layers"] == [0, 1, 2, 3]
    assert status["methods"][1]["neutral"]
    assert not handle.status()["active"]


def test_update_changes_strength_without_attaching_again(family: zoo.Family) -> None:
    batch = two_rows(family)
    with vlm_steer.steer(family.model, {**PAI, "alpha": 0.2}):
        expected = generate(family, batch)
    handle = vlm_steer.attach(family.model, PAI)
    first = generate(family, batch)
    handle.update(alpha=0.2)
    assert torch.equal(generate(family, batch), expected)
    handle.update(pai={"alpha": 0.5})
    assert torch.equal(generate(family, batch), first)
    with pytest.raises(ConfigError, match="no attached method"):
        handle.update(alpa=0.1)
    handle.detach()
    handle.detach()


def test_effect_counts_rows_heads_and_mass(family: zoo.Family) -> None:
    with vlm_steer.steer(family.model, PAI) as steering:
        assert steering.effect() == {}
        generate(family, two_rows(family))
        effect = steering.effect()["pai"]
    assert set(effect["layers"]) == {0, 1, 2, 3}
    # The last prompt row and the first decoded row, of two prompts each.
    assert all(layer["rows"] == 4 for layer in effect["layers"].values())
    assert all(layer["mass"] > 0 for layer in effect["layers"].values())
    assert all(layer["heads"] == 4 for layer in effect["layers"].values())


def test_a_steering_without_effect_warns_once(family: zoo.Family) -> None:
    batch = two_rows(family)
    idle = {"method": "var", "sink_dims": [0], "tau": 1000.0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with vlm_steer.steer(family.model, idle):
            generate(family, batch)
            generate(family, batch)
    assert len([w for w in caught if "changed nothing" in str(w.message)]) == 1


def test_an_effective_steering_does_not_warn(family: zoo.Family) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SteerWarning)
        with vlm_steer.steer(family.model, PAI):
            generate(family, two_rows(family))


def test_var_says_at_attach_that_a_model_has_no_sinks(family: zoo.Family) -> None:
    with pytest.warns(SteerWarning, match="no sink dimensions"):
        handle = vlm_steer.attach(family.model, "var")
    assert "no sink dimensions" in handle.status()["methods"][0]["notes"][0]
    handle.detach()


def test_warnings_point_at_the_line_that_asked_for_the_steering(family: zoo.Family) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        vlm_steer.attach(family.model, "var").detach()
        with vlm_steer.steer(family.model, "var"):
            pass
    assert [Path(warning.filename).name for warning in seen] == [Path(__file__).name] * 2


def test_var_finds_planted_sink_dimensions_by_itself(family: zoo.Family) -> None:
    with torch.no_grad():
        family.model.get_input_embeddings().weight[1, [5, 20]] = 1e6  # 1 is the start token
    with vlm_steer.steer(family.model, {"method": "var", "tau": 3.5}) as steering:
        assert "[5, 20]" in steering.status()["methods"][0]["notes"][0]


def test_records_follow_tokens_and_rows(family: zoo.Family) -> None:
    batch = two_rows(family)
    with vlm_steer.steer(family.model, "lookback_ratio") as steering:
        output = family.model.generate(**batch, max_new_tokens=4, do_sample=False)
        together = steering.records(output)["lookback_ratio"]
        alone = family.batch([family.inputs(n_text=9, seed=1)])
        output = family.model.generate(**alone, max_new_tokens=4, do_sample=False)
        single = steering.records(output)["lookback_ratio"]
    assert together.shape == (2, 4, 4, 4)
    assert ((together >= 0) & (together <= 1)).all()
    torch.testing.assert_close(together[1:], single, rtol=1e-4, atol=1e-4)


def test_records_equal_eager_attention(family: zoo.Family) -> None:
    eager = zoo.load("llava", attn_implementation="eager")
    batch = eager.batch([eager.inputs(n_text=7)])
    with vlm_steer.steer(family.model, {"method": "lookback_ratio", "cue": 1}) as steering:
        output = family.model.generate(**batch, max_new_tokens=3, do_sample=False)
        ratio = steering.records(output)["lookback_ratio"]
    output = eager.model.generate(
        **batch,
        max_new_tokens=3,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    prompt = batch["input_ids"].shape[1]
    for step, layers in enumerate(output.attentions):
        for layer, weights in enumerate(layers):
            row = weights[0, :, -1]
            context, new = row[:, : prompt - 1].mean(-1), row[:, prompt - 1 :].mean(-1)
            torch.testing.assert_close(
                ratio[0, step, layer], context / (context + new), rtol=1e-4, atol=1e-5
            )


def test_records_of_beams_follow_the_returned_sequences(family: zoo.Family) -> None:
    batch = family.batch([family.inputs(n_text=7)])
    with vlm_steer.steer(family.model, "lookback_ratio") as steering:
        output = family.model.generate(
            **batch,
            max_new_tokens=5,
            num_beams=3,
            return_dict_in_generate=True,
            output_scores=True,
        )
        beams = steering.records(output)["lookback_ratio"]
        plain = family.model.generate(**batch, max_new_tokens=5, num_beams=3)
        with pytest.raises(SteerError, match="return_dict_in_generate"):
            steering.records(plain)
        forced = []
        prompt = batch["input_ids"].shape[1]
        for end in range(prompt, prompt + 5):
            row = {**batch, "input_ids": output.sequences[:, :end]}
            row["attention_mask"] = torch.ones_like(row["input_ids"])
            with torch.no_grad():
                family.model.generate(**row, max_new_tokens=1, do_sample=False)
            forced.append(steering.records()["lookback_ratio"])
    # A teacher-forced prompt counts its own tail as context, so only the first token compares.
    torch.testing.assert_close(beams[:, 0], forced[0][:, 0], rtol=1e-4, atol=1e-4)
    assert beams.shape == (1, 5, 4, 4)


def test_records_of_an_unknown_output_are_an_error(family: zoo.Family) -> None:
    with vlm_steer.steer(family.model, "lookback_ratio") as steering:
        generate(family, two_rows(family))
        with pytest.raises(SteerError, match="not among"):
            steering.records(torch.zeros(2, 3))


def test_a_thread_without_a_context_is_steered_too(family: zoo.Family) -> None:
    batch = two_rows(family)
    results = []
    with vlm_steer.steer(family.model, PAI):
        expected = generate(family, batch)
        thread = threading.Thread(target=lambda: results.append(generate(family, batch)))
        thread.start()
        thread.join()
    assert torch.equal(results[0], expected)


def test_streaming_gets_the_steered_tokens(family: zoo.Family) -> None:
    class Tokenizer:
        def decode(self, ids: list[int], **options: object) -> str:
            return "".join(f"{int(i)} " for i in ids)

    batch = family.batch([family.inputs()])
    streamer = TextIteratorStreamer(Tokenizer(), skip_prompt=True)  # type: ignore[arg-type]
    with vlm_steer.steer(family.model, PAI):
        expected = family.model.generate(**batch, max_new_tokens=5, do_sample=False)
        options = {**batch, "streamer": streamer, "max_new_tokens": 5, "do_sample": False}
        thread = threading.Thread(target=family.model.generate, kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert [int(t) for t in text.split()] == expected[0, -5:].tolist()


@pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")
def test_a_second_turn_with_a_new_image_on_a_kept_cache_equals_one_long_prompt(
    family: zoo.Family,
) -> None:
    first = family.inputs(n_text=5, seed=0)
    second = family.inputs(n_text=6, seed=1)
    whole = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], dim=1),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
    }
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with vlm_steer.steer(family.model, ACTIVE["var"]) as steering:
        cache = DynamicCache(config=family.model.config.get_text_config())
        with torch.no_grad():
            family.model(**first, past_key_values=cache)
            steered = family.model(
                input_ids=second["input_ids"],
                pixel_values=second["pixel_values"],
                past_key_values=cache,
            ).logits[:, -1]
            assert steering.effect()["var"]["layers"][1]["rows"] > 0
            expected = family.model(**whole).logits[:, -1]
    assert_close(steered[:, None].float(), expected[:, None].float())


def test_a_contrast_refuses_a_new_image_in_the_middle_of_a_cache(family: zoo.Family) -> None:
    first, second = family.inputs(n_text=5), family.inputs(n_text=6, seed=1)
    cache = DynamicCache(config=family.model.config.get_text_config())
    with vlm_steer.steer(family.model, "vcd"), torch.no_grad():
        family.model(**first, past_key_values=cache)
        with pytest.raises(UnsupportedModelError, match="whole conversation"):
            family.model(
                input_ids=second["input_ids"],
                pixel_values=second["pixel_values"],
                past_key_values=cache,
            )


def test_a_manual_decoding_loop_equals_generate(family: zoo.Family) -> None:
    batch = two_rows(family)
    with vlm_steer.steer(family.model, ["pai", "vcd"]), torch.no_grad():
        expected = family.model.generate(**batch, max_new_tokens=4, do_sample=False)
        output = family.model(**batch)
        tokens = [output.logits[:, -1].argmax(-1)]
        mask = batch["attention_mask"]
        position = mask.sum(dim=1, keepdim=True)
        for step in range(3):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            output = family.model(
                input_ids=tokens[-1][:, None],
                attention_mask=mask,
                position_ids=position + step,
                past_key_values=output.past_key_values,
            )
            tokens.append(output.logits[:, -1].argmax(-1))
    assert torch.equal(torch.stack(tokens, dim=1), expected[:, -4:])


def test_a_generated_first_turn_can_be_continued_with_a_new_image(family: zoo.Family) -> None:
    first = family.inputs(n_text=5, seed=0)
    with vlm_steer.steer(family.model, "vhr"):
        turn = family.model.generate(
            **first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
        )
        second = family.inputs(n_text=4, seed=1)
        ids = torch.cat([turn.sequences, second["input_ids"]], dim=1)
        output = family.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=second["pixel_values"],
            past_key_values=turn.past_key_values,
            max_new_tokens=3,
            do_sample=False,
        )
    assert output.shape[1] == ids.shape[1] + 3


def test_an_adapter_wrapper_is_unwrapped(family: zoo.Family) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, model: torch.nn.Module):
            super().__init__()
            self.model = model

        def get_base_model(self) -> torch.nn.Module:
            return self.model

        def generate(self, **kwargs: object) -> torch.Tensor:
            return self.model.generate(**kwargs)  # type: ignore[no-any-return, operator]

    batch = two_rows(family)
    wrapped = Wrapper(family.model)
    with vlm_steer.steer(family.model, PAI):
        expected = family.model.generate(**batch, max_new_tokens=4, do_sample=False)
    with vlm_steer.steer(wrapped, PAI):
        assert torch.equal(wrapped.generate(**batch, max_new_tokens=4, do_sample=False), expected)


def test_a_model_with_lora_adapters_is_steered_and_restored(family: zoo.Family) -> None:
    peft = pytest.importorskip("peft", reason="needs the peft package")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model = peft.get_peft_model(family.model, config).eval()
    batch = two_rows(family)
    base = model.generate(**batch, max_new_tokens=4, do_sample=False)
    with vlm_steer.steer(model, ["vhr", "vcd"]) as steering:
        model.generate(**batch, max_new_tokens=4, do_sample=False)
        assert steering.effect()["vhr"]["layers"]
        assert steering.effect()["vcd"]["probability_moved"] > 0
    assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), base)


def test_a_compiled_model_is_refused_by_name(family: zoo.Family) -> None:
    with pytest.raises(UnsupportedModelError, match="compiled"):
        vlm_steer.attach(torch.compile(family.model), PAI)


def test_a_model_spread_by_a_device_map_is_steered_alike(family: zoo.Family) -> None:
    from transformers import AutoModelForImageTextToText

    batch = two_rows(family)
    mapped = AutoModelForImageTextToText.from_pretrained(
        family.directory, device_map={"": "cpu"}
    ).eval()
    with vlm_steer.steer(family.model, "pai+vcd"):
        expected = family.model.generate(**batch, max_new_tokens=4, do_sample=False)
    with vlm_steer.steer(mapped, "pai+vcd"):
        assert torch.equal(mapped.generate(**batch, max_new_tokens=4, do_sample=False), expected)


def test_a_model_with_offloaded_weights_is_steered_alike(family: zoo.Family) -> None:
    from accelerate import cpu_offload

    batch = two_rows(family)
    with vlm_steer.steer(family.model, "vhr"):
        expected = family.model.generate(**batch, max_new_tokens=4, do_sample=False)
    offloaded = cpu_offload(zoo.load("llava").model, execution_device=torch.device("cpu"))
    with vlm_steer.steer(offloaded, "vhr"):
        steered = offloaded.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(steered, expected)


def test_a_dynamically_quantised_model_is_steered(family: zoo.Family) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(
        family.model.float(), {torch.nn.Linear}, dtype=torch.qint8
    )
    batch = two_rows(family)
    base = generate(zoo.Family(**{**vars(family), "model": quantised}), batch)
    with vlm_steer.steer(quantised, PAI) as steering:
        steered = generate(zoo.Family(**{**vars(family), "model": quantised}), batch)
    assert not torch.equal(steered, base)
    assert steering.effect()["pai"]["layers"][0]["mass"] > 0


def test_the_image_text_to_text_pipeline_is_steered() -> None:
    from PIL import Image
    from transformers import pipeline

    from vlm_steer.tiny.model import build_model, build_processor

    processor = build_processor()
    torch.manual_seed(0)
    model = build_model(processor).eval()
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    image = Image.new("RGB", (96, 96), "orange")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = "USER: <image>\nWhat is this? ASSISTANT:"
    base = pipe(images=image, text=prompt, generate_kwargs=options)
    with vlm_steer.steer(model, {"method": "vhr", "alpha": 4.0}) as steering:
        steered = pipe(images=image, text=prompt, generate_kwargs=options)
    assert steering.effect()["vhr"]["layers"]
    assert base[0]["generated_text"] != steered[0]["generated_text"]
    assert pipe(images=image, text=prompt, generate_kwargs=options) == base


def test_a_model_in_training_mode_is_refused(family: zoo.Family) -> None:
    family.model.train()
    with pytest.raises(UnsupportedModelError, match="training mode"):
        vlm_steer.attach(family.model, PAI)
    assert "generate" not in vars(family.model)


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="not a transformers model"):
        vlm_steer.attach(object(), PAI)


def test_a_text_model_is_refused(family: zoo.Family) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with pytest.raises(UnsupportedModelError, match="no image token"):
        vlm_steer.attach(LlamaForCausalLM(config).eval(), PAI)


def test_a_processor_of_another_model_is_refused(family: zoo.Family) -> None:
    class Processor:
        image_token_id = 12345

    with pytest.raises(ConfigError, match="12345"):
        vlm_steer.attach(family.model, PAI, processor=Processor())


def test_the_same_method_twice_is_refused(family: zoo.Family) -> None:
    with pytest.raises(CompositionError, match="twice"):
        vlm_steer.attach(family.model, [PAI, PAI])


def test_layers_outside_the_model_are_refused_with_its_depth(family: zoo.Family) -> None:
    with pytest.raises(ConfigError, match=r"pai.*4 layers"):
        vlm_steer.attach(family.model, {**PAI, "layers": [2, 9]})
    assert "generate" not in vars(family.model)


def test_a_copy_of_an_attached_model_is_not_attached(family: zoo.Family) -> None:
    batch = two_rows(family)
    base = generate(family, batch)
    handle = vlm_steer.attach(family.model, PAI)
    handle.detach()
    twin = copy.deepcopy(family)
    assert torch.equal(generate(twin, batch), base)


def test_static_cache_equals_dynamic_cache(family: zoo.Family) -> None:
    batch = two_rows(family)
    with vlm_steer.steer(family.model, PAI):
        dynamic = generate(family, batch)
        static = generate(family, batch, cache_implementation="static", disable_compile=True)
    assert_close(static, dynamic)


def test_eager_base_equals_sdpa_base() -> None:
    results = []
    for implementation in ("sdpa", "eager"):
        family = zoo.load("llava", attn_implementation=implementation)
        with vlm_steer.steer(family.model, [PAI, {"method": "vhr"}]):
            results.append(generate(family, two_rows(family)))
    assert_close(*results)


def test_update_judges_options_given_together_together(family: zoo.Family) -> None:
    with vlm_steer.steer(family.model, PAI) as steering:
        with pytest.raises(ConfigError, match="beta has no effect here"):
            steering.update(beta=0.2)
        steering.update(beta=0.2, gamma=1.5)
        assert steering.plan.methods[0] == vlm_steer.get_method("pai")(
            alpha=0.5, beta=0.2, gamma=1.5
        )

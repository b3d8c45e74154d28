"""The cost benchmark measures and reports; its numbers are never asserted."""

import json
import math
import time

import pytest
import torch
from typer.testing import CliRunner

import vlm_steer
from vlm_steer.cli import build_app
from vlm_steer.errors import ConfigError
from vlm_steer_eval.bench import overhead as bench
from vlm_steer_eval.bench import rows as bench_rows


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    shape = bench.Shape(hidden=32, intermediate=32, layers=8, heads=2, vocabulary=64)
    monkeypatch.setitem(bench.SHAPES, "nano", shape)


def test_every_setting_gets_ratios_over_both_kernels():
    costs = list(
        bench.measure_overhead(
            ["pai_guided", "pai+vcd"],
            shape="nano",
            image_tokens=16,
            new_tokens=3,
            repeats=1,
            attention=["sdpa", "eager"],
        )
    )
    assert {cost.attention for cost in costs} == {"sdpa", "eager"}
    assert {cost.arm for cost in costs} == {"pai_guided", "pai+vcd", "none"}
    for cost in costs:
        assert cost.prefill > 0
        assert cost.decode > 0
        assert cost.memory > 0 or math.isnan(cost.memory)


def test_every_method_can_be_measured():
    assert set(vlm_steer.list_methods()) <= set(bench.every_arm())
    costs = bench.measure_overhead(
        bench.every_arm(),
        shape="nano",
        image_tokens=16,
        new_tokens=3,
        repeats=1,
    )
    assert [cost.arm for cost in costs] == bench.every_arm()


def test_the_model_is_given_back_unsteered_and_on_sdpa():
    model = bench.build_model(bench.SHAPES["nano"], 16, device="cpu", dtype=torch.float32)
    inputs = bench._inputs(model, 16)
    bench._timings(model, inputs, "pai", "eager", 3, time.perf_counter)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)


@pytest.mark.parametrize(
    ("arms", "shape", "tokens"),
    [(["pia"], "nano", 16), (["pai"], "big", 16), (["pai"], "nano", 15)],
)
def test_what_is_not_known_is_an_error_with_the_choices(arms, shape, tokens):
    with pytest.raises(ConfigError, match=r"known|square"):
        list(bench.measure_overhead(arms, shape=shape, image_tokens=tokens))


def test_the_command_writes_json_and_a_table(tmp_path):
    result = CliRunner().invoke(
        build_app(),
        [
            "bench",
            "overhead",
            "--methods",
            "pai",
            "--shape",
            "nano",
            "--image-tokens",
            "16",
            "--new-tokens",
            "3",
            "--repeats",
            "1",
            "--attn",
            "sdpa",
            "--attn",
            "eager",
            "--output",
            str(tmp_path),
        ],
    )
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "overhead.json").read_text())
    assert [cost["arm"] for cost in facts["costs"]] == ["pai", "none", "pai"]
    sdpa, eager = (tmp_path / "overhead.md").read_text().split("Over `eager`")
    assert "| `pai` | 16 |" in sdpa
    assert "| `none` | 16 |" not in sdpa
    assert "| `none` | 16 |" in eager


def test_an_unknown_attention_is_named():
    result = CliRunner().invoke(build_app(), ["bench", "overhead", "--attn", "flash"])
    assert isinstance(result.exception, ConfigError)
    assert "--attn flash" in str(result.exception)


def test_the_published_way_and_ours_agree_on_the_same_tensors():
    costs = bench_rows.measure_layer(160, heads=2, head_dim=8, repeats=1)
    assert [(cost.method, cost.phase) for cost in costs] == [
        ("pai", "prefill"),
        ("var", "prefill"),
        ("pai", "decode"),
        ("var", "decode"),
    ]
    assert all(cost.published > 0 and cost.here > 0 for cost in costs)


def test_the_rows_command_prints_a_line_per_method_and_phase(monkeypatch):
    costs = [bench_rows.LayerCost("pai", "prefill", 160, 3.0, 1.1)]
    monkeypatch.setattr(bench_rows, "measure_layer", lambda *_, **__: costs)
    result = CliRunner().invoke(build_app(), ["bench", "rows", "--tokens", "160"])
    assert result.exit_code == 0, result.output
    assert "3.00" in result.output
    assert "1.10" in result.output

"""What steering costs: time and memory of every method as ratios to the unsteered model.

The model is a LLaVA of the asked shape with random weights, since cost does not depend on what
weights say. Every measurement of a method is taken next to one of the unsteered model in the same
process, and medians of the ratios of neighbours are reported.
"""

import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]  # ships no types
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

import vlm_steer
from vlm_steer.config import Spec, resolve
from vlm_steer.directions import Directions
from vlm_steer.errors import ConfigError, SteerWarning
from vlm_steer.heads import write_head_scores

__all__ = ["SETTINGS", "SHAPES", "Cost", "Shape", "build_model", "every_arm", "measure_overhead"]

_IMAGE_TOKEN = 3
_N_TEXT = 64
_PATCH = 14


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of the random language model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int


SHAPES = {
    "small": Shape(hidden=1024, intermediate=2816, layers=12, heads=16, vocabulary=16000),
    "7b": Shape(hidden=4096, intermediate=11008, layers=32, heads=32, vocabulary=32000),
}

SETTINGS: dict[str, Spec] = {
    "pai": {"method": "pai", "alpha": 0.5, "gamma": 1.0},
    "pai_guided": {"method": "pai", "alpha": 0.5, "gamma": 1.1},
    # A random model has no massive activations; two ordinary dimensions stand in for sinks, so
    # that the redistribution does all of its work.
    "var": {"method": "var", "sink_dims": [1, 2], "tau": 2.0, "min_image_mass": 0.0},
    # The paper acts on few heads, chosen for every model; two of each layer stand in for them.
    "act_calibrated": {"method": "act"},
    # There is no processor that could tell what black is.
    "agla": {"method": "agla", "blank": "mean"},
    # There is no tokenizer either; as many ids as the authors' texts have tokens.
    "icd": {"method": "icd", "disturbance_ids": list(range(16, 26))},
    "lqcd": {"method": "lqcd", "leading_ids": list(range(16, 28)), "tail": 4},
    "vdgd": {
        "method": "vdgd",
        "prompt_ids": list(range(16, 26)),
        "introduction_ids": list(range(16, 24)),
        "tail": 4,
        "max_description_tokens": 16,
    },
    # Every eighth token is looked at, about as often as captions name objects.
    "halc": {"method": "halc", "word_ids": list(range(16, 16000, 8))},
    "mvp": {
        "method": "mvp",
        "view_ids": [list(range(16, 26))] * 3,
        "introduction_ids": list(range(16, 24)),
        "answer_ids": [[16], [17]],
        "tail": 4,
        "max_caption_tokens": 16,
        "max_path_tokens": 8,
    },
    "yes_bias": {"method": "yes_bias", "yes_ids": [16], "no_ids": [17]},
    # A random model is so unsure that the first layer judged settles every token; here none does.
    "memvr_waiting": {"method": "memvr", "threshold": 0.9999},
}
"""Arms whose settings are not the defaults of a method or a preset of that name."""


def every_arm() -> list[str]:
    """Names of all arms: every registered method, and the settings above."""
    return sorted({*vlm_steer.list_methods(), *SETTINGS})


@dataclass(frozen=True, slots=True)
class Cost:
    """Ratios of one method to the unsteered model.

    Attributes:
        arm: Name of the setting.
        attention: Attention implementation below the steering.
        image_tokens: Image tokens of the prompt.
        prefill: Time of the pass over the prompt.
        decode: Time per decoded token.
        memory: Peak memory of the process (of the device, on a GPU).
        timings: How many of each the medians are of.
    """

    arm: str
    attention: str
    image_tokens: int
    prefill: float
    decode: float
    memory: float
    timings: int


def build_model(
    shape: Shape, image_tokens: int, *, device: str, dtype: torch.dtype
) -> PreTrainedModel:
    """A LLaVA with random weights whose images have the given number of tokens.

    Raises:
        ConfigError: The number of image tokens is not a square.
    """
    side = round(image_tokens**0.5)
    if side * side != image_tokens:
        raise ConfigError(f"{image_tokens} image tokens do not form a square grid.")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=side * _PATCH,
            patch_size=_PATCH,
        ),
        text_config=LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            vocab_size=shape.vocabulary,
            max_position_embeddings=8192,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
        image_token_index=_IMAGE_TOKEN,
    )
    torch.manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LlavaForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(default)
    model.generation_config.eos_token_id = None
    model.train(False)
    return model


def measure_overhead(
    arms: Sequence[str],
    *,
    shape: str = "small",
    image_tokens: int = 576,
    new_tokens: int = 24,
    repeats: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: Sequence[str] = ("sdpa",),
    now: Callable[[], float] = time.perf_counter,
) -> Iterator[Cost]:
    """Measure what each arm costs beside the unsteered model, one after the other.

    Args:
        arms: Names in ``SETTINGS``, or methods, presets and compositions of them.
        shape: Name in ``SHAPES``.
        image_tokens: Image tokens of the prompt; 64 text tokens surround them.
        new_tokens: Tokens decoded per timing.
        repeats: Timings per arm; medians are reported.
        device: ``cpu`` or ``cuda``.
        dtype: Data type of the model.
        attention: What lies below the steering, ``sdpa`` or ``eager``, as published code runs; over
            ``eager`` the unsteered model is an arm of its own (``none``).
        now: Clock to read; that of the thread's work with a single thread on a busy machine.

    Yields:
        Ratios to the unsteered model over ``sdpa``, in the order of implementations and arms.

    Raises:
        ConfigError: An arm or a shape is not known.
        UnsupportedModelError: An arm refuses the model.
    """
    if shape not in SHAPES:
        raise ConfigError(f"bench: shape {shape!r} is not known. Shapes: {', '.join(SHAPES)}.")
    specs: dict[str, Spec] = {arm: resolve(SETTINGS.get(arm, arm)) for arm in arms}
    model = build_model(SHAPES[shape], image_tokens, device=device, dtype=dtype)
    inputs = _inputs(model, image_tokens)
    plans = [
        (below, arm)
        for below in attention
        for arm in (*(("none",) if below != "sdpa" else ()), *arms)
    ]
    with tempfile.TemporaryDirectory() as folder:
        made = _made_for(model, folder)
        specs |= {arm: made[arm] for arm in specs if arm in made}
        _timings(model, inputs, None, "sdpa", new_tokens, now)  # warms up allocators and kernels
        for below, arm in tqdm(plans, desc=f"{image_tokens} image tokens", leave=False):
            ratios = _ratios(model, inputs, specs.get(arm), below, new_tokens, repeats, now)
            yield Cost(arm, below, image_tokens, *ratios, repeats)


def _made_for(model: PreTrainedModel, folder: str) -> dict[str, Spec]:
    """Arms that need files or heads of the model; which ones does not change what they cost."""
    config = model.config.get_text_config(decoder=True)
    layers = config.num_hidden_layers
    directions, heads = f"{folder}/vti.safetensors", f"{folder}/decore.json"
    vectors = torch.randn(layers, config.hidden_size)
    Directions(vectors, "vti", str(model.config.model_type), {}).save(directions)
    write_head_scores(heads, {(layer, 0): [1.0] for layer in range(layers)})
    return {
        "vti": {"method": "vti", "directions": directions},
        "decore": {"method": "decore", "head_file": heads, "n_heads": layers},
        "act_calibrated": {"method": "act", "head_list": dict.fromkeys(range(layers), (0, 1))},
    }


def _ratios(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    spec: Spec,
    attention: str,
    new_tokens: int,
    repeats: int,
    now: Callable[[], float],
) -> tuple[float, float, float]:
    """Median ratios of prefill, decoding and memory, each timing beside one of the base."""
    ratios = []
    for _ in range(repeats):
        base = _timings(model, inputs, None, "sdpa", new_tokens, now)
        mine = _timings(model, inputs, spec, attention, new_tokens, now)
        ratios.append([m / b for m, b in zip(mine, base, strict=True)])
    prefill, decode, memory = (statistics.median(column) for column in zip(*ratios, strict=True))
    return prefill, decode, memory


def _timings(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    spec: Spec,
    attention: str,
    new_tokens: int,
    now: Callable[[], float],
) -> tuple[float, float, float]:
    """Seconds of the prompt, seconds per decoded token, and peak bytes."""
    model.set_attn_implementation({"text_config": attention})
    clock = _Clock(model, now)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SteerWarning)
        with _peak_memory(model) as peak, vlm_steer.steer(model, spec):
            clock.start()
            generate: Any = model.generate
            generate(
                **inputs,
                max_new_tokens=1 + new_tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList([clock]),
            )
    model.set_attn_implementation({"text_config": "sdpa"})
    ticks = clock.ticks
    steps = [after - before for before, after in pairwise(ticks[1:])]
    return ticks[1] - ticks[0], statistics.median(steps), peak[0]


class _Clock(LogitsProcessor):
    """Notes the time whenever the logits of a token are ready."""

    def __init__(self, model: PreTrainedModel, now: Callable[[], float]):
        self.model = model
        self.now = now
        self.ticks: list[float] = []

    def start(self) -> None:
        """Start the clock."""
        self._tick()

    def __call__(
        self,
        input_ids: torch.Tensor,  # noqa: ARG002
        scores: torch.Tensor,
    ) -> torch.Tensor:
        """Note the time; the scores stay as they are."""
        self._tick()
        return scores

    def _tick(self) -> None:
        _synchronize(self.model)
        self.ticks.append(self.now())


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _peak_memory(model: PreTrainedModel) -> Iterator[list[float]]:
    """Collects the peak memory of the block, in bytes; NaN where it cannot be read."""
    peak = [float("nan")]
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak[0] = float(torch.cuda.max_memory_allocated())
        return
    resettable = _reset_peak_resident()
    yield peak
    if resettable:
        peak[0] = _peak_resident()


def _reset_peak_resident() -> bool:
    """Reset the kernel's high-water mark of this process; Linux only."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak_resident() -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) * 1024
    return float("nan")


def _inputs(model: PreTrainedModel, image_tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    text = torch.randint(16, vocabulary, (_N_TEXT,), generator=generator)
    image = torch.full((image_tokens,), _IMAGE_TOKEN)
    start = torch.tensor([1])
    ids = torch.cat([start, text[:16], image, text[16:]])[None]
    side = model.config.vision_config.image_size
    pixels = torch.randn((1, 3, side, side), generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }


def as_rows(costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """Costs as plain data."""
    return [asdict(cost) for cost in costs]

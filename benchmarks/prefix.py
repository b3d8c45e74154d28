"""How much faster questions about one image are when they share its pass.

python benchmarks/prefix.py [--images 4] [--questions 6] [--method none] [--threads 1]

A LLaVA of 150 million random weights with 576 image tokens answers yes/no questions in three ways:
one whole prompt after the other, as published code asks them; whole prompts in a batch per image;
and a batch per image whose image is computed once. The answers of all three must be equal. Each way
is timed `--repeats` times, in turn, and medians are reported.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaProcessor

import vlm_steer
from vlm_steer.generation import render_prompt
from vlm_steer_eval.bench.overhead import Shape, build_model
from vlm_steer_eval.running.generation import Generator, Output, Settings

SHAPE = Shape(hidden=1024, intermediate=2816, layers=9, heads=16, vocabulary=16000)
PATCH, SIDE = 14, 24
OBJECTS = ("dog", "cat", "traffic light", "car", "bench", "person", "cup", "bird", "tree", "house")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--questions", type=int, default=6, help="per image")
    parser.add_argument("--tokens", type=int, default=2, help="per answer")
    parser.add_argument("--method", default="none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    model, processor = build(chosen.device, getattr(torch, chosen.dtype))
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{weights / 1e6:.0f} M weights, {SIDE * SIDE} image tokens, {chosen.images} images with "
        f"{chosen.questions} questions each, {chosen.tokens} tokens per answer, "
        f"method {chosen.method}, {chosen.device} with {chosen.threads} threads"
    )
    generator = Generator(model, processor, Settings(max_new_tokens=chosen.tokens))
    batches = [batch(processor, image, chosen.questions) for image in range(chosen.images)]
    with vlm_steer.steer(model, chosen.method, processor=processor) as steering:
        if steering.plan.prefix is None:
            raise SystemExit(f"{chosen.method} does not leave the prefix untouched: nothing shared")
        ways = {
            "one question at a time": lambda: run(generator, batches, size=1),
            "whole prompts, batched": lambda: run(generator, batches, size=chosen.questions),
            "image computed once": lambda: run(
                generator, batches, size=chosen.questions, steering=steering
            ),
        }
        seconds = measure(ways, chosen.repeats)
    report(seconds, chosen.images * chosen.questions)


def build(device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The random model, and a processor that prepares real pictures for it."""
    model = build_model(SHAPE, SIDE * SIDE, device=device, dtype=dtype)
    _, tiny = vlm_steer.load_tiny()
    size = PATCH * SIDE
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ),
        tokenizer=tiny.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        chat_template=tiny.chat_template,
        image_token=tiny.image_token,
        num_additional_image_tokens=1,
    )
    model.config.image_token_id = tiny.image_token_id
    return model, processor


def batch(processor: Any, number: int, n: int) -> tuple[list[str], Image.Image, str]:
    """Prompts about one picture, the picture, and its name."""
    prompts = [
        render_prompt(processor, f"Is there a {OBJECTS[i % len(OBJECTS)]} in the image?")
        for i in range(n)
    ]
    pixels = np.random.default_rng(number).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    return prompts, Image.fromarray(pixels), str(number)


def run(
    generator: Generator,
    batches: Sequence[tuple[list[str], Image.Image, str]],
    *,
    size: int,
    steering: Any = None,
) -> list[str]:
    """Answer everything in batches of a size; with a steering, the image is computed once."""
    outputs: list[Output] = []
    for prompts, image, name in batches:
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            ids = [f"{name}/{start + i}" for i in range(len(part))]
            sharing = None if steering is None else (steering, [name] * len(part))
            with torch.inference_mode():
                outputs += generator(part, [image] * len(part), ids, sharing)
    return [output.text for output in outputs]


def measure(ways: dict[str, Callable[[], list[str]]], repeats: int) -> dict[str, float]:
    """Median seconds of every way, after one run each whose answers must be equal."""
    answers = {name: way() for name, way in ways.items()}
    first, *others = answers.values()
    if any(other != first for other in others):
        raise SystemExit("the ways give different answers; the comparison means nothing")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def report(seconds: dict[str, float], n: int) -> None:
    """Print a table."""
    slowest = next(iter(seconds.values()))
    print("| way | s per question | speed |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value / n:.3f} | × {slowest / value:.2f} |")


if __name__ == "__main__":
    main()

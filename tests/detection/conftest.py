"""Captions of the embedded model, traced, and what eager attention shows of them."""

import pytest
import torch
from torch import Tensor

import vlm_steer
from vlm_steer.detection import NEEDS, Trace, trace_answers
from vlm_steer.generation import encode, render_prompt
from vlm_steer.tiny import CAPTION_PROMPT, scenes

NEW = 12


@pytest.fixture(scope="session")
def tiny():
    return vlm_steer.load_tiny()


@pytest.fixture(scope="session")
def inputs(tiny):
    """Two prompts of different lengths, the second padded on the left."""
    prompts = [render_prompt(tiny[1], text) for text in (CAPTION_PROMPT, "Describe the image.")]
    pictures = [scenes.render(scenes.scene("broken", index)) for index in range(2)]
    return encode(tiny[1], prompts, pictures)


@pytest.fixture(scope="session")
def answers(tiny, inputs) -> list[Tensor]:
    with torch.no_grad():
        output = tiny[0].generate(**inputs, max_new_tokens=NEW, do_sample=False)
    first, second = output[:, inputs["input_ids"].shape[1] :]
    return [first, second[: NEW - 4]]


@pytest.fixture(scope="session")
def traces(tiny, inputs, answers) -> list[Trace]:
    return trace_answers(*tiny, inputs, answers, needs=NEEDS)


@pytest.fixture(scope="session")
def eager(tiny, inputs, answers):
    """Attentions, logits and states of each prompt with its answer, by itself and unpadded."""
    model = tiny[0]
    model.set_attn_implementation("eager")
    found = []
    for row, answer in enumerate(answers):
        kept = inputs["attention_mask"][row].bool()
        ids = torch.cat([inputs["input_ids"][row][kept], answer])[None]
        with torch.no_grad():
            output = model(
                input_ids=ids,
                pixel_values=inputs["pixel_values"][row : row + 1],
                output_attentions=True,
                output_hidden_states=True,
            )
        found.append((int(kept.sum()), output))
    model.set_attn_implementation("sdpa")
    return found

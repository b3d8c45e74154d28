"""Show methods that act on sinks where their effect is known in advance, on a model with sinks.

python benchmarks/planted_sinks.py     writes docs/results/planted_sinks.md

The model is a LLaVA whose weights are written by hand. The colour of a patch says what it is: a
red one becomes an image token with massive activations, which draws attention as the start of the
text does; the vision encoder's class token looks at green ones in its first layer and at blue ones
in its last but one. Text and image tokens are otherwise alike, so every attention weight is a ratio
of small numbers that can be computed on paper, and so is what a method makes of it. The model
names the object that it sees if its text attends to the image enough, and guesses another one if
not.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlm_steer
from vlm_steer.engine.hooks import At, Method
from vlm_steer.errors import SteerWarning

PAGE = Path(__file__).parents[1] / "docs" / "results" / "planted_sinks.md"

WIDTH, LAYERS, HEAD_DIM, SIDE = 1024, 3, 16, 8
PAD, BOS, IMAGE, TEXT, SEES, GUESSES = range(6)
SINK_DIMS = (5, 20)
CONSTANT, IS_IMAGE, IS_TEXT, READOUT = 0, 1, 2, 3
UNIT = math.sqrt(WIDTH / 2)
"""Size of the two features of an ordinary token: its root mean square is then 1."""
MASSIVE = 1000 * UNIT
EPSILON = 1e-3

# Unnormalised attention of every head to a sink, to another image token, to a text token.
HEADS = np.array([[70.0, 4.0, 1.0], [80.0, 0.1, 1.0], [1.0, 0.1, 10.0], [4.0, 4.0, 1.0]])

START, WORD, SINK, LOCAL, SUMMARY, PLAIN = "BTSLUV"


@dataclass(frozen=True)
class Picture:
    """Which of the 64 patches are red, green and blue; no patch is two of them."""

    sinks: tuple[int, ...]
    local: tuple[int, ...] = tuple(range(32, 48))
    summary: tuple[int, ...] = (50, 55, 60)

    def kinds(self) -> str:
        """One letter per image token."""
        letters = [PLAIN] * SIDE**2
        for letter, places in ((SINK, self.sinks), (LOCAL, self.local), (SUMMARY, self.summary)):
            for place in places:
                letters[place] = letter
        return "".join(letters)

    def pixels(self) -> Tensor:
        """``[3, 16, 16]``; a colour is 1 in its patches and -1 elsewhere."""
        colours = -torch.ones(3, SIDE**2)
        for colour, places in enumerate((self.sinks, self.local, self.summary)):
            colours[colour, list(places)] = 1
        grid = colours.view(3, SIDE, SIDE)
        return grid.repeat_interleave(2, 1).repeat_interleave(2, 2)


PICTURES = (Picture(sinks=(3, 17, 29)), Picture(sinks=(0, 8, 9, 63)))
WORDS = ((2, 8), (4, 8))
"""Words before and after each image; the first prompt of a batch is padded by two."""


def prompt_kinds(picture: Picture, words: tuple[int, int]) -> str:
    """One letter per token of a prompt."""
    return START + WORD * words[0] + picture.kinds() + WORD * words[1]


def inputs(pictures: Sequence[Picture] = PICTURES) -> dict[str, Tensor]:
    """A left-padded batch."""
    rows = [
        [BOS] + [TEXT] * before + [IMAGE] * SIDE**2 + [TEXT] * after
        for before, after in WORDS[: len(pictures)]
    ]
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    pixels = torch.stack([picture.pixels() for picture in pictures])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels}


# -- the model --------------------------------------------------------------------------------
def build() -> LlavaForConditionalGeneration:
    """The model with its sinks."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=3,
            num_attention_heads=1,
            image_size=2 * SIDE,
            patch_size=2,
        ),
        text_config=LlamaConfig(
            vocab_size=8,
            hidden_size=WIDTH,
            intermediate_size=8,
            num_hidden_layers=LAYERS,
            num_attention_heads=len(HEADS),
            num_key_value_heads=len(HEADS),
            head_dim=HEAD_DIM,
            # The slowest pair of rotary dimensions does not turn at all within a prompt.
            rope_parameters={"rope_type": "default", "rope_theta": 1e12},
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=None,
        ),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        _plant_vision(model.model.vision_tower)
        _plant_projector(model.model.multi_modal_projector)
        _plant_decoder(model)
    return model


def _plant_vision(tower: Any) -> None:
    vision = getattr(tower, "vision_model", tower)
    kernel = vision.embeddings.patch_embedding.weight
    for colour in range(3):
        kernel[2 * colour, colour], kernel[2 * colour + 1, colour] = 0.25, -0.25
    vision.embeddings.class_embedding[6:] = torch.tensor([1.0, -1.0])
    vision.embeddings.position_embedding.weight[1:, 6:] = torch.tensor([-1.0, 1.0])
    for layer, colour in ((0, 1), (1, 2)):
        attention = vision.encoder.layers[layer].self_attn
        attention.q_proj.weight[0, 6] = 2.0
        attention.k_proj.weight[0, 2 * colour] = 1.0


def _plant_projector(projector: Any) -> None:
    projector.linear_1.weight[0, 0], projector.linear_1.weight[1, 0] = 10.0, -10.0
    out = projector.linear_2.weight
    out[list(SINK_DIMS), 0] = MASSIVE / 10
    out[CONSTANT, :2] = UNIT / 10
    out[IS_IMAGE, 1] = UNIT / 10


def _plant_decoder(model: LlavaForConditionalGeneration) -> None:
    decoder = model.model.language_model
    embeddings = decoder.embed_tokens.weight
    embeddings[[BOS, TEXT, SEES, GUESSES], CONSTANT] = UNIT
    embeddings[[TEXT, SEES, GUESSES], IS_TEXT] = UNIT
    for dim in SINK_DIMS:
        embeddings[BOS, dim] = MASSIVE
    still = HEAD_DIM // 2 - 1
    logs = torch.from_numpy(np.log(HEADS)).float()
    for layer in decoder.layers:
        attention = layer.self_attn
        for head in range(len(HEADS)):
            first = head * HEAD_DIM
            attention.q_proj.weight[first + still, CONSTANT] = math.sqrt(HEAD_DIM) / UNIT
            key = attention.k_proj.weight[first + still]
            key[list(SINK_DIMS)] = logs[head, 0] / UNIT / 2
            key[IS_IMAGE], key[IS_TEXT] = logs[head, 1] / UNIT, logs[head, 2] / UNIT
            attention.v_proj.weight[first, IS_IMAGE] = 1 / UNIT
            attention.o_proj.weight[READOUT, first] = EPSILON
    model.lm_head.weight[SEES, READOUT] = 1 / EPSILON
    model.lm_head.weight[GUESSES, CONSTANT] = _enough() / UNIT


def _enough() -> float:
    """The attention to ordinary image tokens, over heads and layers, that makes the model see."""
    kinds = prompt_kinds(PICTURES[0], WORDS[0])
    return LAYERS * float(masses(on_paper(kinds)[:, -1], kinds)[:, 2].sum()) + 0.05


# -- on paper ---------------------------------------------------------------------------------
def on_paper(kinds: str) -> np.ndarray:
    """``[heads, tokens, tokens]`` attention of the unsteered model."""
    column = {START: 0, SINK: 0, WORD: 2}
    keys = np.log(HEADS)[:, [column.get(kind, 1) for kind in kinds]]
    # The query of a massive token is small, since its other features are normalised away.
    query = np.array([UNIT / MASSIVE if kind in START + SINK else 1.0 for kind in kinds])
    weights = np.exp(query[:, None] * keys[:, None, :]) * np.tri(len(kinds))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def is_any(kinds: str, letters: str) -> np.ndarray:
    """``[tokens]`` bool."""
    return np.array([kind in letters for kind in kinds])


IMAGE_KINDS = SINK + LOCAL + SUMMARY + PLAIN


def var_on_paper(kinds: str, *, keep: float = 0.4) -> np.ndarray:
    """VAR: in image-centric heads, sinks give to the other image tokens."""
    weights = on_paper(kinds)
    sink, image = is_any(kinds, START + SINK), is_any(kinds, IMAGE_KINDS)
    last_image = int(image.nonzero()[0].max())
    for head in range(len(weights)):
        for row in range(last_image + 1, len(kinds)):
            a = weights[head, row]
            m_image, m_image_sink = a[image].sum(), a[image & sink].sum()
            if m_image < 0.2 or m_image_sink / m_image > 0.5:
                continue
            gain = 1 + (1 - keep) * a[sink].sum() / a[image & ~sink].sum()
            a[image & ~sink] *= gain
            a[sink] *= keep
    return weights


def act_on_paper(kinds: str, *, beta: float = 0.4, threshold: float = 5.0) -> np.ndarray:
    """ACT: every token but the first that draws more than 5 even shares gives to all others."""
    weights, n = on_paper(kinds), len(kinds)
    for head in range(len(weights)):
        a = weights[head]
        received = [a[k:, k].sum() / (n - k) for k in range(n)]
        over = [k for k in range(n) if received[k] > threshold / n]
        sink = np.isin(np.arange(n), over[1:])
        for row in a:
            rest = row[~sink].sum()
            row[~sink] *= 1 + (1 - beta) * row[sink].sum() / rest
            row[sink] *= beta
    return weights


def knockout_on_paper(kinds: str) -> np.ndarray:
    """Knockout: text behind the image does not see it."""
    weights = on_paper(kinds)
    image = is_any(kinds, IMAGE_KINDS)
    rows = slice(int(image.nonzero()[0].max()) + 1, None)
    weights[:, rows, image] = 0
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def paint_on_paper(kinds: str, *, alpha: float = 0.7, beta: float = 0.3) -> np.ndarray:
    """PAINT: on the last row, scores of green and blue tokens rise."""
    weights = on_paper(kinds)
    scores = np.log(HEADS)[:, 1]
    for letter, strength in ((LOCAL, alpha), (SUMMARY, beta)):
        raised = np.exp(strength * np.abs(scores))[:, None]
        weights[:, -1, is_any(kinds, letter)] *= raised
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def masses(weights: np.ndarray, kinds: str) -> np.ndarray:
    """``[..., 4]`` attention to the start, image sinks, other image tokens and words."""
    groups = (START, SINK, LOCAL + SUMMARY + PLAIN, WORD)
    return np.stack([weights[..., is_any(kinds, g)].sum(axis=-1) for g in groups], axis=-1)


@dataclass(frozen=True)
class Case:
    """A steering and its effect on paper, in the layers where it acts."""

    spec: Any
    expected: Callable[[str], np.ndarray]
    layers: tuple[int, ...] = (0, 1, 2)


CASES = {
    "none": Case(None, on_paper),
    "var": Case("var", var_on_paper, (0, 1)),
    "var, sinks: secondary": Case("var_secondary", var_on_paper, (0, 1)),
    "var_official": Case("var_official", lambda k: var_on_paper(k, keep=0.6), (2,)),
    "act": Case({"method": "act", "layers": "all"}, act_on_paper),
    "knockout": Case("knockout", knockout_on_paper),
    "paint": Case({"method": "paint", "layers": "all"}, paint_on_paper),
}


# -- in the model -----------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Watch(Method):
    """Records the attention of the row that predicts, the prompt's only."""

    name: ClassVar[str] = "watch"
    observer: ClassVar[bool] = True

    def observe(self, weights: Tensor, at: At) -> Tensor:
        """``[batch, heads, prompt]``."""
        return weights[..., : at.prompt.kinds.shape[1]]


@dataclass(frozen=True)
class Seen:
    """What a steering did in the model.

    Attributes:
        weights: Per row of the batch, ``[layers, heads, tokens]`` of the last prompt row.
        effect: Of the method, by layer.
        says: The first generated token of each row.
    """

    weights: list[np.ndarray]
    effect: dict[int, dict[str, float]]
    says: list[str]


def run(model: LlavaForConditionalGeneration, case: Case, batch: dict[str, Tensor]) -> Seen:
    """Generate one token under a steering."""
    methods = list(vlm_steer.config.resolve(case.spec)) if case.spec else []
    with warnings.catch_warnings(), vlm_steer.steer(model, [*methods, Watch()]) as steering:
        warnings.simplefilter("ignore", SteerWarning)
        output = model.generate(**batch, max_new_tokens=1, do_sample=False)
        seen = steering.records(output)["watch"][:, 0].double().numpy()
        effect = steering.effect()
    is_token = batch["attention_mask"].bool().numpy()
    name = methods[0].name if methods else "watch"
    return Seen(
        weights=[row[..., mask] for row, mask in zip(seen, is_token, strict=True)],
        effect=effect[name]["layers"],
        says=["sees" if token == SEES else "guesses" for token in output[:, -1].tolist()],
    )


def expected_mass(case: Case, kinds: str) -> float:
    """Attention that a steering moves in a layer on paper, over rows and heads."""
    return float(np.abs(case.expected(kinds) - on_paper(kinds)).sum() / 2)


_INTRODUCTION = """\
# Sinks that were planted

Written by `python benchmarks/planted_sinks.py`. Do not edit.

The embedded model has no attention sinks, so methods that act on them are shown on one that was
built to have them: a LLaVA with weights written by hand, in which the start of the text and the
image tokens of red patches have massive activations and draw attention, and in which every weight
can be computed on paper. It names what it sees when its text attends enough to image tokens that
are no sinks, and guesses otherwise. That methods do here what their equations say shows nothing
about their use.

Head by head, a sink draws {0} units, another image token {1} and a word {2}: heads 0 and 3 look at
the image, 1 at sinks alone, 2 at words. A left-padded batch holds two prompts, with 3 image sinks
among 64 image tokens and with 4, which are then more than half of what head 0 gives the image, so
that VAR spares that head. All methods run with their defaults, `act` and `paint` in all layers.

*Start*, *sinks*, *image* and *words* are the attention of the first prompt's last row in the first
layer where the method acts; *moved* is what the method changed in that layer over all rows, heads
and both prompts, as `effect()` counts it, beside the same on paper (a mask's effect is not
counted); *off by* is the largest difference of any weight of the last rows from the one on paper,
over layers, heads and prompts; *says* is what the model answers to both.

| method | head | start | sinks | image | words | moved | on paper | off by | says |
|---|--:|--:|--:|--:|--:|--:|--:|--:|---|"""


def report() -> str:
    """The page."""
    model = build()
    lines = [*_INTRODUCTION.format(*(", ".join(f"{x:g}" for x in h) for h in HEADS.T)).split("\n")]
    batch = inputs()
    rows = [prompt_kinds(p, w) for p, w in zip(PICTURES, WORDS, strict=True)]
    for name, case in CASES.items():
        seen = run(model, case, batch)
        layer = case.layers[0]
        moved = seen.effect.get(layer, {}).get("mass", 0.0)
        paper = sum(expected_mass(case, kinds) for kinds in rows)
        # Attention that a mask cuts off is not accounted for.
        shown = "" if name == "knockout" else f"{moved:.2f}"
        for head, mass in enumerate(masses(seen.weights[0][layer], rows[0])):
            tail = [shown, f"{paper:.2f}", _size(off(case, seen, rows)), ", ".join(seen.says)]
            cells = [
                name,
                str(head),
                *(f"{m:.3f}" for m in mass),
                *(tail if head == 0 else [""] * 4),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def off(case: Case, seen: Seen, rows: Sequence[str]) -> float:
    """Largest difference to the weights on paper."""
    worst = 0.0
    for weights, kinds in zip(seen.weights, rows, strict=True):
        for layer in range(LAYERS):
            expected = (case.expected if layer in case.layers else on_paper)(kinds)[:, -1]
            worst = max(worst, float(np.abs(weights[layer] - expected).max()))
    return worst


def _size(value: float) -> str:
    return "below 1e-5" if value < 1e-5 else f"{value:.0e}"


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(report())
    print(f"wrote {PAGE}")

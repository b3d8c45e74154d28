"""Files that methods need, made for one checkpoint from ``validation`` scenes."""

import dataclasses
from pathlib import Path
from typing import Any

from vlm_steer.commands.directions import Pair, from_pairs
from vlm_steer.commands.head_scores import visual_heads
from vlm_steer.heads import write_head_scores
from vlm_steer.tiny import CAPTION_PROMPT, scenes
from vlm_steer.tiny.dice import Dice
from vlm_steer.tiny.language import long_caption

N_SCENES = 60
TOKENS = 32


def method_needs(model: Any, processor: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """Options of methods that read a file; files that are there are not made again.

    DeCoRe masks the heads that look most at the image. VTI's directions lead from captions with
    one object too many to the same without it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    heads, directions = folder / "heads.json", folder / "directions.safetensors"
    if not (heads.exists() and directions.exists()):
        pairs = [_pair(index, folder) for index in range(N_SCENES)]
    if not heads.exists():
        files = [pair.image for pair in pairs]
        scores = visual_heads(
            model, processor, files, CAPTION_PROMPT, max_new_tokens=TOKENS, batch_size=N_SCENES
        )
        write_head_scores(heads, scores)
    if not directions.exists():
        made = from_pairs(model, processor, pairs, form="mean_plus_component", batch_size=N_SCENES)
        made.save(directions)
    return {
        "decore": {"head_file": str(heads)},
        "vti": {"directions": str(directions)},
    }


def _pair(index: int, folder: Path) -> Pair:
    """Two captions that differ by an object taken from another scene."""
    seen = scenes.scene("validation", index)
    named = {thing.category for thing in seen.objects}
    others = (scenes.scene("validation", index + n).objects for n in range(1, 100))
    stranger = next(t for things in others for t in things if t.category not in named)
    more = dataclasses.replace(seen, objects=(*seen.objects, stranger))
    correct, wrong = (long_caption(Dice("needs", index), s, drop=0.0) for s in (seen, more))
    path = folder / f"{index}.png"
    scenes.render(seen).save(path)
    return Pair(path, CAPTION_PROMPT, correct, wrong)

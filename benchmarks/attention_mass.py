"""Say how the embedded model spreads its attention, into docs/tiny.md.

python benchmarks/attention_mass.py [--scenes 100] [--model DIR --mark MARK]

Rows are the text after the image in prompts that ask for a caption of ``validation`` scenes;
figures are means over rows, heads and scenes. A column is heavy where it gets more than five even
shares of a row's attention.
"""

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor

from vlm_steer.loading import load_model
from vlm_steer.tiny import CAPTION_PROMPT, scenes

PAGE = Path(__file__).parents[1] / "docs" / "tiny.md"
HEAVY = 5.0


def figures(source: str, n_scenes: int) -> Tensor:
    """``[layers, 6]``: the columns of the table."""
    model, processor = load_model(source)
    model.set_attn_implementation("eager")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": CAPTION_PROMPT}]}
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    found = []
    for index in range(n_scenes):
        image = scenes.render(scenes.scene("validation", index))
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        with torch.no_grad():
            seen = model(**inputs, output_attentions=True, output_hidden_states=True)
        is_image = inputs["input_ids"][0] == model.config.image_token_id
        after = int(is_image.nonzero().max()) + 1
        layers = zip(seen.attentions, seen.hidden_states[:-1], strict=True)
        found.append(torch.stack([_layer(a[0, :, after:], h[0], is_image) for a, h in layers]))
    return torch.stack(found).mean(dim=0)


def _layer(weights: Tensor, hidden: Tensor, is_image: Tensor) -> Tensor:
    """One layer's figures from ``[heads, rows, key]`` and its input ``[tokens, hidden]``."""
    n_seen = (weights > 0).sum(dim=-1, keepdim=True)
    is_heavy = weights > HEAVY / n_seen
    massive = (hidden / hidden.square().mean(dim=-1, keepdim=True).sqrt()).abs().amax()
    return torch.stack(
        [
            weights[..., 0].mean(),
            weights[..., is_image].sum(dim=-1).mean(),
            weights[..., is_image].amax(dim=-1).mean(),
            is_heavy[..., is_image].sum(dim=-1).float().mean(),
            is_heavy[..., 1:].all(dim=1)[:, is_image[1:]].any(dim=0).sum().float(),
            massive,
        ]
    )


def table(found: Tensor, n_scenes: int) -> str:
    """The part of the page between the marks."""
    lines = [
        f"Means over {n_scenes} scenes, by `python benchmarks/attention_mass.py`: attention of the "
        "text after the image.",
        "",
        "| layer | first token | image | largest image token | image tokens above 5 even shares "
        "| of these, for every row of a head | largest activation, in root mean squares |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for layer, row in enumerate(found.tolist()):
        first, image, top, heavy, steady, massive = row
        lines.append(
            f"| {layer} | {first:.3f} | {image:.3f} | {top:.3f} | {heavy:.1f} | {steady:.1f} "
            f"| {massive:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--model", default="tiny", help="folder of a model; the embedded one")
    parser.add_argument("--mark", default="attention", help="which table of the page to replace")
    chosen = parser.parse_args()
    begin, end = f"<!-- {chosen.mark} -->", f"<!-- /{chosen.mark} -->"
    found = figures(chosen.model, chosen.scenes)
    text = f"{begin}\n{table(found, chosen.scenes)}\n{end}"
    page = PAGE.read_text()
    PAGE.write_text(re.sub(f"{begin}.*{end}", lambda _: text, page, flags=re.DOTALL))
    print(text)


if __name__ == "__main__":
    main()

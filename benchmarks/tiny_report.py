"""Measure what the embedded model sees and invents: POPE, CHAIR and mention order on both splits.

python benchmarks/tiny_report.py --output /tmp/report [--model DIR] [--scenes 500]

Writes ``report.json`` (every number with its 95 % interval from resampled images) and ``report.md``
(the tables of docs/tiny.md). Decoding is greedy, in float32, with the weights as stored.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vlm_steer.tiny import CAPTION_PROMPT, model_dir
from vlm_steer.tiny.scenes import annotations, image, training_annotations
from vlm_steer_eval.benchmarks.chair import CHAIR_METRICS, TableNormaliser, score_caption
from vlm_steer_eval.benchmarks.pope import POPE_METRICS, parse_answer, pope_counts
from vlm_steer_eval.benchmarks.pope_builder import (
    STRATEGIES,
    BuiltQuestion,
    ImageObjects,
    build_pope,
    images_from_instances,
    object_statistics,
)
from vlm_steer_eval.benchmarks.vocabulary import ObjectVocabulary
from vlm_steer_eval.statistics.metrics import MetricSet, ratio, summarise

PARSER = "official"
PLACES = 6
PLACE = MetricSet(
    columns=("mentions", "false"),
    formulas={"false": lambda c: ratio(c["false"], c["mentions"])},
)


class Subject:
    """A model with its processor, answering questions about images in batches."""

    def __init__(self, directory: Path, batch_size: int) -> None:
        self.processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
        self.model = LlavaForConditionalGeneration.from_pretrained(
            directory, local_files_only=True, dtype=torch.float32
        ).eval()
        self.batch_size = batch_size

    def answer(self, asked: list[tuple[Any, str]], *, max_new_tokens: int, label: str) -> list[str]:
        """Answer (image loader, question) pairs, greedily."""
        answers: list[str] = []
        starts = range(0, len(asked), self.batch_size)
        for start in tqdm(starts, desc=label, mininterval=2.0):
            chunk = asked[start : start + self.batch_size]
            prompts = [self._prompt(question) for _, question in chunk]
            inputs = self.processor(
                images=[load() for load, _ in chunk],
                text=prompts,
                padding=True,
                return_tensors="pt",
            )
            with torch.inference_mode():
                ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
            answers += self.processor.batch_decode(
                ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
        return [answer.strip() for answer in answers]

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        prompt: str = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return prompt


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=model_dir())
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--splits", nargs="+", default=["iid", "broken"])
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=50)
    chosen = parser.parse_args()
    subject = Subject(chosen.model, chosen.batch_size)
    report = {split: measure(subject, split, chosen.scenes) for split in chosen.splits}
    chosen.output.mkdir(parents=True, exist_ok=True)
    (chosen.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    table = tables(report)
    (chosen.output / "report.md").write_text(table)
    print(table)


def measure(subject: Subject, split: str, n_scenes: int) -> dict[str, Any]:
    """Run POPE and captions on the first scenes of a split."""
    instances = annotations(split)
    ids = {entry["file_name"]: entry["id"] for entry in instances["images"][:n_scenes]}
    truth = {
        one.image: set(one.objects) for one in images_from_instances(instances) if one.image in ids
    }

    def loader(name: str) -> Any:
        return lambda: image(split, ids[name])

    questions = _questions(truth)
    unique = sorted({(q.image, q.text) for built in questions.values() for q in built})
    texts = subject.answer(
        [(loader(name), text) for name, text in unique], max_new_tokens=4, label=f"{split} POPE"
    )
    answers = dict(zip(unique, texts, strict=True))
    captions = subject.answer(
        [(loader(name), CAPTION_PROMPT) for name in truth],
        max_new_tokens=128,
        label=f"{split} captions",
    )
    return {
        "scenes": n_scenes,
        "pope": {name: _score_pope(built, answers) for name, built in questions.items()},
        **_score_captions(truth, captions),
        "examples": dict(list(zip(truth, captions, strict=True))[:5]),
    }


def _questions(truth: dict[str, set[str]]) -> dict[str, list[BuiltQuestion]]:
    """POPE's questions, frequency and co-occurrence taken from the training scenes."""
    learnt = object_statistics(images_from_instances(training_annotations()))
    images = [ImageObjects(name, tuple(sorted(objects))) for name, objects in truth.items()]
    return {name: build_pope(images, name, statistics=learnt) for name in STRATEGIES}


def _score_pope(built: list[BuiltQuestion], answers: dict[tuple[str, str], str]) -> dict[str, Any]:
    counts = [pope_counts(parse_answer(PARSER, answers[q.image, q.text], q.label)) for q in built]
    scores = summarise(POPE_METRICS, counts, [q.image for q in built], n_resamples=2000)
    return {name: scores[name] for name in ("accuracy", "f1", "yes_ratio")} | {
        "questions": len(built)
    }


def _score_captions(truth: dict[str, set[str]], captions: list[str]) -> dict[str, Any]:
    normaliser = TableNormaliser(ObjectVocabulary.coco())
    rows: list[list[int]] = []
    places: dict[int, list[tuple[str, list[int]]]] = defaultdict(list)
    for (name, present), caption in zip(truth.items(), captions, strict=True):
        score = score_caption(normaliser.read(caption), present)
        rows.append(score.counts())
        for place, mention in enumerate(score.reading.mentions, start=1):
            wrong = int(mention in score.hallucinated)
            places[min(place, PLACES)].append((name, [1, wrong]))
    order = {
        str(place): {
            "mentions": len(members),
            **summarise(
                PLACE, [row for _, row in members], [name for name, _ in members], n_resamples=2000
            )["false"],
        }
        for place, members in sorted(places.items())
    }
    chair = summarise(CHAIR_METRICS, rows, list(truth), n_resamples=2000)
    mentions = sum(len(members) for members in places.values())
    return {"chair": chair, "mentions": mentions / len(truth), "by_place": order}


def tables(report: dict[str, Any]) -> str:
    """Write the numbers as Markdown tables."""
    lines = ["| split | questions | accuracy | F1 | yes rate |", "|---|---|---|---|---|"]
    for split, found in report.items():
        for name, scores in found["pope"].items():
            cells = [_percent(scores[key]) for key in ("accuracy", "f1", "yes_ratio")]
            lines.append(f"| {split} | {name} | {' | '.join(cells)} |")
    names = ("CHAIRi", "CHAIRs", "Recall")
    lines += ["", f"| split | {' | '.join(names)} | objects | words |", "|---|---|---|---|---|---|"]
    for split, found in report.items():
        cells = [_percent(found["chair"][name]) for name in names]
        cells += [f"{found['mentions']:.1f}", f"{found['chair']['Len']['value']:.1f}"]
        lines.append(f"| {split} | {' | '.join(cells)} |")
    heads = [str(place) for place in range(1, PLACES)] + [f"{PLACES} and later"]
    lines += ["", f"| false mentions by place | {' | '.join(heads)} |", "|---" * 7 + "|"]
    for split, found in report.items():
        cells = [
            _percent(found["by_place"][str(place)]) if str(place) in found["by_place"] else "-"
            for place in range(1, PLACES + 1)
        ]
        lines.append(f"| {split} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _percent(score: dict[str, Any]) -> str:
    low, high = score["ci95"]
    return f"{100 * score['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


if __name__ == "__main__":
    main()

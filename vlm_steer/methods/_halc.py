"""The search of HALC over all prompts of a batch at once."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import Decoding, Found
from vlm_steer.locating import Locator
from vlm_steer.matching import Matcher
from vlm_steer.tagging import Tagger, ends_word, is_content_word, last_word

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo
    from vlm_steer.methods.halc import HALC

__all__ = ["Search", "Tools"]

_CENTRE = (0.2, 0.2, 0.8, 0.8)  # as in the official code, where a detector finds nothing


@dataclass(frozen=True)
class Tools:
    """Models beside the steered one.

    Attributes:
        tagger: Tells which words name objects.
        locator: Tells where they are.
        matcher: Tells which text matches the image.
    """

    tagger: Tagger | None = None
    locator: Locator | None = None
    matcher: Matcher | None = None

    @classmethod
    def load(cls, method: "HALC", model: "ModelInfo") -> "Tools":
        """Those that a method names; each is loaded once per model."""
        device = model.model.device
        tagger = locator = matcher = None
        if method.tagger != "words" and method.word_ids is None:
            name = method.tagger
            tagger = model.remember(("tagger", name), lambda: Tagger.load(name, device))
        if method.detector != "attention":
            found = method.detector
            locator = model.remember(("locator", found), lambda: Locator.load(found, device))
        if method.matcher != "own":
            given = method.matcher
            matcher = model.remember(("matcher", given), lambda: Matcher.load(given, device))
        return cls(tagger, locator, matcher)


@dataclass(frozen=True)
class _Choice:
    """How the last token of every row was chosen.

    Attributes:
        scores: ``[rows, vocabulary]`` of which it was the best, or among which it was drawn.
        attention: ``[rows, prompt]`` to image tokens meanwhile; ``None`` with a detector.
    """

    scores: Tensor
    attention: Tensor | None


class Search:
    """Writes token by token; a word is judged once the token behind it is known."""

    def __init__(self, method: "HALC", decoding: Decoding):
        self.method, self.decoding = method, decoding
        self.tools: Tools = decoding.plan
        self.is_over = torch.zeros_like(decoding.is_done)
        self.words = frozenset(word.casefold() for word in method.words or ())

    def run(self) -> Found:
        """Write to the end."""
        decoding, length = self.decoding, 0
        rows = torch.arange(len(decoding.ids), device=decoding.ids.device)
        chosen: _Choice | None = None
        while not (decoding.is_finished or bool(self.is_over.all())):
            tokens = self._next_tokens()
            better = None if chosen is None else self._better(tokens, chosen)
            if better is not None:
                decoding.take_back(1)
                self._append(better)
                chosen = None  # what replaces a word is not judged again
                continue
            decoding.commit(rows, length)
            chosen = _Choice(decoding.scores, self._attention())
            self._append(tokens)
            length += 1
        decoding.commit(rows, length)
        ids = decoding.ids[:, : decoding.prompt_length + length]
        return Found(ids, decoding.trace[:, :length])

    def _next_tokens(self) -> Tensor:
        scores = self.decoding.scores
        if self.decoding.asked.samples:
            return torch.multinomial(scores.softmax(dim=-1), 1).squeeze(1)
        return scores.argmax(dim=-1)

    def _append(self, tokens: Tensor) -> None:
        # A token that is taken back opens texts again that had ended before it.
        self.decoding.append(tokens.masked_fill(self.is_over, self.decoding.pad))
        self.is_over = self.is_over | self.decoding.is_done

    def _attention(self) -> Tensor | None:
        seen = self.decoding.seen
        if not seen:
            return None
        device = self.decoding.ids.device
        return torch.stack([part.to(device) for part in seen.values()]).mean(dim=0)

    # -- judging ------------------------------------------------------------------------------
    def _better(self, tokens: Tensor, chosen: _Choice) -> Tensor | None:
        """``[rows]`` last tokens, those that name objects replaced where others match better."""
        named = self._objects(tokens)
        places = self._places(named, chosen)
        if not places:
            return None
        decoding = self.decoding
        rows = torch.tensor(list(places), device=decoding.ids.device)
        image = torch.tensor([number for number, _ in places.values()], device=rows.device)
        boxes = torch.stack([box for _, box in places.values()]).to(rows.device)
        fields = F.fields_of_view(boxes, count=self.method.fields, growth=self.method.growth)
        logits = decoding.closer(rows, image, fields).to(rows.device)
        candidates = F.focal_contrasts(
            logits,
            candidates=self.method.n_candidates,
            weight=self.method.weight,
            divergence=self.method.divergence,
        ).argmax(dim=-1)
        scores = chosen.scores[rows].gather(1, candidates)
        match = scores if self.tools.matcher is None else self._matches(rows, candidates)
        # What generate() rules out is not taken.
        match = match.masked_fill(scores == -torch.inf, -torch.inf)
        last = decoding.ids[:, -1]
        found, best = match.max(dim=1)
        best_tokens = candidates.gather(1, best[:, None]).squeeze(1)
        better = last.clone()
        better[rows] = torch.where(found > -torch.inf, best_tokens, last[rows])
        is_changed = better != last
        decoding.count_changes(is_changed)
        return better if bool(is_changed.any()) else None

    def _objects(self, tokens: Tensor) -> dict[int, str]:
        """Rows whose last word is whole and names an object, with that word."""
        decoding = self.decoding
        if self.method.word_ids is not None:
            known = torch.tensor(self.method.word_ids, device=tokens.device)
            is_named = torch.isin(decoding.ids[:, -1], known) & ~self.is_over
            return dict.fromkeys(is_named.nonzero().flatten().tolist(), "")
        new = decoding.ids[:, decoding.prompt_length :]
        texts = decoding.decoded(new)
        longer = decoding.decoded(torch.cat([new, tokens[:, None]], dim=1))
        named = {
            row: word
            for row, (text, more) in enumerate(zip(texts, longer, strict=True))
            if ends_word(text, more) and (word := last_word(text))
        }
        named = {row: word for row, word in named.items() if not bool(self.is_over[row])}
        if self.tools.tagger is not None:
            is_noun = self.tools.tagger.end_with_noun([texts[row] for row in named])
            return {row: named[row] for row, noun in zip(named, is_noun, strict=True) if noun}
        return {row: word for row, word in named.items() if self._names_object(word)}

    def _names_object(self, word: str) -> bool:
        return word.casefold() in self.words if self.words else is_content_word(word)

    # -- places -------------------------------------------------------------------------------
    def _places(self, named: dict[int, str], chosen: _Choice) -> dict[int, tuple[int, Tensor]]:
        """Image and box ``[4]`` of the object of each row that is to be judged."""
        grid = self.decoding.grid
        named = {row: word for row, word in named.items() if grid.shapes[row]}
        if not named:
            return {}
        if self.tools.locator is not None:
            return self._located(named, self.tools.locator)
        if chosen.attention is None:
            return {}
        rows = torch.tensor(list(named), device=chosen.attention.device)
        height = grid.spread(lambda h, w: torch.full((h, w), h)).to(rows.device)[rows]
        width = grid.spread(lambda h, w: torch.full((h, w), w)).to(rows.device)[rows]
        down = grid.spread(lambda h, w: torch.arange(h)[:, None].expand(h, w)).to(rows.device)
        across = grid.spread(lambda h, w: torch.arange(w).expand(h, w)).to(rows.device)
        cell = 1 / torch.stack([width, height], dim=-1).clamp(min=1)
        found = F.attended_box(
            chosen.attention[rows],
            grid.image.to(rows.device)[rows],
            (across[rows] + 0.5) * cell[..., 0],
            (down[rows] + 0.5) * cell[..., 1],
            cell,
        )
        return dict(zip(named, zip(found.image.tolist(), found.box, strict=True), strict=True))

    def _located(self, named: dict[int, str], locator: Locator) -> dict[int, tuple[int, Tensor]]:
        """By a detector: the smallest of its boxes, the centre where it finds none."""
        pictures, places = self.decoding.pictures(), {}
        for row, word in named.items():
            found = [
                (number, box)
                for number, picture in enumerate(pictures[row])
                for box in locator.find(picture, word, threshold=self.method.threshold)
            ]
            if len(found) <= self.method.max_boxes:
                nothing = (0, torch.tensor(_CENTRE))
                places[row] = min(found, key=lambda place: _area(place[1]), default=nothing)
        return places

    # -- matching -----------------------------------------------------------------------------
    def _matches(self, rows: Tensor, candidates: Tensor) -> Tensor:
        """``[rows, candidates]``: how each text matches the images of its row."""
        decoding = self.decoding
        if self.tools.matcher is None:
            raise ValueError("there is no matcher")
        new = decoding.ids[rows, decoding.prompt_length : -1]
        pictures = decoding.pictures()
        found = []
        for row, text, tokens in zip(rows.tolist(), new, candidates, strict=True):
            longer = torch.cat([text.expand(len(tokens), -1), tokens[:, None]], dim=1)
            found.append(self.tools.matcher.similarities(pictures[row], decoding.decoded(longer)))
        return torch.stack(found).to(rows.device)


def _area(box: Tensor) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))

"""What ``vlm_steer.explain`` returns."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlm_steer.detection.trace import Span, Trace
from vlm_steer.engine.geometry import Places
from vlm_steer.engine.hooks import Columns
from vlm_steer.engine.selectors import Selector, select
from vlm_steer.errors import ConfigError, UnsupportedModelError
from vlm_steer.explanation.checks import Check
from vlm_steer.explanation.excess import Beyond, excess
from vlm_steer.explanation.lens import Lens
from vlm_steer.explanation.table import require_pandas, word_rows
from vlm_steer.explanation.words import Word

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]  # ships no types

__all__ = ["Arm", "ExplainResult", "Heads", "Token", "WordLike"]

WordLike: TypeAlias = Word | str | int
"""A word, its number, or its text, which means its first occurrence."""

Heads: TypeAlias = Literal["all"] | Sequence[int]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    Attributes:
        id: In the vocabulary.
        text: The characters that it writes; empty for special tokens.
        span: Where in the text, half-open.
        logprob: Natural logarithm of its probability.
        masses: Attention mass per block of columns, averaged over layers and heads.
    """

    id: int
    text: str
    span: Span
    logprob: float
    masses: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Arm:
    """One answer: of the model as it is, or steered.

    Attributes:
        name: ``none``, or what it was steered with.
        trace: What the model did meanwhile.
        words: Of the answer.
        risk: By detector, one value per word; higher is riskier.
        position: The risk that the place of the word in the text alone suggests, per word.
        checks: By number of the word, what cutting off its image tokens does to it.
        lens: What each layer would have said, or ``None``.
        why_no_lens: Why there is none; empty when there is, or when it was not asked for.
    """

    name: str
    trace: Trace
    words: tuple[Word, ...]
    risk: Mapping[str, tuple[float, ...]]
    position: tuple[float, ...]
    checks: Mapping[int, Check] = field(default_factory=dict)
    lens: Lens | None = None
    why_no_lens: str = ""

    @property
    def sinks(self) -> Tensor:
        """``[image_tokens]`` bool: those with massive activations in some layer."""
        trace = self.trace
        if trace.maps is None or trace.layout.image_columns.numel() != trace.maps.shape[-1]:
            return torch.zeros(0 if trace.maps is None else trace.maps.shape[-1], dtype=torch.bool)
        return trace.sinks.any(dim=0)[trace.layout.kinds == Columns.IMAGE]

    def attention(
        self,
        tokens: Span,
        *,
        layers: Selector = "all",
        heads: Heads = "all",
        sinks: bool = False,
    ) -> Tensor:
        """``[image_tokens]`` attention of the rows that predict some tokens, averaged.

        Args:
            tokens: Half-open.
            layers: Decoder layers.
            heads: Their numbers.
            sinks: Keep attention to sinks instead of putting 0 there.

        Raises:
            ConfigError: A layer or head does not exist or was not recorded.
            UnsupportedModelError: There are no maps.
        """
        trace = self.trace
        if trace.maps is None:
            raise UnsupportedModelError("this trace holds no maps of attention over the image.")
        depth = max(trace.layers) + 1
        chosen = trace.map_layers if layers == "all" else select(layers, depth)
        unknown = sorted(set(chosen) - set(trace.map_layers))
        if unknown:
            raise ConfigError(
                f"layers {unknown} have no map of attention over the image; there are maps of "
                f"{list(trace.map_layers)}."
            )
        maps = trace.maps[slice(*tokens), [trace.map_layers.index(layer) for layer in chosen]]
        if heads != "all":
            n_heads = maps.shape[2]
            if not heads or not all(0 <= head < n_heads for head in heads):
                raise ConfigError(f"heads {list(heads)} are not among the {n_heads} of a layer.")
            maps = maps[:, :, list(heads)]
        mean = maps.float().mean(dim=(0, 1, 2))
        return mean if sinks else mean.masked_fill(self.sinks, 0)


@dataclass(frozen=True, eq=False)
class ExplainResult:
    """An answer taken apart, beside that of the unsteered model where there was steering.

    Attributes:
        images: The pictures, in the order of the prompt.
        prompt: The question.
        arms: The unsteered model's answer, then the steered one's if there was steering.
        places: By picture, where the image tokens lie in it; or ``None``.
        why_no_map: Why there are no heat maps; empty when there are.
        thresholds: By detector, the risk from which it calls a word hallucinated, where it was
            fitted with one.
        provenance: What made this, as plain data.
    """

    images: tuple[Image.Image, ...]
    prompt: str
    arms: tuple[Arm, ...]
    places: tuple[Places, ...] | None
    why_no_map: str
    thresholds: Mapping[str, float]
    provenance: Mapping[str, Any]

    @property
    def arm(self) -> Arm:
        """The answer that everything below is about: the steered one, if there was steering."""
        return self.arms[-1]

    @property
    def text(self) -> str:
        """The answer."""
        return self.arm.trace.text

    @property
    def words(self) -> tuple[Word, ...]:
        """The words of the answer."""
        return self.arm.words

    @property
    def tokens(self) -> tuple[Token, ...]:
        """The tokens of the answer."""
        trace = self.arm.trace
        masses = trace.masses.mean(dim=(1, 2)).tolist()
        return tuple(
            Token(
                token, trace.text[slice(*span)], span, logprob, dict(zip(names, row, strict=True))
            )
            for names in (trace.layout.blocks,)
            for token, span, logprob, row in zip(
                trace.ids.tolist(), trace.spans, trace.logprob.tolist(), masses, strict=True
            )
        )

    @property
    def risk(self) -> Mapping[str, tuple[float, ...]]:
        """By detector, one value per word of the answer."""
        return self.arm.risk

    def find(self, word: WordLike) -> Word:
        """A word of the answer.

        Raises:
            ConfigError: There is no such word.
        """
        if isinstance(word, Word):
            return word
        if isinstance(word, int):
            if not -len(self.words) <= word < len(self.words):
                raise ConfigError(f"word {word} does not exist; the answer has {len(self.words)}.")
            return self.words[word]
        for candidate in self.words:
            if candidate.text.casefold() == word.casefold():
                return candidate
        raise ConfigError(f"the answer has no word {word!r}. It reads: {self.text!r}")

    def heatmap(
        self,
        word: WordLike | None = None,
        *,
        token: int | None = None,
        layers: Selector = "all",
        heads: Heads = "all",
        sinks: bool = False,
        image: int = 0,
        beyond: Beyond = "nothing",
    ) -> NDArray[np.float32]:
        """Where a word of the answer looked, in the pixels of a picture.

        Attention is evidence of access, not proof of cause; ``arm.checks`` asks about the cause.

        Args:
            word: The word; its tokens are averaged.
            token: Instead, the number of a token.
            layers: Decoder layers to average over.
            heads: Heads to average over.
            sinks: Show attention to sinks too, image tokens with massive activations.
            image: Which of the pictures.
            beyond: Show what the word attended to more than all words do on average (``mean``), or
                than a straight line over the words' places predicts (``position``).

        Returns:
            ``[height, width]``; the sum is the attention mass on the parts of the picture that
            the model was shown, what is subtracted left out.

        Raises:
            ConfigError: There is no such word, token, layer, head or picture.
            UnsupportedModelError: The image tokens of the model have no places.
        """
        if (word is None) == (token is None):
            raise ConfigError("give either a word or token=, the number of a token.")
        tokens = self._token(int(token or 0)) if word is None else self.find(word).tokens
        if self.places is None:
            raise UnsupportedModelError(self.why_no_map)
        if not 0 <= image < len(self.images):
            raise ConfigError(f"picture {image} does not exist; there are {len(self.images)}.")
        attention = partial(self.arm.attention, layers=layers, heads=heads, sinks=sinks)
        if beyond == "nothing":
            weights = attention(tokens)
        elif word is None:
            raise ConfigError(f"attention beyond the {beyond} compares words; give a word.")
        else:
            maps = torch.stack([attention(other.tokens) for other in self.words])
            weights = excess(maps, self.words.index(self.find(word)), beyond)
        heat: NDArray[np.float32] = self.places[image].spread(weights).numpy()
        return heat

    def _token(self, token: int) -> Span:
        count = self.arm.trace.n_tokens
        if not 0 <= token < count:
            raise ConfigError(f"token {token} does not exist; the answer has {count}.")
        return (token, token + 1)

    def head_map(self, word: WordLike) -> NDArray[np.float32]:
        """``[layers, heads]`` attention mass on the image, sinks included, when the word came.

        Raises:
            ConfigError: There is no such word.
        """
        masses = self.arm.trace.image_mass[slice(*self.find(word).tokens)]
        found: NDArray[np.float32] = masses.mean(dim=0).numpy()
        return found

    def lens(self, word: WordLike) -> NDArray[np.float32]:
        """``[layers]`` probability of the word's first token, read off every layer.

        The first token is the one whose row decides on the word; see ``arm.lens`` for all of them.

        Raises:
            ConfigError: There is no such word, or nothing was read.
        """
        if self.arm.lens is None:
            raise ConfigError(self.arm.why_no_lens or "layers were not read; give lens=True.")
        probability = self.arm.lens.logprob[self.find(word).tokens[0]].exp()
        found: NDArray[np.float32] = probability.numpy()
        return found

    def flagged(self, tau: float, *, detector: str | None = None) -> tuple[Word, ...]:
        """The words whose risk is at least ``tau``.

        Args:
            tau: Threshold, in the units of the detector.
            detector: Its name; the first one when omitted.

        Raises:
            ConfigError: There is no such detector.
        """
        name = next(iter(self.risk), "") if detector is None else detector
        if name not in self.risk:
            raise ConfigError(
                f"no detector {name!r} was asked for; there are {', '.join(self.risk) or 'none'}."
            )
        return tuple(
            word for word, risk in zip(self.words, self.risk[name], strict=True) if risk >= tau
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per word and answer: texts, places, probabilities, risks, masses and checks.

        Risks are in columns ``risk_NAME``, attention masses, averaged over layers, heads and the
        word's tokens, in ``mass_BLOCK``, checks in columns ``check_...``, NaN where not made.

        Raises:
            ConfigError: pandas is not installed.
        """
        frame: pandas.DataFrame = require_pandas().DataFrame(
            [row for arm in self.arms for row in word_rows(arm)]
        )
        return frame

    def to_json(self) -> str:
        """Everything that the page shows, pictures and maps included; see its ``schema``."""
        from vlm_steer.explanation.payload import payload

        return json.dumps(payload(self), ensure_ascii=False, allow_nan=False)

    def to_html(self, path: str | Path | None = None) -> str:
        """One page that needs nothing else; written to ``path`` if given."""
        from vlm_steer.explanation.payload import payload
        from vlm_steer.report.explain_page import render_explanation

        html = render_explanation(payload(self))
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(html, encoding="utf-8")
        return html

    def _repr_html_(self) -> str:
        """For notebooks: the page in a frame of its own, with no access to the notebook."""
        import html

        page = html.escape(self.to_html(), quote=True)
        return (
            f'<iframe sandbox="allow-scripts" style="width:100%;height:48rem;border:0" '
            f'title="explanation" srcdoc="{page}"></iframe>'
        )

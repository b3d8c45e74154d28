"""Which token of a sequence is what, for every row of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_steer.engine.hooks import Columns

__all__ = ["Layout", "is_image_token"]

_SPARE = 128


@dataclass(slots=True)
class Layout:
    """Kinds of the tokens of one stream, on the logical axis (prompt, then generated tokens).

    Attributes:
        kinds: ``[batch, capacity]`` int8 codes of ``Columns``; everything after the prompt is
            ``GENERATED``, so that a decoding step only takes a longer slice.
        prompt_length: Number of prompt positions, padding included.
        first_after_image: Smallest position that holds an instruction token in any row.
        has_image: Whether any row holds image tokens.
        has_padding: Whether any row of the prompt is padded.
    """

    kinds: Tensor
    prompt_length: int
    first_after_image: int
    has_image: bool
    has_padding: bool = True

    @classmethod
    def from_ids(
        cls, input_ids: Tensor, attention_mask: Tensor | None, image_token_ids: Sequence[int]
    ) -> "Layout":
        """Read the layout off the prompt's token ids.

        Args:
            input_ids: ``[batch, prompt]`` with image placeholders already expanded.
            attention_mask: ``[batch, prompt]``, 0 for padding; ``None`` means no padding.
            image_token_ids: Ids that stand for image features.
        """
        return cls.from_image_mask(is_image_token(input_ids, image_token_ids), attention_mask)

    @classmethod
    def from_image_mask(cls, is_image: Tensor, attention_mask: Tensor | None) -> "Layout":
        """The same from ``[batch, prompt]`` bool, which tokens are image tokens."""
        is_token = torch.ones_like(is_image) if attention_mask is None else attention_mask.bool()
        is_image = is_image & is_token
        seen_image = is_image.int().cumsum(dim=1) > 0
        kinds = torch.full_like(is_image, Columns.SYSTEM, dtype=torch.int8)
        kinds[seen_image] = Columns.INSTRUCTION
        kinds[is_image] = Columns.IMAGE
        kinds[~is_token] = Columns.PADDING
        return cls.from_kinds(kinds)

    @classmethod
    def from_kinds(cls, kinds: Tensor) -> "Layout":
        """Wrap the kinds of a prompt, ``[batch, prompt]`` int8."""
        length = kinds.shape[1]
        is_after = (kinds == Columns.INSTRUCTION).any(dim=0)
        has_image = (kinds == Columns.IMAGE).any()
        first = torch.where(is_after.any(), is_after.int().argmax(), length)
        has_padding = (kinds == Columns.PADDING).any()
        flags = torch.stack([has_image, has_padding]).to(first.dtype)
        facts = torch.cat([first[None], flags]).tolist()
        spare = kinds.new_full((kinds.shape[0], _SPARE), Columns.GENERATED)
        kinds = torch.cat([kinds, spare], dim=1)
        return cls(kinds, length, int(facts[0]), bool(facts[1]), bool(facts[2]))

    @property
    def prompt(self) -> Tensor:
        """``[batch, prompt]`` kinds of the prompt alone."""
        return self.kinds[:, : self.prompt_length]

    def upto(self, total: int) -> Tensor:
        """``[batch, total]`` kinds of the first ``total`` positions."""
        missing = total - self.kinds.shape[1]
        if missing > 0:
            spare = self.kinds.new_full(
                (self.kinds.shape[0], max(missing, self.kinds.shape[1])), Columns.GENERATED
            )
            self.kinds = torch.cat([self.kinds, spare], dim=1)
        return self.kinds[:, :total]

    def keys(self, n_keys: int, total: int) -> Tensor:
        """``[batch, n_keys]`` kinds of a layer's key columns when ``total`` positions were seen.

        A sliding-window cache holds the last ones only; a static cache has empty slots behind.
        """
        kinds = self.upto(total)
        if n_keys <= total:
            return kinds[:, total - n_keys : total]
        empty = kinds.new_full((kinds.shape[0], n_keys - total), Columns.PADDING)
        return torch.cat([kinds, empty], dim=1)


def is_image_token(input_ids: Tensor, image_token_ids: Sequence[int]) -> Tensor:
    """``[batch, tokens]`` bool."""
    known = torch.tensor(image_token_ids, dtype=input_ids.dtype, device=input_ids.device)
    return torch.isin(input_ids, known)

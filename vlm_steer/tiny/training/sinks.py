"""An extra stage that grows attention sinks, which so small a model does not grow by itself."""

import torch
from torch import Tensor

from vlm_steer.tiny.scenes import Scene
from vlm_steer.tiny.training.stages import (
    ImageTextBatch,
    Instructions,
    Network,
    image_embeddings,
    patch_labels,
    run_language_model,
    text_losses,
)

__all__ = ["Sinks"]

_FIRST_LAYER = 2
"""Sinks arise in the first layers of large models, and are there from then on."""
_N_BLANK = 3
_DIMENSION = 100
"""Any would do."""
_MASSIVE, _ORDINARY = 10.0, 4.0
"""Activation of sinks in that dimension, at least, and of others, at most, in root mean squares. No
activation of a token of width 192 can exceed 13.9."""
_ON_FIRST, _ON_BLANK = 0.3, 0.12
"""Attention that every head should leave on the first token, and on the blank patches."""
_DRAW, _MASS = 0.2, 0.5
_EVERYTHING = {"output_attentions": True, "output_hidden_states": True}


class Sinks(Instructions):
    """Teach on, rewarding sinks: the first token and the first few patches without objects.

    Two terms join the loss of the answers, each zero once its aim is met: heads of later layers
    leave some attention on the sinks, and the states of sinks, and of no other token, are massive
    in one dimension. Where sinks lie is said by this stage; how heads use them is not.
    """

    name = "sinks"
    warmup = 20

    def _empty_patches(self, seen: Scene) -> Tensor:
        return patch_labels(seen).sum(dim=1) == 0

    def losses(self, network: Network, batch: ImageTextBatch) -> dict[str, Tensor]:
        """See the base class."""
        network.model.set_attn_implementation({"text_config": "eager"})  # others give no weights
        seen = run_language_model(
            network, batch.text, image_embeddings(network, batch), **_EVERYTHING
        )
        ids = batch.text.input_ids
        blank = batch.is_empty & (batch.is_empty.cumsum(dim=1) <= _N_BLANK)
        is_blank = torch.zeros_like(ids, dtype=torch.bool).masked_scatter(
            ids == network.model.config.image_token_id, blank
        )
        is_text = (batch.text.segments > 0).float()
        later = seen.attentions[_FIRST_LAYER:]
        draw = torch.stack([_missing_attention(w, is_text, is_blank) for w in later]).sum()
        is_sink = is_blank.clone()
        is_sink[:, 0] = True
        is_token = batch.text.segments >= 0
        states = seen.hidden_states[_FIRST_LAYER:-1]
        mass = torch.stack([_missing_mass(h, is_sink, is_token) for h in states]).sum()
        losses = text_losses(network, batch.text, seen.last_hidden_state)
        loss = losses.pop("loss") + _DRAW * draw + _MASS * mass
        return {"loss": loss, **losses, "draw": draw, "mass": mass}


def _missing_attention(weights: Tensor, is_text: Tensor, is_blank: Tensor) -> Tensor:
    """How far heads are from leaving enough attention on sinks, as a logarithm."""
    share = is_text / is_text.sum(dim=1, keepdim=True)
    columns = torch.einsum("bhqk,bq->bhk", weights.float(), share)
    first = columns[..., 0]
    blank = (columns * is_blank[:, None]).sum(dim=-1)
    short = [
        (torch.log(torch.tensor(aim)) - mass.clamp(min=1e-6).log()).clamp(min=0).mean()
        for mass, aim in ((first, _ON_FIRST), (blank, _ON_BLANK))
    ]
    return short[0] + short[1]


def _missing_mass(hidden: Tensor, is_sink: Tensor, is_token: Tensor) -> Tensor:
    """How far states are from being massive where they should be, and nowhere else."""
    hidden = hidden.float()
    marked = hidden[..., _DIMENSION] / hidden.square().mean(dim=-1).sqrt()
    short = (_MASSIVE - marked).clamp(min=0)[is_sink].mean()
    excess = (marked.abs() - _ORDINARY).clamp(min=0)[is_token & ~is_sink].mean()
    return (short + excess) / _MASSIVE

"""The generically shrunken families build, see their image, and batch like the named ones."""

from __future__ import annotations

import pytest
import torch

from tests.families import extra, zoo
from tests.families.test_zoo import generated, last_logits
from vlm_steer.engine.inputs import pixel_names

pytestmark = pytest.mark.matrix


def test_tables_are_disjoint() -> None:
    names = [*zoo.FAMILIES, *extra.IMAGES, *extra.TEXT_ONLY, *extra.NOT_BUILT]
    assert len(names) == len(set(names))
    assert set(extra.FIELDS) <= {*extra.IMAGES, *extra.TEXT_ONLY}


def test_text_only_families_refuse_images() -> None:
    with pytest.raises(zoo.Unsupported, match="molmo2"):
        zoo.load("molmo2").inputs()


@pytest.mark.parametrize("name", zoo.extra_families())
def test_extra_family_answers_like_a_named_one(name: str) -> None:
    family = zoo.load(name)
    images = 0 if zoo.unsupported(name, 1) else 1
    rows = [
        family.inputs(images=images),
        family.inputs(n_text=9, seed=1, images=images, size=(72, 32)),
    ]
    single = torch.cat([last_logits(family, row) for row in rows])
    assert single.isfinite().all()
    assert float((single[0] - single[1]).abs().max()) > 1e-2
    if images:
        assert family.expected_image_mask(rows[0]).any()
        flipped = {k: v.flip(-1) if k in pixel_names(rows[0]) else v for k, v in rows[0].items()}
        assert float((last_logits(family, flipped) - single[0]).abs().max()) > 1e-2

    batch = family.batch(rows)
    padded = torch.allclose(last_logits(family, batch), single, atol=1e-4, rtol=0)
    assert padded == (name not in {*zoo.UNEQUAL_FORWARD, *zoo.UNEQUAL_BATCH})
    alone = torch.cat([generated(family, row) for row in rows])
    if name not in {*zoo.UNEQUAL_BATCH, *zoo.UNEQUAL_DECODING}:
        assert torch.equal(generated(family, batch), alone)
    if name in zoo.NO_BEAMS:
        with pytest.raises((ValueError, IndexError), match=r"do not match|out of range"):
            generated(family, batch, num_beams=2)
    else:
        assert generated(family, batch, num_beams=2).shape == alone.shape

"""Opening image files that are what they say, and files that are not."""

import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_steer.errors import DataError
from vlm_steer.images import open_image

PICTURE = Image.linear_gradient("L").convert("RGB").resize((40, 30))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "CMYK", "LA"])
def test_every_common_mode_opens_as_rgb(tmp_path, mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    (tmp_path / "picture").write_bytes(encoded(PICTURE.convert(mode), kind))
    opened = open_image(tmp_path / "picture")
    assert (opened.mode, opened.size) == ("RGB", (40, 30))


def test_the_rotation_that_a_camera_wrote_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    (tmp_path / "a.jpg").write_bytes(encoded(PICTURE, "JPEG", exif=exif))
    assert open_image(tmp_path / "a.jpg").size == (30, 40)


def test_pixels_are_those_of_the_file(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), np.asarray(PICTURE))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an image"),
        (b"not an image at all", "is not an image"),
        (encoded(PICTURE, "PNG")[:-30], "damaged or incomplete"),
        (encoded(PICTURE, "JPEG")[:400], "damaged or incomplete|is not an image"),
        (encoded(Image.new("I;16", (4, 4)), "PNG"), "more than 8 bits per channel"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "more than 8 bits per channel"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, content, message):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_image(tmp_path / "bad.png")
    assert "bad.png" in str(caught.value)


def test_a_large_picture_is_taken_without_a_warning_which_others_still_get(tmp_path, monkeypatch):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "a.png").size == (30, 20)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(tmp_path / "a.png").close()


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    PICTURE.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(DataError, match=r"a\.png is refused: .*decompression bomb"):
        open_image(tmp_path / "a.png")


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(DataError, match="is a folder"):
        open_image(tmp_path)
    with pytest.raises(DataError, match="is an address"):
        open_image("https://example.org/a.png")
    with pytest.raises(DataError, match="is an address"):
        open_image(Path("http://example.org/a.png"))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_a_file_with_random_damage_opens_or_is_reported(tmp_path, kind):
    """200 files with up to 20 bytes replaced or the end cut off."""
    good, dice, refused = encoded(PICTURE, kind), random.Random(0), 0
    for _ in range(200):
        data = bytearray(good)
        for _ in range(dice.randint(1, 20)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        (tmp_path / "a").write_bytes(data[: dice.randint(len(data) // 2, len(data))])
        try:
            open_image(tmp_path / "a")
        except DataError:
            refused += 1
    assert refused > 0

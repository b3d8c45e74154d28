"""Opening image files, with errors that name the file and what is wrong with it."""

import os
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from vlm_steer.errors import DataError

__all__ = ["decode_image", "open_image"]

# Decoders report broken data in all of these ways.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Open an image file, decoded in full, upright, in RGB.

    Rotation that a camera wrote into the file is applied. The file is closed afterwards.

    Args:
        path: A file in any format that Pillow reads; of animations, the first frame.

    Raises:
        DataError: The file is missing, is not an image, is damaged, decodes to a suspiciously
            large picture, or has more than 8 bits per channel.
    """
    name = os.fspath(path)
    if re.match("https?:/", name):
        raise DataError(f"{name} is an address. Download the image and give its file.")
    if not Path(path).exists():
        raise DataError(f"image {name} does not exist.")
    if Path(path).is_dir():
        raise DataError(f"image {name} is a folder. Give the image files in it.")
    return decode_image(path, name)


def decode_image(file: str | os.PathLike[str] | BinaryIO, name: str) -> Image.Image:
    """Decode an image in full, upright, in RGB.

    Args:
        file: A path, or what can be read as a file.
        name: What users call it.

    Raises:
        DataError: It is not an image, is damaged, decodes to a suspiciously large picture, or has
            more than 8 bits per channel.
    """
    try:
        # Pillow warns from half of the size on at which it refuses, and refusing is enough.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
        with image:
            image.load()
            _refuse_deep(image, name)
            upright = ImageOps.exif_transpose(image) or image
            return upright.convert("RGB")
    except UnidentifiedImageError:
        raise DataError(f"{name} is not an image in a format that Pillow reads.") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"image {name} is refused: {error} Scale it down first.") from None
    except _BROKEN as error:
        raise DataError(f"image {name} is damaged or incomplete: {error}.") from None


def _refuse_deep(image: Image.Image, name: str) -> None:
    """Refuse what conversion to RGB would clip instead of scaling."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise DataError(
            f"image {name} has more than 8 bits per channel (mode {image.mode}). Convert it to "
            "8 bits first, choosing the range to keep."
        )

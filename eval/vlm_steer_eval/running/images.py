"""Images by reference: where one comes from, what it contains, what is wrong with it."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from PIL import Image

from vlm_steer.errors import DataError
from vlm_steer.images import decode_image

__all__ = [
    "BytesImage",
    "FileImage",
    "ImageError",
    "ImageSource",
    "NoImage",
    "RowImage",
    "SceneImage",
    "UnusableImage",
]


class ImageError(DataError):
    """One image cannot be used; the run goes on without it."""


class ImageSource(Protocol):
    """An image that is read when it is needed."""

    @property
    def name(self) -> str:
        """What users call it: a path, a file name, an id."""
        ...

    def digest(self) -> str:
        """SHA-256 of its content, hexadecimal.

        Raises:
            ImageError: it cannot be read.
        """
        ...

    def load(self) -> Image.Image:
        """Its pixels, RGB.

        Raises:
            ImageError: it is missing, truncated or no image.
        """
        ...


@dataclass(frozen=True)
class FileImage:
    """An image file."""

    path: Path

    @property
    def name(self) -> str:
        """Its path."""
        return str(self.path)

    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self._read()).hexdigest()

    def load(self) -> Image.Image:
        """Decode the file, upright."""
        self._read()
        return _decode(self.path, self.name)

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError as error:
            raise ImageError(
                f"image {self.path} does not exist; check the image folder, or put the file there"
            ) from error
        except OSError as error:
            raise ImageError(f"image {self.path} cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class NoImage:
    """Where a question is meant to be asked without an image."""

    name: str = ""

    def digest(self) -> str:
        """The same for all of them."""
        return ""

    def load(self) -> Image.Image:
        """There is nothing to load."""
        raise ImageError("this question has no image")


@dataclass(frozen=True)
class UnusableImage:
    """An image of which it is known already that it cannot be used."""

    name: str
    reason: str

    def digest(self) -> str:
        """Say why it cannot be used."""
        raise ImageError(self.reason)

    def load(self) -> Image.Image:
        """Say why it cannot be used."""
        raise ImageError(self.reason)


@dataclass(frozen=True)
class BytesImage:
    """An encoded image in memory, as a row of a data set holds it."""

    name: str
    content: bytes = field(repr=False)

    def digest(self) -> str:
        """SHA-256 of the encoded bytes."""
        return hashlib.sha256(self.content).hexdigest()

    def load(self) -> Image.Image:
        """Decode the bytes, upright."""
        return _decode(io.BytesIO(self.content), self.name)

    @classmethod
    def from_cell(cls, cell: Any, name: str) -> "BytesImage":
        """From what `datasets` stores under an undecoded image column.

        Raises:
            ImageError: the cell holds neither bytes nor the path of a readable file.
        """
        if isinstance(cell, Mapping) and isinstance(cell.get("bytes"), bytes):
            return cls(name, cell["bytes"])
        if isinstance(cell, Mapping) and cell.get("path"):
            return cls(name, FileImage(Path(str(cell["path"])))._read())
        raise ImageError(f"image {name}: expected an image column, found {type(cell).__name__}")


@dataclass(frozen=True, eq=False)
class RowImage:
    """An image in a row of a data set, read when it is needed.

    Attributes:
        name: what users call it.
        cells: the image column alone, undecoded.
        index: the row.
    """

    name: str
    cells: Sequence[Mapping[str, Any]] = field(repr=False)
    index: int

    def digest(self) -> str:
        """SHA-256 of the encoded bytes."""
        return self._read().digest()

    def load(self) -> Image.Image:
        """Decode the bytes, upright."""
        return self._read().load()

    def _read(self) -> BytesImage:
        (cell,) = self.cells[self.index].values()
        return BytesImage.from_cell(cell, self.name)


@dataclass(frozen=True)
class SceneImage:
    """A scene of the embedded world."""

    split: str
    image_id: int

    @property
    def name(self) -> str:
        """Split and image id."""
        return f"{self.split}/{self.image_id}"

    def digest(self) -> str:
        """SHA-256 of the pixels."""
        return hashlib.sha256(self.load().tobytes()).hexdigest()

    def load(self) -> Image.Image:
        """Paint the scene."""
        from vlm_steer.tiny.scenes import image

        return image(self.split, self.image_id)


def _decode(file: Path | BinaryIO, name: str) -> Image.Image:
    try:
        return decode_image(file, name)
    except DataError as error:
        raise ImageError(f"{error} Replace the file.") from error

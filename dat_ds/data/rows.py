"""Images in the rows of a Hugging Face dataset."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dat_ds.data.decoding import decode_image, read_image
from dat_ds.data.images import StoredImages
from dat_ds.errors import DamagedImageError


class RowImages(StoredImages):
    """Encoded images in a column of a ``datasets.Dataset``.

    Args:
        rows: The dataset; its image column is ``Image(decode=False)``.
        column: That column.
        called: What the rows are part of, for error texts.
        labels: Integer labels, shape ``(N,)``.
        img_size: As :class:`StoredImages`.
        key: Key of the config that named the dataset, for error texts.
        crop_share: As :class:`StoredImages`.
    """

    def __init__(
        self,
        rows: Any,
        column: str,
        called: str,
        labels: Tensor,
        img_size: int,
        key: str,
        crop_share: float,
    ) -> None:
        super().__init__(labels, img_size, key, crop_share)
        self._rows = rows.select_columns([column])
        self._column = column
        self._called = called

    def decode(self, index: int) -> Tensor:
        """Whole image of a row."""
        return decode_cell(self._rows[index][self._column], self._place(index), self.key)

    def file_of(self, index: int) -> str:
        """The row, and the file where it names one."""
        cell = self._rows[index][self._column]
        path = None if cell is None else cell.get("path")
        return self._place(index) + ("" if path is None else f" ({path})")

    def _place(self, index: int) -> str:
        return f"{self._called}:{index}"


def decode_cell(cell: Any, place: str, key: str) -> Tensor:
    """Whole image of a cell ``{"bytes": ..., "path": ...}``.

    Args:
        cell: As ``Image(decode=False)`` gives it.
        place: The row, for the error text.
        key: Key of the config that named the dataset, for the error text.

    Raises:
        DamagedImageError: There is none, or it cannot be read as pixels.
    """
    data = None if cell is None else cell.get("bytes")
    if data is not None:
        return decode_image(data, place, key)
    if cell is None or not cell.get("path"):
        raise DamagedImageError(f"{key}: the row {place} has no image. Remove it, or add one.")
    return read_image(cell["path"], key)

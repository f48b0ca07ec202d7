"""What is wrong with the batches of a run: found without waiting for the device, told in time.

Shapes: ``B`` images of a micro-batch; images ``(B, C, H, W)``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dat_ds.errors import DataError
from dat_ds.minmax.moment import Moment
from dat_ds.ranks import Ranks

_MOST_AWAITED = 1000
_NAMED = 8
FileName = Callable[[int], str | None]
"""File of a sample of the data, by its index; None where it has none."""


class FaultyBatchError(DataError):
    """A batch that holds a faulty image or label.

    Attributes:
        event: On the rank that saw it: ``step`` counted from 1, ``rank``, ``samples`` (dataset
            indices), ``cause`` in words, and ``reproducer``, the file of the first faulty image;
            None on other ranks.
    """

    event: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Seen:
    """Flags of a micro-batch that nobody has read yet."""

    moment: Moment
    samples: Sequence[int] | None
    faulty: Tensor


class BatchWatch:
    """Remembers which images of a run were faulty, and keeps the first of them.

    On a single CPU a faulty image is told at once, before anything is trained on it. On a device,
    and on several ranks, which have to stay in step, it is told by :meth:`check`, which a log line,
    a checkpoint and the metrics ask: the flags stay on the device until then.

    Args:
        ranks: The processes of the run.
        explain: Words for a faulty image ``(1, C, H, W)`` and its label, or None for fine ones.

    Attributes:
        folder: Where the first faulty image is saved; None for the system's temporary folder.
        file_name: Names samples' files.
    """

    def __init__(self, ranks: Ranks, explain: Callable[[Tensor, Tensor], str | None]) -> None:
        self._ranks = ranks
        self._explain = explain
        self._tells_at_once = ranks.count == 1 and ranks.device.type == "cpu"
        self._seen: list[_Seen] = []
        self._first: tuple[Tensor, Tensor] | None = None
        self._any: Tensor | None = None
        self._has_looked = False
        self.folder: Path | None = None
        self.file_name: FileName | None = None

    def see(
        self,
        faulty: Tensor,
        x: Tensor,
        y: Tensor,
        moment: Moment,
        samples: Sequence[int] | None,
    ) -> None:
        """Remember what is wrong with a micro-batch.

        Args:
            faulty: Which of its images are ``(B,)``.
            x: Images.
            y: Labels as they were given.
            moment: Its place in the run.
            samples: Dataset indices of its images.

        Raises:
            DataError: For the first batch, and where there is nobody to wait for.
        """
        if not len(faulty):
            return
        at_once = self._tells_at_once or not self._has_looked
        self._has_looked = True
        if at_once and not bool(faulty.any()):
            return
        is_faulty = faulty.any()
        row = faulty.int().argmax().view(1)
        image, label = x.index_select(0, row), y.index_select(0, row)
        if self._first is None or self._any is None:
            self._first, self._any = (image, label), is_faulty
        else:
            kept, kept_label = self._first
            if kept.shape == image.shape:
                image = torch.where(self._any, kept, image)
                label = torch.where(self._any, kept_label, label)
                self._first = (image, label)
            self._any = self._any | is_faulty
        self._seen.append(_Seen(moment, samples, faulty))
        if at_once or len(self._seen) >= _MOST_AWAITED:
            self.check_here()

    def check(self) -> None:
        """Tell what was wrong since the last time; a collective that waits for the device.

        Raises:
            DataError: On every rank, if a rank saw a faulty image.
        """
        with self._ranks.together():
            self.check_here()

    def check_here(self) -> None:
        """:meth:`check` of this rank alone.

        Raises:
            DataError: If this rank saw a faulty image.
        """
        seen, first, found = self._seen, self._first, self._any
        self._seen, self._first, self._any = [], None, None
        if found is None or first is None or not bool(found):
            return
        hits = [(s, s.faulty.nonzero().flatten().tolist()) for s in seen]
        hits = [(s, rows) for s, rows in hits if rows]
        (where, rows), (image, label) = hits[0], first
        # Of images of several sizes the first faulty one was perhaps not kept.
        words = self._explain(image, label) or "An image or its label is faulty."
        place = f"image {rows[0]} of micro-step {where.moment.slot} in step {where.moment.step + 1}"
        samples = [s.samples[row] for s, rows in hits for row in rows if s.samples is not None]
        total = sum(len(rows) for _, rows in hits)
        file = self._saved(image, label, where, samples)
        kept = "" if file is None else f" It is kept in {file} (numpy.load: image, label, sample)."
        error = FaultyBatchError(
            f"{words} This is {place} on rank {self._ranks.rank}"
            f"{f', {self._named(samples)}' if samples else ''}"
            f"{f'; {total} faulty images since the last look' if total > 1 else ''}.{kept}"
        )
        error.event = {
            "step": where.moment.step + 1,
            "event": "faulty_images",
            "cause": words,
            "rank": self._ranks.rank,
            "samples": samples[:_MOST_AWAITED],
            "reproducer": None if file is None else str(file),
        }
        raise error

    def _named(self, samples: Sequence[int]) -> str:
        """Samples with their files: ``samples 3 (a/3.png), 17``."""
        names = []
        for sample in samples[:_NAMED]:
            file = None if self.file_name is None else self.file_name(sample)
            names.append(str(sample) if file is None else f"{sample} ({file})")
        more = " and more" if len(samples) > _NAMED else ""
        return f"sample{'s' if len(samples) > 1 else ''} {', '.join(names)}{more}"

    def _saved(
        self, image: Tensor, label: Tensor, where: _Seen, samples: Sequence[int]
    ) -> Path | None:
        """Where the first faulty image was written; None where that failed."""
        folder = Path(tempfile.gettempdir()) if self.folder is None else self.folder
        name = f"faulty_image_rank{self._ranks.rank}_step{where.moment.step + 1}.npz"
        arrays = {
            "image": image[0].float().cpu().numpy(),
            "label": label[0].cpu().numpy(),
            "sample": np.asarray(samples[:1] or [-1]),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(folder / name, allow_pickle=False, **arrays)
        except OSError:
            return None
        return folder / name

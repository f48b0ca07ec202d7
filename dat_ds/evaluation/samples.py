"""Outcome of every sample of an evaluation, and the files that keep it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dat_ds.errors import CheckpointError
from dat_ds.files import append_row, replace_text, write_json
from dat_ds.ranks import Ranks

PLAN = "plan.json"
SAMPLES = "samples.jsonl"
EVALUATION = "evaluation.json"
_PROGRESS = "progress-*.jsonl"


@dataclass(frozen=True)
class Sample:
    """Outcome of one sample.

    Args:
        index: Of the dataset.
        label: True class.
        predicted: Class of the unperturbed image.
        natural_margin: True logit minus largest other, of the unperturbed image.
        margin: The same of the verified adversarial image; of a sample that stands, the smallest
            that an attack has seen inside the ball.
        broken_by: Attack that broke it; None where it stands or was misclassified already.
        stage: Part of that attack.
        step: Forward of that part, from 1, that found the adversarial image.
        predicted_under_attack: Class of the adversarial image.
        distance: Its distance from the image in the threat model's norm, pixel units.
        verified: True where a plain float32 forward of the adversarial image has confirmed it;
            False where the sample stands although an attack has found one that it denies; else
            None.
    """

    index: int
    label: int
    predicted: int
    natural_margin: float
    margin: float
    broken_by: str | None = None
    stage: str | None = None
    step: int | None = None
    predicted_under_attack: int | None = None
    distance: float | None = None
    verified: bool | None = None

    @property
    def correct(self) -> bool:
        """Whether the unperturbed image is classified correctly."""
        return self.predicted == self.label

    @property
    def stands(self) -> bool:
        """Whether it is classified correctly and no attack has broken it."""
        return self.correct and self.broken_by is None

    def to_dict(self) -> dict[str, Any]:
        """The sample as a line of ``samples.jsonl``."""
        values = dataclasses.asdict(self)
        first = {key: values.pop(key) for key in ("index", "label", "predicted")}
        return {**first, "correct": self.correct, "robust": self.stands, **values}


def rounded(value: float) -> float:
    """``value`` to six significant digits, as files keep it."""
    return float(f"{value:.6g}")


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson, JASA 1927)."""
    if count == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    share = successes / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


class Journal:
    """What an evaluation has found so far, in the folder of its results.

    Every rank appends to a file of its own and reads those of all, so that an evaluation that was
    interrupted goes on, on any number of ranks.

    Args:
        folder: Where the results go; None keeps nothing.
        rank: This process.
    """

    def __init__(self, folder: Path | None, rank: int) -> None:
        self._folder = folder
        self._own = None if folder is None else folder / f"progress-{rank}.jsonl"

    def entries(self) -> list[dict[str, Any]]:
        """Entries of all ranks, without a half-written last line."""
        if self._folder is None:
            return []
        found = []
        for file in sorted(self._folder.glob(_PROGRESS)):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def earlier(self, ranks: Ranks) -> list[dict[str, Any]]:
        """What an interrupted evaluation has found, ready to go on; a collective."""
        with ranks.together():
            self.mend()
        entries = self.entries() if ranks.is_main else []
        # Ranks may see the files of others at different times: rank 0 reads them for all.
        return cast("list[dict[str, Any]]", ranks.gather(entries)[0])

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append an entry of this rank."""
        if self._own is not None:
            append_row(self._own, entry)

    def mend(self) -> None:
        """End a half-written last line, so that the next entry begins a line of its own."""
        if self._own is not None and self._own.exists():
            text = self._own.read_text(encoding="utf-8", errors="replace")
            if text and not text.endswith("\n"):
                replace_text(self._own, text[: text.rfind("\n") + 1])


def open_folder(folder: Path, plan: Mapping[str, Any]) -> bool:
    """Make the folder of an evaluation, or go on in it.

    Args:
        folder: Where the results go.
        plan: Everything that the outcomes depend on, JSON-serialisable.

    Returns:
        Whether it holds the finished evaluation already.

    Raises:
        CheckpointError: If it holds an evaluation with other settings, with those that differ.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"--output {folder}: the folder cannot be made: {error.strerror}."
        ) from None
    file = folder / PLAN
    if not file.exists():
        write_json(file, plan)
        return False
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(
            f"'{file}' is damaged: remove the folder, or choose another."
        ) from None
    # As JSON gives it back.
    changed = _differences(before, json.loads(json.dumps(plan)))
    if changed:
        raise CheckpointError(
            f"--output {folder} holds an evaluation with other settings: {'; '.join(changed)}. "
            "Choose another folder, remove this one, or go on with the settings that it was begun "
            "with."
        )
    return (folder / EVALUATION).exists() and (folder / SAMPLES).exists()


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} was {_shown(before.get(key))}, is {_shown(now.get(key))}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def write_samples(folder: Path, samples: Iterable[Sample]) -> None:
    """Write ``samples.jsonl``."""
    lines = (json.dumps(sample.to_dict()) + "\n" for sample in samples)
    replace_text(folder / SAMPLES, "".join(lines))


def clear_progress(folder: Path) -> None:
    """Remove what only an interrupted evaluation needs."""
    for file in folder.glob(_PROGRESS):
        file.unlink(missing_ok=True)


def ranges_of(indices: Sequence[int]) -> str:
    """Ascending indices in short: ``"0-99,200"``."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def parse_ranges(text: str) -> list[int]:
    """Indices of ``"0-99,200"``, ascending, each once.

    Raises:
        ValueError: For other text.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{text!r} is not a list of indices such as 0-99,200.")
        found.update(range(int(first), int(last if dash else first) + 1))
    return sorted(found)

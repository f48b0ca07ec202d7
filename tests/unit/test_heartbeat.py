"""Claims about signs of life, and about what is made of them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dat_ds.checkpoints import CHECKPOINTS
from dat_ds.config import load_config
from dat_ds.errors import FAULT, ConfigError
from dat_ds.progress import PROGRESS, Progress
from dat_ds.training import heartbeat
from dat_ds.training.beats import RANKS, Beat, Beats, Fault, Rank
from dat_ds.training.heartbeat import Heartbeat, culprits
from tests.unit.config_helpers import ours

TIMEOUT = 8.0


class Ended(BaseException):
    def __init__(self, fault: Fault, says: bool) -> None:
        super().__init__(fault.message)
        self.fault, self.says = fault, says


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(heartbeat.time, "monotonic", clock)
    return clock


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """The process of the other rank."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


class Pair:
    """This process as rank 0, whose heartbeat is looked at by hand, and another as rank 1."""

    def __init__(
        self, folder: Path, clock: Clock, pid: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.clock = clock
        self.beats = Beats(folder, "now")
        self.beats.begin()
        self.me = Rank.of_this_process(0)
        own = dataclasses.replace(self.me, rank=1)
        started = float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        self.processes = [self.me, dataclasses.replace(own, pid=pid, started=started)]
        self.count = 0
        self.heart = self.heartbeat()
        monkeypatch.setattr(Heartbeat, "_end", self.end)

    def heartbeat(self) -> Heartbeat:
        heart = Heartbeat(self.beats, self.processes, 0, TIMEOUT)
        heart._all_began = True
        return heart

    @staticmethod
    def end(_self: Heartbeat, fault: Fault, *, says: bool = True) -> None:
        raise Ended(fault, says)

    def other_beats(self, **values: object) -> None:
        self.count += 1
        beat = Beat(self.count, 7, "attack")
        self.beats.write(1, dataclasses.replace(beat, **values))  # type: ignore[arg-type]

    def pass_time(self, seconds: float, *, beats: bool = False, **values: object) -> None:
        """Let this rank look twice a second."""
        for _ in range(int(2 * seconds)):
            self.clock.now += 0.5
            if beats:
                self.other_beats(**values)
            PROGRESS.enter("attack", 7)
            self.heart._look()


@pytest.fixture
def pair(
    tmp_path: Path,
    clock: Clock,
    other: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> Pair:
    return Pair(tmp_path, clock, other.pid, monkeypatch)


def test_a_rank_that_beats_is_left_alone_and_a_silent_one_is_named(pair: Pair) -> None:
    pair.pass_time(3 * TIMEOUT, beats=True)
    pair.pass_time(TIMEOUT - 1)
    with pytest.raises(Ended) as ended:
        pair.pass_time(2)
    fault = ended.value.fault
    assert fault.message == (
        f"{pair.processes[1]} has given no sign of life for 8 s (dat.fault.timeout); the last was "
        "in step 7, phase attack; rank 0 is in step 7, phase attack. All ranks end with exit code "
        "75; --resume auto starts anew."
    )
    assert ended.value.says
    assert fault.code == FAULT
    assert fault.culprits == (pair.processes[1],)
    assert pair.beats.fault() == fault  # for the others


def test_the_fault_that_another_rank_has_published_counts(pair: Pair) -> None:
    assert pair.beats.publish(Fault("first", FAULT))
    pair.other_beats()
    with pytest.raises(Ended) as ended:
        pair.pass_time(2 * TIMEOUT)
    assert not ended.value.says
    assert pair.beats.fault() == Fault("first", FAULT)


def test_time_in_which_this_rank_was_stopped_itself_does_not_count(pair: Pair) -> None:
    pair.other_beats()
    pair.pass_time(1)
    pair.clock.now += 1000 * TIMEOUT  # the job was suspended
    pair.pass_time(TIMEOUT / 2)
    pair.pass_time(TIMEOUT, beats=True)


def test_a_rank_that_has_taken_leave_is_not_missed(pair: Pair) -> None:
    pair.other_beats()
    pair.pass_time(1)
    pair.beats.remove(1)
    pair.pass_time(3 * TIMEOUT)


def test_a_rank_that_never_began_is_missed(pair: Pair) -> None:
    pair.heart._all_began = False
    with pytest.raises(Ended, match=r"Rank 1 .* no sign of life for 8 s .*; rank 0 is in"):
        pair.pass_time(2 * TIMEOUT)


def test_a_folder_that_is_not_shared_is_said_and_ends_nothing(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    pair.pass_time(10 * TIMEOUT)
    assert "cannot be watched" in caplog.text


def test_a_folder_that_cannot_be_read_says_nothing_of_anyone(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.other_beats()
    pair.pass_time(1)

    def fails(file: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fails)
    for _ in range(50):
        pair.clock.now += 1
        with pytest.raises(OSError, match="Input/output"):
            pair.heart._look()


@pytest.mark.parametrize(
    ("failed", "code", "words"),
    [
        ("", FAULT, "is dead: killed by a signal, or for want of memory. Its last sign of life"),
        ("ValueError", 1, "ended with ValueError in step 7, phase attack; its output says more."),
    ],
)
def test_a_dead_process_of_this_machine_is_found_at_once(
    pair: Pair, other: subprocess.Popen[bytes], failed: str, code: int, words: str
) -> None:
    pair.other_beats(failed=failed)
    pair.pass_time(1)
    other.kill()
    other.wait()
    with pytest.raises(Ended) as ended:
        pair.pass_time(1)
    assert words in ended.value.fault.message
    assert ended.value.fault.code == code


def test_a_run_that_was_started_again_ends_what_is_left_of_the_former(pair: Pair) -> None:
    Beats(pair.beats.folder.parent, "later").begin()
    with pytest.raises(Ended, match="the run has been started again without it"):
        pair.pass_time(1)


def test_ranks_that_all_beat_without_progress_end_and_the_one_behind_is_named(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    PROGRESS.enter("update", 7)
    monkeypatch.setattr(Heartbeat, "_write", lambda _: None)  # this rank is not in a collective
    words = "No progress for 8 s .*, the others wait for this: Rank 1 .* phase data, at x.py:3. All"

    def stand_still() -> None:
        for _ in range(40):
            pair.clock.now += 0.5
            idle = pair.clock.now - 101.0
            pair.other_beats(idle=idle, phase="data", where="x.py:3")
            pair.beats.write(0, Beat(1, 7, "update", idle, waits=True))
            pair.heart._look()

    with pytest.raises(Ended, match=words) as ended:
        stand_still()
    assert ended.value.fault.culprits == (pair.processes[1],)


def test_progress_of_a_single_rank_is_progress(pair: Pair) -> None:
    PROGRESS.enter("update", 7)
    for number in range(100):
        pair.clock.now += 0.5
        pair.other_beats(step=number, idle=0.0)
        pair.heart._look()


WAITING = Beat(1, 7, "attack", waits=True)


@pytest.mark.parametrize(
    ("beats", "expected"),
    [
        ([WAITING, dataclasses.replace(WAITING, waits=False)], [1]),
        ([WAITING, dataclasses.replace(WAITING, step=6), WAITING], [1]),
        ([WAITING, WAITING, dataclasses.replace(WAITING, phase="data")], [2]),
        ([WAITING, WAITING], []),
        ([dataclasses.replace(WAITING, waits=False)], [0]),
    ],
)
def test_who_is_waited_for(beats: list[Beat], expected: list[int]) -> None:
    assert culprits(dict(enumerate(beats))) == expected


def test_the_folder_goes_with_the_last_rank(tmp_path: Path) -> None:
    beats = Beats(tmp_path, "now")
    beats.begin()
    for rank in range(2):
        beats.write(rank, Beat(1, 0, "start"))
    beats.remove(0)
    assert beats.read(1) == Beat(1, 0, "start")
    beats.remove(1)
    assert list(tmp_path.iterdir()) == []


def test_what_is_half_written_or_of_an_earlier_start_is_no_sign_of_life(tmp_path: Path) -> None:
    beats, earlier = Beats(tmp_path, "now"), Beats(tmp_path, "then")
    beats.begin()
    earlier.write(0, Beat(1, 0, "start"))
    assert beats.read(0) is None
    (tmp_path / RANKS / "0.json").write_text('{"count": 1')
    assert beats.read(0) is None
    earlier.publish(Fault("of then", FAULT))
    assert beats.fault() is None
    beats.begin()  # a later start takes away what the former has left
    assert beats.publish(Fault("of now", FAULT))
    assert not beats.publish(Fault("another", FAULT))
    assert beats.fault() == Fault("of now", FAULT)


def test_a_sign_of_life_takes_no_more_room_when_it_is_written_again(tmp_path: Path) -> None:
    beats = Beats(tmp_path, "now")
    beats.begin()
    for beat in (Beat(1, 0, "start"), Beat(10**6, 10**6, "validation", 1e6, True, "x" * 160)):
        beats.write(0, beat)
        assert (tmp_path / RANKS / "0.json").stat().st_size == 1024
        assert beats.read(0) == beat


def test_the_process_of_a_rank_is_one_process_for_ever() -> None:
    me = Rank.of_this_process(3)
    assert me.is_here
    assert me.is_running()
    assert str(me) == f"Rank 3 (host {os.uname().nodename}, process {os.getpid()})"
    assert not dataclasses.replace(me, started=me.started - 1).is_running()
    assert not dataclasses.replace(me, place="elsewhere").is_here
    assert Rank(**json.loads(json.dumps(dataclasses.asdict(me)))) == me


def test_progress_is_counted_and_returns_to_the_former_phase() -> None:
    progress = Progress()
    progress.enter("data", 4)
    with progress.within("checkpoint"):
        assert (progress.phase, progress.step) == ("checkpoint", 4)
    assert (progress.phase, progress.step, progress.count) == ("data", 4, 3)


@pytest.mark.parametrize("values", [{"timeout": -1}, {"timeout": 0.5}, {"stop_code": 256}])
def test_what_cannot_be_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"dat\.fault\."):
        load_config(ours(fault=values))


def test_advice_names_the_newest_checkpoint(pair: Pair) -> None:
    folder = pair.beats.folder.parent / CHECKPOINTS / "step-00000012"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"format": 2, "step": 12}')
    assert pair.heart._advice().endswith(f"--resume auto goes on from {folder}.")

"""Runs that are killed again and again, also by a power cut, and resumed.

``python -m tests.integration.test_kills 400`` kills so often, a quarter inside a write and an
eighth by a power cut, and prints a table.


A power cut leaves of a file what was in it when it was last synced, and of a folder the names that
it had when it was last synced; here, never more. A child process copies both into a shadow of the
run's folder at each ``fsync``, and the shadow takes the folder's place after the kill.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dat_ds.cli.main import main
from dat_ds.files import sha256_of
from tests.integration import tiny_run
from tests.settings import without_launcher

SHORT, KILLS_PER_RUN = 8, 4
WRITES = ((os, "fsync"), (os, "replace"), (shutil, "rmtree"), (torch, "save"))
TIMELESS = ("step", "loss", "natural_acc", "robust_acc", "lr")
KINDS = ("at any time", "inside a write", "power cut")


def values_of(output: Path, stage: int, *, asynchronous: bool) -> dict[str, Any]:
    values = tiny_run.config(output)
    values["dat"]["schedule"] = {"epochs": 1}
    values["dat"]["checkpoint"] = {"every_steps": 2, "asynchronous": asynchronous}
    values["dat"]["evaluation"] |= {"pictures": 0, "attacks": ["pgd-2"]}
    values["dat"]["logging"]["trackers"] = []
    values["zero_optimization"] = {"stage": stage}
    return values


class Shadow:
    """What the disk would hold of a folder after a power cut."""

    def __init__(self, folder: Path, shadow: Path) -> None:
        self._folder, self._shadow = folder.resolve(), shadow
        self._files, self._names = shadow / "files", shadow / "names"
        for made in (self._files, self._names):
            made.mkdir(parents=True, exist_ok=True)

    def take(self, descriptor: int) -> None:
        """Copy what is being synced."""
        about = os.fstat(descriptor)
        if stat.S_ISDIR(about.st_mode):
            listing = {
                entry.name: (entry.inode(), entry.is_dir())
                for entry in os.scandir(f"/proc/self/fd/{descriptor}")
            }
            self._put(self._names / str(about.st_ino), json.dumps(listing).encode())
        else:
            with open(f"/proc/self/fd/{descriptor}", "rb") as file:
                self._put(self._files / str(about.st_ino), file.read())

    def _put(self, path: Path, content: bytes) -> None:
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        os.rename(partial, path)

    def restore(self) -> None:
        """Put what was synced in the place of the folder."""
        inode = self._folder.stat().st_ino
        after = self._folder.with_name(self._folder.name + ".after")
        shutil.rmtree(after, ignore_errors=True)
        self._build(inode, after)
        shutil.rmtree(self._folder)
        after.rename(self._folder)
        shutil.rmtree(self._shadow)

    def _build(self, inode: int, place: Path) -> None:
        place.mkdir()
        names = self._names / str(inode)
        for name, (child, is_folder) in json.loads(
            names.read_text() if names.exists() else "{}"
        ).items():
            if is_folder:
                self._build(child, place / name)
            else:
                synced = self._files / str(child)
                (place / name).write_bytes(synced.read_bytes() if synced.exists() else b"")


def in_child(work: Callable[[], int], log: Path) -> int:
    """Process number of a child that does ``work``; its output goes to ``log``."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = work()
    finally:
        os._exit(code)


def train(values: dict[str, Any], folder: Path) -> int:
    path = tiny_run.write(folder / "config.json", values)
    return main(["train", "--deepspeed_config", str(path), "--resume", "auto"])


def counting(before: Callable[[str, tuple[Any, ...]], None]) -> None:
    """Call ``before`` ahead of each call that writes, in this process from now on."""
    for owner, name in WRITES:
        original = getattr(owner, name)

        def call(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            before(_name, args)
            return _original(*args, **kwargs)

        setattr(owner, name, call)


class Campaign:
    """Kills runs and compares what they come to with runs that were left alone."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._random = folder, random.Random(seed)
        self._whole: dict[tuple[int, bool], tuple[Any, float, int]] = {}
        self.table: Counter[tuple[str, str]] = Counter()

    def run(self, count: int) -> None:
        """Kill ``count`` times."""
        done = 0
        while done < count:
            stage, asynchronous = self._random.randrange(4), self._random.random() < 0.5
            kinds = [self._kind(done + i) for i in range(min(KILLS_PER_RUN, count - done))]
            self._one_run(stage, asynchronous, kinds)
            done += len(kinds)

    def _kind(self, number: int) -> str:
        place = number % 8
        return KINDS[2] if place == 0 else KINDS[1] if place in (3, 6) else KINDS[0]

    def _one_run(self, stage: int, asynchronous: bool, kinds: list[str]) -> None:
        expected, seconds, writes = self._left_alone(stage, asynchronous)
        place = self._folder / "killed"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        values = values_of(place / "run", stage, asynchronous=asynchronous)
        verdict = "the same end"
        for kind in kinds:
            self._kill_once(values, place, kind, seconds, writes)
        before = newest(place / "run")
        code = self._finish(values, place)
        if code != 0:
            verdict = f"lost: exit code {code}, {(place / 'log').read_text()[-300:]}"
        elif before and "Continuing from" not in (place / "last.log").read_text():
            verdict = "lost: started anew"
        elif outcome(place / "run") != expected:
            verdict = "another trajectory"
        elif leftovers(place / "run"):
            verdict = f"left behind: {leftovers(place / 'run')}"
        for kind in kinds:
            self.table[kind, verdict] += 1

    def _left_alone(self, stage: int, asynchronous: bool) -> tuple[Any, float, int]:
        key = stage, asynchronous
        if key not in self._whole:
            place = self._folder / f"whole-{stage}-{asynchronous}"
            place.mkdir()
            values = values_of(place / "run", stage, asynchronous=asynchronous)

            def work() -> int:
                calls: list[str] = []
                counting(lambda name, _args: calls.append(name))
                code = train(values, place)
                (place / "calls").write_text(str(len(calls)))
                return code

            started = time.monotonic()
            assert os.waitpid(in_child(work, place / "log"), 0)[1] == 0, (place / "log").read_text()
            seconds = time.monotonic() - started
            self._whole[key] = outcome(place / "run"), seconds, int((place / "calls").read_text())
        return self._whole[key]

    def _kill_once(
        self, values: dict[str, Any], place: Path, kind: str, seconds: float, writes: int
    ) -> None:
        run, log = place / "run", place / "log"
        if kind == KINDS[0]:
            child = in_child(lambda: train(values, place), log)
            time.sleep(self._random.uniform(0.2, 1.0) * seconds)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return
        run.mkdir(exist_ok=True)
        fatal, shadow = self._random.randrange(max(1, writes)), place / "shadow"
        if kind == KINDS[2]:
            shutil.rmtree(shadow, ignore_errors=True)
            sync_all(run, Shadow(run, shadow))  # what an earlier start left is on the disk by now

        def work() -> int:
            seen = [0]
            disk = Shadow(run, shadow) if kind == KINDS[2] else None

            def before(name: str, args: tuple[Any, ...]) -> None:
                if seen[0] == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen[0] += 1
                if disk is not None and name == "fsync":
                    disk.take(args[0])

            counting(before)
            return train(values, place)

        os.waitpid(in_child(work, log), 0)
        if kind == KINDS[2]:
            Shadow(run, shadow).restore()

    def _finish(self, values: dict[str, Any], place: Path) -> int:
        child = in_child(lambda: train(values, place), place / "last.log")
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def sync_all(folder: Path, shadow: Shadow) -> None:
    """Copy everything that is in a folder now."""
    for path in (folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        shadow.take(descriptor)
        os.close(descriptor)


def newest(run: Path) -> str | None:
    """The newest complete checkpoint before a start."""
    checkpoints = sorted((run / "checkpoints").glob("step-*/manifest.json"))
    return checkpoints[-1].parent.name if checkpoints else None


def outcome(run: Path) -> Any:
    """What a run came to: each step's numbers, the weights, the outcome of every image."""
    record = json.loads((run / "record.json").read_text())
    rows = [{key: row[key] for key in TIMELESS} for row in tiny_run.rows(run)]
    weights = sha256_of(run / "checkpoints" / "step-00000012" / "model.safetensors")
    return rows, weights, record["outcomes"]


def leftovers(run: Path) -> list[str]:
    """Temporary files that nobody has removed."""
    names = (".partial", ".replaced", ".tmp")
    return [str(p.relative_to(run)) for p in run.rglob("*") if p.name.endswith(names)]


def test_whatever_kills_a_run_it_comes_to_the_same_end() -> None:
    # In a process of its own: what this one has started (process groups, threads) forks badly.
    words = [sys.executable, "-m", "tests.integration.test_kills", str(SHORT), "0"]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        cwd=tiny_run.ROOT,
        env=without_launcher(),
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in KINDS:
        assert re.search(rf"{kind} +the same end", done.stdout), done.stdout
    assert all("the same end" in line for line in done.stdout.splitlines()), done.stdout


def test_the_shadow_forgets_what_was_not_synced(tmp_path: Path) -> None:
    folder, store = tmp_path / "run", tmp_path / "shadow"
    folder.mkdir()
    shadow = Shadow(folder, store)

    def sync(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        shadow.take(descriptor)
        os.close(descriptor)

    (folder / "a").write_text("1")
    (folder / "b").write_text("2")
    sync(folder / "a")
    sync(folder)
    (folder / "a").write_text("3")  # content that was not synced
    os.rename(folder / "b", folder / "c")  # a name that was not
    shadow.restore()
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"a": "1", "b": ""}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        whole = Campaign(Path(scratch), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 1)
        whole.run(int(sys.argv[1]))
        for (kind, verdict), number in sorted(whole.table.items()):
            print(f"{kind:16} {verdict:40} {number}")

"""Claims about a folder of checkpoints: which is the newest, what is damaged, what may go."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dat_ds.checkpoints import (
    FORMAT,
    CheckpointFolder,
    damage_of,
    described,
    files_in,
    write_manifest,
)
from dat_ds.cli.main import main
from dat_ds.errors import CheckpointError

pytestmark = pytest.mark.fast


def checkpoint(folder: Path, name: str, step: int) -> Path:
    """A checkpoint of two small files."""
    path = folder / name
    (path / "reference").mkdir(parents=True)
    (path / "rank-0.pt").write_bytes(bytes(range(200)))
    (path / "reference" / "model.safetensors").write_bytes(b"weights")
    state = {"format": FORMAT, "step": step, "ranks": 1}
    (path / "state.json").write_text(json.dumps(state), encoding="utf-8")
    write_manifest(path, described(path, files_in(path)))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (5, 10, 15):
        checkpoint(tmp_path, f"step-{step:08d}", step)
    (tmp_path / "latest").write_text("step-00000015", encoding="utf-8")
    return tmp_path


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_a_checkpoint_as_it_was_written_has_no_damage(folder):
    assert damage_of(folder / "step-00000015") == []


@pytest.mark.parametrize("place", [0, 7, 100, -1])
@pytest.mark.parametrize(
    "file", ["rank-0.pt", "reference/model.safetensors", "state.json", "manifest.json"]
)
def test_one_flipped_bit_anywhere_is_named(folder, file, place):
    path = folder / "step-00000010" / file
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 4
    path.write_bytes(bytes(data))
    found = damage_of(folder / "step-00000010")
    assert len(found) == 1
    assert found[0].startswith(str(path))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.write_bytes(b""), "has 0 of 200 bytes"),
        (lambda p: p.write_bytes(bytes(199)), "has 199 of 200 bytes"),
        (lambda p: p.write_bytes(bytes(200)), "has other bytes than were written"),
        (lambda p: p.unlink(), "is missing"),
        (lambda p: (p.unlink(), p.mkdir()), "is missing"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(folder, damage, words):
    path = folder / "step-00000015" / "rank-0.pt"
    damage(path)
    assert damage_of(folder / "step-00000015") == [f"{path} {words}."]


def test_ranks_find_together_what_one_finds_alone(folder):
    path = folder / "step-00000015"
    for name in files_in(path):
        (path / name).write_bytes(b"?")
    alone = damage_of(path)
    shares = [damage_of(path, first=rank, every=3) for rank in range(3)]
    assert sorted(problem for share in shares for problem in share) == sorted(alone)
    assert len(alone) == 3


def test_a_manifest_that_was_removed_is_missed_and_one_of_0_1_is_not(folder):
    path = folder / "step-00000015"
    (path / "manifest.json").unlink()
    assert damage_of(path) == [f"{path / 'manifest.json'} is missing."]
    state = {"format": 1, "step": 15, "files": {"rank-0.pt": 200}}
    (path / "state.json").write_text(json.dumps(state), encoding="utf-8")
    assert damage_of(path) == []
    (path / "rank-0.pt").write_bytes(b"half")
    assert damage_of(path) == [f"{path / 'rank-0.pt'} has 4 of 200 bytes."]


def test_a_strange_file_that_deepspeed_would_read_is_named(folder):
    path = folder / "step-00000015"
    (path / "notes.txt").write_text("good", encoding="utf-8")
    assert damage_of(path) == []
    strange = path / "zero_pp_rank_7_mp_rank_00_optim_states.pt"
    strange.write_bytes(b"")
    assert damage_of(path) == [f"{strange} is not one of the checkpoint's files."]


def test_latest_names_the_newest_and_without_it_the_steps_do(folder, caplog):
    here = CheckpointFolder(folder)
    assert here.latest() == folder / "step-00000015"
    (folder / "latest").write_text("step-00000005\n", encoding="utf-8")
    assert names(here.newest_first()) == ["step-00000005", "step-00000015", "step-00000010"]
    (folder / "latest").unlink()
    assert names(here.newest_first()) == ["step-00000015", "step-00000010", "step-00000005"]
    (folder / "latest").write_text("step-00000099", encoding="utf-8")
    assert here.latest() == folder / "step-00000015"
    assert "which is not there" in caplog.text


@pytest.mark.parametrize(
    "name", ["../..", "/etc", "a/b", "..", "", "latest", "step\0", "x" * 3 + "/"]
)
def test_latest_that_is_no_name_beside_it_is_refused(folder, name):
    (folder / "latest").write_text(name, encoding="utf-8")
    with pytest.raises(CheckpointError, match="not the name of a folder beside it"):
        CheckpointFolder(folder).latest()


def test_pipes_in_the_place_of_files_are_not_waited_for(folder):
    path = folder / "step-00000015"
    for file in (folder / "latest", path / "state.json", path / "rank-0.pt"):
        file.unlink()
        os.mkfifo(file)
    assert CheckpointFolder(folder).latest() == path
    assert damage_of(path) == [f"{path / name} is missing." for name in ("rank-0.pt", "state.json")]


@pytest.mark.parametrize("files", [[], {"rank-0.pt": None}, {"rank-0.pt": "big"}, {"a\0b": 1}])
def test_a_state_of_0_1_that_makes_no_sense_is_damage(folder, files):
    path = folder / "step-00000015"
    (path / "manifest.json").unlink()
    state = {"format": 1, "step": 15, "files": files}
    (path / "state.json").write_text(json.dumps(state), encoding="utf-8")
    assert len(damage_of(path)) == 1


def test_a_checkpoint_whose_state_is_damaged_is_still_seen(folder):
    (folder / "step-00000015" / "state.json").write_bytes(b"\xff{")
    assert CheckpointFolder(folder).latest() == folder / "step-00000015"


def test_pruning_leaves_what_the_user_named(folder):
    for name in ("step-6-good", "step-00000020-good", "best-so-far"):
        checkpoint(folder, name, 6)
    (folder / "step-00000001").mkdir()
    (folder / "step-00000001" / "notes.txt").write_text("mine", encoding="utf-8")
    removed = CheckpointFolder(folder).prune(1)
    assert names(removed) == ["step-00000010", "step-00000005"]
    left = {path.name for path in folder.iterdir()} - {"latest"}
    assert left == {
        "step-00000015",
        "step-6-good",
        "step-00000020-good",
        "best-so-far",
        "step-00000001",
    }


def test_pruning_leaves_what_latest_names(folder):
    (folder / "latest").write_text("step-00000005", encoding="utf-8")
    CheckpointFolder(folder).prune(1)
    assert (folder / "step-00000005").exists()


def test_cleaning_removes_halves_and_puts_back_what_was_about_to_be_replaced(folder):
    (folder / ".partial" / "step-00000020").mkdir(parents=True)
    (folder / ".replaced").mkdir()
    (folder / "step-00000015").rename(folder / ".replaced" / "step-00000015")
    (folder / "latest.partial").write_text("step", encoding="utf-8")
    CheckpointFolder(folder).clean()
    assert sorted(path.name for path in folder.iterdir()) == [
        "latest",
        "step-00000005",
        "step-00000010",
        "step-00000015",
    ]


def test_publishing_replaces_one_of_the_same_name(folder):
    new = checkpoint(folder / ".partial", "step-00000010", 10)
    (new / "new.txt").write_text("new", encoding="utf-8")
    assert CheckpointFolder(folder).publish(new) == folder / "step-00000010"
    assert (folder / "step-00000010" / "new.txt").exists()
    assert (folder / "latest").read_text(encoding="utf-8") == "step-00000010"
    assert not (folder / ".replaced").exists()


def test_everything_is_on_the_disk_before_it_gets_its_name(folder, monkeypatch):
    events = []

    sync, replace = os.fsync, os.replace

    def syncing(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def replacing(source, target):
        events.append(("name", str(target)))
        replace(source, target)

    monkeypatch.setattr("os.fsync", syncing)
    monkeypatch.setattr("os.replace", replacing)
    new = checkpoint(folder / ".partial", "step-00000020", 20)
    CheckpointFolder(folder).publish(new)
    named = events.index(("name", str(folder / "step-00000020")))
    files = {str(new / name) for name in files_in(folder / "step-00000020")}
    before = {path for kind, path in events[:named] if kind == "sync"}
    assert files | {str(new), str(new / "reference")} <= before
    # The folder holds the name before latest does.
    latest = events.index(("name", str(folder / "latest")))
    assert ("sync", str(folder)) in events[named:latest]
    assert ("sync", str(folder)) in events[latest:]


def test_the_command_verifies_lists_and_prunes(folder, capsys):
    (folder / "step-00000010" / "rank-0.pt").write_bytes(b"?")
    assert main(["checkpoint", "verify", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert f"{folder / 'step-00000015'}: whole" in printed
    assert f"{folder / 'step-00000010' / 'rank-0.pt'} has 1 of 200 bytes." in printed
    assert main(["checkpoint", "verify", str(folder / "step-00000015")]) == 0
    assert main(["checkpoint", "list", str(folder)]) == 0
    assert "step 15, 1 rank(s)" in capsys.readouterr().out
    assert main(["checkpoint", "prune", str(folder), "--keep", "1"]) == 0
    assert main(["checkpoint", "prune", str(folder)]) == 2
    assert main(["checkpoint", "list", str(folder / "nowhere")]) == 2
    assert names(CheckpointFolder(folder).newest_first()) == ["step-00000015"]

"""Every exported format gives the training model's outputs, without this package; refusals."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

from dat_ds import models
from dat_ds.cli.main import main
from dat_ds.errors import ExportError, UserError
from dat_ds.export import FORMATS, Order, export
from dat_ds.export.base import Format
from dat_ds.models import build_model, save_weights
from tests.integration import tiny_run
from tests.unit.model_helpers import write_hf_vit

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def odd_vit() -> models.PixelModel:
    return build_model(
        "vit_tiny_patch16_224",
        num_classes=4,
        in_chans=1,
        img_size=(6, 10),
        patch_size=2,
        depth=1,
        embed_dim=16,
        num_heads=2,
        drop_rate=0.1,
        mean=[0.3],
        std=[0.2],
        seed=0,
    )


def cnn(stem: Any = "default", **options: Any) -> models.PixelModel:
    size = {"num_classes": 4, "img_size": 16, "stem": stem, "mean": MEAN, "std": STD, "seed": 0}
    return build_model("resnet18", options={"channels": [8, 8, 8, 8]}, **{**size, **options})


def hf_vit(folder: Path) -> models.PixelModel:
    write_hf_vit(folder)
    return build_model(f"hf:{folder}", num_classes=4, img_size=8, mean=MEAN, std=STD, seed=0)


def save(model: models.PixelModel, folder: Path) -> Path:
    """Saved with weights and statistics unlike those that a fresh network has."""
    torch.manual_seed(1)
    state = {
        name: tensor + 0.1 * torch.rand_like(tensor)
        if tensor.is_floating_point() and name.startswith("body.")
        else tensor
        for name, tensor in model.state_dict().items()
    }
    save_weights(folder, state, model.spec)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("saved")
    built = {
        "vit": odd_vit(),
        "cnn": cnn(),
        "cifar-stem": cnn("cifar"),
        "hf": hf_vit(folder / "private"),
        "projection": cnn(head="projection", num_classes=8),
        "features": cnn(head="features", num_classes=0),
        "two-channels": cnn(in_chans=2, mean=[0.5] * 2, std=[0.5] * 2),
    }
    return {name: save(model, folder / name) for name, model in built.items()}


def evaluation(folder: Path, **values: Any) -> Path:
    content = {
        "target": "elsewhere",
        "threat_model": {"norm": "linf", "eps": "8/255", "lower": 0.0, "upper": 1.0},
        "data": {"name": "cifar10"},
        "ensemble": "standard",
        "natural_acc": 0.8125,
        "robust_acc": {"apgd-ce-100": 0.5, "apgd-t-100": 0.4375, "all": 0.4375},
        "num_examples": 16,
        "class_names": ["a", "b", "c", "d"],
        "checks": [
            {"name": "gradients", "status": "ok", "found": "x", "meaning": "y"},
            {"name": "noise", "status": "suspicious", "found": "Random.", "meaning": "Weak."},
        ],
        "versions": {"torch": "2.6.0"},
        **values,
    }
    file = folder / "evaluation.json"
    file.write_text(json.dumps(content))
    return file


# ---- round trips

NO_TIMM = {"cifar-stem", "projection"}
CASES = [
    *(("vit", to) for to in ("timm", "hf", "safetensors", "onnx", "program", "folder")),
    *(("cnn", to) for to in ("timm", "hf", "safetensors", "robustbench")),
    *(("cifar-stem", to) for to in ("safetensors", "program", "robustbench", "folder")),
    *(("hf", to) for to in ("hf", "safetensors", "onnx", "program", "folder")),
    *(("projection", to) for to in ("safetensors", "folder")),
    ("features", "timm"),
    ("two-channels", "safetensors"),
]

OUTSIDE = """
import json, runpy, sys
sys.modules["dat_ds"] = sys.modules["deepspeed"] = None
from pathlib import Path
import onnxruntime, safetensors.torch, timm, torch, transformers

def load(to, folder):
    if to == "program":
        return torch.export.load(folder / "model.pt2").module()
    if to == "robustbench":
        return runpy.run_path(str(folder / "model.py"))["build"]()
    if to == "onnx":
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
        return lambda x: torch.from_numpy(session.run(None, {"pixels": x.numpy()})[0])
    if to == "hf":
        model = transformers.AutoModelForImageClassification.from_pretrained(folder)
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        def classify(x):
            levels = (255 * x).round().byte().permute(0, 2, 3, 1).numpy()
            return model(**processor(list(levels), return_tensors="pt")).logits
        return classify
    if to == "timm":
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        config = timm.data.resolve_model_data_config(model)
        mean, std = config["mean"], config["std"]
    else:
        spec = json.loads((folder / "spec.json").read_text())
        if spec["changes"] or "config" in spec:
            return None
        model = timm.create_model(
            spec["architecture"], num_classes=spec["num_classes"], **spec["model_args"]
        ).eval()
        model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        mean, std = spec["mean"], spec["std"]
    view = lambda values: torch.tensor(values).view(1, -1, 1, 1)
    return lambda x: model((x - view(mean)) / view(std))

for case in json.loads(sys.argv[1]):
    model, x = load(case["to"], Path(case["folder"])), torch.load(case["pixels"])
    if model is not None:
        with torch.no_grad():
            outputs = model(x)
            single = model(x[:1])  # any batch
        assert torch.allclose(single, outputs[:1], atol=1e-5), case
        if case["to"] == "program":
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
            torch.save(gradient, Path(case["folder"]) / "gradient.pt")
        torch.save(outputs, Path(case["folder"]) / "outputs.pt")
"""


@pytest.fixture(scope="module")
def exported(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, exported here and then loaded in one process that cannot import dat_ds."""
    root = tmp_path_factory.mktemp("exported")
    record = evaluation(root)
    cases = []
    for model, to in CASES:
        order = Order(target=saved[model], to=to, output=root / f"{model}-{to}", record=record)
        folder = export(order)
        shape = models.load(saved[model]).spec
        size = shape["img_size"]
        height, width = (size, size) if isinstance(size, int) else size
        levels = torch.randint(256, (5, shape["in_chans"], height, width))
        torch.save(levels / 255, folder / "pixels.pt")
        if to != "folder":
            cases.append({"to": to, "folder": str(folder), "pixels": str(folder / "pixels.pt")})
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, json.dumps(cases)],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize(("model", "to"), CASES, ids=[f"{m}-{t}" for m, t in CASES])
def test_outputs_are_those_of_the_training_model(
    saved: dict[str, Path], exported: Path, model: str, to: str
) -> None:
    folder = exported / f"{model}-{to}"
    x = torch.load(folder / "pixels.pt")
    expected = models.load(saved[model])(x).detach()
    if to == "folder":
        outputs = models.load(folder)(x).detach()
    elif not (folder / "outputs.pt").exists():
        assert to == "safetensors"
        assert model in {"cifar-stem", "projection", "hf"}, "others need no more than timm"
        outputs = FORMATS[to].load(None, folder)(x).detach()  # type: ignore[arg-type]
    else:
        outputs = torch.load(folder / "outputs.pt")
    assert outputs.shape == expected.shape
    assert float((outputs - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))
    if to == "program":
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(models.load(saved[model])(x)[:, 0].sum(), x)
        found = torch.load(folder / "gradient.pt")
        assert float((found - gradient).abs().max()) < 1e-4 * float(gradient.abs().max())


def test_nothing_in_an_export_names_a_folder_of_this_machine(
    saved: dict[str, Path], exported: Path
) -> None:
    private = str(saved["hf"].parent).encode()
    files = [file for file in exported.glob("hf-*/*") if file.suffix != ".pt"]
    assert len(files) >= 10
    assert [file for file in files if private in file.read_bytes()] == []


def test_the_processor_of_a_folder_of_images_resizes_and_crops_as_the_data_do(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    import transformers

    from dat_ds.data.transforms import resize_center_crop

    run = tmp_path / "run"
    config = {"dat": {"data": {"name": "imagefolder"}, "ema": {"decay": 0}}}
    config["dat"] |= {
        "attack": {"name": "none"},
        "objective": {"name": "at"},
        "threat_model": {"norm": "linf", "eps": "8/255"},
    }
    best = run / "checkpoints" / "best"
    best.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config))
    picture = torch.randint(256, (3, 40, 30), dtype=torch.uint8)
    for name, side in (("hf", 8), ("cnn", 16)):
        for file in saved[name].iterdir():
            (best / file.name).write_bytes(file.read_bytes())
        folder = export(Order(target=run, to="hf", output=tmp_path / name))
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        values = processor([picture.permute(1, 2, 0).numpy()], return_tensors="pt")["pixel_values"]
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
        found = values[0] * std + mean
        expected = resize_center_crop(picture, side) / 255
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) < 2.5 / 255, "rounding of resized levels"


def test_what_a_library_cannot_write_is_a_message(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*args: Any, **options: Any) -> None:
        raise NotImplementedError("aten::unheard_of\nmore")

    monkeypatch.setattr("dat_ds.export.program.torch.export.export", unsupported)
    with pytest.raises(
        ExportError, match=r"--to program does not work .* aten::unheard_of Nothing"
    ):
        export(Order(target=saved["cnn"], to="program", output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_gives_other_outputs_is_refused_and_leaves_nothing(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = FORMATS["safetensors"]
    write: Callable[..., None] = form.write

    def write_other(self: Format, source: Any, folder: Path) -> None:
        bias = dict(source.model.named_parameters())["body.fc.bias"]
        with torch.no_grad():
            bias += 3e-4
            write(source, folder)
            bias -= 3e-4

    monkeypatch.setattr(type(form), "write", write_other)
    with pytest.raises(ExportError, match=r"outputs differ from the training model's by 0.0003"):
        export(Order(target=saved["cnn"], to="safetensors", output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


# ---- the card


def card_of(folder: Path) -> tuple[huggingface_hub.ModelCard, str]:
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    return card, (folder / "README.md").read_text()


def test_the_card_states_the_worst_case_over_the_ensemble(exported: Path) -> None:
    card, text = card_of(exported / "cnn-timm")
    results = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert results == {
        "clean accuracy": 0.8125,
        "robust accuracy, worst case over apgd-ce-100, apgd-t-100 (l-infinity, eps 8/255)": 0.4375,
    }
    assert card.data.library_name == "timm"
    assert card.data.license == "unknown"
    assert card.data.metrics == ["accuracy"]
    sha256 = hashlib.sha256((exported / "evaluation.json").read_bytes()).hexdigest()
    for part in (sha256, "16 test images of cifar10", f"mean {MEAN} and std {STD}", "43.8%"):
        assert part in text
    assert "- noise: suspicious. Random. Weak." in text
    assert "gradients: ok" not in text
    config = json.loads((exported / "cnn-timm" / "config.json").read_text())
    assert config["label_names"] == ["a", "b", "c", "d"]


def test_single_attacks_are_named_and_never_called_robust_accuracy(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    record = evaluation(tmp_path, robust_acc={"pgd-10": 0.5}, ensemble=None, checks=[])
    output = tmp_path / "out"
    export(Order(target=saved["cnn"], to="folder", output=output, record=record, license="mit"))
    card, text = card_of(output)
    names = [r.metric_name for r in card.data.eval_results]
    assert names == ["clean accuracy", "accuracy under pgd-10 (l-infinity, eps 8/255)"]
    assert "upper bound of robust accuracy" in text
    assert card.data.license == "mit"


def test_without_a_record_the_card_claims_no_accuracy(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    export(Order(target=saved["cnn"], to="folder", output=tmp_path / "out"))
    card, text = card_of(tmp_path / "out")
    assert card.data.eval_results is None
    assert "No evaluation of these weights is known." in text


def test_the_robustbench_entry_leaves_to_others_what_only_they_know(exported: Path) -> None:
    (file,) = (exported / "cnn-robustbench").glob("model_info/cifar10/Linf/*.json")
    entry = json.loads(file.read_text())
    assert entry["clean_acc"] == "81.25"
    assert entry["reported"] == "43.75"
    assert entry["eps"] == "8/255"
    assert entry["dataset"] == "cifar10"
    assert entry["unreliable"] is True, "a check was not passed"
    for key in ("link", "name", "authors", "venue", "additional_data", "autoattack_acc"):
        assert entry[key] is None


# ---- runs: averaged and un-averaged weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    values = tiny_run.config(folder / "run", schedule={"epochs": 1})
    values["dat"]["evaluation"]["pictures"] = 0
    path = tiny_run.write(folder / "config.json", values)
    assert main(["train", "--deepspeed_config", str(path)]) == 0
    return folder / "run"


def test_a_run_exports_its_average_with_its_record_and_raw_weights_without(run: Path) -> None:
    assert main(["export", str(run), "--to", "folder", "--weights", "ema"]) == 0
    averaged = run / "exports" / "folder-ema"
    best = models.load(run).state_dict()
    assert all(torch.equal(v, best[k]) for k, v in models.load(averaged).state_dict().items())
    text = (averaged / "README.md").read_text()
    sha256 = hashlib.sha256((run / "record.json").read_bytes()).hexdigest()
    assert sha256 in text
    assert "Weights: averaged over training (EMA, decay 0.9)." in text

    assert main(["export", str(run), "--to", "folder", "--weights", "raw"]) == 0
    raw = run / "exports" / "folder-raw"
    checkpoint = max((run / "checkpoints").glob("step-*"))
    module = torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    state = models.load(raw).state_dict()
    assert all(torch.equal(v, module[k]) for k, v in state.items())
    assert not torch.equal(state["body.head.weight"], best["body.head.weight"])
    text = (raw / "README.md").read_text()
    assert f"Weights: un-averaged, of {checkpoint.name}." in text
    assert "No evaluation of these weights is known." in text


def test_a_checkpoint_other_than_the_evaluated_model_is_exported_without_its_record(
    run: Path, tmp_path: Path
) -> None:
    checkpoint = max((run / "checkpoints").glob("step-*"))
    export(Order(target=checkpoint, to="folder", output=tmp_path / "out"))
    assert "No evaluation of these weights is known." in (tmp_path / "out/README.md").read_text()


def test_without_an_average_raw_weights_are_the_saved_ones_and_ema_is_refused(
    run: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "run"
    best = copied / "checkpoints" / "best"
    best.mkdir(parents=True)
    for name in ("model.json", "model.safetensors"):
        (best / name).write_bytes((run / "checkpoints" / "best" / name).read_bytes())
    config = json.loads((run / "config.json").read_text())
    config["dat"]["ema"]["decay"] = 0.0
    (copied / "config.json").write_text(json.dumps(config))
    folder = export(Order(target=copied, to="folder", weights="raw"))
    expected = models.load(run).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in models.load(folder).state_dict().items())
    with pytest.raises(ExportError, match=r"--weights ema: .* has no average of its weights"):
        export(Order(target=copied, to="folder", weights="ema"))


def test_raw_weights_of_a_model_alone_are_refused(saved: dict[str, Path]) -> None:
    with pytest.raises(ExportError, match="holds a model alone, without DeepSpeed's files"):
        export(Order(target=saved["cnn"], to="folder", weights="raw"))


# ---- refusals


@pytest.mark.parametrize(
    ("model", "to", "words"),
    [
        ("cifar-stem", "timm", "stem='cifar' puts a 3x3 convolution .* which timm cannot build"),
        ("cifar-stem", "hf", "which transformers' TimmWrapper cannot build"),
        ("projection", "timm", "projection head has two layers .* which timm cannot build"),
        ("projection", "hf", "is for classifiers, and this model gives 'projection'"),
        ("features", "robustbench", "is for classifiers, and this model gives 'features'"),
        ("hf", "timm", "one of transformers, not of timm. Write --to hf"),
        ("hf", "robustbench", "this one is of transformers. Write --to hf or program"),
        ("cnn", "robustbench", "Run dat-ds eval first, or name its evaluation.json by --record"),
        ("two-channels", "hf", "take images of 1 or 3 channels, not 2"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    saved: dict[str, Path], tmp_path: Path, model: str, to: str, words: str
) -> None:
    with pytest.raises(ExportError, match=words):
        export(Order(target=saved[model], to=to, output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_all_problems_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    words = ["export", str(tmp_path / "none"), "--to", "tim", "--output", str(full)]
    assert main([*words, "--push", "no user"]) == 2
    error = capsys.readouterr().err
    assert "--to 'tim' is not a format (did you mean 'timm'?)" in error
    assert f"--output {full} is not empty, and nothing is overwritten" in error
    assert f"No saved model at '{tmp_path / 'none'}'" in error
    assert "--push 'no user' is not a repository on the hub: write USER/NAME." in error
    assert (full / "mine.txt").read_text() == "mine"


def test_a_record_that_is_none_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text("{}")
    with pytest.raises(ExportError, match="is not a record of an evaluation"):
        export(Order(target=saved["cnn"], to="folder", output=tmp_path / "out", record=file))


def test_a_model_of_ones_own_is_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "own", {"w": torch.zeros(1)}, {})
    with pytest.raises(UserError, match="a module of your own, which dat_ds cannot rebuild"):
        export(Order(target=tmp_path / "own", to="folder"))


def test_a_missing_package_is_named(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(FORMATS["onnx"]), "needs", ("no_such", "nor_this"))
    with pytest.raises(ExportError, match=r"needs no_such and nor_this: pip install 'dat-ds\[exp"):
        export(Order(target=saved["cnn"], to="onnx", output=tmp_path / "out"))


@pytest.mark.parametrize("fault", ["no room", "full while writing"])
def test_a_full_disk_leaves_nothing(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    if fault == "no room":
        usage = type("usage", (), {"free": 1000})
        monkeypatch.setattr("dat_ds.export.run.shutil.disk_usage", lambda folder: usage)
        words = "No room in .*: the export takes up to"
    else:
        monkeypatch.setattr("dat_ds.export.safetensors.write_tensors", full)
        words = "Cannot write .*No space left on device. Nothing was left there"
    with pytest.raises(ExportError, match=words):
        export(Order(target=saved["cnn"], to="safetensors", output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_a_message(run: Path, tmp_path: Path) -> None:
    checkpoint = max((run / "checkpoints").glob("step-*"))
    damaged = tmp_path / "checkpoints" / checkpoint.name
    damaged.mkdir(parents=True)
    for file in checkpoint.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "mp_rank_00_model_states.pt").write_bytes(b"none")
    with pytest.raises(UserError, match=r"mp_rank_00_model_states.pt has 4 of \d+ bytes"):
        export(Order(target=damaged, to="folder", weights="raw"))


# ---- uploading


class Hub:
    """In the place of ``huggingface_hub.HfApi``: keeps what it is sent."""

    uploaded: ClassVar[list[dict[str, Any]]] = []
    error: Exception | None = None

    def whoami(self) -> dict[str, str]:
        return {"name": "me"}

    def create_repo(self, repo_id: str, **options: Any) -> None:
        assert options == {"repo_type": "model", "private": True, "exist_ok": True}
        if self.error is not None:
            raise self.error

    def upload_folder(self, **options: Any) -> Any:
        self.uploaded.append(options)
        return type("Commit", (), {"commit_url": "https://huggingface.co/me/it/commit/1"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr("dat_ds.export.push.HfApi", Hub)
    monkeypatch.setattr(Hub, "uploaded", [])
    monkeypatch.setattr(Hub, "error", None)
    return Hub


@pytest.mark.parametrize(("answer", "uploads"), [("y", 1), ("", 0), (None, 0), ("--yes", 1)])
def test_an_upload_is_shown_and_agreed_to_first(
    saved: dict[str, Path],
    tmp_path: Path,
    hub: type[Hub],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str | None,
    uploads: int,
) -> None:
    def reply(question: str) -> str:
        assert answer != "--yes", "nobody is asked"
        assert hub.uploaded == []
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", reply)
    output = tmp_path / "out"
    words = ["export", str(saved["cnn"]), "--to", "timm", "--output", str(output)]
    yes = ["--yes"] if answer == "--yes" else []
    assert main([*words, "--push", "me/it", *yes]) == 0
    printed = capsys.readouterr().out
    assert "To upload to https://huggingface.co/me/it" in printed
    for file in output.iterdir():
        assert f"  {file.name}  {file.stat().st_size:,} bytes" in printed
    assert len(hub.uploaded) == uploads
    if uploads:
        assert hub.uploaded[0]["repo_id"] == "me/it"
        assert hub.uploaded[0]["folder_path"] == output
        assert "https://huggingface.co/me/it/commit/1" in printed
    assert (
        'timm.create_model("hf-hub:me/it", pretrained=True)' in (output / "README.md").read_text()
    )


def refusal(status: int, kind: Any = HfHubHTTPError, words: str = "no") -> Exception:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    error: Exception = kind(words, response=response)
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LocalTokenNotFoundError("none"), "nobody is logged in to the hub. Type: hf auth login"),
        (refusal(401), "does not accept the login"),
        (refusal(403), "the login .me. may not write there"),
        (refusal(404, RepositoryNotFoundError), "the login .me. may not write there"),
        (refusal(500, words="server down"), "server down"),
        (ConnectionError("offline mode is enabled"), "the hub cannot be reached .offline mode"),
        (Exception("no route"), "the hub cannot be reached .no route"),
    ],
    ids=["logged-out", "401", "403", "404", "500", "offline", "no-network"],
)
def test_a_refused_upload_is_a_message_and_keeps_the_export(
    saved: dict[str, Path],
    tmp_path: Path,
    hub: type[Hub],
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    words: str,
) -> None:
    hub.error = error
    output = tmp_path / "out"
    command = ["export", str(saved["cnn"]), "--to", "safetensors", "--output", str(output)]
    assert main([*command, "--push", "me/it", "--yes"]) == 2
    message = capsys.readouterr().err
    assert re.search(words, message)
    assert f"upload it later: hf upload me/it {output}" in message
    assert (output / "model.safetensors").exists()

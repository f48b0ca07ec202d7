"""What is judged: a model from wherever it is, the images, and the threat model.

Nothing that a file contains is executed, except a program of ``torch.export``, which torch reads
with pickle; a module is imported only where it is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dat_ds.checkpoints import CHECKPOINTS
from dat_ds.config import RunConfig, load_config
from dat_ds.config.load import apply_override
from dat_ds.config.schema import ThreatModelConfig
from dat_ds.data import DATASETS, DatasetMethod
from dat_ds.data.images import Images
from dat_ds.data.method import named_data
from dat_ds.errors import ConfigError, DataError, ModelError
from dat_ds.method import import_methods, parse_method, parse_section
from dat_ds.models import MODELS, PixelModel, build_model, load
from dat_ds.models.pretrained import STATE_SUFFIXES, read_weights, statistics_of, unwrapped
from dat_ds.models.saved import SPEC_NAME

logger = logging.getLogger("dat_ds")

_KINDS = (
    "the folder of a run, a checkpoint or an export, a timm name, a Hugging Face folder, a state "
    "dict (.safetensors, .pt), an exported program (.pt2), or MODULE:CALLABLE with --import MODULE"
)


@dataclass(frozen=True)
class Target:
    """A model to be judged.

    Args:
        name: As it was asked for.
        model: Pixels ``(B, C, H, W)`` in [0, 1], float32, to logits ``(B, K)``.
        run: Run that trained it; None where it is none of ours.
        class_names: Names of its classes in order, where they are known.
        digest: SHA-256 of its weights and buffers; None where it has none.
        was_training: Modules that were delivered in training mode, by name.
    """

    name: str
    model: Callable[[Tensor], Any]
    run: RunConfig | None = None
    class_names: tuple[str, ...] | None = None
    digest: str | None = None
    was_training: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A target with what it is judged by.

    Args:
        target: The model.
        images: Map-style dataset of ``(x, y)``; ``x`` float32 ``(C, H, W)`` in [0, 1].
        data: Name and path of the dataset, for the record.
        class_names: Names of the data's classes in order, where they are known.
        threat: Allowed perturbations; its eps remembers how it was written.
    """

    target: Target
    images: Images
    data: Mapping[str, Any]
    class_names: tuple[str, ...] | None
    threat: ThreatModelConfig


def open_case(
    target: str,
    *,
    data: str | None = None,
    threat: str | None = None,
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> Case:
    """Load a model, and find the images and the threat model that it is judged by.

    Args:
        target: One of the kinds of the command line.
        data: ``"NAME"`` or ``"NAME:PATH"`` of a dataset, such as ``"npz:FILE"``; None for the data
            that the run was trained on.
        threat: ``"NORM:EPS"``, such as ``"linf:8/255"``; None for the run's.
        overrides: ``"dotted.key=value"`` over the run's config; for other targets keys of
            ``dat.model`` and ``dat.data``.
        imports: Modules to import first.
        device: Where the model is put.

    Raises:
        UserError: For whatever of it cannot be had, with all problems that can be seen together.
    """
    run = _run_of(Path(target), overrides, imports)
    values = _sections(overrides) if run is None else {}
    problems: list[str] = []
    dataset = dataset_of(data, run, values.get("data", {}), problems)
    ball = threat_of(threat, run, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    assert dataset is not None
    assert ball is not None
    part = dataset.read_test(0 if run is None else run.dat.seed)
    if len(part.images) == 0:
        raise DataError("There is no image to evaluate: the dataset is empty.")
    # Where these are the run's own data, they are not read again for their names.
    trained = part.class_names if data is None else _names_of(run)
    found = load_target(
        target,
        run=run,
        class_names=None if run is None else trained,
        imports=imports,
        options=values.get("model", {}),
        num_classes=part.num_classes or int(part.images.labels.max()) + 1,
        in_chans=part.images.image_shape[0],
        device=device,
    )
    images = _in_order_of(found.class_names, part.images, part.class_names)
    described = {"name": dataset.name} | (
        {} if getattr(dataset, "path", None) is None else {"path": str(dataset.path)}  # type: ignore[attr-defined]
    )
    names = found.class_names or part.class_names
    return Case(found, images, described, names, ball)


def load_target(
    text: str,
    *,
    run: RunConfig | None = None,
    class_names: tuple[str, ...] | None = None,
    imports: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    in_chans: int = 3,
    device: torch.device | str = "cpu",
) -> Target:
    """Load the model that ``text`` stands for, in eval mode.

    Args:
        text: One of the kinds of the command line.
        run: Run that trained it, where it is the folder of one.
        class_names: Names of the classes that the run was trained with, where they are known.
        imports: Modules that were imported for it.
        options: Keys of ``dat.model``, for a state dict and a timm name.
        num_classes: Classes of the data, for a state dict of an architecture that does not say.
        in_chans: Channels of the images, likewise.
        device: Where the model is put.

    Raises:
        ModelError: Where there is no model, or it cannot be read.
        ConfigError: For a module that cannot be imported.
    """
    path = Path(text).expanduser()
    options = dict(options or {})
    module_name, colon, attribute = text.partition(":")
    if colon and module_name in imports:
        model = _called(module_name, attribute)
    elif path.is_dir():
        model, names = _of_folder(path, run)
        class_names = names or class_names
    elif path.is_file():
        model, names = _with_names(_of_file(path, options, num_classes, in_chans))
        class_names = names or class_names
    elif text.startswith("hf:"):
        model, class_names = _of_hugging_face(text)
    elif colon and module_name.replace(".", "").isidentifier() and attribute.isidentifier():
        raise ModelError(f"{text!r} names a callable: add --import {module_name}, which runs it.")
    else:
        model = _of_timm(text, options)
    model = _opened(model)
    if isinstance(model, nn.Module):
        _refuse_meta(model, text)
        training = tuple(name or "model" for name, m in model.named_modules() if m.training)
        for module in model.modules():  # model.eval() is not there for an exported program
            module.training = False
        model.to(device)
        return Target(text, model, run, class_names, _digest(model), training)
    return Target(text, model, run, class_names)


def dataset_of(
    data: str | None,
    run: RunConfig | None,
    options: Mapping[str, Any],
    problems: list[str],
) -> DatasetMethod | None:
    """The dataset of ``"NAME:PATH"``, or the run's; None where there is a problem."""
    if data is None and run is not None:
        return run.dat.data
    if data is None and "name" not in options:
        problems.append(
            "--data is missing: name the images, such as --data npz:FILE, --data imagefolder:DIR "
            "or --data digits."
        )
        return None
    values = dict(options)
    if data is not None:
        values |= named_data(data)
    if run is not None:
        values.setdefault("img_size", run.dat.data.img_size)
        chosen = DATASETS.methods.get(str(values["name"]))
        if chosen is not None and "crop_share" in chosen.known_keys():
            values.setdefault("crop_share", getattr(run.dat.data, "crop_share", None))
    before = len(problems)
    dataset = parse_method(DATASETS, values, "dat.data", problems)
    problems += [
        f"--data {data}: {dataset.name!r} needs {what}, as in --data {dataset.name}:PATH."
        for key, what in dataset.required.items()
        if key == "path" and getattr(dataset, key) is None
    ]
    return dataset if len(problems) == before else None


def threat_of(
    threat: str | None, run: RunConfig | None, problems: list[str]
) -> ThreatModelConfig | None:
    """The threat model of ``"NORM:EPS"``, or the run's; None where there is a problem."""
    if threat is None:
        if run is None:
            problems.append("--threat is missing: write the ball, such as --threat linf:8/255.")
            return None
        return run.dat.threat_model
    norm, colon, eps = threat.partition(":")
    if not colon:
        problems.append(f"--threat {threat!r} is not NORM:EPS, such as linf:8/255 or l2:0.5.")
        return None
    before = len(problems)
    radius: float | str = eps
    with contextlib.suppress(ValueError):  # a fraction stays as it is written
        radius = float(eps)
    ball = parse_section(ThreatModelConfig, {"norm": norm, "eps": radius}, "--threat", problems)
    return ball if len(problems) == before else None


def _run_of(folder: Path, overrides: Sequence[str], imports: Sequence[str]) -> RunConfig | None:
    """The run whose folder, or whose checkpoint's folder, this is; its modules are imported."""
    for module in imports:
        import_methods(module)
    for candidate in (folder, folder.parent.parent):
        config = candidate / "config.json"
        try:
            values = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(values, dict) and "dat" in values:
            return load_config(config, overrides=overrides, imports=imports, here=False)
    return None


def _sections(overrides: Sequence[str]) -> dict[str, Any]:
    """Keys of ``dat.model`` and ``dat.data`` among overrides.

    Raises:
        ConfigError: For others.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        if not override.startswith(("dat.model.", "dat.data.")):
            raise ConfigError(
                f"--set {override}: the target is not a run of ours, so only dat.model.* and "
                "dat.data.* mean something."
            )
        apply_override(values, override)
    sections: dict[str, Any] = values.get("dat", {})
    return sections


def _called(module: str, attribute: str) -> Any:
    """The model that a callable of an imported module returns, or that it is."""
    found = getattr(sys.modules[module], attribute, None)
    if not callable(found):
        names = sorted(n for n, v in vars(sys.modules[module]).items() if callable(v))
        raise ModelError(
            f"{module}:{attribute}: the module has no callable of that name; it has "
            f"{', '.join(names) or 'none'}."
        )
    if isinstance(found, nn.Module):
        return found
    model = found()
    if not callable(model):
        raise ModelError(
            f"{module}:{attribute}() returned {type(model).__name__}: return the model, a callable "
            "of pixels (B, C, H, W) in [0, 1]."
        )
    return model


def _of_folder(folder: Path, run: RunConfig | None) -> tuple[nn.Module, tuple[str, ...] | None]:
    if run is not None or (folder / SPEC_NAME).is_file() or (folder / CHECKPOINTS).is_dir():
        return _with_names(load(folder))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if isinstance(config, dict) and "architecture" in config:
        return _of_timm(f"local-dir:{folder.resolve()}", {}), None
    if isinstance(config, dict) and "model_type" in config:
        return _of_hugging_face(f"hf:{folder}")
    return _with_names(load(folder))  # says where it has looked


def _with_names(model: nn.Module) -> tuple[nn.Module, tuple[str, ...] | None]:
    """A saved model of ours, and the names of the classes that it was trained on."""
    names = getattr(model, "spec", {}).get("class_names")
    return model, None if names is None else tuple(names)


def _names_of(run: RunConfig | None) -> tuple[str, ...] | None:
    """Class names that a run was trained with, where its data are still there."""
    if run is None:
        return None
    try:
        return run.dat.data.read_test(run.dat.seed).class_names
    except DataError:
        return None


def _of_hugging_face(text: str) -> tuple[nn.Module, tuple[str, ...] | None]:
    import transformers

    location = text.removeprefix("hf:")
    try:
        config = transformers.AutoConfig.from_pretrained(str(Path(location).expanduser()))
    except (OSError, ValueError) as error:
        raise ModelError(f"{text!r} is not a Hugging Face model: {error}") from None
    model = build_model(
        text, num_classes=config.num_labels, in_chans=getattr(config, "num_channels", 3), seed=0
    )
    names = tuple(config.id2label[i] for i in sorted(config.id2label))
    return model, None if names[0].startswith("LABEL_") else names


def _of_file(
    path: Path, options: dict[str, Any], num_classes: int | None, in_chans: int
) -> nn.Module:
    if path.suffix == ".pt2":
        return _of_program(path)
    if not path.name.endswith(STATE_SUFFIXES):
        raise ModelError(f"{str(path)!r} is not a model: a target is {_KINDS}.")
    if path.with_name(SPEC_NAME).is_file() and path.name == "model.safetensors":
        return load(path)
    weights = read_weights(path)
    statistics = statistics_of(weights)
    if statistics is not None:
        options = {**dict(zip(("mean", "std"), statistics, strict=True)), **options}
    missing = [key for key in ("name", "mean", "std") if key not in options]
    if missing:
        raise ModelError(
            f"{str(path)!r} is a state dict, which does not say of which model: add "
            + " ".join(f"--set dat.model.{key}={_EXAMPLES[key]}" for key in missing)
            + "."
        )
    model = _built({"num_classes": num_classes, "in_chans": in_chans, **options})
    fitting = unwrapped(weights, model.body.state_dict())
    try:
        model.body.load_state_dict(fitting)
    except RuntimeError as error:
        raise ModelError(f"{str(path)!r} does not fit {options['name']!r}: {error}") from None
    return model


_EXAMPLES = {"name": "resnet18", "mean": "[0.5,0.5,0.5]", "std": "[0.5,0.5,0.5]"}


def _built(options: dict[str, Any]) -> PixelModel:
    """A model by the keys of ``dat.model``."""
    sizes = {key: options.pop(key) for key in ("num_classes", "in_chans") if key in options}
    problems: list[str] = []
    section = parse_method(MODELS, options, "dat.model", problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return build_model(
        section.name,
        num_classes=section.num_classes or sizes["num_classes"],
        in_chans=sizes["in_chans"],
        mean=section.mean,
        std=section.std,
        img_size=section.img_size,
        **section.overrides(),
        options=section.options,
        seed=0,
    )


def _of_timm(text: str, options: dict[str, Any]) -> nn.Module:
    import timm

    if not text.startswith("local-dir:") and not timm.is_model(text.split(".")[0]):
        raise ModelError(
            f"{text!r} is not a target: there is no such file, folder or timm model. "
            f"A target is {_KINDS}."
        )
    try:
        body = timm.create_model(text, pretrained=True, **options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"The weights of the timm model {text!r} cannot be had: {str(error).splitlines()[0]}"
        ) from error
    published: Mapping[str, Any] = body.pretrained_cfg
    spec = {"name": text}
    return PixelModel(
        body,
        num_classes=body.num_classes,
        mean=published["mean"],
        std=published["std"],
        spec=spec,
    )


def _of_program(path: Path) -> nn.Module:
    try:
        return torch.export.load(path).module()
    # torch.export has no error class of its own.
    except (OSError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{str(path)!r} is not a program of torch.export that this torch reads: {error}"
        ) from error


def _opened(model: Any) -> Any:
    """The module inside ``torch.compile`` and ``DataParallel``, which computes the same."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, (nn.DataParallel, nn.parallel.DistributedDataParallel)
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        logger.info("%s is taken off the model: the module inside is judged.", type(model).__name__)
        model = inner


def _refuse_meta(model: nn.Module, text: str) -> None:
    meta = [name for name, p in model.named_parameters() if p.is_meta]
    if meta:
        raise ModelError(
            f"{text!r} has {len(meta)} parameters on the meta device, without values, such as "
            f"{meta[0]!r}: load its weights first."
        )


def _digest(model: nn.Module) -> str | None:
    digest = hashlib.sha256()
    state = model.state_dict()
    for key in sorted(state):
        if isinstance(state[key], Tensor):
            flat = state[key].detach().cpu().contiguous().flatten()
            digest.update(key.encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if state else None


def _in_order_of(
    of_model: tuple[str, ...] | None,
    images: Images,
    of_data: tuple[str, ...] | None,
) -> Images:
    """The images with their labels in the model's order of classes, where both have names.

    Raises:
        DataError: If they are not the same classes.
    """
    if of_model is None or of_data is None or of_model == of_data:
        return images
    strange = sorted(set(of_data) - set(of_model))
    if strange:
        raise DataError(
            f"The data have classes that the model was not trained on: {', '.join(strange[:5])}; "
            f"its own are {', '.join(of_model[:5])}{', ...' if len(of_model) > 5 else ''}."
        )
    logger.info("Classes of the data are in another order than the model's: matched by name.")
    place = torch.tensor([of_model.index(name) for name in of_data])
    return images.relabelled(place[images.labels])

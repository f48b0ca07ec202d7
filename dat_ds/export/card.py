"""The model card of an exported model: ``README.md`` with the hub's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from dat_ds.evaluation import describe_training, versions
from dat_ds.export.base import Format
from dat_ds.export.measured import Measured
from dat_ds.export.source import Source

# Ids of datasets on the hub, which a card's metadata may name.
_HUB_DATASETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
_TASK = "image-classification"
_SHOWN_VERSIONS = ("dat_ds", "torch", "timm", "transformers", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card tells beside the model itself.

    Attributes:
        form: The format.
        place: Where the model will be loaded from: the id of a repository, or a folder's name.
        license: The hub's name of a licence.
        difference: Largest difference of outputs from those of the training model.
    """

    form: Format
    place: str
    license: str
    difference: float

    def text(self, source: Source) -> str:
        """The whole ``README.md``."""
        sections = [
            f"---\n{_metadata(source, self)}\n---",
            f"# {source.name}",
            _summary(source),
            "## Load\n\n```python\n" + self.form.usage(source, self.place) + "\n```",
            _inputs(source, self.form),
            "## Accuracy\n\n" + _accuracy(source.measured),
            "## Provenance\n\n" + _provenance(source, self),
        ]
        return "\n\n".join(sections) + "\n"


def _metadata(source: Source, card: Card) -> str:
    dat = {} if source.config is None else source.config["dat"]
    tags = ["image-classification", "adversarial-robustness", "dat_ds"]
    if dat and dat["attack"]["name"] != "none":
        tags.append("adversarial-training")
    data = dat.get("data", {}).get("name")
    measured = source.measured
    results = [] if measured is None else _results(measured)
    values = ModelCardData(
        license=card.license,
        library_name=card.form.library,
        pipeline_tag=_TASK if source.head == "classes" else "image-feature-extraction",
        tags=tags,
        datasets=[_HUB_DATASETS[data]] if data in _HUB_DATASETS else None,
        metrics=["accuracy"] if results else None,
        model_name=source.name if results else None,
        eval_results=results or None,
    )
    return str(values.to_yaml()).strip()


def _results(measured: Measured) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=_TASK,
            dataset_type=_HUB_DATASETS.get(measured.data, measured.data),
            dataset_name=measured.data,
            dataset_args={"num_examples": measured.num_examples},
            metric_type="accuracy",
            metric_name=words,
            metric_value=accuracy,
        )
        for words, accuracy in measured.rows()
    ]


def _summary(source: Source) -> str:
    outputs = {
        "classes": f"{source.spec['num_classes']} class logits",
        "rotation": "logits of the image's rotation by 0, 90, 180 and 270 degrees",
        "projection": "a projection of its features, trained by a self-supervised objective",
        "features": "its features",
    }[source.head]
    channels, height, width = source.image_shape
    name = str(source.spec["name"])
    text = f"`{name}`: images of {channels} x {height} x {width} to {outputs}."
    if source.config is None:
        return text
    dat = source.config["dat"]
    threat = dat["threat_model"]
    text += f" Trained on {dat['data']['name']} by {describe_training(dat)}"
    if dat["attack"]["name"] != "none":
        text += f" for the threat model {threat['norm']}, eps {threat['eps']} (pixels in [0, 1])"
    return text + "."


def _inputs(source: Source, form: Format) -> str:
    mean, std = source.spec["mean"], source.spec["std"]
    if form.normalises:
        text = f"Takes pixels in [0, 1]; normalisation (mean {mean}, std {std}) is inside."
    else:
        text = (
            f"Takes normalised images, `(pixels - mean) / std` of pixels in [0, 1], with mean "
            f"{mean} and std {std}. Normalisation is not in the model, but in its config: attacks "
            "must bound perturbations in pixels, before it."
        )
    return f"## Inputs\n\n{text}"


def _accuracy(measured: Measured | None) -> str:
    if measured is None:
        return "No evaluation of these weights is known."
    rows = measured.rows()
    if not rows:
        return f"The model does not classify; {measured.file} has its losses."
    lines = ["| measured | accuracy |", "| --- | --- |"]
    lines += [f"| {words} | {accuracy:.1%} |" for words, accuracy in rows]
    lines += [
        "",
        f"On {measured.num_examples} test images of {measured.data}. Record: {measured.file}, "
        f"sha256 `{measured.sha256}`.",
    ]
    if measured.worst_case is None and measured.robust_acc:
        lines.append("Accuracy under one attack is an upper bound of robust accuracy.")
    if measured.remarks:
        lines += ["", "The evaluation doubts itself:", ""]
        lines += [f"- {remark}" for remark in measured.remarks]
    return "\n".join(lines)


def _provenance(source: Source, card: Card) -> str:
    lines = [
        f"- Weights: {source.weights}.",
        f"- Exported with {_in_words(versions())}.",
    ]
    if source.measured is not None and source.measured.versions:
        lines.append(f"- Evaluated with {_in_words(source.measured.versions)}.")
    lines.append(
        f"- Loaded again and compared with the training model on random pixels: outputs differ by "
        f"at most {card.difference:.1e}."
    )
    return "\n".join(lines)


def _in_words(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {found[name]}" for name in _SHOWN_VERSIONS if name in found)

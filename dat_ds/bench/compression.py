"""Error, size and cost of codecs, and the bytes that ranks send under each ZeRO stage."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dat_ds.bench.records import write_record
from dat_ds.bench.step_time import PlainSteps
from dat_ds.bench.timing import check_repetitions, time_in_turn
from dat_ds.compression import CODECS, Codec, build_codec
from dat_ds.config import RunConfig, load_config, resolve_batch
from dat_ds.processes import on_ranks

RANKS, STAGES = 2, (0, 1, 2, 3)
_SAMPLE, _DRAWS, _FREEDOM = 2**20, 32, 2.0


def bench_compression(run: RunConfig, *, repetitions: int, output: str | None = None) -> str:
    """Measure every codec alone and in the engine, and print two tables.

    Args:
        run: Gives the model, whose size decides time and bytes; its data gives the image size, the
            images themselves are random. Its own ``dat.compression`` plays no part.
        repetitions: Timed rounds; each times every codec and one update, so that a drifting
            machine slows all of them alike.
        output: JSON file for the numbers.

    Returns:
        Markdown: a table of codecs, and one of bytes per rank and step on two gloo ranks.

    Raises:
        ConfigError: Fewer than 5 repetitions.
    """
    check_repetitions(repetitions)
    codecs = {name: codec_properties(build_codec(name)) for name in CODECS}
    numel, update = _add_times(codecs, run, repetitions)
    sent = bytes_by_stage(run)
    values = {
        "codecs": codecs,
        "parameters": numel,
        "update_seconds": update,
        "bytes_sent": sent,
        "ranks": RANKS,
        "config": run.to_dict(),
    }
    write_record(output, values, torch.device("cpu"))
    batch, _ = resolve_batch(run.deepspeed, 1)
    return "\n".join(
        [
            *_codec_table(codecs),
            "",
            f"Share: of one update ({1000 * update:.0f} ms: {run.dat.model.name}, {numel} "
            f"parameters, batch {batch}) for what a rank of {RANKS} encodes and decodes in it, "
            "double-sided.",
            "",
            *_bytes_table(sent),
        ]
    )


def codec_properties(codec: Codec) -> dict[str, float]:
    """Bits, error and bias of a codec, measured on heavy and on light tails.

    Returns:
        ``bits`` per element; ``error_gaussian`` and ``error_student``, relative in l2, of standard
        normal entries and of Student-t ones with 2 degrees of freedom (infinite variance);
        ``bound``, the root of the codec's variance bound; ``bias``, how much longer than the
        tensor the decoded one is along it, in the mean, and ``bias_z``, that over its standard
        error: within 4 without bias, 0 where there is nothing random.
    """
    torch.manual_seed(0)
    source = torch.Generator().manual_seed(1)
    gaussian = torch.randn(_SAMPLE)
    student = torch.distributions.StudentT(_FREEDOM).sample((_SAMPLE,))
    draws = [_projected(codec, gaussian, source) for _ in range(_DRAWS)]
    spread = statistics.stdev(draws)
    bias = statistics.fmean(draws) - 1
    return {
        "bits": 8 * codec.bytes_of(_SAMPLE) / _SAMPLE,
        "error_gaussian": _relative_error(codec, gaussian, source),
        "error_student": _relative_error(codec, student, source),
        "bound": math.sqrt(codec.variance_bound(_SAMPLE)),
        "bias": bias,
        "bias_z": bias / (spread / math.sqrt(_DRAWS)) if spread else 0.0,
    }


def _relative_error(codec: Codec, tensor: Tensor, source: torch.Generator) -> float:
    decoded = codec.decode(codec.encode(tensor, source)).double()
    return float((decoded - tensor).norm() / tensor.double().norm())


def _projected(codec: Codec, tensor: Tensor, source: torch.Generator) -> float:
    """Length of what is decoded along ``tensor``, over the length of ``tensor``: 1 on average."""
    decoded, exact = codec.decode(codec.encode(tensor, source)).double(), tensor.double()
    return float(decoded @ exact / (exact @ exact))


def _add_times(
    codecs: dict[str, dict[str, float]], run: RunConfig, repetitions: int
) -> tuple[int, float]:
    """Time codecs beside an update of the run's model; its parameters and seconds."""
    from dat_ds.bench.engines import prepared_engine

    engine, model, x, y = prepared_engine(run)
    plain = PlainSteps(model, run, x, y)
    gradient = torch.randn(sum(p.numel() for p in model.parameters()))
    source = torch.Generator().manual_seed(0)
    parts: dict[str, Callable[[], object]] = {"update": plain.training_step}
    for name in CODECS:
        codec = build_codec(name)
        payload = codec.encode(gradient, source)
        parts[f"encode {name}"] = lambda c=codec: c.encode(gradient, source)  # type: ignore[misc]
        parts[f"decode {name}"] = lambda c=codec, p=payload: c.decode(p)  # type: ignore[misc]
    rounds = time_in_turn(parts, repetitions, torch.device("cpu"))
    engine.close()
    seconds = {name: statistics.median(values) for name, values in rounds.items()}
    for name, properties in codecs.items():
        encode, decode = seconds[f"encode {name}"], seconds[f"decode {name}"]
        # Its gradient and its share of the mean go out; as many payloads come in, twice; error
        # feedback decodes what was sent.
        decodes = 2 if CODECS[name].unbiased else 3
        work = (1 + 1 / RANKS) * encode + decodes * decode
        properties["encode_ns"] = 1e9 * encode / gradient.numel()
        properties["decode_ns"] = 1e9 * decode / gradient.numel()
        properties["share_of_update"] = work / seconds["update"]
    return gradient.numel(), seconds["update"]


def bytes_by_stage(run: RunConfig) -> dict[str, dict[str, dict[str, int]]]:
    """Bytes that a rank of two sends in one optimizer step: by stage, codec and kind.

    Two gloo processes on this machine train the run's model for two steps in each combination; the
    second is counted, at the process group.
    """
    counted: dict[str, dict[str, dict[str, int]]] = on_ranks(_count_bytes, RANKS, run.to_dict())
    return counted


def _count_bytes(values: dict[str, Any]) -> dict[str, dict[str, dict[str, int]]]:
    return {
        f"zero{stage}": {name: _sent(values, stage, name) for name in ("none", *CODECS)}
        for stage in STAGES
    }


def _sent(values: dict[str, Any], stage: int, codec: str) -> dict[str, int]:
    from dat_ds.bench.engines import prepared_engine

    section = {"name": codec} if codec == "none" else {"name": codec, "sides": "double"}
    dat = {**values["dat"], "compression": section}
    zero = {k: v for k, v in values["zero_optimization"].items() if k != "reduce_scatter"}
    config = {**values, "dat": dat, "zero_optimization": {**zero, "stage": stage}}
    if stage == 3:
        # Else ZeRO-3 keeps small parameters whole, and a small model would send none.
        config["zero_optimization"].setdefault("stage3_param_persistence_threshold", 0)
    engine, _, x, y = prepared_engine(load_config(config))
    for _ in range(2):
        engine.backward(engine(x, y))
        engine.step()
    sent: dict[str, int] = engine.metrics["bytes_sent"]
    engine.close()
    return sent


def _codec_table(codecs: dict[str, dict[str, float]]) -> list[str]:
    rows = [
        f"| {name} | {v['bits']:.2f} | {v['error_gaussian']:.4f} | {v['error_student']:.4f} "
        f"| {v['bound']:.4f} | {v['bias']:.4f} | {v['bias_z']:.1f} | {v['encode_ns']:.2f} "
        f"| {v['decode_ns']:.2f} | {100 * v['share_of_update']:.1f} % |"
        for name, v in codecs.items()
    ]
    return [
        "| codec | bits/element | error, Gaussian | error, Student-t(2) | bound | bias | bias z "
        "| encode ns | decode ns | share of update |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ]


def _bytes_table(sent: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    rows = []
    for stage, by_codec in sent.items():
        plain = by_codec["none"]["gradients"]
        for name, kinds in by_codec.items():
            rows.append(
                f"| {stage} | {name} | {kinds['gradients']} | {kinds['gradients'] / plain:.4f} "
                f"| {kinds.get('parameters', 0)} | {kinds.get('norms', 0)} |"
            )
    return [
        f"Bytes that a rank of {RANKS} sends in a step, double-sided:",
        "",
        "| stage | codec | gradients | of float32's | parameters | norms |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
    ]

"""Target of a prediction: model, GPU and links."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dat_ds.bench.prediction.cost_model import Cluster, Hardware, Link, Workload, same_link
from dat_ds.compression import CODECS


@dataclass(frozen=True)
class Target:
    """A machine room and a model whose steps are predicted.

    Defaults are ImageNet, ResNet-50 and PGD-4 with 512 images per six GPUs, as Zhang et al., UAI
    2022, train it; 1 Gbit/s between machines; and a V100: 367 images a second of float32 training,
    which is three forwards (NVIDIA DeepLearningExamples, ResNet-50 v1.5 for PyTorch, DGX-1 16 GB).

    Args:
        num_parameters: Of the model.
        attack_steps: ``K``.
        micro_batch: Images of a GPU.
        forward_ms: One forward of one image on a GPU.
        codec_ns: Encoding, and also decoding, an entry on a GPU. Default: 90 bytes moved at 900
            GB/s, a V100's memory bandwidth.
        optimizer_ns: Updating an entry: AdamW moves 28 bytes.
        mbit: Bandwidth of a machine's link.
        latency_us: Latency of a message between machines; default that of TCP over Ethernet.
        inside_mbit: Bandwidth of a GPU's link inside a machine. Default: 10 GB/s, PCI Express 3.
        inside_latency_us: Latency inside a machine.
    """

    num_parameters: int = 25_557_032
    attack_steps: int = 4
    micro_batch: int = 85
    forward_ms: float = 1000 / (3 * 367)
    codec_ns: float = 0.1
    optimizer_ns: float = 28 / 900
    mbit: float = 1000.0
    latency_us: float = 50.0
    inside_mbit: float = 80_000.0
    inside_latency_us: float = 10.0

    def hardware(self, overhead: float, codecs: Iterable[str] = CODECS) -> Hardware:
        """A GPU.

        Args:
            overhead: A step without its optimizer, over ``2 K + 3`` forwards.
            codecs: Those whose steps are to be predicted.
        """
        codec = dict.fromkeys(codecs, 1e-9 * self.codec_ns)
        return Hardware(
            forward=self.forward_ms / 1000,
            overhead=overhead,
            optimizer=1e-9 * self.optimizer_ns,
            encode=codec,
            decode=codec,
        )

    def cluster(self, machines: int, gpus: int) -> Cluster:
        """So many machines."""
        between = Link.of(mbit=self.mbit, microseconds=self.latency_us)
        inside = Link.of(mbit=self.inside_mbit, microseconds=self.inside_latency_us)
        return Cluster(machines, gpus, same_link(between), same_link(inside))

    def work(self, codec: str, stage: int = 0) -> Workload:
        """A step with a codec under a ZeRO stage."""
        return Workload(
            self.num_parameters,
            self.attack_steps,
            self.micro_batch,
            zero_stage=stage,
            codec=codec,
            sides=default_sides(stage),
        )


def default_sides(stage: int) -> Literal["single", "double"]:
    """Of dat.compression."""
    return "single" if stage == 3 else "double"

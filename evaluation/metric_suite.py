"""What a protocol measures with: which measures, which networks, which regions of the image."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from core.errors import UserError
from metrics import features, weights
from metrics.features import FeatureExtractor, ImageDistance
from metrics.protocols import MEASURES, PROTOCOLS, STAND_INS, Protocol

FEATURES = ("published", "stand-in", "none")
REGIONS = ("", "foreground", "background")  # the whole image, the person, everything else
PERSON_MEASURES = ("keypoint_error", "part_colour")


@dataclass
class ProtocolConfig:
    """What is measured, and how.

    Attributes:
        protocol: "disco-2023", "disco-fixed" or "native".
        features: networks of LPIPS, FID, FID-VID and FVD: "published" (their files must be in `weights`), "stand-in"
            (ST-LPIPS and VGG Frechet distances, fetched by `python -m metrics.weights`) or "none".
        measures: names instead of all measures of the protocol.
        weights: folder of the networks' files; null is the cache.
        batch_size: frames at a time.
    """

    protocol: str = "native"
    features: str = "published"
    measures: list[str] | None = None
    weights: str | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class MetricSuite:
    """A protocol with the networks of its measures at hand.

    Attributes:
        measures: names, in the order of tables.
        regions: those of `REGIONS` that are measured.
        distances: of the measures of kind "distance".
        extractors: of the measures of kind "frames" and "windows".
        batch_size: frames at a time.
        device: of the networks.
    """

    protocol: Protocol
    measures: tuple[str, ...]
    regions: tuple[str, ...]
    distances: dict[str, ImageDistance] = field(default_factory=dict)
    extractors: dict[str, FeatureExtractor] = field(default_factory=dict)
    batch_size: int = 8
    device: torch.device | str = "cpu"

    def of_kind(self, kind: str) -> list[str]:
        """Names of the measures of one kind."""
        return [name for name in self.measures if MEASURES[name].kind == kind]

    def networks(self) -> dict[str, dict[str, Any]]:
        """Which network stands behind each measure, for reports."""
        described = {
            name: {"network": distance.network, "sha256": distance.sha256} for name, distance in self.distances.items()
        }
        for name, extractor in self.extractors.items():
            described[name] = {
                "network": extractor.network,
                "dimension": extractor.dimension,
                "sha256": extractor.sha256,
            }
        return described


def chosen_protocol(config: ProtocolConfig) -> Protocol:
    """The protocol that a configuration names.

    Raises:
        UserError: there is none of that name.
    """
    if config.protocol not in PROTOCOLS:
        raise UserError(f"protocol={config.protocol} must be one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[config.protocol]


def chosen_measures(config: ProtocolConfig, persons: bool) -> tuple[str, ...]:
    """The measures that a configuration names, without opening their networks.

    Args:
        persons: whether poses are there for the measures of the person.

    Raises:
        UserError: unknown names, or measures of the person without poses.
    """
    if config.features not in FEATURES:
        raise UserError(f"features={config.features} must be one of {', '.join(FEATURES)}")
    if config.batch_size < 1:
        raise UserError(f"batch_size={config.batch_size} must be at least 1")
    names = config.measures
    if names is None:
        names = list(chosen_protocol(config).measures)
        if config.features == "none":
            names = [name for name in names if MEASURES[name].kind == "pixels"]
        if config.features == "stand-in":
            names = [STAND_INS.get(name, name) for name in names]
        names += PERSON_MEASURES if persons else ()
    for name in names:
        if name not in MEASURES:
            raise UserError(f"measures: {name!r} is none of {', '.join(MEASURES)}")
        if name in PERSON_MEASURES and not persons:
            raise UserError(f"measures: {name} needs poses; add persons=true")
    return tuple(dict.fromkeys(names))


def open_instruments(
    config: ProtocolConfig,
    regions: tuple[str, ...] = ("",),
    persons: bool = False,
    device: torch.device | str = "cpu",
) -> MetricSuite:
    """Check a configuration and load the networks of its measures.

    Raises:
        UserError: unknown names, or a weight file that is missing or not what it should be.
    """
    protocol, measures = chosen_protocol(config), chosen_measures(config, persons)
    folder = weights.weights_folder() if config.weights is None else Path(config.weights)
    vgg = cache(lambda: features.vgg_features(device))  # two measures share its work
    makers = {
        "lpips_alex": lambda: features.lpips("alex", folder, device),
        "lpips_vgg": lambda: features.lpips("vgg", folder, device),
        "st_lpips_alex": lambda: features.shift_tolerant_lpips("alex", device),
        "st_lpips_vgg": lambda: features.shift_tolerant_lpips("vgg", device),
        "fid": lambda: features.inception_features(folder, device),
        "fid_vid": lambda: features.resnet3d_features(folder, device),
        "fvd": lambda: features.i3d_features(folder, device),
        "vgg_frechet": vgg,
        "vgg_frechet_video": lambda: features.vgg_clip_features(vgg()),
    }
    made = {name: makers[name]() for name in measures if name in makers}
    distances = {name: value for name, value in made.items() if isinstance(value, ImageDistance)}
    extractors = {name: value for name, value in made.items() if isinstance(value, FeatureExtractor)}
    return MetricSuite(protocol, measures, regions, distances, extractors, config.batch_size, device)

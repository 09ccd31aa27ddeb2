"""The measures, networks and image regions that a protocol measures with."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from core.errors import UserError
from evaluation.config import PERSON_MEASURES, ProtocolConfig
from metrics import features, weights
from metrics.features import FeatureExtractor, ImageDistance
from metrics.protocols import MEASURES, PROTOCOLS, STAND_INS, Protocol

REGIONS = ("", "foreground", "background")  # the whole image, the person, everything else


@dataclass(frozen=True)
class MetricSuite:
    """A protocol with the networks of its measures."""

    protocol: Protocol
    measures: tuple[str, ...]  # names, in the order of tables
    regions: tuple[str, ...]  # those of `REGIONS` that are measured
    distances: dict[str, ImageDistance] = field(default_factory=dict)  # of the measures of kind "distance"
    # Of the measures of kind "frames" and "windows"
    extractors: dict[str, FeatureExtractor] = field(default_factory=dict)
    batch_size: int = 8  # frames at a time
    device: torch.device | str = "cpu"  # of the networks

    def of_kind(self, kind: str) -> list[str]:
        """Names of the measures of one kind."""
        return [name for name in self.measures if MEASURES[name].kind == kind]

    def measured_names(self) -> list[tuple[str, str, str]]:
        """Name, region and measure of everything measured, in the order of tables; person measures have no region."""
        persons = self.of_kind("person")
        pairs = [(region, measure) for region in self.regions for measure in self.measures if measure not in persons]
        pairs += [("", measure) for measure in persons]
        return [(measured_name(measure, region), region, measure) for region, measure in pairs]

    def names_by_clip(self) -> list[str]:
        """Names of everything measured that a single clip has a value of; the others pool the features of all."""
        return [name for name, _, measure in self.measured_names() if measure not in self.extractors]

    def networks(self) -> dict[str, dict[str, Any]]:
        """The network behind each measure, for reports."""
        described: dict[str, dict[str, Any]] = {}
        for name, made in (self.distances | self.extractors).items():
            dimension = {"dimension": made.dimension} if isinstance(made, FeatureExtractor) else {}
            described[name] = {"network": made.network, **dimension, "sha256": made.sha256}
        return described


def measured_name(measure: str, region: str) -> str:
    """Name of a measure in a region: "ssim", "foreground_ssim"."""
    return f"{region}_{measure}" if region else measure


def split_name(name: str) -> tuple[str, str]:
    """Region and measure of a measured name: "foreground_ssim" -> ("foreground", "ssim")."""
    region, separator, measure = name.partition("_")
    return (region, measure) if separator and region in REGIONS else ("", name)


def open_metric_suite(
    config: ProtocolConfig,
    regions: tuple[str, ...] = ("",),
    persons: bool = False,
    device: torch.device | str = "cpu",
) -> MetricSuite:
    """The measures of a configuration with their networks; `persons`: poses are estimated.

    Raises:
        UserError: unknown names, measures of the person without poses, a weight file that is missing or wrong.
    """
    protocol, names = PROTOCOLS[config.protocol], config.measures
    if names is None:
        names = list(protocol.measures)
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
    measures = tuple(dict.fromkeys(names))  # two measures may have one stand-in

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

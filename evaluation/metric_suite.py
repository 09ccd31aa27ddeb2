"""The measures, networks and image regions that a protocol measures with."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.errors import UserError
from evaluation.config import PERSON_MEASURES, ProtocolConfig
from metrics import features, weights
from metrics.face import FaceNetwork
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
    # Of the measures of kind "frames", "windows" and "steady"; several may have the same one
    extractors: dict[str, FeatureExtractor] = field(default_factory=dict)
    face: FaceNetwork | None = None
    # Of kind "given": "generated" and "truth" -> clip -> vectors (windows, dimension)
    given: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    batch_size: int = 8  # frames at a time
    device: torch.device | str = "cpu"  # of the networks

    def of_kind(self, kind: str) -> list[str]:
        """Names of the measures of one kind."""
        return [name for name in self.measures if MEASURES[name].kind == kind]

    def measured_names(self) -> list[tuple[str, str, str]]:
        """Name, region and measure of everything measured, in the order of tables; some have no region."""
        whole = [name for name in self.measures if MEASURES[name].kind in ("person", "motion", "given")]
        pairs = [(region, measure) for region in self.regions for measure in self.measures if measure not in whole]
        pairs += [("", measure) for measure in whole]
        return [(measured_name(measure, region), region, measure) for region, measure in pairs]

    def names_by_clip(self) -> list[str]:
        """Names of everything measured that a single clip has a value of; the others pool the features of all."""
        return [name for name, _, measure in self.measured_names() if not MEASURES[measure].is_pooled]

    def source(self, measure: str) -> str:
        """The first measure of the same vectors."""
        if MEASURES[measure].kind == "motion":
            return "keypoint_motion"
        extractor = self.extractors[measure]
        return next(name for name, made in self.extractors.items() if made is extractor and MEASURES[name].is_pooled)

    def networks(self) -> dict[str, dict[str, Any]]:
        """The network behind each measure, for reports."""
        described: dict[str, dict[str, Any]] = {}
        for name, made in (self.distances | self.extractors).items():
            dimension = {"dimension": made.dimension} if isinstance(made, FeatureExtractor) else {}
            described[name] = {"network": made.network, **dimension, "sha256": made.sha256}
        if self.face is not None:
            described["face_identity"] = {"network": self.face.network, "sha256": self.face.sha256}
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
    given: dict[str, dict[str, np.ndarray]] | None = None,
) -> MetricSuite:
    """The measures of a configuration with their networks; `persons`: poses are known or estimated.

    Raises:
        UserError: unknown names, measures without the poses or files that they need, a weight file that is missing or
            wrong.
    """

    def lacks(name: str) -> str | None:
        kind = MEASURES[name].kind
        if kind in ("person", "motion") and not persons:
            return "poses; add persons=true"
        if name == "face_identity" and config.face is None:
            return "an embedding of faces; bring an ONNX file and add face=FILE"
        return (
            "generated_features= and truth_features= of `evaluate.py metrics`"
            if kind == "given" and not given
            else None
        )

    protocol, names = PROTOCOLS[config.protocol], config.measures
    if names is None:
        names = [name for name in protocol.measures if lacks(name) is None]
        if config.features == "none":
            networks = ("distance", "frames", "windows", "steady")
            names = [name for name in names if MEASURES[name].kind not in networks]
        if config.features == "stand-in":
            names = [STAND_INS.get(name, name) for name in names]
        names += PERSON_MEASURES if persons else ()
    for name in names:
        if name not in MEASURES:
            raise UserError(f"measures: {name!r} is none of {', '.join(MEASURES)}")
        if (missing := lacks(name)) is not None:
            raise UserError(f"measures: {name} needs {missing}")
    measures = tuple(dict.fromkeys(names))  # two measures may have one stand-in

    folder = weights.weights_folder() if config.weights is None else Path(config.weights)
    # Measures that share one share its work.
    vgg = cache(lambda: features.vgg_features(device))
    vgg_clips = cache(lambda: features.vgg_clip_features(vgg()))
    resnet3d = cache(lambda: features.resnet3d_features(folder, device))
    i3d = cache(lambda: features.i3d_features(folder, device))
    makers = {
        "lpips_alex": lambda: features.lpips("alex", folder, device),
        "lpips_vgg": lambda: features.lpips("vgg", folder, device),
        "st_lpips_alex": lambda: features.shift_tolerant_lpips("alex", device),
        "st_lpips_vgg": lambda: features.shift_tolerant_lpips("vgg", device),
        "fid": lambda: features.inception_features(folder, device),
        "fid_vid": resnet3d,
        "mmd_resnet3d": resnet3d,
        "fvd": i3d,
        "mmd_i3d": i3d,
        "vgg_frechet": vgg,
        "vgg_frechet_video": vgg_clips,
        "mmd_vgg": vgg_clips,
    } | {name: vgg for name in MEASURES if MEASURES[name].kind == "steady"}
    made = {name: makers[name]() for name in measures if name in makers}
    distances = {name: value for name, value in made.items() if isinstance(value, ImageDistance)}
    extractors = {name: value for name, value in made.items() if isinstance(value, FeatureExtractor)}
    face = FaceNetwork(config.face) if "face_identity" in measures else None
    return MetricSuite(
        protocol, measures, regions, distances, extractors, face, given or {}, config.batch_size, device
    )

"""Test-time Procrustes Calibration: a reference's persons carried to where they are in every driving frame."""

from tpc.calibration import calibrate
from tpc.config import CalibrationConfig
from tpc.procrustes import AffineTransform, FailedEstimation, LinearTransform, SimilarityTransform
from tpc.result import Calibration

__all__ = [
    "AffineTransform",
    "Calibration",
    "CalibrationConfig",
    "FailedEstimation",
    "LinearTransform",
    "SimilarityTransform",
    "calibrate",
]

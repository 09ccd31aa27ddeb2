"""Test-time Procrustes Calibration: a reference's persons carried to where they are in every driving frame."""

from importlib import import_module
from typing import Any

# Imported when they are asked for: `tpc.config` alone is read by commands that check their arguments first.
_MODULES = {
    "AffineTransform": "tpc.procrustes",
    "Calibration": "tpc.result",
    "CalibrationConfig": "tpc.config",
    "FailedEstimation": "tpc.procrustes",
    "LinearTransform": "tpc.procrustes",
    "SimilarityTransform": "tpc.procrustes",
    "calibrate": "tpc.calibration",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)

"""Test-time Procrustes Calibration: a reference's persons carried to where they are in every driving frame.

estimator = tpc.open_estimator(tpc.PoseConfig())
reference = tpc.load_reference("photo.png", None, None, lambda: estimator)
driving = tpc.load_driving("dance.mp4", None, None, lambda: estimator)
calibration = tpc.calibrate(reference.image, reference.poses, driving.poses, driving.size)
"""

from importlib import import_module
from typing import Any

# Imported when they are asked for: `tpc.config` alone is read by commands that check their arguments first.
_MODULES = {
    "AffineTransform": ".procrustes",
    "Calibration": ".result",
    "CalibrationConfig": ".config",
    "FailedEstimation": ".procrustes",
    "LinearTransform": ".procrustes",
    "PoseConfig": ".export.inputs",
    "Poses": ".export.inputs",
    "SimilarityTransform": ".procrustes",
    "UserError": ".export.inputs",
    "calibrate": ".calibration",
    "load_driving": ".export.inputs",
    "load_reference": ".export.inputs",
    "open_estimator": ".export.inputs",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)

"""What `calibrate` is given, under the name `tpc`: an installation keeps `data` elsewhere than the repository does."""

from core.errors import UserError
from data.config import PoseConfig
from data.inputs import load_driving, load_reference
from data.poses.poses import Poses, open_estimator

__all__ = ["PoseConfig", "Poses", "UserError", "load_driving", "load_reference", "open_estimator"]

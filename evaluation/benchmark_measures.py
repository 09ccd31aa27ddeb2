"""What is measured of the benchmark's clips."""

from dataclasses import dataclass

from evaluation.metric_suite import PERSON_MEASURES, MetricSuite, ProtocolConfig, open_instruments
from evaluation.trials import TrialsConfig

LPIPS = "st_lpips_alex"


@dataclass
class MeasuresConfig(TrialsConfig):
    """What is measured beside PSNR and SSIM of person and background.

    flicker: also the error of the change from frame to frame.
    lpips: also ST-LPIPS, a stand-in for LPIPS that `python -m metrics.weights` fetches.
    weights: folder of ST-LPIPS's network; null: the cache.
    """

    flicker: bool = False
    lpips: bool = False
    weights: str | None = None


def open_measures(config: MeasuresConfig, device: str) -> MetricSuite:
    """PSNR and SSIM of person and background, and what else is asked for."""
    measures = ["psnr", "ssim"]
    measures += [name for name, chosen in (("flicker", config.flicker), (LPIPS, config.lpips)) if chosen]
    measures += PERSON_MEASURES if config.persons else ()
    features = "stand-in" if config.lpips else "none"
    protocol = ProtocolConfig(protocol="native", features=features, measures=measures, weights=config.weights)
    return open_instruments(protocol, ("foreground", "background"), config.persons, device)

"""Lightning callbacks: stages, benchmarks, progress. Loaded on first use, so the import stays free of torch."""

from typing import TYPE_CHECKING

from alignvlm_pl.utils.lazy import lazy_names

if TYPE_CHECKING:
    from .benchmark_evaluation import BenchmarkEvaluation as BenchmarkEvaluation
    from .connector_health import ConnectorHealth as ConnectorHealth
    from .data_health import DataHealth as DataHealth
    from .feature_noise import FeatureNoise as FeatureNoise
    from .gain_calibration import GainCalibration as GainCalibration
    from .ledger import Ledger as Ledger
    from .progress import TrainingProgress as TrainingProgress
    from .stage_transition import StageTransition as StageTransition
    from .throughput import Throughput as Throughput

# CONTRACT: alignvlm_pl/utils/installation.py compares this with the name of the distribution that ships the package.
__distribution__ = "alignvlm_pl"
_HOME = {
    "BenchmarkEvaluation": ".benchmark_evaluation",
    "ConnectorHealth": ".connector_health",
    "DataHealth": ".data_health",
    "FeatureNoise": ".feature_noise",
    "GainCalibration": ".gain_calibration",
    "Ledger": ".ledger",
    "StageTransition": ".stage_transition",
    "Throughput": ".throughput",
    "TrainingProgress": ".progress",
}
__all__ = [*_HOME]
__getattr__, __dir__ = lazy_names(__name__, _HOME)

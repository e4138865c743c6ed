"""Metrics and their registry by name. Nothing here needs torch.

Every `Metric` that a file of this folder defines is registered: to add one, add a file (docs/extend/benchmark.md). A
file holds a pure function `(prediction, references, *, rule)` of the generated text and all accepted texts, and the
`Metric` made of it, which scores a dataset under every rule. A rule is named after the reference implementation that it
reproduces to the last digit; functions raise ConfigError where there is no such rule.
"""

from alignvlm_pl.utils.registry import instances_in, load_instance

from .base import EvalSample, Metric

__all__ = ["METRICS", "EvalSample", "Metric", "get_metric"]


METRICS = instances_in(__name__, __path__, Metric)


def get_metric(name: str) -> Metric:
    """Return the metric of a name, or of the import path of a `Metric`, such as `mypackage.metrics.TYPOS`.

    Raises:
        ConfigError: The name is unknown, or the path names no metric.
    """
    return load_instance(name, METRICS, Metric)

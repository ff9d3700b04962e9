"""A histogram that is cheap to feed: the bounds of vLLM's, and counts per bucket.

`prometheus_client.Histogram` takes a lock and walks its buckets for each observation; a server makes one observation
per token. All observations come from one thread (the event loop), so none of that is needed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString

FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
PER_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
COMPLETIONS = (1, 2, 5, 10, 20)
PREEMPTIONS = (0, 1, 2, 5, 10, 20)


def token_bounds(max_model_len: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 … up to `max_model_len`."""
    bounds, scale = [], 1
    while scale <= max_model_len:
        bounds += [scale * digit for digit in (1, 2, 5) if scale * digit <= max_model_len]
        scale *= 10
    return tuple(bounds)


class Histogram:
    """Counts per bucket, and the sum of what was observed.

    Args:
        name, help: as Prometheus shows them.
        bounds: upper bounds, ascending; a last one of infinity is added.
    """

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.help = help
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count a value, or `count` equal ones."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def observe_all(self, values: Iterable[tuple[float, int]]) -> None:
        """Count (value, how often) pairs."""
        for value, count in values:
            self.observe(value, count)

    def family(self, labels: dict[str, str]) -> HistogramMetricFamily:
        """What Prometheus reads: cumulative counts."""
        family = HistogramMetricFamily(self.name, self.help, labels=list(labels))
        buckets, total = [], 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append((floatToGoString(bound), float(total)))
        family.add_metric(list(labels.values()), buckets, self._sum)
        return family

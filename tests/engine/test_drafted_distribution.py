"""In a whole engine, with seeds that the plain run never had: drafted sentences come from the plain distribution.

Everywhere else drafted tokens are compared with those of the same seed. Here both runs are independent, and a
chi-square judges whether they are draws from one distribution over all sentences of a few tokens.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from engine.built import BuiltEngine
from engine.core import EngineCore
from engine.sampling_params import RequestOutputKind, SamplingParams
from tests.engine.conftest import EngineShelf
from tests.engine.helpers import drive, parts_of
from tests.engine.speculation import EXECUTABLES, METHODS, config_of, guessing
from tests.engine.test_invariance import Schedule, make_core
from tests.sampling.helpers import REJECT

pytestmark = pytest.mark.slow

TOKENS, LENGTH, COUNT = (20, 45, 130), 4, 1200
PROMPT = [7, 130, 45, 20, 45, 20, 130]
PARAMETERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.0},
    "filters": {"temperature": 1.3, "top_p": 0.9, "min_p": 0.02},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.4},
}


def sentences(core: EngineCore, parts: BuiltEngine, first_seed: int, **params: Any) -> np.ndarray:
    """int[COUNT], the number of each sentence, of as many seeds."""
    asked = [
        SamplingParams(
            max_tokens=LENGTH,
            seed=first_seed + index,
            ignore_eos=True,
            allowed_token_ids=list(TOKENS),
            output_kind=RequestOutputKind.FINAL_ONLY,
            **params,
        )
        for index in range(COUNT)
    ]
    arrivals = [(8 * (i // 8), parts.inputs.make(PROMPT, each, request_id=f"{i}")) for i, each in enumerate(asked)]
    outputs = drive(core, arrivals)
    digits = [[TOKENS.index(token) for token in outputs[f"{i}"].outputs[0].token_ids] for i in range(COUNT)]
    return np.ravel_multi_index(tuple(np.array(digits).T), (len(TOKENS),) * LENGTH)


def p_value(left: np.ndarray, right: np.ndarray) -> float:
    """How likely two samples of one distribution are at least so different; cells with few of both count as one."""
    counts = np.stack([np.bincount(sample, minlength=len(TOKENS) ** LENGTH) for sample in (left, right)])
    rare = counts.sum(0) < 12
    table = np.concatenate([counts[:, ~rare], counts[:, rare].sum(1, keepdims=True)], axis=1)
    return float(chi2_contingency(table[:, table.sum(0) > 0]).pvalue)


@pytest.fixture(scope="module")
def plain(shelf: EngineShelf) -> Any:
    """Name of parameters -> sentences without drafts."""
    parts = parts_of(shelf.take(**EXECUTABLES))

    @cache
    def of(name: str) -> np.ndarray:
        return sentences(make_core(parts, Schedule(spare_blocks=100)), parts, 0, **PARAMETERS[name])

    return of


@pytest.mark.parametrize("method", ["ngram", "suffix", *METHODS])
def test_independent_seeds(method: str, shelf: EngineShelf, head_dir: Path, plain: Any) -> None:
    if method in METHODS:
        config = config_of(method, head_dir)
    else:
        config = f'{{"method": "{method}", "num_speculative_tokens": 3, "adaptive": false}}'
    parts = parts_of(shelf.take(**EXECUTABLES, speculative_config=config))
    for name, params in PARAMETERS.items():
        core = guessing(parts, Schedule(spare_blocks=100), 1.0, 0)
        assert p_value(plain(name), sentences(core, parts, 1_000_000, **params)) > REJECT
        assert core.stats.num_draft_tokens > COUNT / 4


def test_another_distribution_is_seen(shelf: EngineShelf, plain: Any) -> None:
    """The same test tells parameters apart that differ a little."""
    parts = parts_of(shelf.take(**EXECUTABLES))
    core = make_core(parts, Schedule(spare_blocks=100))
    assert p_value(plain("temperature"), sentences(core, parts, 5_000_000, temperature=1.0)) > REJECT
    core = make_core(parts, Schedule(spare_blocks=100))
    assert p_value(plain("temperature"), sentences(core, parts, 5_000_000, temperature=0.7)) < REJECT

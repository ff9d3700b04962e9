"""The dashboard asks for metrics that `/metrics` has, with labels that they have, and its panels do not overlap."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.observing import end_of, start_of
from tests.serving.test_metrics import feed, make_metrics, text_of

BOARD = json.loads((Path(__file__).parents[2] / "serving" / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
FUNCTIONS = {"sum", "rate", "increase", "max", "min", "histogram_quantile", "label_values"}
WORDS = FUNCTIONS | {"by", "le", "ignoring", "group_left"}
NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


def exported() -> dict[str, set[str]]:
    """Name of each sample -> its labels, after a little of everything has happened."""
    metrics = make_metrics()
    feed(metrics.requests, start_of(), [(0.75, 1), (0.1, 1)], end_of())
    metrics.http._answers["/v1/completions", "POST", "200"] += 1
    metrics.requests.on_rejected("/v1/x", 401, "no key")
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text_of(metrics)):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def names_in(expression: str) -> set[str]:
    """The metrics that an expression reads."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|ignoring) ?\([^)]*\)", " ", expression)
    return set(NAME.findall(bare)) - WORDS


def labels_in(expression: str) -> set[str]:
    """The labels that it selects or groups by."""
    selected = re.findall(r"\{([^}]*)\}", expression)
    grouped = re.findall(r"\b(?:by|ignoring) ?\(([^)]*)\)", expression)
    return {name for part in selected for name in re.findall(r"(\w+)\s*=", part)} | {
        name.strip() for part in grouped for name in part.split(",")
    }


def targets() -> list[tuple[str, str]]:
    """(title, expression) of every query."""
    return [(panel["title"], target["expr"]) for panel in BOARD["panels"] for target in panel["targets"]]


@pytest.mark.parametrize(("title", "expression"), targets())
def test_every_metric_is_exported(title: str, expression: str) -> None:
    samples = exported()
    names = names_in(expression)
    assert names and names <= set(samples), f"{title} asks for {names - set(samples)}"
    known = set().union(*(samples[name] for name in names))
    assert labels_in(expression) <= known, f"{title}: {labels_in(expression) - known}"


def test_the_check_can_fail() -> None:
    assert names_in('sum(rate(vllm:nonsense_total{a="b"}[5m])) / x') == {"vllm:nonsense_total", "x"}
    assert labels_in('sum by (le, z) (rate(a{b="c", d=~"e"}[1m]))') == {"le", "z", "b", "d"}


def test_panels_do_not_overlap() -> None:
    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        columns, rows = range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])
        return set(itertools.product(columns, rows))

    for one, other in itertools.combinations(BOARD["panels"], 2):
        assert not cells(one) & cells(other), (one["title"], other["title"])
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])

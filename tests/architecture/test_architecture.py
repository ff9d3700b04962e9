"""The project's own source against the rules."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.architecture import allowed, rules
from tests.architecture.rules import Module, Violation

ROOT = Path(__file__).resolve().parents[2]

EXTRAS = ("bench",)  # what the packages can use where it is there

# Distributions whose import name is another one.
IMPORT_NAMES = {"orbax-checkpoint": "orbax", "pyyaml": "yaml"}


class ArchitectureWarning(UserWarning):
    """An early warning: something to talk about, not an error."""


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    found = rules.read_modules(ROOT)
    assert {module.package for module in found} == set(rules.LAYERS), "the packages are not where they should be"
    return found


def check(violations: Sequence[Violation], reasons: Mapping[str, str] | None = None) -> None:
    """Fail with a list of violations that have no reason, or of reasons that have no violation."""
    reasons = reasons or {}
    unexcused = [str(violation) for violation in violations if violation.key not in reasons]
    stale = sorted(set(reasons) - {violation.key for violation in violations})
    assert not unexcused, "\n".join(["", *unexcused])
    assert not stale, f"tests/architecture/allowed.py allows what no longer happens: {stale}"


@pytest.mark.parametrize(
    "rule",
    [
        rules.layer_violations,
        rules.jax_violations,
        rules.http_violations,
        rules.kernel_library_violations,
        rules.environment_violations,
        rules.nnx_violations,
    ],
)
def test_hard_lines(rule, modules: list[Module]) -> None:
    check(rule(modules))


def test_own_packages_are_imported_at_the_top(modules: list[Module]) -> None:
    check(rules.local_import_violations(modules), allowed.LOCAL_IMPORTS)


def test_no_file_is_too_long(modules: list[Module]) -> None:
    check(rules.file_size_violations(modules), allowed.LONG_FILES)


def test_early_warnings(modules: list[Module]) -> None:
    for violation in rules.function_size_violations(modules):
        warnings.warn(str(violation), ArchitectureWarning, stacklevel=1)


def test_every_imported_library_is_declared(modules: list[Module]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = [requirement for name in EXTRAS for requirement in project["optional-dependencies"][name]]
    declared = _import_names(project["dependencies"]) | {"jaxlib": "jax"}
    check(rules.dependency_violations(modules, declared, _import_names(optional)), allowed.EXTRA_LIBRARIES)
    extras = [name for requirements in project["optional-dependencies"].values() for name in requirements]
    for library in allowed.EXTRA_LIBRARIES:
        assert any(name.startswith(library.rpartition(" ")[2]) for name in extras), f"no extra brings {library}"


def _import_names(requirements: Sequence[str]) -> dict[str, str]:
    """The names that are imported, each with its distribution."""
    names = [re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0] for requirement in requirements]
    return {IMPORT_NAMES.get(name, name.replace("-", "_")): name for name in names}


def test_what_must_not_import_jax_does_not_do_so_through_others_either(modules: list[Module]) -> None:
    pure = [module.dotted for module in modules if module.path.startswith(rules.JAX_FREE)]
    assert len(pure) > 10
    code = f"import importlib, sys\nfor name in {pure}:\n    importlib.import_module(name)\n"
    code += "    assert 'jax' not in sys.modules, name"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_reason_that_is_no_longer_needed_is_reported() -> None:
    violation = Violation("engine/core.py", 1, "engine/core.py", "401 lines")
    check([violation], {"engine/core.py": "a reason"})
    with pytest.raises(AssertionError, match="401 lines"):
        check([violation])
    with pytest.raises(AssertionError, match="no longer happens"):
        check([], {"engine/core.py": "a reason"})

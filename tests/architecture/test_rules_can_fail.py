"""Each rule, fed with a planted bad file, must find it; and must not find fault with its good neighbour."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture import rules
from tests.architecture.rules import Module

LONG = "\n".join(["x = 1"] * 401)
LONGER = "\n".join(["x = 1"] * 701)
LONG_FUNCTION = "def f():\n" + "\n".join(["    x = 1"] * 60)
GREEDY_CLASS = "class A:\n    def __init__(self, a, b, c, d, e, f, g, h, *, i): ..."

BAD = [
    # layers
    (rules.layer_violations, "models/decoder.py", "from engine.config import EngineConfig"),
    (rules.layer_violations, "models/decoder.py", "import engine.config as c"),
    (rules.layer_violations, "models/decoder.py", "from engine import config"),
    (rules.layer_violations, "models/decoder.py", "def f():\n    import serving"),
    (rules.layer_violations, "models/decoder.py", "if TYPE_CHECKING:\n    from serving.cli import main"),
    (rules.layer_violations, "models/decoder.py", "importlib.import_module('engine.core')"),
    (rules.layer_violations, "models/decoder.py", "__import__('engine')"),
    (rules.layer_violations, "pallas_kernels/op.py", "import models"),
    (rules.layer_violations, "engine/core.py", "from serving import cli"),
    (rules.layer_violations, "serving/cli.py", "from tests.cli.fake_engine import FakeEngine"),
    (rules.layer_violations, "engine/core.py", "import benchmarks.compare"),
    # no jax
    (rules.jax_violations, "engine/scheduling/plan.py", "import jax"),
    (rules.jax_violations, "engine/requests/x/deep.py", "import jax.numpy as jnp"),
    (rules.jax_violations, "engine/config.py", "def f():\n    from jax import numpy"),
    (rules.jax_violations, "models/config.py", "from flax import nnx"),
    (rules.jax_violations, "engine/runtime/buckets.py", "import jaxlib"),
    (rules.jax_violations, "engine/structured/fsm.py", "import optax"),
    (rules.jax_violations, "serving/cli.py", "import orbax.checkpoint"),
    (rules.jax_violations, "engine/__init__.py", "import jax"),
    # HTTP
    (rules.http_violations, "engine/async_engine.py", "from aiohttp import web"),
    (rules.http_violations, "models/hub.py", "import http.server"),
    # kernels stand alone
    (rules.kernel_library_violations, "pallas_kernels/op.py", "import flax"),
    (rules.kernel_library_violations, "pallas_kernels/op.py", "from transformers import AutoConfig"),
    # environment
    (rules.environment_violations, "engine/core.py", "import os\nx = os.environ['A']"),
    (rules.environment_violations, "engine/core.py", "import os as o\no.getenv('A')"),
    (rules.environment_violations, "models/x.py", "from os import environ"),
    (rules.environment_violations, "models/x.py", "from os import getenv as read"),
    (rules.environment_violations, "serving/cli.py", "import os\ndef f():\n    os.putenv('A', 'b')"),
    # nnx
    (rules.nnx_violations, "models/decoder.py", "from flax import nnx\nnnx.split(model)"),
    (rules.nnx_violations, "models/decoder.py", "import flax.nnx as n\nn.merge(a, b)"),
    (rules.nnx_violations, "models/decoder.py", "import flax.nnx\nflax.nnx.merge(a, b)"),
    (rules.nnx_violations, "engine/core.py", "from flax.nnx import split"),
    # imports inside functions
    (rules.local_import_violations, "engine/core.py", "def f():\n    from engine.config import EngineConfig"),
    (rules.local_import_violations, "engine/core.py", "class A:\n    def f(self):\n        import models.config"),
    (rules.local_import_violations, "engine/core.py", "async def f():\n    from . import config"),
    (rules.local_import_violations, "engine/core.py", "def f():\n    import_module('engine.config')"),
    (rules.local_import_violations, "engine/core.py", "f = lambda: __import__('engine')"),
    # sizes
    (rules.file_size_violations, "engine/core.py", LONG),
    (rules.file_size_violations, "pallas_kernels/matmul/xla.py", LONG),
    (rules.file_size_violations, "pallas_kernels/matmul/pallas_mosaic_gpu.py", LONGER),
    (rules.function_size_violations, "engine/core.py", LONG_FUNCTION),
    (rules.function_size_violations, "engine/core.py", GREEDY_CLASS),
]

GOOD = [
    (rules.layer_violations, "engine/core.py", "from models.config import ModelConfig\nimport pallas_kernels.op"),
    (rules.layer_violations, "engine/core.py", "import engineering, serving_tools"),
    (rules.layer_violations, "models/decoder.py", "from . import config\nfrom .layers import rope"),
    (rules.jax_violations, "engine/core.py", "import jax"),
    (rules.jax_violations, "engine/scheduling/plan.py", "import jaxtyping_free\nname = 'jax'"),
    (rules.http_violations, "serving/app.py", "from aiohttp import web"),
    (
        rules.kernel_library_violations,
        "pallas_kernels/op.py",
        "import jax, numpy, math, pallas_kernels.op",
    ),
    (rules.kernel_library_violations, "models/decoder.py", "import flax"),
    (rules.environment_violations, "engine/config.py", "import os\nx = os.environ['A']"),
    (rules.environment_violations, "engine/core.py", "import os\nos.cpu_count()\nenv.environ"),
    (rules.nnx_violations, "models/functional.py", "from flax import nnx\nnnx.split(model)"),
    (rules.nnx_violations, "models/decoder.py", "'a b'.split()\njnp.split(x, 2)"),
    (
        rules.local_import_violations,
        "engine/core.py",
        "from engine.config import X\ndef f():\n    import json",
    ),
    (rules.file_size_violations, "engine/core.py", LONG.removesuffix("\nx = 1")),
    (rules.file_size_violations, "pallas_kernels/matmul/pallas_mosaic_gpu.py", LONG),
    (rules.function_size_violations, "engine/core.py", LONG_FUNCTION.removesuffix("\n    x = 1")),
    (rules.function_size_violations, "engine/core.py", GREEDY_CLASS.replace(", *, i", "")),
]


@pytest.mark.parametrize(("rule", "path", "source"), BAD)
def test_a_planted_fault_is_found(rule, path: str, source: str, tmp_path: Path) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source, encoding="utf-8")
    [module] = rules.read_modules(tmp_path)
    [violation] = rule([module])
    assert violation.path == path and path in violation.key and str(violation).startswith(f"{path}:{violation.line}: ")


@pytest.mark.parametrize(("rule", "path", "source"), GOOD)
def test_good_code_passes(rule, path: str, source: str) -> None:
    assert rule([Module(path, source)]) == []


def test_undeclared_libraries_are_found() -> None:
    module = Module("engine/core.py", "import json, numpy.linalg\nfrom torch import nn\nfrom models import config")
    [violation] = rules.dependency_violations([module], {"numpy": "numpy"})
    assert "torch" in violation.message


def test_optional_libraries_may_only_be_imported_inside_functions() -> None:
    module = Module("serving/plot.py", "import matplotlib\ndef draw():\n    import matplotlib")
    [violation] = rules.dependency_violations([module], {}, ["matplotlib"])
    assert violation.line == 1


def test_relative_imports_are_resolved() -> None:
    def targets(path: str, source: str) -> list[str]:
        return [imported.target for imported in Module(path, source).imports]

    assert targets("engine/runtime/step.py", "from .buckets import Bucket") == ["engine.runtime.buckets.Bucket"]
    assert targets("engine/runtime/step.py", "from ..config import X") == ["engine.config.X"]
    assert targets("engine/runtime/__init__.py", "from . import step") == ["engine.runtime.step"]
    assert targets("engine/runtime/__init__.py", "from .. import config") == ["engine.config"]


def test_the_checker_reads_files_of_all_packages(tmp_path: Path) -> None:
    for path in ("models/a.py", "engine/b/c.py", "serving/d.py", "pallas_kernels/e.py", "other/f.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    paths = {module.path for module in rules.read_modules(tmp_path)}
    assert paths == {"models/a.py", "engine/b/c.py", "serving/d.py", "pallas_kernels/e.py"}

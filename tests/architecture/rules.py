"""The house plan's hard lines as functions from source files to violations.

Nothing is imported or run: each rule walks syntax trees, so that it also sees imports inside functions and under
`TYPE_CHECKING`. A rule takes modules and returns what it found; the tests say what is allowed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

LAYERS = ("pallas_kernels", "models", "engine", "serving")  # each knows those before it, none knows one after it
OUTSIDE = ("tests", "benchmarks")  # these know the packages, never the other way round

JAX = frozenset({"jax", "jaxlib", "flax", "optax", "orbax"})
JAX_FREE = (
    "serving/",
    "engine/requests/",
    "engine/scheduling/",
    "engine/structured/",
    "engine/text/",
    "engine/__init__.py",
    "engine/client.py",
    "engine/config.py",
    "engine/errors.py",
    "engine/evaluation.py",
    "engine/quantizing.py",
    "engine/input_processor.py",
    "engine/outputs.py",
    "engine/remote/__init__.py",
    "engine/remote/client.py",
    "engine/remote/deltas.py",
    "engine/remote/exchange.py",
    "engine/remote/plain.py",
    "engine/remote/process.py",
    "engine/remote/supervisor.py",
    "engine/remote/wire.py",
    "engine/sampling_params.py",
    "engine/stream.py",
    "engine/timeline.py",
    "engine/runtime/buckets.py",
    "models/config.py",
    "models/quantization/schemes.py",
)
HTTP = frozenset({"aiohttp", "fastapi", "flask", "starlette", "uvicorn", "http.server", "socketserver"})
KERNEL_LIBRARIES = frozenset({"jax", "jaxlib", "numpy", "ml_dtypes"})

ENVIRONMENT_READER = "engine/config.py"
ENVIRONMENT_NAMES = frozenset({"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"})
NNX_SPLITTER = "models/functional.py"
NNX_NAMES = frozenset({"split", "merge"})

MAX_FILE_LINES = 400
MAX_KERNEL_LINES = 700
MAX_FUNCTION_LINES = 60
MAX_CONSTRUCTOR_PARAMETERS = 8


@dataclass(frozen=True)
class Violation:
    """One place that breaks a rule. `key` names it in an allow-list; it holds no line number, so it outlives edits."""

    path: str
    line: int
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


@dataclass(frozen=True)
class Import:
    """One imported name, absolute. `function` is the qualified name of the enclosing function, if there is one."""

    target: str
    line: int
    function: str | None

    def is_of(self, names: Iterable[str]) -> bool:
        """True if the target is one of the modules `names`, or inside one."""
        return any(self.target == name or self.target.startswith(name + ".") for name in names)


@dataclass(frozen=True)
class Module:
    """A source file; `path` is relative to the project's root, with forward slashes."""

    path: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.source, filename=self.path)

    @property
    def package(self) -> str:
        """The top-level package."""
        return self.path.partition("/")[0]

    @property
    def dotted(self) -> str:
        """The module's name for `import`."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @cached_property
    def imports(self) -> list[Import]:
        """All imports, wherever they stand."""
        return list(_imports(self))


def read_modules(root: Path, packages: Iterable[str] = LAYERS) -> list[Module]:
    """All Python files of the packages under `root`, in order."""
    paths = sorted(path for package in packages for path in (root / package).rglob("*.py"))
    return [Module(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def _imports(module: Module) -> Iterator[Import]:
    for node, function in _walk(module.tree, None):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            # `from a import b` may mean the module a.b as well as a name in a.
            names = [f"{base}.{alias.name}".removesuffix(".*") for alias in node.names]
            yield from (Import(name, node.lineno, function) for name in names)
        elif isinstance(node, ast.Call) and node.args and _is_import_call(node.func):
            match node.args[0]:
                case ast.Constant(value=str(name)):
                    yield Import(name, node.lineno, function)


def _walk(node: ast.AST, function: str | None) -> Iterator[tuple[ast.AST, str | None]]:
    """All nodes, each with the qualified name of the function around it."""
    for child in ast.iter_child_nodes(node):
        yield child, function
        inner = function
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f"{function}.{child.name}" if function else child.name
        elif isinstance(child, ast.Lambda):
            inner = f"{function}.<lambda>" if function else "<lambda>"
        yield from _walk(child, inner)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.dotted.split(".")
    is_package = module.path.endswith("/__init__.py")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def _is_import_call(function: ast.expr) -> bool:
    return (isinstance(function, ast.Attribute) and function.attr == "import_module") or (
        isinstance(function, ast.Name) and function.id in ("import_module", "__import__")
    )


def layer_violations(modules: Iterable[Module]) -> list[Violation]:
    """Nothing imports a layer above its own, nor tests or benchmarks."""
    found = []
    for module in modules:
        above = LAYERS[LAYERS.index(module.package) + 1 :]
        for imported in module.imports:
            if imported.is_of((*above, *OUTSIDE)):
                message = f"{module.package} must not know {imported.target}"
                found.append(Violation(module.path, imported.line, f"{module.path}: {imported.target}", message))
    return found


def jax_violations(modules: Iterable[Module]) -> list[Violation]:
    """What plans, validates and talks imports no jax."""
    return _forbidden(modules, JAX_FREE, JAX, "is pure Python: it must not import")


def http_violations(modules: Iterable[Module]) -> list[Violation]:
    """Only `serving` knows HTTP."""
    return _forbidden(modules, ("engine/", "models/", "pallas_kernels/"), HTTP, "must not know HTTP: it imports")


def _forbidden(
    modules: Iterable[Module], places: tuple[str, ...], names: frozenset[str], complaint: str
) -> list[Violation]:
    return [
        Violation(module.path, imported.line, f"{module.path}: {imported.target}", f"{complaint} {imported.target}")
        for module in modules
        if module.path.startswith(places)
        for imported in module.imports
        if imported.is_of(names)
    ]


def kernel_library_violations(modules: Iterable[Module]) -> list[Violation]:
    """`pallas_kernels` stands on jax and numpy alone, so that it could be published as it is."""
    found = []
    for module in modules:
        for imported in module.imports if module.package == "pallas_kernels" else ():
            top = imported.target.partition(".")[0]
            if top not in KERNEL_LIBRARIES | sys.stdlib_module_names | {"pallas_kernels"} and top not in LAYERS:
                message = (
                    f"pallas_kernels needs only {', '.join(sorted(KERNEL_LIBRARIES))}; it imports {imported.target}"
                )
                found.append(Violation(module.path, imported.line, f"{module.path}: {imported.target}", message))
    return found


def environment_violations(modules: Iterable[Module]) -> list[Violation]:
    """Only one file reads or changes the process environment."""
    found = []
    for module in modules:
        if module.path != ENVIRONMENT_READER:
            found += _name_uses(module, "os", ENVIRONMENT_NAMES, f"only {ENVIRONMENT_READER} knows the environment")
    return found


def nnx_violations(modules: Iterable[Module]) -> list[Violation]:
    """Only one file takes flax modules apart and puts them together."""
    found = []
    for module in modules:
        if module.path != NNX_SPLITTER:
            found += _name_uses(module, "flax.nnx", NNX_NAMES, f"only {NNX_SPLITTER} splits and merges modules")
    return found


def _name_uses(module: Module, owner: str, names: frozenset[str], complaint: str) -> list[Violation]:
    """Uses of `owner.name`, under whatever name `owner` was imported, and imports of `name` itself."""
    aliases = _aliases(module, owner)
    found = []
    for node, _ in _walk(module.tree, None):
        name = None
        if isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) in aliases:
            name = node.attr
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == owner:
            name = next((alias.name for alias in node.names if alias.name in names), None)
        if name is not None:
            message = f"{complaint}; this is {owner}.{name}"
            found.append(Violation(module.path, node.lineno, f"{module.path}: {owner}.{name}", message))
    return found


def _aliases(module: Module, owner: str) -> set[str]:
    aliases = set()
    for node, _ in _walk(module.tree, None):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname or alias.name for alias in node.names if alias.name == owner}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            aliases |= {alias.asname or alias.name for alias in node.names if f"{node.module}.{alias.name}" == owner}
    return aliases


def local_import_violations(modules: Iterable[Module]) -> list[Violation]:
    """Our own packages are imported at the top of a file: an import inside a function hides a cycle."""
    found = []
    for module in modules:
        for imported in module.imports:
            if imported.function is not None and imported.is_of(LAYERS):
                key = f"{module.path}: {imported.function}: {imported.target}"
                message = f"{imported.function} imports {imported.target} inside a function"
                found.append(Violation(module.path, imported.line, key, message))
    return found


def dependency_violations(
    modules: Iterable[Module], declared: Mapping[str, str], optional: Iterable[str] = ()
) -> list[Violation]:
    """Every imported library is declared. `declared` maps the names that are imported to their distributions;
    `optional` ones, of the extras, are imported inside functions only: a plain installation lacks them."""
    known, optional = set(declared) | sys.stdlib_module_names | set(LAYERS), set(optional)
    found = []
    for module in modules:
        for imported in module.imports:
            top = imported.target.partition(".")[0]
            if top not in known and not (top in optional and imported.function is not None):
                message = f"{top} is imported, but pyproject.toml does not declare it"
                found.append(Violation(module.path, imported.line, f"{module.path}: {top}", message))
    return found


def file_size_violations(modules: Iterable[Module]) -> list[Violation]:
    """Files that are too long to be read at one sitting."""
    found = []
    for module in modules:
        name = module.path.rpartition("/")[2]
        is_kernel = module.package == "pallas_kernels" and name.startswith("pallas_")
        limit = MAX_KERNEL_LINES if is_kernel else MAX_FILE_LINES
        lines = len(module.source.splitlines())
        if lines > limit:
            found.append(Violation(module.path, lines, module.path, f"{lines} lines; the limit is {limit}"))
    return found


def function_size_violations(modules: Iterable[Module]) -> list[Violation]:
    """Functions that are too long, and constructors with too many parameters."""
    found = []
    for module in modules:
        for node, outer in _walk(module.tree, None):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            name = f"{outer}.{node.name}" if outer else node.name
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                message = f"{name} has {lines} lines; more than {MAX_FUNCTION_LINES}"
                found.append(Violation(module.path, node.lineno, f"{module.path}: {name}", message))
            arguments = node.args
            parameters = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs) - 1
            if node.name == "__init__" and parameters > MAX_CONSTRUCTOR_PARAMETERS:
                message = f"a constructor with {parameters} parameters; more than {MAX_CONSTRUCTOR_PARAMETERS}"
                found.append(Violation(module.path, node.lineno, f"{module.path}: {name}", message))
    return found

"""The GPU session: what happens to cases that fail, hang or die; resuming; rooflines; and all parts in a smoke run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from benchmarks.costs import ModelCosts
from benchmarks.gpu import steps
from benchmarks.gpu.kernels import Comparison
from benchmarks.gpu.models import CONFIGS, model_config, model_names, write_model
from benchmarks.gpu.part import Context, Skip
from benchmarks.gpu.parts import PARTS, load
from benchmarks.gpu.parts.graphs import MODES
from benchmarks.gpu.parts.matmul import _format
from benchmarks.gpu.records import DIED, DONE, FAILED, HUNG, SKIPPED, Ended, ResultFile, is_complete
from benchmarks.gpu.report import PRECISIONS, Table, cases_table, limits_of, markdown, step_floor_s
from benchmarks.gpu.roofline import Limits, Precision, decode_s, floor_s, prefill_s
from benchmarks.gpu.session import Session
from benchmarks.gpu.target_config import differences, fields
from benchmarks.gpu.timing import IN_ORDER, L2_BYTES, MOST_ROTATIONS, noise, rotations
from benchmarks.gpu_session import write_about

ROOT = Path(__file__).resolve().parents[2]
FAKES = "tests.benchmarks.fake_parts"
H200 = Limits(4.3e12, {"bf16": 790e12, "fp8": 1580e12, "int8": 1580e12})
LLAMA = ModelCosts.of(model_config("llama-3.1-8b"), "bfloat16")


def _fakes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake_parts", Path(__file__).with_name("fake_parts.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Cases and processes


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, list[str]]:
    """A session that ran the part whose cases end in every way."""
    said: list[str] = []
    session = Session(Context(tmp_path_factory.mktemp("session"), smoke=True), FAKES, said.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--first")
        assert session.run(_fakes().PARTS["fake"], 120.0)
    return session, said


def test_every_case_ends_and_says_how(ended: tuple[Session, list[str]]) -> None:
    session, _ = ended
    found = {name: end.status for name, end in session.file(_fakes().PARTS["fake"]).ended().items()}
    assert found == {
        "first": DONE,
        "skips": SKIPPED,
        "raises": FAILED,
        "after a failure": DONE,
        "hangs": HUNG,
        "after a hang": DONE,
        "dies": DIED,
        "after a death": DONE,
        "alone": DONE,
    }


def test_reasons_are_kept(ended: tuple[Session, list[str]]) -> None:
    session, _ = ended
    ends = session.file(_fakes().PARTS["fake"]).ended()
    assert ends["skips"].reason == "there is nothing to measure here"
    assert ends["raises"].reason == "ValueError: this case is wrong"
    assert "exit status 7" in ends["dies"].reason and "the last words" in ends["dies"].reason
    assert 1.0 < ends["hangs"].seconds < 10.0


def test_a_hanging_case_goes_with_its_children_and_keeps_what_it_gave(ended: tuple[Session, list[str]]) -> None:
    session, _ = ended
    assert not _is_alive(int((session.context.out / "child").read_text()))
    results = session.file(_fakes().PARTS["fake"]).results()
    assert [r["case"] for r in results].count("hangs") == 1
    assert [r["case"] for r in results].count("first") == 2


def test_a_process_serves_many_cases_until_one_hangs_or_dies_or_wants_its_own(ended: tuple[Session, list[str]]) -> None:
    session, _ = ended
    pids = {r["case"]: r["pid"] for r in session.file(_fakes().PARTS["fake"]).results() if "pid" in r}
    assert pids["first"] == pids["after a failure"] == pids["hangs"]
    assert len({pids["hangs"], pids["after a hang"], pids["after a death"], pids["alone"]}) == 4


def test_a_case_has_its_environment_for_itself(ended: tuple[Session, list[str]]) -> None:
    session, _ = ended
    flags = {r["case"]: (r["flag"], r["xla"]) for r in session.file(_fakes().PARTS["fake"]).results() if "pid" in r}
    assert flags["alone"] == ("set", "--first --second")
    assert flags["first"] == ("", "--first")


def test_progress_is_said(ended: tuple[Session, list[str]]) -> None:
    _, said = ended
    assert any("hangs: hung" in line for line in said) and any("first: done" in line for line in said)


def test_a_killed_session_leaves_no_process(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from benchmarks.gpu.part import Context; "
        "from benchmarks.gpu.session import Session; from tests.benchmarks.fake_parts import PARTS; "
        f"Session(Context(Path({str(tmp_path)!r}), True), {FAKES!r}).run(PARTS['long'], 300.0)"
    )
    session, child = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT), tmp_path / "child"
    try:
        assert _soon(lambda: child.exists() and child.read_text() != "")
    finally:
        session.kill()
        session.wait()
    (result,) = ResultFile(tmp_path / "long.jsonl").results()
    assert _soon(lambda: not _is_alive(result["pid"]) and not _is_alive(int(child.read_text())))


def _soon(condition: Callable[[], bool], patience_s: float = 30.0) -> bool:
    until = time.monotonic() + patience_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.1)
    return condition()


def test_time_is_over_and_the_rest_is_resumed(tmp_path: Path) -> None:
    session, part = Session(Context(tmp_path, smoke=True), FAKES, lambda line: None), _fakes().PARTS["short"]
    file, attempts = session.file(part), 0
    while not session.run(part, 60.0):
        attempts += 1
        assert "quick" in file.ended() and not is_complete(file, ("quick", "slow", "later"))
        if attempts == 2:  # a case that needs more than a part may take would never end: give it room
            part = _fakes().PARTS["short"].__class__(**{**vars(part), "limit_s": 30.0})
    assert is_complete(file, ("quick", "slow", "later")) and attempts == 2
    begins = [e["case"] for e in file.events() if e["event"] == "begin"]
    assert begins.count("quick") == 1 and begins.count("later") == 1
    assert [r["case"] for r in file.results()].count("slow") == 2  # of the last attempt only


def test_nothing_is_started_when_no_time_is_left(tmp_path: Path) -> None:
    session = Session(Context(tmp_path, smoke=True), FAKES, lambda line: None)
    assert not session.run(_fakes().PARTS["short"], 0.0)
    assert list(tmp_path.iterdir()) == []


# Result files


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "part.jsonl")
    file.append({"event": "begin", "case": "a"})
    file.append({"event": "result", "case": "a", "us": 1.0})
    file.end(Ended("a", DONE, 0.5))
    with file.path.open("a") as stream:
        stream.write('{"event": "begin", "ca')
    assert file.ended() == {"a": Ended("a", DONE, 0.5)}
    assert file.results() == [{"case": "a", "us": 1.0}]


# Rooflines


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (Precision("bf16", "bf16"), (3.52, 3.74, 4.49, 7.49, 12.9)),
        (Precision("fp8", "fp8"), (1.88, 1.99, 2.37, 3.87, 6.60)),
        (Precision("int4", "fp8"), (1.10, 1.21, 1.58, 4.43, 8.86)),
    ],
)
def test_decode_floors_of_llama_on_an_h200(precision: Precision, expected: tuple[float, ...]) -> None:
    found = [decode_s(LLAMA, H200, batch, 1024, precision) * 1e3 for batch in (1, 8, 32, 128, 256)]
    assert found == pytest.approx(expected, rel=4e-3)


@pytest.mark.parametrize(
    ("precision", "expected"), [(Precision(), (38, 167, 936)), (Precision("fp8", "fp8"), (20, 95, 646))]
)
def test_prefill_floors_of_llama_on_an_h200(precision: Precision, expected: tuple[float, ...]) -> None:
    found = [prefill_s(LLAMA, H200, tokens, precision) * 1e3 for tokens in (2048, 8192, 32768)]
    assert found == pytest.approx(expected, rel=0.02)


def test_a_small_model_has_the_floor_that_shows_the_hosts_time() -> None:
    costs = ModelCosts.of(model_config("qwen3-0.6b"), "bfloat16")
    assert decode_s(costs, H200, 1, 1024, Precision()) * 1e3 == pytest.approx(0.31, rel=0.03)


def test_a_floor_is_the_larger_of_bytes_and_operations() -> None:
    limits = Limits(10.0, {"bf16": 100.0, "fp8": 200.0})
    assert floor_s(limits, 50.0, 100.0) == 5.0
    assert floor_s(limits, 1.0, 100.0) == 1.0
    assert floor_s(limits, 1.0, 100.0, "fp8") == 0.5


def test_ceilings_are_the_best_of_each_kind_in_the_same_session() -> None:
    records = [
        {"by": "jax", "bytes_per_s": 3e12},
        {"by": "torch", "bytes_per_s": 4e12},
        {"by": "jax", "dtype": "bf16", "flops_per_s": 7e14},
        {"by": "torch", "dtype": "bf16", "flops_per_s": 6e14},
        {"by": "torch", "dtype": "int8", "flops_per_s": 9e14},
    ]
    limits = limits_of({"environment": records})
    assert limits == Limits(4e12, {"bf16": 7e14, "fp8": 14e14, "int8": 9e14})
    assert limits_of({"environment": records[:2]}) is None
    assert limits_of({}) is None


def test_a_steps_floor_is_that_of_its_variant() -> None:
    record = {"model": "llama-3.1-8b", "variant": "fp8 / fp8", "kind": "decode", "batch": 8, "tokens": 1024}
    assert step_floor_s(record, H200) == decode_s(LLAMA, H200, 8, 1024, Precision("fp8", "fp8"))
    assert step_floor_s(record | {"kind": "prefill"}, H200) == prefill_s(LLAMA, H200, 1024, Precision("fp8", "fp8"))
    assert step_floor_s(record, None) is None
    assert set(PRECISIONS) == set(steps.VARIANTS)


@pytest.mark.parametrize(("name", "rate"), [("w4a16 g128 M=1", "bf16"), ("w8a8 M=1", "int8"), ("w8a8 fp8 x", "fp8")])
def test_a_products_rate_is_that_of_what_meets(name: str, rate: str) -> None:
    assert _format(name) == rate


# Timing


def test_sets_of_operands_exceed_the_cache() -> None:
    assert rotations(10 * L2_BYTES) == 1
    assert rotations(1) == MOST_ROTATIONS
    assert rotations(L2_BYTES) * L2_BYTES > 3 * L2_BYTES


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8", "int4"])
def test_noise_is_not_zeros_and_differs_by_seed(dtype: str) -> None:
    first, second = (noise((64, 33), dtype, seed).astype("float32") for seed in (0, 1))
    assert abs(float(first.mean())) < 0.1 * float(first.std())
    assert float((first == second).mean()) < 0.2
    if dtype in ("bfloat16", "float8_e4m3fn"):
        assert float(first.std()) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(
    "flag", [flag for flag in MODES.values() if flag] + [f"--{k}={v}" for k, v in IN_ORDER.items()]
)
def test_xla_knows_the_flags(flag: str) -> None:
    """A value that it does not know ends a process when it comes as a flag; as an option it raises."""
    name, _, value = flag.removeprefix("--").partition("=")
    assert jax.jit(lambda x: x + 1, compiler_options={name: value})(1.0) == 2.0


# Target config

CONFIG = """
# a comment: with { braces
gpu_device_info {
  core_count: 132
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  name: "NVIDIA \\"H200\\" { }"
  repeated: 1
  repeated: 2
}
platform_name: "CUDA"
"""


def test_fields_of_a_target_config() -> None:
    assert fields(CONFIG) == {
        "gpu_device_info.core_count": "132",
        "gpu_device_info.cuda_compute_capability.major": "9",
        "gpu_device_info.cuda_compute_capability.feature_extension": "ACCELERATED_FEATURES",
        "gpu_device_info.name": '"NVIDIA \\"H200\\" { }"',
        "gpu_device_info.repeated": "1",
        "gpu_device_info.repeated[2]": "2",
        "platform_name": '"CUDA"',
    }


def test_differences_of_target_configs() -> None:
    real = CONFIG.replace("132", "114").replace("repeated: 2\n", "").replace("platform_name", "platform")
    assert differences(CONFIG, real) == [
        ("gpu_device_info.core_count", "132", "114"),
        ("gpu_device_info.repeated[2]", "2", ""),
        ("platform", "", '"CUDA"'),
        ("platform_name", '"CUDA"', ""),
    ]
    assert differences(CONFIG, CONFIG) == []


# Models, report


@pytest.mark.parametrize("name", CONFIGS)
def test_a_models_folder_is_its_config(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, name)
    assert json.loads((folder / "config.json").read_text()) == CONFIGS[name]


def test_the_large_model_is_llamas_8b() -> None:
    assert LLAMA.body_weights + LLAMA.head_weights == pytest.approx(7.5e9, rel=0.01)
    assert {*model_names(True), *model_names(False)} < set(CONFIGS)


def test_settings_that_the_engine_refuses_are_not_built_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "VARIANTS", {"none": {}, "odd": {"no_such_setting": 1}})
    context = Context(tmp_path, smoke=True)
    assert steps.variant_config(context, "tiny-qwen3", "none").load.load_format == "dummy"
    with pytest.raises(Skip, match="^not built yet: Unknown setting no_such_setting$"):
        steps.variant_config(context, "tiny-qwen3", "odd")


def test_a_comparison_knows_its_edge() -> None:
    expected = np.array([1.0, -2.0])
    assert Comparison(expected + 0.01, expected, 0.02).as_record()["error"] == pytest.approx(0.5)
    assert not Comparison(expected + 0.03, expected, 0.02).as_record()["ok"]
    assert Comparison(expected + 0.03, expected, 0.02, scale=2.0).as_record()["ok"]
    wrong = Comparison(np.array([np.nan, -2.0]), expected, 1e9).as_record()
    assert not wrong["ok"] and wrong["not_finite"] == 1


def test_a_table_escapes_bars_and_shows_what_is_missing() -> None:
    table = Table("a", "b")
    assert table.markdown() == "No results."
    table.add("x|y", None)
    assert table.markdown().splitlines()[-1] == "| x\\|y | – |"


def test_cases_that_were_not_done_are_listed_by_reason() -> None:
    ends = {name: Ended(name, SKIPPED, 0.0, "no torch") for name in "abcde"} | {"f": Ended("f", DONE, 1.0)}
    text = cases_table(ends, 8)
    assert "8 cases: 5 skipped, 1 done, 2 not run." in text
    assert "- skipped: a; b; c; and 2 more: no torch" in text


def test_case_names_are_unique_and_stable() -> None:
    for part in PARTS.values():
        for smoke in (False, True):
            names = [case.name for case in part.cases(smoke)]
            assert names and len(names) == len(set(names)), part.name
            assert names == [case.name for case in part.cases(smoke)]
        assert part.limit_s < 480
        assert all(case.timeout_s < part.limit_s for case in part.cases(False)), part.name


def test_a_part_that_cannot_be_imported_says_so_and_spares_the_others() -> None:
    part = load("benchmarks.gpu.parts.no_such_part", "step")
    (case,) = part.cases(False)
    with pytest.raises(ImportError, match="no_such_part"):
        list(part.run(case, Context(Path(), smoke=True)))
    assert all(part.about != "cannot be imported" for part in PARTS.values())


def test_what_measures_kernels_does_not_need_the_engine() -> None:
    light = [f"benchmarks.gpu.parts.{name}" for name in ("environment", "numerics", "attention", "matmul", "tune")]
    script = f"import sys, {', '.join(light)}; print(*sys.modules)"
    blocked = "import sys; sys.modules.update(dict.fromkeys(('flax', 'gguf', 'orbax', 'tokenizers')));"
    done = subprocess.run([sys.executable, "-c", f"{blocked} {script}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "benchmarks.gpu.parts.matmul" in done.stdout.split()


def test_a_resumed_session_names_every_commit(tmp_path: Path) -> None:
    about = {"date": "1", "device": "H200", "jax": "0.11.2", "commit": "a", "smoke": False}
    for commit, date in (("a", "1"), ("b", "2"), ("b", "3")):
        write_about(tmp_path / "session.json", about | {"commit": commit, "date": date}, resume=True)
    assert json.loads((tmp_path / "session.json").read_text()) == about | {"commit": "a, then b"}
    write_about(tmp_path / "session.json", about | {"commit": "c"}, resume=False)
    assert json.loads((tmp_path / "session.json").read_text())["commit"] == "c"


def test_the_session_itself_touches_no_device() -> None:
    script = (
        "import jax, benchmarks.gpu_session as s; from jax._src import xla_bridge; "
        "counts = [len(part.cases(False)) for part in s.PARTS.values()]; print(xla_bridge.backends_are_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_empty_session_has_a_report() -> None:
    about = {"date": "today", "device": "none", "smoke": False, "commit": "x"}
    text = markdown(about, list(PARTS.values()), {name: [] for name in PARTS}, {name: {} for name in PARTS})
    assert text.startswith("# GPU session of today: none")


# The whole


@pytest.mark.slow
def test_smoke_run_of_all_parts_then_resume(tmp_path: Path) -> None:
    variables = dict(os.environ) | {"QUIRE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--smoke", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    out = tmp_path / "out"
    for name, part in PARTS.items():
        file = ResultFile(out / f"{name}.jsonl")
        ends = file.ended()
        assert set(ends) == {case.name for case in part.cases(True)}
        assert {end.status for end in ends.values()} <= {DONE, SKIPPED}, name
        if name != "tune":  # has nothing to tune on a CPU
            assert file.results(), name
        assert f"## {name}: " in done.stdout
    assert (out / "report.md").read_text() == done.stdout.removesuffix("\n")
    assert "SMOKE RUN" in done.stdout

    lines = {path.name: path.read_text() for path in out.glob("*.jsonl")}
    again = subprocess.run(
        [*command, "--resume"], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert again.returncode == 0 and again.stdout == done.stdout
    assert again.stderr.count("complete, skipped") == len(PARTS)
    assert {path.name: path.read_text() for path in out.glob("*.jsonl")} == lines

"""Bundles: the round trip in processes of its own (slow), and everything that must be refused (fast)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from engine.bundle.files import map_arrays, read_checked, require_trusted, write_arrays
from engine.bundle.key import current_key, remake_command, require_fresh, settings_of
from engine.bundle.manifest import BUNDLE_NAME, Probe, read_manifest
from engine.bundle.probe import compare
from engine.bundle.write import compile_bundle
from engine.config import EngineConfig, worker_environment
from engine.engine import Engine
from engine.errors import BundleError
from engine.sampling_params import SamplingParams
from pallas_kernels.quantized_matmul import QuantizedWeight
from tests.engine.helpers import SMALL, TINY

PROMPT = [5, 6, 7, 8, 9]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
FEW: dict[str, Any] = {**SMALL, "max_num_seqs": 1, "max_num_batched_tokens": 16, "model": str(TINY / "llama")}

# Loads a bundle in a process that has compiled nothing, and says what it computed and what was compiled meanwhile.
CHILD = """
import json, sys
import jax
names = []
def note(event, duration_secs, **more):
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        names.append(more.get("fun_name"))
jax.monitoring.register_event_duration_secs_listener(note)
from engine.engine import Engine
from engine.sampling_params import SamplingParams
engine = Engine(sys.argv[1], show_progress=False, compilation_cache_dir="")
params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
[output] = engine.generate([5, 6, 7, 8, 9], params)
engine.wait_until_compiled()
print(json.dumps({"ids": output.outputs[0].token_ids, "lowered": names, "metrics": engine.metrics()}))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "llama"
    compile_bundle(EngineConfig.from_flat(**FEW), out, lambda done, total, what: None)
    return out


@pytest.mark.slow
def test_a_bundle_computes_the_same_and_lowers_no_step(bundle: Path, compilation_cache: str) -> None:
    with Engine(**FEW, compilation_cache_dir=compilation_cache) as engine:
        expected = engine.generate(PROMPT, GREEDY)[0].outputs[0].token_ids
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(bundle)],
        env=worker_environment(),
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert child.returncode == 0, child.stderr
    said = json.loads(child.stdout.splitlines()[-1])
    assert tuple(said["ids"]) == expected
    assert said["metrics"]["compiles_after_ready"] == 0
    assert said["metrics"]["num_executables_ready"] == said["metrics"]["num_executables"]
    assert not {"forward", "sample_step", "mask_logits", "score_prompt", "pool_rows"} & set(said["lowered"])


@pytest.mark.slow
def test_a_bundle_that_was_touched_is_refused(bundle: Path) -> None:
    def load(**settings: Any) -> str:
        with pytest.raises(BundleError) as caught:
            Engine(str(bundle), show_progress=False, **settings)
        return str(caught.value)

    assert "made with block_size=16, and 32 is asked for" in load(block_size=32)
    manifest, weights = bundle / BUNDLE_NAME, bundle / "weights.bin"
    content, original = json.loads(manifest.read_text()), weights.read_bytes()
    try:
        weights.write_bytes(original[:-64] + bytes(64))
        assert "weights.bin is damaged" in load()
        weights.write_bytes(original)
        content["probe"]["token_ids"][0] += 1
        manifest.write_text(json.dumps(content))
        assert "does not compute what it did when it was made" in load()
        content["key"]["jaxlib"] = "0.1"
        manifest.write_text(json.dumps(content))
        said = load()
        assert "jaxlib was 0.1" in said and "quire compile" in said
    finally:
        weights.write_bytes(original)


def test_another_key_is_refused_with_the_command_that_helps() -> None:
    key, settings = current_key(), EngineConfig.from_flat(model="m", block_size=32).flat()
    require_fresh(Path("b"), key, settings)
    with pytest.raises(
        BundleError, match=r"processor was a 386, is .*quire compile 'm' -o 'b' --force --block-size '32'"
    ):
        require_fresh(Path("b"), {**key, "processor": "a 386"}, settings)
    with pytest.raises(BundleError, match="quire was"):
        require_fresh(Path("b"), {**key, "quire": "other sources"}, settings)


def test_what_shapes_executables_is_the_bundles_and_the_rest_is_the_users() -> None:
    made_with = EngineConfig.from_flat(model="m", max_num_seqs=4, dtype="float32", seed=1).flat()
    asked = EngineConfig.from_flat(model="b", max_num_seqs=4, seed=7, max_logprobs=3)
    got = settings_of(asked, Path("b"), made_with).flat()
    assert (got["model"], got["max_num_seqs"], got["dtype"]) == ("b", 4, "float32")
    assert (got["seed"], got["max_logprobs"], got["compile_in_background"]) == (7, 3, True)
    with pytest.raises(BundleError, match="made with max_num_seqs=4, and 8 is asked for"):
        settings_of(EngineConfig.from_flat(model="b", max_num_seqs=8), Path("b"), made_with)
    assert "--no-enable-chunked-prefill" in remake_command(Path("b"), {**made_with, "enable_chunked_prefill": False})


def test_files_that_others_could_have_written_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "bundle.json"
    file.write_text("{}")
    tmp_path.chmod(0o700)
    file.chmod(0o600)
    require_trusted(tmp_path, trusted=False)
    file.chmod(0o666)
    with pytest.raises(BundleError, match="can be written by others"):
        require_trusted(tmp_path, trusted=False)
    require_trusted(tmp_path, trusted=True)
    file.chmod(0o600)
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(BundleError, match="is a link"):
        require_trusted(tmp_path, trusted=False)


def test_files_of_another_user_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(BundleError, match="belongs to user"):
        require_trusted(tmp_path, trusted=False)


def test_a_damaged_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"x\.bin is damaged"):
        read_checked(tmp_path, "x.bin", {"x.bin": "0" * 64})
    with pytest.raises(BundleError, match="cannot be read"):
        read_checked(tmp_path, "y.bin", {})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "quire-bundle", "version": 99}'])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / BUNDLE_NAME).write_text(content)
    with pytest.raises(BundleError):
        read_manifest(tmp_path)


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    packed = QuantizedWeight(jnp.arange(12, dtype=jnp.int8).reshape(3, 4), jnp.ones((1, 3)), None, "int8", -1)
    params = {"a": jnp.arange(5, dtype=jnp.bfloat16), "b": packed, "c": jnp.float32(2.5).reshape(1)}
    entries, tree = write_arrays(tmp_path / "w", params)
    assert all(entry.offset % 64 == 0 for entry in entries)
    again = map_arrays(tmp_path / "w", entries, tree)
    assert list(again) == list(params) and again["b"].kind == "int8"  # type: ignore[union-attr]
    np.testing.assert_array_equal(np.asarray(again["a"]), np.asarray(params["a"]))
    np.testing.assert_array_equal(np.asarray(again["b"].stored), np.asarray(packed.stored))  # type: ignore[union-attr]
    assert again["a"].dtype == jnp.bfloat16


def test_probes_are_compared() -> None:
    probe = Probe([1], [2, 3], [-0.5, -1.0])
    assert compare(probe, replace(probe, logprobs=[-0.501, -1.0])) is None
    assert "should have answered" in str(compare(probe, replace(probe, token_ids=[2, 4])))
    assert "off by 0.5" in str(compare(probe, replace(probe, logprobs=[-1.0, -1.0])))


def test_what_cannot_be_bundled_is_refused(tmp_path: Path) -> None:
    (tmp_path / BUNDLE_NAME).write_text("{}")
    with pytest.raises(BundleError, match="is a bundle"):
        compile_bundle(EngineConfig.from_flat(model=str(tmp_path)), tmp_path / "out", lambda *_: None)
    draft = {"method": "ngram", "num_speculative_tokens": 2}
    with pytest.raises(BundleError, match="no drafter"):
        compile_bundle(EngineConfig.from_flat(model="m", speculative_config=draft), tmp_path / "out", lambda *_: None)

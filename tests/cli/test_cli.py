"""The `quire` command as a whole: help, version, errors, interrupts, start-up."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ModelNotFoundError
from serving.cli import main
from tests.cli.fake_engine import FakeEngine, FakeFactory

ROOT = Path(__file__).resolve().parents[2]


def refuse(model: str, **settings: Any) -> FakeEngine:
    raise ModelNotFoundError(f"There is no model\n  {model!r}.")


def interrupt(model: str, **settings: Any) -> FakeEngine:
    raise KeyboardInterrupt


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["generate"],
        ["chat"],
        ["bench"],
        ["bench", "latency"],
        ["bench", "throughput"],
        ["bench", "serve"],
        ["convert"],
    ],
)
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    usage = capsys.readouterr().out.splitlines()[0]
    assert usage.startswith("usage: " + " ".join(["quire", *command])) and len(usage) < 80


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("quire ")


def test_no_command_and_unknown_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["bench"], ["generate", "--no-such-flag", "x"], ["generate", "--max-model", "5", "x"]):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2


def test_an_error_is_one_line_and_debug_shows_its_origin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x"], engine_factory=refuse) == 2
    assert capsys.readouterr().err == "quire: error: There is no model 'demo'.\n"
    with pytest.raises(ModelNotFoundError):
        main(["generate", "--debug", "x"], engine_factory=refuse)


def test_an_interrupt_exits_with_130_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x"], engine_factory=interrupt) == 130
    assert capsys.readouterr().err == "\n"


def test_logs_go_to_stderr_and_stop_there_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    def create(model: str, **settings: Any) -> FakeEngine:
        logging.getLogger("quire.start").info("a memory ledger")
        logging.getLogger("models.loading").debug("a detail")
        return FakeEngine(model, **settings)

    logger = logging.getLogger("quire")
    before = (logger.level, logger.propagate, list(logger.handlers))
    assert main(["generate", "x"], engine_factory=create) == 0
    captured = capsys.readouterr()
    assert captured.err == "INFO quire.start: a memory ledger\n"
    assert "ledger" not in captured.out
    assert (logger.level, logger.propagate, list(logger.handlers)) == before

    main(["generate", "--log-level", "error", "x"], engine_factory=create)
    assert capsys.readouterr().err == ""


def test_help_and_wrong_flags_do_not_load_jax() -> None:
    code = "import sys, serving.cli; serving.cli.main(['generate', '--top-p', '7', 'x']); print('jax' in sys.modules)"
    result = run_python(code)
    assert result.stdout == "False\n", result.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "import sys; from serving.cli import main; from tests.cli.fake_engine import FakeFactory;"
        "sys.exit(main(['generate', '--max-tokens', '5', 'x'], engine_factory=FakeFactory()))"
    )
    command = f'{sys.executable} -c "{code}" | true; echo "${{PIPESTATUS[0]}}"'
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.stderr == ""
    assert result.stdout in ("141\n", "0\n"), "0 if all was written before the reader had gone"


def test_the_fake_engine_is_closed_after_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    factory = FakeFactory()
    main(["generate", "x"], engine_factory=factory)
    assert not factory.made.is_open

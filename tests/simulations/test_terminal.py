"""Ctrl-C in a real terminal: the half that is done stays done, and the same command finishes it."""

import sys
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect", reason="needs pexpect (extra dev) and a POSIX terminal")
ROOT = Path(__file__).parents[2]
CODE = "import sys; from tests.simulations import toy_experiment; sys.exit(toy_experiment.command())"


@pytest.mark.slow
def test_ctrl_c_at_a_half_keeps_the_half(tmp_path: Path) -> None:
    import os

    out, gate = tmp_path / "run", tmp_path / "gate"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOY_GATE": str(gate), "TERM": "xterm", "COLUMNS": "200"}
    arguments = ["-c", CODE, "run", "toy", "--workers", "1", "--out", str(out)]

    def terminal() -> "pexpect.spawn[str]":
        return pexpect.spawn(
            sys.executable, arguments, env=environment, encoding="utf-8", timeout=120, dimensions=(40, 200)
        )

    first = terminal()
    first.expect("3/8")  # the progress bar; settings from number 3 on wait for the gate
    first.sendintr()
    first.expect("interrupted: 3 of 8 settings are kept")
    first.expect(pexpect.EOF)
    first.close()
    assert first.exitstatus == 130
    kept = {p.name: p.read_bytes() for p in (out / "records").iterdir()}
    assert len(kept) == 3

    gate.touch()
    second = terminal()
    second.expect("resuming toy")
    second.expect("3 of 8 settings are kept")
    second.expect(pexpect.EOF)
    second.close()
    assert second.exitstatus == 0
    assert len(list((out / "records").iterdir())) == 8
    assert all((out / "records" / name).read_bytes() == data for name, data in kept.items())

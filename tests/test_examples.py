"""The examples run as their first lines say, outside of the checkout, for a few steps."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.launch import ROOT, environment

EXAMPLES = ROOT / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
COMMANDS = {
    "own_network.py": [sys.executable],
    "own_trainer.py": [sys.executable],
    "policy.py": [sys.executable],
    "finetune.py": [sys.executable],
    "diffusers_unet.py": [sys.executable],
    "ddp.py": TORCHRUN,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    command = [*COMMANDS[name], str(EXAMPLES / name), "--steps", "3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_example_is_run() -> None:
    assert set(COMMANDS) == {path.name for path in EXAMPLES.glob("*.py")}

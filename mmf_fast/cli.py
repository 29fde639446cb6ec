"""The command line: mmf COMMAND ..., or python -m mmf_fast COMMAND ... where the package is not installed.

Each command is the `main` of a module, which parses its arguments, does the work, and raises what is wrong. Here is the
only place that turns an error into a line and an exit status.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

__all__ = ["COMMANDS", "main"]

COMMANDS = {  # name: (module, the extra that it needs, what it does)
    "train": ("mmf_fast.train", "train", "train a one-step generative model"),
    "sample": ("mmf_fast.sampling", "eval", "draw samples from a trained run"),
    "evaluate": ("mmf_fast.evaluation.samples", "eval", "judge the samples of a trained run"),
    "fid": ("mmf_fast.evaluation.fid", "eval", "Frechet Inception distance of a trained run"),
    "plan": ("mmf_fast.planning", "train", "memory, communication and time of a step on paper"),
    "prepare": ("mmf_fast.data.prepare", "train", "turn a dataset into a folder that training reads"),
    "doctor": ("mmf_fast.doctor", "", "whether a network of yours runs as it is, how exact, and what is in the way"),
    "ops": ("mmf_fast.ops.overview", "", "which implementation serves each operator here, and why"),
}
# What the extras of pyproject.toml bring.
OPTIONAL = {"matplotlib", "omegaconf", "PIL", "safetensors", "sklearn", "tensorboard", "tqdm", "yaml"}


def parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:10} {what}" for name, (*_, what) in COMMANDS.items())
    result = argparse.ArgumentParser(
        prog="mmf",
        description="Fast training of one-step generative models of the MeanFlow family.",
        epilog=f"commands:\n{commands}\n\nmmf COMMAND --help says what a command takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    result.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 the work failed or the disk is full, 2 wrong input, 128 + n on signal n."""
    options = parser().parse_args(arguments)
    module, extra, _ = COMMANDS[options.command]
    try:
        status = importlib.import_module(module).main(options.arguments) or 0
        sys.stdout.flush()
        return status
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in OPTIONAL:
            raise
        extra = "train" if missing in ("omegaconf", "yaml") else extra  # of mmf evaluate, where data.key=value is given
        print(
            f"error: mmf {options.command} needs {missing}, which is not installed: install mmf_fast with its extra "
            f"[{extra or 'train'}], in a checkout by pip install --no-build-isolation '.[{extra or 'train'}]'",
            file=sys.stderr,
        )
        return 2
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return 1
        if not getattr(error, "told", False):  # by another rank: see distributed.py
            if not isinstance(error, (ValueError, OSError, FloatingPointError)):
                raise
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _reader_left() -> bool:
    """Whether nobody reads the output any more, as of `mmf ops | head`; the interpreter's own last flush is spared."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())

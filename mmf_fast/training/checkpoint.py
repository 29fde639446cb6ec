"""Checkpoints that survive a crash at any moment.

    checkpoints/step_0000500.pt           everything needed to go on, loadable with torch.load(weights_only=True)
    checkpoints/step_0000500.pt.sha256    its checksum (`sha256sum -c` reads it)
    checkpoints/step_0000500.rank1.pt     what only rank 1 holds, where several processes train
    checkpoints/latest                    the name of the newest one, for people and other programs

A file is written under a temporary name, flushed to disk and renamed; its checksum is in place before it is, and
`latest` moves last. The shares of other ranks come before the main file, which holds their checksums. So whatever bears
the final name is whole, and what is damaged later is known by its checksum.
"""

import pickle
import random
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmf_fast.files import digest, remove_drafts, write_text, writing
from mmf_fast.training.plain import readable
from mmf_fast.training.settings import differences


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line that names the file and the way out."""


class Checkpoints:
    """The checkpoints of one run; the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, state: dict[str, Any], step: int, shares: Mapping[str, str] | None = None) -> Path:
        """Writes `state` as the checkpoint of `step` and moves `latest` to it. shares: what `save_share` returned on
        the other ranks. Raises OSError (a full disk), and ValueError for what could not be read again."""
        path = self.folder / f"step_{step:07d}.pt"
        state = readable(state, "the checkpoint")
        with self._writing(path) as draft:
            _write(draft, {**state, "shares": dict(shares or {})})
            path.unlink(missing_ok=True)  # a damaged one of an earlier attempt: the checksum below is not its own
            write_text(_sidecar(path), f"{digest(draft)}  {path.name}\n")
        with self._explained(path):
            write_text(self.folder / "latest", path.name + "\n")
            self._prune(step)
        return path

    def save_share(self, share: dict[str, Any], step: int, rank: int) -> tuple[str, str]:
        """Writes what `rank` alone holds; returns the file's name and checksum. Raises as `save` does."""
        path = self.folder / f"step_{step:07d}.rank{rank}.pt"
        share = readable(share, "the share")
        with self._writing(path) as draft:
            _write(draft, share)
            found = digest(draft)
        return path.name, found

    @contextmanager
    def _writing(self, path: Path) -> Iterator[Path]:
        with self._explained(path), writing(path) as draft:
            yield draft

    @contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save reports a failed write as RuntimeError
            raise OSError(
                f"{path}: cannot be written ({_reason(error)}); earlier checkpoints are whole; "
                "make room, go on with --resume"
            ) from error

    def newest_whole(self) -> Path | None:
        """The newest checkpoint whose files are all whole, to be read with check=False; None where there is none.

        One that is damaged or cannot be read is named in a warning and the one before it is used.
        Raises CheckpointError, with the reasons, when none of them can be used.
        """
        reasons = []
        for path in reversed(_found(self.folder)):
            try:
                read(path)
            except CheckpointError as error:
                reasons.append(str(error))
                warnings.warn(f"{error}; the checkpoint before it is used", stacklevel=2)
                continue
            return path
        if reasons:
            raise CheckpointError(f"no checkpoint can be used: {'; '.join(reasons)}; restore one or start another run")
        return None

    def newest(self) -> Path | None:
        """The file of the newest checkpoint, unread."""
        return next(reversed(_found(self.folder)), None)

    def _prune(self, step: int) -> None:
        """Removes all but the newest `keep`; what lies beyond `step` is the damaged rest of an earlier attempt."""
        found = _found(self.folder)
        kept = [path for path in found if _step(path) <= step][-self.keep :]
        for path in set(found) - set(kept):
            path.unlink(missing_ok=True)
            _sidecar(path).unlink(missing_ok=True)
        steps = {path.stem for path in kept}
        for share in self.folder.glob("step_*.rank*.pt"):
            if share.name.partition(".")[0] not in steps:
                share.unlink(missing_ok=True)
        remove_drafts(self.folder)


def read(path: Path, check: bool = True) -> dict[str, Any]:
    """Loads one checkpoint to the CPU, with "shares" as a list: those of ranks 1, 2, ...

    check: compares the checksums, which reads every byte of it. Many ranks let one of them do that.
    Raises CheckpointError if it is not what was written.
    """
    expected = None
    if check:
        try:
            expected = _sidecar(path).read_text().split()[0]
        except (OSError, IndexError) as error:
            raise CheckpointError(f"{path}: its checksum {_sidecar(path).name} is missing") from error
    state = _read(path, expected, _sidecar(path).name)
    shares = state["shares"].items()
    state["shares"] = [_read(path.parent / name, digest if check else None, path.name) for name, digest in shares]
    return state


def changes(path: Path, saved: dict[str, Any], now: dict[str, Any], allow: bool) -> list[str]:
    """What a run that goes on from `path` has otherwise than it says, as `differences` names it. Raises CheckpointError
    for changes of what it is, and unless they are allowed for those of how it trains."""
    changed = differences(saved, now)
    allowed = [each for each in changed if each.startswith(("optimizer.", "loss.", "train."))]
    if changed and not (allow and allowed == changed):
        ways = "set these back" if allowed != changed else "set these back, go on with them by --allow-changes"
        raise CheckpointError(
            f"{path} is of another configuration: {', '.join(changed)}; {ways}, or pass another --run"
        )
    return changed


def _read(path: Path, expected: str | None, holder: str) -> dict[str, Any]:
    try:
        if expected is not None and digest(path) != expected:
            raise CheckpointError(f"{path}: damaged (its sha256 is not the one in {holder})")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing, though {holder} names it") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))  # torch.load names it in the midst of many lines
        reason = f"it holds {foreign[1]}, which could run code" if foreign else str(error).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read ({reason})") from error


def _reason(error: BaseException) -> str:
    """What the system said: torch.save then fails on closing its archive, and says that instead."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return str(getattr(found, "strerror", None) or found or error).splitlines()[0]


def _write(path: Path, state: dict[str, Any]) -> None:
    with open(path, "wb") as file:  # by itself torch.save does not say what the system said
        torch.save(state, file)


def rng_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's (also CUDA's) global generators, as plain containers and tensors."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what `rng_state` returned; CUDA states beyond the devices at hand are left out."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted((path for path in folder.glob("step_*.pt") if re.fullmatch(r"step_\d+", path.stem)), key=_step)

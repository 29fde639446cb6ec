"""The trainer: it feeds batches to an engine, records, draws, saves, and goes on exactly where a run stopped."""

import hashlib
import json
import logging
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmf_fast.contract import bare
from mmf_fast.data import Batch, Prefetcher, as_dataset, conditions_of
from mmf_fast.devices import peak_flops
from mmf_fast.distributed import agree, ending_together, gather
from mmf_fast.files import write_text
from mmf_fast.models import exported_step, save_pretrained
from mmf_fast.training.checkpoint import CheckpointError, Checkpoints, changes, rng_state, set_rng_state
from mmf_fast.training.checkpoint import read as read_checkpoint
from mmf_fast.training.drawing import can_draw, draw_curves, draw_samples
from mmf_fast.training.engines import Engine, build_engine
from mmf_fast.training.initial import start_from, take_constants
from mmf_fast.training.logs import RankLog
from mmf_fast.training.optimizers import MakeOptimizer
from mmf_fast.training.plain import plain, readable
from mmf_fast.training.record import Callback, MetricsLog, Rows, TensorBoard
from mmf_fast.training.run_folder import check_run_folder, prepare_run_folder, seed_everything
from mmf_fast.training.settings import ConfigError, Optimizer, Train, fixed
from mmf_fast.training.signals import Signals
from mmf_fast.training.skipping import Skipped
from mmf_fast.training.timing import PHASES, TRACED, WARM_UP, Speed, tracer


def content_digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


class Trainer:
    """Trains a loss module on data in the folder `run`, with everything a long run needs:

        net = MyUNet()                                          # u(z, r, t, **cond)
        loss_fn = MeanFlowLoss(net, times=TimeSampler(share=0.25), lam=0.1, paired=True)
        trainer = Trainer(
            loss_fn,
            MyDataset(),
            "runs/mine",
            train=Train(batch=256, steps=100_000, precision="bf16", zero="zero1.json"),
            optimizer=Optimizer(lr=1e-4, ema=0.9999),
            resume=True,
        )
        trainer.fit()

    under python, torchrun or deepspeed. Killed and started again, it goes on from its newest checkpoint.

    loss_fn: a module around `.net`, called as loss_fn(x, step=step, part=part, **cond), which returns an object with
        .loss and .metrics: `MeanFlowLoss`, or one's own. `part` (BatchShare) says which rows of the global batch x is.
        What torch.compile, DDP or AveragedModel put around the network is taken off: `train.compile` compiles it.
        `net.flops()` and `loss_fn.forwards(batch, step)`, where they are, give the model FLOPs utilisation.
    data: what `mmf_fast.data.as_dataset` takes: a torch Dataset, an iterable of batches, tensors, a Dataset.
    seed: of what the loss draws, and of the order of the data. The weights are the network's own; under several
        processes those of the first count.
    make_optimizer: takes the place of AdamW in one process: of [(name, parameter)] of what is trained it makes one
        optimizer or a list, whose groups keep their learning rates, times the schedule of `optimizer`.
    engine: what steps; by default the one that `train.zero` and `train.device` name.
    callbacks: each is called as callback(step, row) with what is logged, a {name: float}, on the first process; where
        it has a `close`, that is called at the end of each fit.
    record: nested plain values that config.yaml keeps.  extra: is kept beside the exported weights.
    identity: flat plain values in which, beside the settings, a run that goes on must agree; by default the `identity`
        of the data, and of the loss where it has one.
    resume: continues from the newest whole checkpoint, or from the start where there is none yet.
    allow_changes: to it, of the optimizer, the loss, the precision and the batch; the run's history.jsonl has them.
        With another batch the data go on at the next one of that size, so that no sample comes twice in an epoch.
    profile: leaves a trace of a few of its first steps in the run folder.
    Raises ConfigError, RunFolderError, CheckpointError, or ValueError of the component that refuses its arguments.
    """

    def __init__(
        self,
        loss_fn: nn.Module,
        data: Any,
        run: str | Path,
        *,
        train: Train | None = None,
        optimizer: Optimizer | None = None,
        seed: int = 0,
        make_optimizer: MakeOptimizer | None = None,
        engine: Engine | None = None,
        callbacks: Sequence[Callback] = (),
        record: Mapping[str, Any] | None = None,
        identity: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        resume: bool = False,
        allow_changes: bool = False,
        profile: bool = False,
    ) -> None:
        self.train, optimizer, seed = train or Train(), optimizer or Optimizer(), plain(seed)
        self.seed, self.callbacks, self.profile, self.allow_changes = seed, callbacks, profile, allow_changes
        self.history: list[dict[str, Any]] = []
        self.run = Path(run)
        self.checkpoints = Checkpoints(self.run / "checkpoints", self.train.keep)
        self.step = 0  # steps done: the schedules follow from it
        self.data_offset = 0  # of the batch of data that a step takes, since the batch size changed
        self._log: MetricsLog | None = None
        self._logged: Any = None  # what the checkpoint says of metrics.jsonl
        self.signals = Signals()

        check_run_folder(self.run, resume)
        self.dataset = as_dataset(data, seed)
        of_loss = getattr(loss_fn, "identity", {})
        known = {**self.dataset.identity, **(of_loss if isinstance(of_loss, Mapping) else {})}
        own = readable(dict(identity or known), "identity")
        self.fingerprint = {**own, **fixed(optimizer, self.train), "seed": seed}
        if not isinstance(getattr(loss_fn, "net", None), nn.Module):
            raise ConfigError("loss_fn.net must be the network, a torch module: there is nothing to train otherwise")
        given, net = loss_fn.net, bare(loss_fn.net)
        classes = getattr(net, "num_classes", 0)
        if isinstance(classes, int) and 0 < classes < self.dataset.num_classes:
            raise ConfigError(
                f"labels go up to {self.dataset.num_classes - 1}, but the network has {classes} classes, 0 to "
                f"{classes - 1}: build it with num_classes={self.dataset.num_classes}, or count labels from 0"
            )
        loss_fn.net = net
        self.model = type(net).__name__
        self.flow_matching_until = getattr(getattr(loss_fn, "times", None), "start", 0)
        self.shown = getattr(getattr(loss_fn, "guidance", None), "shown", None)
        forwards, flops = getattr(loss_fn, "forwards", None), getattr(net, "flops", None)
        self.flops_of_step = (lambda step: flops() * forwards(self.train.batch, step)) if forwards and flops else None
        fresh = not resume or self.checkpoints.newest() is None
        shares = start_from(loss_fn, self.train.init, self.train.init_from) if self.train.init and fresh else None
        if not fresh:
            take_constants(net, self.checkpoints)
        if engine and make_optimizer:
            raise ConfigError("engine and make_optimizer do not go together: give the engine its optimizers")
        self.engine = engine or build_engine(loss_fn, optimizer, self.train, seed, make_optimizer)
        self.fingerprint |= self.engine.identity
        if shares:
            try:
                self.engine.load_state_dict(shares)
            except (KeyError, ValueError) as error:
                raise ConfigError(f"train.init={self.train.init}: it is of another loss module ({error})") from error
        rank, count = self.engine.rank, self.engine.world_size
        # Refuses a batch that does not fit before anything is written.
        self._example = agree(lambda: self.dataset.batch(0, self.train.batch, rank, count))
        self.extra = plain({"shape": [*self.dataset.shape], "num_classes": self.dataset.num_classes, **(extra or {})})
        self.log = RankLog(self.engine.rank, terminal=self.is_main)
        if net is not given:
            self.log.say(
                f"the network is trained as {self.model}, without the {type(given).__name__} around it: "
                "train.compile compiles it, and its moving average is always kept"
            )
        first = gather(content_digest(self._example[0]))
        if len(set(first)) < len(first):
            self.log.say(
                "ranks have equal first batches, so that samples count twice: give each process samples of its own, "
                "for instance by a DistributedSampler",
                logging.WARNING,
            )
        self.skipped = Skipped(self.train.max_bad_steps, self.engine.device)
        if not self.is_main:
            self._seed_apart()
        if resume:
            self._restore()
        if profile and self.train.steps - self.step < WARM_UP + TRACED:
            raise ConfigError(
                f"--profile records {TRACED} steps after {WARM_UP} others, train.steps={self.train.steps} leaves "
                f"{self.train.steps - self.step}: train longer"
            )
        if self.is_main:
            settings = {"optimizer": asdict(optimizer), "train": asdict(self.train), "seed": seed}
            prepare_run_folder(self.run, record or settings)
            if self.history:
                write_text(self.run / "history.jsonl", "".join(json.dumps(each) + "\n" for each in self.history))

    @property
    def is_main(self) -> bool:
        return self.engine.rank == 0

    @property
    def stopped_by(self) -> signal.Signals | None:
        """The signal that ended the run early."""
        return self.signals.came

    def fit(self) -> bool:
        """Trains up to train.steps. Returns False where SIGINT or SIGTERM ended it early (and it was saved): called
        again, it goes on from there.

        Raises NonFiniteError, OSError (a full disk), and of several ranks RankError for what one of them met alone.
        """
        with self.log.recording(self.run), ending_together(self.log.error):
            self._describe()
            if self.step and gather(exported_step(self.run) if self.is_main else None)[0] != self.step:
                self._export(self.engine.averaged())  # the run was killed between its checkpoint and its export
            with self.signals.caught(), self._rows() as rows, self._progress_bar() as bar:
                self._train(rows, bar)
            self.log.info("step %d: ended%s", self.step, f" on {self.stopped_by.name}" if self.stopped_by else "")
            if self.step < self.train.steps:
                return False
            self.draw()
            if self.is_main:
                draw_curves(self.run)
            return True

    def _train(self, rows: Rows | None, bar: Any) -> None:
        train, engine = self.train, self.engine
        peak = peak_flops(engine.device, train.precision) if self.flops_of_step else None
        speed = Speed(engine.phases, train.batch, peak and peak * engine.world_size)
        saved = self.step
        with self._batches() as prefetcher, self._tracer() as trace:
            batches = iter(prefetcher)
            while self.step < train.steps and not self.signals.end(self.step, train.log_every):
                speed.count(self.flops_of_step(self.step) if self.flops_of_step else 0)
                with engine.phases("data"):
                    _, (x, y) = next(batches)
                metrics = self._one_step(x, y)
                bar.update()
                if trace:
                    trace.step()
                last = self.step == train.steps
                logs, saves = (last or self.step % every == 0 for every in (train.log_every, train.checkpoint_every))
                draws = not last and train.sample_every > 0 and self.step % train.sample_every == 0
                if logs:
                    values = {key: float(value) for key, value in metrics.items()}
                    self._record(rows, bar, values | speed.read())
                if logs or self.step % train.max_bad_steps == 0:
                    self.skipped.check(self.step, x, self.checkpoints)  # seldom, as it waits: weights are safe
                if saves:
                    self.save()
                    saved = self.step
                if draws:  # after saving: where it fails, the run goes on behind it
                    self.draw()
                if logs or draws or saves:
                    speed.restart()
        if saved < self.step:
            self.save()

    def save(self) -> None:
        """Writes a checkpoint, of which every rank holds a share, then exports the averaged weights."""
        start = time.perf_counter()
        share, rank = {**self.engine.state_dict(), "rng": rng_state()}, self.engine.rank
        written = agree(lambda: self.checkpoints.save_share(share, self.step, rank) if rank else None)
        shares = gather(written)
        state = {
            "step": self.step,
            **self.skipped.state(),
            "fingerprint": self.fingerprint,
            "history": self.history,
            "data_offset": self.data_offset,
            "metrics": self._log.mark() if self._log else None,
            "engine": share,
        }
        net = self.engine.averaged()
        agree(lambda: self.checkpoints.save(state, self.step, dict(shares[1:])) if self.is_main else None)
        self._export(net)
        self.log.info("step %d: checkpoint written in %.1f s", self.step, time.perf_counter() - start)

    def _export(self, net: nn.Module) -> None:
        agree(lambda: save_pretrained(self.run, net, {**self.extra, "step": self.step}) if self.is_main else None)

    def draw(self) -> None:
        """Draws one-step samples of the averaged weights, of each class or with the conditions of the first batch. What
        is neither images nor points is not drawn."""
        shape, (x, cond) = self.dataset.shape, self._example
        if not can_draw(shape):
            self.log.info("step %d: no picture, as samples of shape %s need their decoder", self.step, tuple(shape))
            return
        net, path = self.engine.averaged(), self.run / "samples" / f"step_{self.step:07d}.png"
        given: dict[str, Any] = {"cond": conditions_of(cond), "x": x, "classes": self.dataset.num_classes}
        if self.is_main and not draw_samples(net, shape, path, seed=self.seed, shown=self.shown, **given):
            self.log.say(f"step {self.step}: samples are not finite, no picture drawn", logging.WARNING)

    # ---- one step ---------------------------------------------------------------------------------------------------

    def _batches(self) -> Prefetcher:
        """The batches of this rank from the present step on, made while the device works; on CUDA in pinned memory, as
        a copy from any other would wait for the device."""
        device, train = self.engine.device, self.train

        def pin(batch: Batch) -> Batch:
            torch.cuda.set_device(device)  # a thread starts on the first device, and would open a context there
            return torch.utils.data._utils.pin_memory.pin_memory(batch)

        return Prefetcher(
            self.dataset,
            train.batch,
            first=self.step + self.data_offset,
            last=train.steps + self.data_offset,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            then=pin if device.type == "cuda" else None,
        )

    def _one_step(self, x: Tensor, cond: Any) -> dict[str, Tensor]:
        result = self.engine.step(x, self.step, **conditions_of(cond))
        self.step += 1
        self.skipped.count(result.skipped)
        return result.metrics

    def _record(self, rows: Rows | None, bar: Any, values: dict[str, float]) -> None:
        values["skipped"] = self.skipped.total
        if rows:
            rows(self.step, values)
        names = ("loss", "skipped", "peak_memory_gib", "step_seconds", *(f"{phase}_seconds" for phase in PHASES))
        self.log.info("step %d: %s", self.step, ", ".join(f"{name} {values[name]:.4g}" for name in names))
        shown = {"loss": "loss", "mse": "mse", "lam": "lambda", "images_per_second": "images/s", "mfu": "MFU"}
        bar.set_postfix({name: f"{values[key]:.4g}" for key, name in shown.items() if key in values}, refresh=False)

    def _rows(self) -> AbstractContextManager[Rows | None]:
        if not self.is_main:
            return nullcontext()
        logged = self._log.mark() if self._log else self._logged  # by an earlier fit, or before the run was resumed
        self._log = MetricsLog(self.run, self.step)
        if logged and (change := self._log.changed_since(logged)):
            self.log.say(change, logging.WARNING)
        return Rows(self._log, TensorBoard(self.run, self.step), *self.callbacks)

    def _tracer(self) -> AbstractContextManager[Any]:
        return tracer(self.run / "profile" / f"rank_{self.engine.rank}.json") if self.profile else nullcontext()

    def _progress_bar(self) -> Any:
        return tqdm(
            total=self.train.steps,
            initial=self.step,
            unit="step",
            disable=not self.is_main,
            mininterval=0.2 if sys.stderr.isatty() else 20,
        )

    # ---- start, stop and go on --------------------------------------------------------------------------------------

    def _describe(self) -> None:
        engine, train = self.engine, self.train
        device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else platform.machine()
        self.log.info(
            "rank %d of %d (process %d on %s) on %s (%s), torch %s, %d threads: steps %d to %d, batch %d, data %s, "
            "network %s",
            *(engine.rank, engine.world_size, os.getpid(), platform.node(), engine.device, device, torch.__version__),
            *(torch.get_num_threads(), self.step, train.steps, train.batch, self.dataset.name, self.model),
        )
        if self.flow_matching_until >= train.steps:
            self.log.say(
                f"the first intervals would come at step {self.flow_matching_until} of {train.steps}: this run is flow "
                "matching alone, and one evaluation of it draws badly; set loss.times.start lower",
                logging.WARNING,
            )

    def _seed_apart(self) -> None:
        """Each rank drops other units out."""
        seed_everything(hash((self.seed, self.engine.rank, self.step)) % 2**32)

    def _restore(self) -> None:
        with warnings.catch_warnings(record=True) as damaged:
            warnings.simplefilter("always")
            chosen = agree(lambda: self.checkpoints.newest_whole() if self.is_main else None)
        path = gather(chosen)[0]  # rank 0 compared the checksums; all go on from what it chose
        for warning in damaged:
            self.log.say(str(warning.message), logging.WARNING)
        if path is None:
            self.log.say(f"{self.run}: no checkpoint yet, starting at step 0")
            return
        state = agree(lambda: read_checkpoint(path, check=False))
        changed = changes(path, state["fingerprint"], self.fingerprint, self.allow_changes)
        shares, rank = [state["engine"], *state["shares"]], self.engine.rank
        try:
            self.engine.load_state_dict(shares)
            generators = shares[rank]["rng"] if rank < len(shares) else None
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is of another network or version of the code ({error}); start another run"
            ) from error
        self.step, self._logged = state["step"], state["metrics"]
        self.history, self.data_offset = state["history"], state["data_offset"]
        if changed:
            self.history.append({"step": self.step, "changes": changed})
            self.log.say(f"{self.run}: from step {self.step} on: {', '.join(changed)}")
            samples = (self.step + self.data_offset) * state["fingerprint"]["train.batch"]
            self.data_offset = -(-samples // self.train.batch) - self.step
        self.skipped.load(state)
        if generators:
            set_rng_state(generators)
        else:
            self._seed_apart()
        self.log.say(f"{self.run}: going on from {path.name}")

"""One loss for the MeanFlow family.

    path      z_t = (1 - t) x + t eps,   v = eps - x
    identity  v(z, t) = u + (t - r) du/dt,   du/dt = (d_z u) w + d_t u            MeanFlow, arXiv 2505.13447, eq. 6
    SG_lam    SG_lam[a] = lam a + (1 - lam) stopgrad(a)                           Modular MeanFlow, arXiv 2508.17426
    residual  e = u(z_t, r, t) + (t - r) SG_lam[du/dt] - v_target
    loss      mean_b w_b ||e_b||^2,   w_b = stopgrad(1 / (||e_b||^2 + c)^p), or 1 / (m(r, t) + c)^p

Flow matching is r = t, MeanFlow is lam = 0, a continuous consistency model is r = 0, Modular MeanFlow is lam > 0.
Modular MeanFlow prints (x1 - x0) / (t - r) as velocity; on the straight path that is wrong unless (r, t) = (0, 1), and
it diverges as r -> t. The velocity is eps - x.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmf_fast.contract import check_cond, check_network, check_output, names_refused, names_taken, per_sample
from mmf_fast.forward.functional import FiniteDifference, check_mode, jvp
from mmf_fast.objective.compiled import Compiled
from mmf_fast.objective.counts import Counts
from mmf_fast.objective.draws import WHOLE_BATCH, BatchShare, Draw, Points, arrange, check, column
from mmf_fast.objective.guidance import Guidance, like_rows
from mmf_fast.objective.schedule import LambdaSchedule
from mmf_fast.objective.times import TimeSampler
from mmf_fast.objective.weights import TimesWeight
from mmf_fast.ops.dispatch import serve
from mmf_fast.ops.sg_loss import LossTerms, sg_loss

__all__ = ["LossOutput", "MeanFlowLoss", "sg_lambda"]

TANGENTS = ("predicted", "conditional")
WEIGHTS = ("sample", "times")


class LossOutput(NamedTuple):
    """loss: 0-d, to back-propagate. per_sample: (B,), detached, its mean is the loss. metrics: detached 0-d tensors."""

    loss: Tensor
    per_sample: Tensor
    metrics: dict[str, Tensor]


def sg_lambda(x: Tensor, lam: Tensor | float) -> Tensor:
    """SG_lam[x] = lam x + (1 - lam) stopgrad(x): the value of x, lam times its gradient (arXiv 2508.17426)."""
    return torch.lerp(x.detach(), x, lam)


class MeanFlowLoss(nn.Module):
    """The loss of an average-velocity network `net(z, r, t, **cond)`, as a module whose forward computes the loss.

    net: any callable u(z, r, t, **cond) -> (B, ...) like z, with r, t of shape (B,); usually an nn.Module. Another
        call is adapted by mmf_fast.Adapter.
    times: the law of (r, t) and the share of samples with r < t ("intervals"; those with r = t are "instants"). Only
        the intervals run as Duals. Their number follows the share over the steps, also in a batch of one.
    lam: the curriculum of SG_lambda, or a constant in [0, 1].
    tangent: direction w of du/dt. "predicted": w = stopgrad(u(z, t, t)), the network's own marginal velocity.
        "conditional": w = v. With lam > 0 the conditional tangent biases the minimiser (the double-sampling bias of
        residual-gradient methods), so it warns.
    paired: each interval shares (x, eps, t) with an instant, whose prediction is then its tangent: no extra forward.
        Data rows that lose their place to a partner are not used; a batch has at most half as many intervals as rows.
    stochastic: back-propagate through the tangents of a random lam-share of the samples, not through a lam-share of
        every tangent: the same expected gradient, paid only for that share.
    p, c: exponent and offset of the adaptive weight; p = 0 is the plain squared error, p = 1 MeanFlow's.
    weight: of what the weight is a function. "sample": of the row's own error, as in MeanFlow, which biases the
        minimiser unless p = 0. "times": of the mean error at (r, t) over earlier steps, which does not; its running
        sums are a buffer of this module, and in training mode every rank must call it equally often.
    guidance: guidance inside the target; needs conditions that have a null value. Of one scale, or of a range of
        scales that the network is told.
    null_label: of the labels `y`, by default `net.num_classes`.  null: of other conditions, by name: what a row of them
        is where there is none, such as the embedding of an empty prompt. All of them are dropped together.
    teacher: a trained velocity field, called teacher(z, t, t, **cond) as a network is. Its velocity takes the place of
        v: that is distillation, with a target that has no variance. tangent="conditional" is then the teacher's
        velocity too, without bias at any lambda. It is frozen, follows this module to devices, and is not saved.
    shared: names of conditions that belong to all samples even where they have as many rows as there are samples.
    jvp: "dual", "func", "finite_difference" or FiniteDifference(step, order) (see mmf_fast.jvp).
    Raises ValueError for settings that do not fit together.
    """

    def __init__(
        self,
        net: Callable[..., Any],
        *,
        times: TimeSampler | None = None,
        lam: LambdaSchedule | float = 0.0,
        tangent: str = "predicted",
        paired: bool = False,
        stochastic: bool = False,
        p: float = 1.0,
        c: float = 1e-3,
        weight: str = "sample",
        guidance: Guidance | None = None,
        null_label: int | None = None,
        null: Mapping[str, Tensor] | None = None,
        teacher: Callable[..., Any] | None = None,
        shared: Collection[str] = (),
        jvp: str | FiniteDifference = "dual",
    ) -> None:
        super().__init__()
        check_network(net)
        self.net = net
        self.times = times or TimeSampler()
        self.lam = lam if isinstance(lam, LambdaSchedule) else LambdaSchedule(value=lam)
        self.tangent, self.paired, self.stochastic = tangent, paired, stochastic
        self.p, self.c, self.guidance, self.jvp = p, c, guidance, jvp
        self.weight, self.by_times = weight, TimesWeight(p, c) if weight == "times" else None
        self.shared = tuple(shared)
        self.compiled: Compiled | None = None
        self.ambiguous = names_taken(net, ("step", "noise", "times", "part"))
        self.null_label: int | None = getattr(net, "num_classes", 0) or None if null_label is None else null_label
        values = ({} if self.null_label is None else {"y": torch.tensor(self.null_label)}) | dict(null or {})
        self.nullable = tuple(values)
        for name, value in values.items():
            self.register_buffer(f"_null_{name}", value, persistent=False)
        self._teacher = (teacher,)  # in a tuple it is no submodule: nothing of it is trained, averaged or saved
        self._check()
        if isinstance(teacher, nn.Module):
            teacher.eval().requires_grad_(False)

    def _check(self) -> None:
        if self.tangent not in TANGENTS:
            raise ValueError(f"tangent is {self.tangent!r}: choose one of {', '.join(TANGENTS)}")
        if self.weight not in WEIGHTS:
            raise ValueError(f"weight is {self.weight!r}: choose one of {', '.join(WEIGHTS)}")
        check_mode(self.jvp)
        if self.p < 0 or self.c < 0:
            raise ValueError(f"p and c are {self.p} and {self.c}: they must not be negative")
        if self.paired and self.tangent != "predicted":
            raise ValueError('paired batches serve predicted tangents: set tangent="predicted" or paired=False')
        if self.paired and self.times.share > 0.5:
            raise ValueError(
                f"paired: each r < t needs a partner with r = t, so times.share may be 0.5, not {self.times.share}"
            )
        if self.guidance is not None and not self.nullable:
            raise ValueError(
                "guidance needs to know what no condition is: pass null_label (the label of no class), or null={name: "
                "row} of another condition"
            )
        if self.guidance is not None and (refused := names_refused(self.net, self.guidance.told)):
            raise ValueError(
                f"guidance.{refused[0]} is a range, but the network has no condition {refused[0]}, by which it is told "
                "what a row draws: build one of this package with guided=True, or give its own by mmf_fast.Adapter"
            )
        if self.teacher is not None:
            check_network(self.teacher)
            if self.teacher is self.net or _trained_by(self.teacher) & _trained_by(self.net):
                raise ValueError(
                    "teacher and network are trained together, but a teacher is frozen: give copy.deepcopy"
                )
            if self.guidance is not None:
                raise ValueError("teacher and guidance do not go together: give a teacher that guides its own velocity")
        if self.tangent == "conditional" and self.teacher is None and self.lam.maximum > 0 and self.times.share > 0:
            warnings.warn(
                'conditional tangents bias the minimiser when lambda > 0; use tangent="predicted"', stacklevel=3
            )

    @property
    def teacher(self) -> Callable[..., Any] | None:
        return self._teacher[0]

    @property
    def identity(self) -> dict[str, Any]:
        """Its settings, flat and plain: what a run that goes on with this loss must agree in."""
        names = ("times", "lam", "tangent", "paired", "stochastic", "p", "c", "weight", "guidance", "shared", "jvp")
        found = {f"loss.{name}": getattr(self, name) for name in names}
        return {name: x if isinstance(x, (str, bool, int, float)) else repr(x) for name, x in found.items()}

    @property
    def _counts(self) -> Counts:
        return Counts(self.times, self.lam, self.paired, self.stochastic)  # as they are now: they may be replaced

    def forward(
        self,
        x: Tensor,
        *,
        step: int | None = None,
        noise: Tensor | None = None,
        times: tuple[Tensor, Tensor] | None = None,
        part: BatchShare = WHOLE_BATCH,
        **cond: Any,
    ) -> LossOutput:
        """The loss of data x (B, ...) at training step `step`: floating-point, or stored images (uint8, 0 to 255, which
        stand for [-1, 1]).

        step: decides lambda and, where the share of the rows is a fraction, how many are intervals at this step
        (without it lambda is that of step 0, and chance decides). It must be given where intervals begin later
        (`times.start`). noise: like x; times: (r, t), each (B,), 0 <= r <= t <= 1. Both are drawn when absent. part:
        which rows of a global batch x is; by default all, drawn from torch's generators.
        cond: passed to the network; leaves with B rows follow their samples, through dicts, lists and tuples.
        Raises ValueError for shapes or times that do not fit, and for a step that must be given.
        """
        if step is None and times is None and self.times.start:
            raise ValueError(f"times.start is {self.times.start}: pass step=, which says whether intervals have begun")
        if self.ambiguous:
            given = {"step": step, "noise": noise, "times": times, "part": None if part is WHOLE_BATCH else part}
            check_cond(self.net, given, "loss_fn")
        check(x, noise, times, cond)
        rows, dtype = len(x), torch.float64 if x.dtype == torch.float64 else torch.float32
        stream, counts = part.stream(step or 0, x, dtype), self._counts
        if self.guidance is not None:  # before rows are paired: a tangent is that of its row's label, dropped or not
            cond = self.guidance.drop(cond, self._nulls, stream.uniform())
        if times is None:
            kinds, lam = counts.draw(rows, step, part)
            r, t = self.times.draw(stream)
        else:
            r, t = (time.to(x.device, dtype) for time in times)
            kinds, lam = counts.given(r, t, step, part)
        if self.guidance is not None:
            cond = self.guidance.tell(cond, stream)
        noise = stream.noise() if noise is None else noise.to(dtype)
        x = x if x.dtype == torch.uint8 else x.to(dtype)
        padded = counts.called_elsewhere(step or 0) if times is None else (False, False, False)
        d, order = arrange(x, noise, r, t, cond, per_sample(cond, rows, self.shared), kinds, padded)

        of_graph = torch.full((), lam, dtype=dtype, device=x.device)  # a new value needs no new graph
        weight = None if self.by_times is None else self.by_times(d)
        if self.compiled is None:
            loss, found, square = self._compute(d, of_graph, weight)
        else:
            loss, found, square = self.compiled(x, self, d, of_graph, weight)
        if self.by_times is not None and weight is not None and self.training and torch.is_grad_enabled():
            self.by_times.add(d, found / d.counted(weight), part)

        per_sample_loss = torch.empty_like(found).index_copy_(0, order, found)
        metrics = _errors(square, rows, kinds.intervals / (rows * part.count if times is None else rows))
        lam = lam * kinds.graphs / kinds.intervals if kinds.intervals else self.lam(step or 0)
        metrics["lam"] = torch.tensor(lam)
        return LossOutput(loss, per_sample_loss, metrics)

    def compile(self, **kwargs: Any) -> None:
        """Compile the loss computation in place (fullgraph). Noise and times are still drawn eagerly, so a seed gives
        the same draws either way; a change of lambda, step or times does not recompile, and batches of any size are
        welcome (see Compiled)."""
        self.compiled = Compiled(MeanFlowLoss._compute, kwargs)

    def forwards(self, batch: int, step: int = 0) -> int:
        """What a training step on `batch` samples costs, in forward passes of one sample: what the algorithm needs,
        however it is carried out. A backward costs two forwards, a dual number (primal and tangent) two of its primal.

            r = t: 1 + 2 = 3      r < t, lam = 0: 2 + 2 = 4      r < t, lam > 0: 2 + 4 = 6
            + 1 per r < t without partner for u(z, t, t | c), where the tangent is predicted or guidance has kappa > 0
            + 1 per sample for u(z, t, t | null), where there is guidance, or for the velocity of a teacher

        stochastic: 6 for the rows whose tangent back-propagates at this step, 4 for the other r < t. Central
        differences evaluate each r < t once more, with a backward where lam > 0.
        """
        intervals, graphs = self._counts.of_batch(batch, step)
        needs_u = self.tangent == "predicted" or self._guided_by_class
        cost = 3 * (batch - intervals) + 4 * intervals + 2 * graphs
        cost += intervals if needs_u and not self.paired else 0
        cost += intervals + 2 * graphs if isinstance(self.jvp, FiniteDifference) and self.jvp.order == 2 else 0
        more = self.teacher is not None or (self.guidance is not None and self.guidance.active)
        return cost + (batch if more else 0)

    def _compute(
        self, d: Draw, lam: Tensor, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The loss, its terms in the order of the draw, and the mean squares per element summed over each kind.

        weight: of the rows of the draw, where it does not depend on their errors.
        """
        points, v = d.on_path()
        v = self._taught(points, v)
        instants = d.sizes[0]
        now, later = points.rows(0, instants), points.rows(instants, len(v))

        u_now = self._velocity(now)  # r = t: flow matching
        with torch.no_grad():
            u_later = None
            if self.tangent == "predicted" or self._guided_by_class:
                u_later = self._velocity(later) if d.pair is None else u_now[d.pair]
            target = self._target(points, v, u_now, u_later)
            w = target[instants:] if u_later is None or self.tangent == "conditional" else u_later

        targets = target.split(d.sizes)
        weights = (None, None, None) if weight is None else weight.split(d.sizes)
        found = [(d.weights[0], self._error(u_now, targets[0], weights[0]))] if instants else []
        start = 0
        for kind, share in ((1, lam), (2, None)):  # None: SG_0, the tangent is detached
            stop = start + d.sizes[kind]
            if start < stop:
                rows = later.rows(start, stop)
                u, du = self._average(rows, w[start:stop], tangent_grad=share is not None)
                term = self._error(u, targets[kind], weights[kind], du, rows.t - rows.r, share)
                found.append((d.weights[kind], term))
            start = stop
        loss = torch.stack([term.loss * of_loss for of_loss, term in found]).sum()
        terms = [term for of_loss, term in found if of_loss]
        square = torch.cat([term.square for term in terms]) / v[0].numel()
        counted = instants if d.weights[0] else 0
        return loss, torch.cat([term.per_sample for term in terms]), (square[:counted].sum(), square[counted:].sum())

    @torch.no_grad()
    def _taught(self, points: Points, v: Tensor) -> Tensor:
        """v, or that of the teacher."""
        if self.teacher is None:
            return v
        return check_output(self.teacher(points.z, points.t, points.t, **points.cond), points.z).to(v.dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MeanFlowLoss:
        """Moves the teacher to where this module goes."""
        if isinstance(self.teacher, nn.Module):
            self.teacher._apply(fn)
        return super()._apply(fn, recurse)

    def _velocity(self, points: Points) -> Tensor:
        """u(z, t, t), the marginal velocity; nothing is evaluated for no rows."""
        if not len(points.t):
            return points.z
        return check_output(self.net(points.z, points.t, points.t, **points.cond), points.z)

    def _average(self, points: Points, w: Tensor, tangent_grad: bool) -> tuple[Any, Any]:
        """u(z, r, t) and du/dt along (w, 0, 1)."""
        u_of_z_t = functools.partial(_with_r, self.net, points.r, points.cond)
        tangents = (w.to(points.z.dtype), torch.ones_like(points.t))
        return jvp(u_of_z_t, (points.z, points.t), tangents, tangent_grad, self.jvp)

    def _error(
        self,
        u: Tensor,
        target: Tensor,
        weight: Tensor | None,
        du: Any = None,
        interval: Any = None,
        lam: Tensor | None = None,
    ) -> LossTerms:
        """e = u + (t - r) SG_lam[du/dt] - v_target and its weighted square; by default with the adaptive weight
        (MeanFlow, eq. 22).

        Written out for autograd and the compiler; a kernel, where there is one, does the same in one pass, of a target
        that is a constant. Of learned data or noise it is none.
        """
        if weight is None and not target.requires_grad and serve("sg_loss", u):
            interval = target.new_zeros(len(u)) if interval is None else interval
            value, grad = (0.0, False) if lam is None else (lam, True)
            return sg_loss(u, du, interval, value, target, p=self.p, c=self.c, tangent_grad=grad)
        e = u.to(target.dtype) - target
        if du is not None:
            e = e + column(interval, u) * (du if lam is None else sg_lambda(du, lam)).to(target.dtype)
        square = e.square().flatten(1).sum(1)
        per_sample = square * ((square.detach() + self.c) ** -self.p if weight is None else weight)
        return LossTerms(per_sample.mean(), per_sample.detach(), square.detach())

    def _target(self, points: Points, v: Tensor, u_now: Tensor, u_later: Tensor | None) -> Tensor:
        """v, or the guided velocity built from it."""
        if self.guidance is None or not self.guidance.active:
            return v
        nulls = like_rows(self._nulls, points.cond)
        same = [(points.cond[name] == null).reshape(len(v), -1).all(1) for name, null in nulls.items()]
        u_class = torch.cat([u_now, u_later]) if self._guided_by_class and u_later is not None else None
        u_null = self._velocity(points._replace(cond={**points.cond, **nulls}))
        is_null = torch.stack(same).all(0)
        return self.guidance.target(v, u_class, u_null, points.t, is_null, points.cond)

    @property
    def _guided_by_class(self) -> bool:
        return self.guidance is not None and self.guidance.by_class

    @property
    def _nulls(self) -> dict[str, Tensor]:
        """The null values of conditions, which are buffers: they go where this module goes."""
        return {name: self.get_buffer(f"_null_{name}") for name in self.nullable}


def _trained_by(net: Any) -> set[int]:
    """The parameters that its training changes, by their identities."""
    return {id(p) for p in net.parameters() if p.requires_grad} if isinstance(net, nn.Module) else set()


def _with_r(net: Callable[..., Any], r: Tensor, cond: dict[str, Any], z: Tensor, t: Tensor) -> Any:
    return check_output(net(z, r, t, **cond), z)


def _errors(square: tuple[Tensor, Tensor], rows: int, share: float) -> dict[str, Tensor]:
    """Raw mean-square error per element, of all rows and of each kind: the weighted loss sits near 1 when p = 1.

    square: its sums over the instants and the intervals of these rows.  share: of the intervals in the global batch, so
    that the mean over its parts is that of the batch, and all of them have the same metrics.
    """
    instant, interval = square
    errors = {"mse": (instant + interval) / rows}
    if 0 < share < 1:
        errors |= {"mse_instant": instant / (rows * (1 - share)), "mse_interval": interval / (rows * share)}
    return errors

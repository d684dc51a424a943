"""The asynchronous learner: policy history + lag law + estimator + step rule -> a stream of records.

One update of one run: past versions of the policy sample `groups` x `group_size` trajectories; the estimator of the
catalogue turns rewards and log-ratios to the *current* policy into coefficients; the gradient is clipped, the step rule
sets the step, the optimizer makes it. Nothing here knows a formula: estimators, diagnostics and step rules are the
kernel's.

**Many runs advance in lock-step**, whatever their seeds, estimators, lags, step sizes and rules: arrays are
(run, group, sample, time), and each estimator is called once for all its runs. What a run does depends on nothing but
itself: its random numbers are those of (its seed, purpose, update), so runs of one seed see the same numbers under
every method (paired comparisons), and adding, removing or reordering runs changes no bit of the others.

Tokens are many and everything else is few, so what can be is said of tables (run, row, token), and tokens look it up.
In memory time comes first: what is summed over time are long rows.

>>> from vcposim.learning.learner import Learner
>>> from vcposim.learning.run_records import Run
>>> from vcposim.learning.lags import Lag
>>> from vcposim.learning.tasks import task
>>> runs = [Run("vcpo", seed=s, lag=Lag(4), step_size=0.05) for s in range(3)]
>>> learner = Learner(task("contextual_bandit"), runs, groups=8, group_size=8)
>>> [record.step for record in learner.updates(2)], learner.step
([0, 1], 2)
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from vcposim import diagnostics
from vcposim.arrays import Array, expectation, peak, saturating_exp
from vcposim.batch import Batch
from vcposim.control import MEMORY, Seen, norm_scale
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.gauges.tails import tail_index
from vcposim.learning.lags import History
from vcposim.learning.optimizers import AdamMoments, adam_direction, stepped
from vcposim.learning.run_records import Run, UpdateRecord, remembered_baseline
from vcposim.learning.streams import START, RandomNumbers, cumulative, generator, invert
from vcposim.learning.tables import Family, TableScores, Tabular, gradient, time_first, time_last
from vcposim.learning.tasks import LearningTask
from vcposim.problems.policies import log_and_softmax

CAP = 8.0
"""where the diagnostics' truncated ESS truncates, VCPO's own cap"""
LARGEST = 1e6
"""a norm of the parameters that no run leaves behind: beyond it, probabilities are 0 and 1 and gradients overflow"""
NO_LIMIT = 1e300
"""a limit of the gradient's norm that never binds"""
LARGEST_LOG = 300.0
"""where k3's exponential stops growing, nats: a distance beyond it says nothing more"""


@dataclass
class LearnerState:
    """All that an update reads and writes: copy it, and a learner resumes from there to the bit."""

    step: int
    theta: Array
    moments: AdamMoments
    prob: Array
    """of the current policy (run, rows, V)"""
    history: History
    """of log-probabilities (run, rows, V)"""
    cumulative: History
    """of their cumulative probabilities without the last (run, rows, V - 1), to sample from"""
    previous: Array
    """last gradient (run, p)"""
    typical_norm: Array
    """running mean of gradient norms (run,); infinite before the first"""
    remembered: Array
    """sums of a R and of a over each prompt's past responses, faded (run, prompt, 2): baselines with a memory"""
    reference: Array = field(repr=False)
    """log-probabilities of the start (run, rows, V): the reference policy of KL penalties"""


@dataclass(frozen=True)
class Drawn:
    """The trajectories of one update of all runs."""

    cell: Array
    """(run, group, n, time): which entry of a table (run, rows, V) each token is"""
    reward: Array
    """(run, group, n)"""
    log_ratio: Array
    """(run, group, n, time)"""
    log_weight: Array
    """(run, group, n): log-ratios of trajectories"""
    lag: Array
    """(run, group, time), or (run, 1, 1) where a run has one lag"""


class Learner:
    """Runs in lock-step on one task.

    Each update draws `groups` groups of `group_size` for each run; prompts take turns. `khat_every` and `truth_every`
    say on which updates (multiples; 0 for never) the costly fields of `UpdateRecord` are filled.

    Raises `InputError` without runs, or for a group too small for an estimator.
    """

    def __init__(
        self,
        task: LearningTask,
        runs: Sequence[Run],
        *,
        groups: int = 4,
        group_size: int = 8,
        family: Family | None = None,
        khat_every: int = 0,
        truth_every: int = 0,
    ) -> None:
        if not runs:
            raise InputError("runs: empty; pass at least one Run")
        if groups < 1:
            raise InputError(f"groups: {groups} is not positive; use 1 or more")
        self.task, self.groups, self.group_size = task, groups, group_size
        self.khat_every, self.truth_every = khat_every, truth_every
        self.family = family or Tabular(*task.logit.shape)
        by_estimator = sorted(range(len(runs)), key=lambda i: (repr(runs[i].estimator), runs[i].memory > 0))
        self._restore_order = np.argsort(by_estimator)
        self._in_order = by_estimator == list(range(len(runs)))
        self.runs = [runs[i] for i in by_estimator]
        kinds = [(run.resolved(), run.memory > 0) for run in self.runs]
        first = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
        self._parts = [(kinds[a], slice(a, b)) for a, b in zip(first, [*first[1:], len(kinds)], strict=True)]
        self._memory = np.array([run.memory for run in self.runs])
        for (estimator, _), _ in self._parts:
            estimator.require(group_size)
        self._controls = _positions([run.control for run in self.runs])
        self._laws = _positions([run.lag for run in self.runs])
        self._open_loop = bool(np.all(task.row == task.row[:, :1]))
        self._numbers = RandomNumbers([run.seed for run in self.runs], groups, group_size, task.chain.shape[0])
        self._limits = _positions([min(run.clip_norm, NO_LIMIT) for run in self.runs])
        self._lag = np.array([run.lag.k for run in self.runs])
        self._moves = [to.reshape(-1) * task.logit.shape[1] for to in task.chain.transition]
        self._step_size, self._decay = (
            np.array([getattr(run, name) for run in self.runs]) for name in ("step_size", "weight_decay")
        )
        self._betas = 0.9, np.array([run.beta2 for run in self.runs])[:, None]
        self._adam = np.array([run.optimizer == "adam" for run in self.runs])[:, None]
        self.state = self._initial()

    @property
    def step(self) -> int:
        """Updates made so far."""
        return self.state.step

    def updates(self, count: int) -> Iterator[UpdateRecord]:
        """Make `count` more updates, yielding a record of each. Stop and call again at will: nothing is lost."""
        for _ in range(count):
            yield self.update()

    def snapshot(self) -> LearnerState:
        """A copy of the state; assign it to `state` of a learner of the same runs to resume there."""
        return copy.deepcopy(self.state)

    def update(self) -> UpdateRecord:
        """One update of every run."""
        state, drawn = self.state, self._draw()
        scores = TableScores(self.family, state.theta, state.prob, drawn.cell)
        weight, group_gradient = self._coefficients(drawn, scores)
        found = scores.total(weight) / (self.groups * self.group_size)
        norm = np.sqrt(np.einsum("rp,rp->r", found, found))
        usable = np.isfinite(norm)  # the brake: where anything is not, the step is 0
        found, norm = np.where(usable[:, None], found, 0.0), np.where(usable, norm, np.inf)
        weights = _Weights.of(drawn.log_weight.reshape(len(self.runs), -1))
        ess_fraction = weights.ess_fraction
        needed = {name for control, _ in self._controls for name in control.entry.needs}
        tokens = drawn.log_ratio.reshape(len(self.runs), -1) if "token_ess_fraction" in needed else None
        seen = Seen(
            state.step,
            ess_fraction,
            drawn.lag.mean(axis=(1, 2)),
            norm,
            state.typical_norm,
            group_gradient,
            None if tokens is None else _Weights.of(tokens).ess_fraction,
            np.full((len(self.runs), state.step + 1), float(drawn.cell.shape[-1])) if "length" in needed else None,
        )
        scale = np.empty(len(self.runs))
        for control, members in self._controls:
            own = Seen(seen.step, *(x if x is None else x[members] for x in seen[1:]))
            scale[members] = control.scale(own)
        record = self._record(drawn, scores, weights, seen, scale, found)
        self._move(found, seen, scale)
        return record

    # --- one update, part by part -------------------------------------------------------------------------------------

    def _initial(self) -> LearnerState:
        starts = {}
        for run in self.runs:
            if run.seed not in starts:
                starts[run.seed] = self.family.parameters(self.task.start(generator(run.seed, START)))
        theta = np.stack([starts[run.seed] for run in self.runs])
        log_prob, prob = log_and_softmax(self.family.logit(theta))
        max_lag = max(run.lag.k for run in self.runs)
        return LearnerState(
            step=0,
            theta=theta,
            moments=AdamMoments.zeros(theta.shape),
            prob=prob,
            history=History(log_prob, max_lag + 1),  # one more for the anchor
            cumulative=History(cumulative(prob), max_lag + 1),
            previous=np.zeros_like(theta),
            remembered=np.zeros((len(self.runs), self.task.prompts, 2)),
            typical_norm=np.full(len(self.runs), np.inf),
            reference=log_prob.copy(),
        )

    def _draw(self) -> Drawn:
        # all arrays (time, run, group, n), or broadcast to it
        chain, history = self.task.chain, self.state.history
        (rows, vocabulary), runs = self.task.logit.shape, len(self.runs)
        if all(law.law == "fixed" for law, _ in self._laws):  # nothing to draw
            lag = self._lag[:, None, None]
        else:
            drawn = self._numbers.lags(self.state.step)
            lag = np.empty((runs, self.groups, chain.shape[0]), dtype=np.int64)
            for law, members in self._laws:
                lag[members] = law.of_tokens(drawn[members], chain.shape[0])
        lag = np.minimum(lag, history.pushed - 1)  # no version is older than the first
        uniform = self._numbers.tokens(self.state.step)
        slot = history.slot(lag)
        version = time_first(slot[:, :, None]) * (runs * rows)  # first row of the version that samples
        first = np.arange(runs)[:, None, None] * rows
        steps = self.state.cumulative.ring.reshape(-1, vocabulary - 1)
        prompt = self._prompt()
        state = np.broadcast_to(chain.start[prompt][:, None] * vocabulary, uniform.shape[1:])  # states times V
        if self._open_loop:
            row = first + self.task.row[:, :1, None, None]
            token = invert(steps[version + row], uniform)
            for chosen, move in zip(token, self._moves, strict=True):
                state = move.take(state + chosen)
        else:
            row, token = (np.empty(uniform.shape, dtype=np.int64) for _ in range(2))
            version = np.broadcast_to(version, (len(uniform), *version.shape[1:]))
            for t, move in enumerate(self._moves):
                row[t] = first + self.task.row[t][state // vocabulary]
                token[t] = invert(steps[version[t] + row[t]], uniform[t])
                state = move.take(state + token[t])
        cell = row * vocabulary + token
        if lag[0].size == 1:  # one version a run: compare tables, and look up their difference
            stale = history.ring[slot[:, 0, 0], np.arange(runs)]
            log_ratio = (history.newest - stale).reshape(-1).take(cell)
        else:
            stale = history.ring.reshape(-1).take(cell + version * vocabulary)
            log_ratio = history.newest.reshape(-1).take(cell) - stale
        reward = chain.reward[state // vocabulary]
        return Drawn(time_last(cell), reward, time_last(log_ratio), log_ratio.sum(axis=0), lag)

    def _coefficients(self, drawn: Drawn, scores: TableScores) -> tuple[Array, Array | None]:
        """Coefficients of all runs, per trajectory or per token, and each group's gradient if a step rule asks."""
        found = []
        for (estimator, remembers), part in self._parts:
            own = scores if len(self._parts) == 1 else scores.part(part)
            batch = self._batch(estimator.needs, drawn, own, part)
            if remembers and isinstance(estimator, Estimator):
                b, self.state.remembered[part] = remembered_baseline(
                    estimator, batch, self.state.remembered[part], self._prompt(), self._memory[part]
                )
                batch = replace(batch, population_baseline=b)
                estimator = replace(estimator, baseline="population")
            found.append((part, estimator.coefficients(batch)))
        if all(c.ndim == 3 for _, c in found):
            weight = np.concatenate([c for _, c in found])
        else:
            weight = time_last(np.empty(time_first(drawn.cell).shape))
            for part, c in found:
                weight[part] = c if c.ndim == 4 else c[..., None]
        if any("group_gradient" in control.entry.needs for control, _ in self._controls):
            return weight, scores.combine(weight / self.group_size)
        return weight, None

    def _prompt(self) -> Array:
        """The prompt of each group of this update: they take turns."""
        return (self.state.step * self.groups + np.arange(self.groups)) % self.task.prompts

    def _batch(self, needs: frozenset[str], drawn: Drawn, scores: TableScores, part: slice) -> Batch:
        history = self.state.history
        log_prob = history.newest[part]
        extra: dict[str, Callable[[], Array]] = {
            "log_prob": lambda: scores.at(log_prob),
            "collision": lambda: scores.at(scores.collision),
            # the proximal policy of decoupled PPO: the learner one update ago, or itself where it learns on policy
            "anchor_log_ratio": lambda: scores.at(
                log_prob - history.ring[history.slot(np.minimum(self._lag[part], 1)), np.arange(len(self.runs))[part]]
            ),
            "reference_log_ratio": lambda: scores.at(log_prob - self.state.reference[part]).sum(axis=-1),
        }
        optional: dict[str, Any] = {name: extra[name]() for name in sorted(needs & extra.keys())}
        return Batch(
            reward=drawn.reward[part],
            log_ratio=(drawn.log_ratio if "tokens" in needs else drawn.log_weight)[part],
            scores=scores,
            length=np.full(drawn.reward[part].shape, float(drawn.cell.shape[-1])),
            grouped=True,
            **optional,
        )

    def _record(
        self, drawn: Drawn, scores: TableScores, weights: "_Weights", seen: Seen, scale: Array, found: Array
    ) -> UpdateRecord:
        prob, measure = self.state.prob, weights.measure
        row_entropy = -np.einsum("rtv,rtv->rt", prob, self.state.history.newest)[..., None]
        # where every trajectory passes every row, all rows count the same
        entropy = row_entropy.mean(axis=(1, 2)) if self._open_loop else scores.at(row_entropy).mean(axis=(1, 2, 3))
        true_ess = true_cosine = None
        if self._due(self.truth_every):
            true_ess = self._true_ess(prob, drawn)
            true = gradient(self.family, self.state.theta, prob, self.task.flow(prob))
            size = np.sqrt(np.sum(true * true, axis=-1) * np.sum(found * found, axis=-1))
            true_cosine = np.divide(np.sum(true * found, axis=-1), size, out=np.zeros_like(size), where=size > 0)
        record = UpdateRecord(
            step=seen.step,
            value=self.task.value(prob),
            reward=drawn.reward.mean(axis=(1, 2)),
            ess_fraction=seen.ess_fraction,
            truncated_ess_fraction=_ess_fraction(weights.capped(CAP), measure),
            mean_weight=weights.mean * saturating_exp(weights.top[:, 0]),
            max_share=measure / weights.mean,  # the largest relative weight is 1
            kl=diagnostics.kl_low_variance(np.minimum(weights.log, LARGEST_LOG), measure),
            chi2=diagnostics.chi2_of_weights(weights.saturated, measure),
            entropy=entropy,
            gradient_norm=seen.norm,
            step_scale=scale,
            lag=seen.lag,
            khat=np.array([tail_index(x) for x in weights.log]) if self._due(self.khat_every) else None,
            true_ess_fraction=true_ess,
            true_cosine=true_cosine,
        )
        if self._in_order:
            return record
        given: dict[str, Any] = {
            f.name: x[self._restore_order] if isinstance(x := getattr(record, f.name), np.ndarray) else x
            for f in fields(record)
        }
        return UpdateRecord(**given)

    def _due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    def _true_ess(self, prob: Array, drawn: Drawn) -> Array:
        """1 / E_mu[w^2] over the batch's own versions, exact."""
        history, row = self.state.history, self.task.row
        moment = np.zeros(len(self.runs))
        position = np.empty(prob.shape[1], dtype=np.int64)  # of each row; a row has one position
        for t in range(len(row)):
            position[row[t]] = t
        slot = history.slot(np.broadcast_to(drawn.lag, (len(prob), self.groups, len(row))))
        for g in range(self.groups):
            version = slot[:, g][:, position]
            behavior = history.ring[version, np.arange(len(prob))[:, None], np.arange(prob.shape[1])]
            moment += self.task.second_moment(prob, np.exp(behavior)) / self.groups
        return 1 / moment

    def _move(self, found: Array, seen: Seen, scale: Array) -> None:
        state, turned, size = self.state, found.copy(), seen.norm.copy()
        for control, members in self._controls:
            if control.entry.turn is not None:
                turned[members] = control.turned(found[members], state.previous[members])
                size[members] = np.sqrt(np.sum(turned[members] ** 2, axis=-1))
        shrink = np.empty(len(self.runs))
        for limit, members in self._limits:
            shrink[members] = norm_scale(size[members], limit)
        turned *= shrink[:, None]
        direction = np.where(self._adam, adam_direction(state.moments, turned, beta=self._betas), turned)
        moved = stepped(state.theta, direction, self._step_size * scale, self._decay)
        # a run whose parameters leave the range of floats stands still from then on, and the others go on
        with np.errstate(over="ignore", invalid="ignore"):
            within = np.einsum("rp,rp->r", moved, moved) < LARGEST * LARGEST
        state.theta = np.where(within[:, None], moved, state.theta)
        state.previous = found
        finite = np.where(np.isfinite(seen.norm), seen.norm, 0.0)
        known = np.isfinite(state.typical_norm)
        typical = np.where(known, state.typical_norm, 0.0)
        state.typical_norm = np.where(known, MEMORY * typical + (1 - MEMORY) * finite, finite)
        log_prob, state.prob = log_and_softmax(self.family.logit(state.theta))
        state.history.push(log_prob)
        state.cumulative.push(cumulative(state.prob))
        state.step += 1


# --- helpers ----------------------------------------------------------------------------------------------------------


def _positions(keys: list[Any]) -> list[tuple[Any, list[int] | slice]]:
    found: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    if len(found) == 1:
        return [(keys[0], slice(None))]  # all of them: a view instead of a copy
    return list(found.items())


@dataclass(frozen=True)
class _Weights:
    """Sequence weights of each run's batch, (run, batch) each, from one exponential."""

    log: Array
    measure: float
    """1 / batch, of each"""
    top: Array
    """the largest log-weight (run, 1)"""
    relative: Array
    """up to a factor: the largest is 1"""
    mean: Array
    """of the relative weights (run,)"""
    saturated: Array
    """themselves, at most so large that their squares are finite"""

    @classmethod
    def of(cls, log_weight: Array) -> "_Weights":
        measure = 1 / log_weight.shape[-1]
        top = peak(log_weight, measure)
        relative = np.exp(log_weight - top)
        mean = expectation(relative, measure)
        return cls(log_weight, measure, top, relative, mean, relative * saturating_exp(top))

    @property
    def ess_fraction(self) -> Array:
        """ESS / n (run,)."""
        return _ess_fraction(self.relative, self.measure)

    def capped(self, cap: float) -> Array:
        """min(w, cap) up to a factor: the largest is 1."""
        limit = np.log(cap)
        return np.exp(np.minimum(self.log, limit) - np.minimum(self.top, limit))


def _ess_fraction(relative: Array, measure: float) -> Array:
    return np.minimum(diagnostics.ess_fraction_of_weights(relative, measure), 1.0)  # rounding aside

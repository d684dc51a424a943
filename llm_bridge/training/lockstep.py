"""Many runs of one small model in lock-step: their weights are stacked, and each operation serves all runs at once.

    runs = LockStep([TrainConfig(estimator=e, seed=s, ...) for e in estimators for s in range(8)], lm=lm)
    for record in runs.updates():
        print(record["step"], record["reward"], record["ess_fraction"])         # (run,) each
    print(runs.evaluate(256))                                                   # success rates (run,)

A small model trains slowly one run at a time: an operation is over before the next is dispatched, and sampling is a
loop over tokens. Here a token of all runs is one step. What runs begin with is the same, so what version 0 samples (all
of the first `lag` updates) is drawn once for all runs of a seed.

**A run is that of `Trainer`** with the same configuration, to the rounding of sums: same problems, random numbers,
coefficients (one call of the kernel for all runs of an estimator), optimizer. Nothing in it depends on the other runs.
What is left out is refused by name: ranks, other optimizers and precisions, older policies, other laws of lag.

Score norms are exact. The products x W of the network are known by their inputs x and the gradients g of their outputs:
the gradient of trajectory i is sum_t g_it x_it, and that of a batch sum_i c_i of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_bridge.models.language_model import LanguageModel
from llm_bridge.rollouts import OpenTrajectory, Sampler, draw
from llm_bridge.static_sampler import served
from llm_bridge.tasks.base import Task
from llm_bridge.training.config import TrainConfig
from llm_bridge.training.gradient import token_coefficients
from llm_bridge.training.schedule import Schedule
from llm_bridge.training.trainer import HELD_OUT, training_task
from vcposim import diagnostics
from vcposim.arrays import Array
from vcposim.batch import Batch, ScoreNorms
from vcposim.catalogue.trainers import ALWAYS
from vcposim.control import EXPONENTS, MEMORY, Seen, norm_scale, step_rule
from vcposim.errors import InputError
from vcposim.estimators import NEEDS
from vcposim.learning.optimizers import AdamMoments, adam_direction

ALIKE = ("task", "task_options", "groups", "group_size", "max_new_tokens", "temperature", "updates", "problems")
"""what runs in lock-step have in common; they may differ in method, step size, lag and seed"""
PLAIN: dict[str, str | float] = {
    "lag_law": "fixed", "optimizer": "adam", "weight_decay": 0.0, "micro_batch": 0, "sharding": "none", "norm": "exact",
    "ess_reference": 1.0, "memory": 0.0,
}  # fmt: skip
"""settings with one value here"""
KNOWN_TO_RULES = frozenset({"ess_fraction", "lag", "norm", "typical_norm", "step"})
"""what step rules may look at here"""
NOT_READ = NEEDS - ALWAYS - {"log_prob"}
"""what estimators may not ask of a batch here"""


class Stack:
    """The weights of `runs` equal Llamas as one array `theta` (run, p), and their forward.

    Raises `InputError` for another network than a plain Llama with untied embeddings and a key for each head.
    """

    def __init__(self, model: Any, runs: int) -> None:
        c = model.config
        if not served(model) or c.tie_word_embeddings or c.num_key_value_heads != c.num_attention_heads:
            raise InputError("model: lock-step knows plain Llamas with untied embeddings; use 'char', or one Trainer")
        self.heads, self.eps, self.layers = c.num_attention_heads, c.rms_norm_eps, c.num_hidden_layers
        self.padding = model.model.embed_tokens.padding_idx
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.theta = torch.cat([p.detach().flatten() for p in model.parameters()]).repeat(runs, 1)
        self.inv_freq = model.model.rotary_emb.inv_freq.float()

    def weights(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of some rows of `theta` (run, p), (run, *shape) by name."""
        parts = theta.split([shape.numel() for shape in self.shapes.values()], 1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


@dataclass
class Tap:
    """One use of a weight: its name, input x and output y, (run, n, t, ...); `product` for x W, else elementwise."""

    name: str
    x: Tensor
    y: Tensor
    product: bool


class Forward:
    """One pass, or the steps of a generation, of stacked Llamas: `weights` (run, ...) by name.

    `slots`: the length of the key-value cache, 0 for none; with `taps`, the uses of weights are noted for gradients.
    """

    def __init__(self, stack: Stack, weights: dict[str, Tensor], *, rows: int = 0, slots: int = 0, taps: bool = False):
        self.stack, self.weights, self.position = stack, weights, 0
        self.taps: list[Tap] | None = [] if taps else None
        head = weights["lm_head.weight"]
        self.vocabulary, size = head.shape[1:]
        shape = (len(head) * rows, stack.heads, slots, size // stack.heads)
        self.cache = [(head.new_empty(shape), head.new_empty(shape)) for _ in range(stack.layers if slots else 0)]

    def hidden(self, token: Tensor) -> Tensor:
        """Tokens (run, n, t) that follow those before -> (run, n, t, d), normalized."""
        chosen = F.one_hot(token, self.vocabulary).to(self.stack.theta.dtype)
        x = self._product("model.embed_tokens.weight", chosen)
        if self.taps is not None and self.stack.padding is not None:
            chosen[..., self.stack.padding] = 0  # as torch's embedding, whose padding learns nothing; a tap holds this
        angle = torch.arange(self.position, self.position + token.shape[2])[:, None].float() * self.stack.inv_freq
        angle = torch.cat([angle, angle], -1)
        turn = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for i in range(self.stack.layers):
            at = f"model.layers.{i}."
            y = self._norm(at + "input_layernorm.weight", x)
            q, k, v = (self._product(f"{at}self_attn.{name}_proj.weight", y) for name in "qkv")
            x = x + self._product(at + "self_attn.o_proj.weight", self._attend(i, q, k, v, turn))
            y = self._norm(at + "post_attention_layernorm.weight", x)
            gate, up = (self._product(f"{at}mlp.{name}_proj.weight", y) for name in ("gate", "up"))
            x = x + self._product(at + "mlp.down_proj.weight", F.silu(gate) * up)
        self.position += token.shape[2]
        return self._norm("model.norm.weight", x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states: (run, n, t, d) -> (run, n, t, V)."""
        return self._product("lm_head.weight", hidden)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = turn
        q, k, v = (x.flatten(0, 1).unflatten(-1, (self.stack.heads, -1)).transpose(1, 2) for x in (q, k, v))
        q, k = (x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (q, k))
        whole = self.position == 0
        if self.cache:
            end = self.position + q.shape[2]
            for kept, new in zip(self.cache[layer], (k, v), strict=True):
                kept[:, :, self.position : end] = new
            k, v = (kept[:, :, :end] for kept in self.cache[layer])
        out = F.scaled_dot_product_attention(q, k, v, is_causal=whole)
        return out.transpose(1, 2).flatten(2).unflatten(0, (len(self.weights["lm_head.weight"]), -1))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return self._tapped(name, F.rms_norm(x, x.shape[-1:], eps=self.stack.eps), product=False)

    def _product(self, name: str, x: Tensor) -> Tensor:
        return self._tapped(name, x, product=True)

    def _tapped(self, name: str, x: Tensor, product: bool) -> Tensor:
        w = self.weights[name]
        if not product:
            y = x * w[:, None, None]
        else:
            w = w if name == "model.embed_tokens.weight" else w.mT
            y = (x.flatten(1, 2) @ w).unflatten(1, x.shape[1:3])
        if self.taps is not None:
            y = y if y.requires_grad else y.requires_grad_()  # the first of all: weights themselves are constants
            self.taps.append(Tap(name, x.detach(), y, product))
        return y


def sq_norms(taps: Sequence[Tap], gradients: Sequence[Tensor]) -> Tensor:
    """Squared norms of the gradients of each trajectory, from those of the outputs: (run, n)."""
    total = torch.zeros(taps[0].x.shape[:2], dtype=torch.float64)
    for tap, g in zip(taps, gradients, strict=True):
        each = g.mT @ tap.x if tap.product else (g * tap.x).sum(2)
        total += each.square().flatten(2).sum(-1)
    return total.to(taps[0].x.dtype)


def summed(stack: Stack, taps: Sequence[Tap], gradients: Sequence[Tensor]) -> Tensor:
    """Gradients of all weights, summed over trajectories: (run, p)."""
    found = {}
    for tap, g in zip(taps, gradients, strict=True):
        x, g = tap.x.flatten(1, 2), g.flatten(1, 2)
        if not tap.product:
            found[tap.name] = (g * x).sum(1)
        else:
            found[tap.name] = x.mT @ g if tap.name == "model.embed_tokens.weight" else g.mT @ x
    return torch.cat([found[name].flatten(1) for name in stack.shapes], 1)


@dataclass(frozen=True)
class DrawnRuns:
    """Trajectories of one update of several runs, (run, n, ...): as `Rollouts`, but for what no update reads."""

    token: Tensor
    mask: Tensor
    behavior_log_prob: Tensor
    reward: Tensor

    def cut(self, rows: Any) -> "DrawnRuns":
        """Some runs."""
        return DrawnRuns(*(getattr(self, f.name)[rows] for f in fields(self)))


class LockStep:
    """Runs of `configs` from the weights of `lm`, which are left as they are. `task` replaces what they name, for all
    seeds; `chunk` runs at a time pass through the network, which bounds memory and changes nothing.

    Raises `InputError` for configurations that cannot go in lock-step: it names the setting.
    """

    def __init__(
        self, configs: Sequence[TrainConfig], *, lm: LanguageModel, task: Task | None = None, chunk: int = 16
    ) -> None:
        if not configs:
            raise InputError("configs: none given; a lock-step needs at least one run")
        self.configs, self.lm, self.chunk, self.version = list(configs), lm, chunk, 0
        self._refuse_what_cannot_be()
        first = self.first = configs[0]
        self.stack = Stack(lm.model, len(configs))
        self.seed, self.lag = [c.seed for c in configs], [c.lag for c in configs]
        self.samplers = {
            seed: Sampler(
                training_task(replace(first, seed=seed), task),
                first.group_size, first.max_new_tokens, seed, first.temperature,
            )
            for seed in dict.fromkeys(self.seed)
        }  # fmt: skip
        self.estimators = [c.resolved() for c in configs]
        self.per_token = [token_coefficients(e, first.group_size) for e in self.estimators]
        self.controls = [c.control(EXPONENTS["adam"]) for c in configs]
        shape = (len(configs), self.stack.theta.shape[1])
        self.moments = AdamMoments.zeros(shape)
        self.typical_norm = np.full(len(configs), np.inf)
        self.waiting: list[dict[int, DrawnRuns]] = [{} for _ in configs]
        """of each run, by update"""
        self._planned = lru_cache(maxsize=None)(self._plan)

    @property
    def theta(self) -> Tensor:
        """The weights of all runs: (run, p)."""
        return self.stack.theta

    def updates(self, count: int | None = None) -> Iterator[dict[str, Array]]:
        """Make `count` more updates (default: up to the configurations'), yielding a record of each."""
        last = self.first.updates if count is None else self.version + count
        while self.version < last:
            yield self.update()

    def update(self) -> dict[str, Array]:
        """One update of every run. Its record: `step`, and (run,) arrays of reward, lag, ess_fraction, mean_weight,
        gradient_norm, step_scale."""
        self._generate()
        drawn = [waiting.pop(self.version) for waiting in self.waiting]
        gradient = torch.empty_like(self.theta)
        log_weight = np.empty((len(self.configs), len(drawn[0].reward[0])))
        alike: dict[Any, list[int]] = {}  # runs of one estimator pass through the network together
        for i, estimator in enumerate(self.estimators):
            alike.setdefault(estimator, []).append(i)
        for rows in (rows for members in alike.values() for rows in self._chunks(members)):
            batch = _stacked([drawn[i] for i in rows])
            gradient[rows], log_weight[rows] = self._gradient(rows, batch)
        record = self._step(gradient.double().numpy(), log_weight)
        reward = np.array([float(d.reward.mean()) for d in drawn])
        self._planned.cache_clear()
        self.version += 1
        return {"step": np.array(self.version - 1), "reward": reward, **record}

    def evaluate(self, problems: int = 256) -> Array:
        """Success rates on held-out problems, one response each, as `Trainer.evaluate` has them: (run,)."""
        return self.success(range(HELD_OUT, HELD_OUT + problems)).mean(axis=1)

    def success(self, problems: Sequence[int], responses: int = 1) -> Array:
        """The share of `responses` to each of these problems that solve it: (run, problem).

        Random numbers are those of the problem's number: ask for numbers that no update trains on.
        """
        index = tuple(problems)
        found = np.empty((len(self.configs), len(index)))
        for rows in self._chunks(range(len(self.configs))):
            drawn = self._sample(self.theta[rows], [(self.seed[i], index, responses) for i in rows])
            solved = (drawn.reward >= 1).double().unflatten(1, (len(index), responses))
            found[rows] = solved.mean(2).numpy()
        return found

    # --- sampling -----------------------------------------------------------------------------------------------------

    def _generate(self) -> None:
        """Draw what is due at this version; at version 0 all weights are equal, so once for all runs of a seed."""
        size, now = self.first.group_size, self.version
        due: dict[tuple[int, int], list[int]] = {}
        for i, config in enumerate(self.configs):
            schedule = Schedule(config.law, config.groups, config.seed, config.updates)
            for update in dict.fromkeys(slot.update for slot in schedule.due(now)):
                due.setdefault((update, config.seed if now == 0 else i), []).append(i)
        jobs = list(due.items())
        for part in self._chunks(range(len(jobs))):
            chosen = [jobs[j] for j in part]
            asked = []
            for (update, _), members in chosen:
                config = self.configs[members[0]]
                problems = tuple(range(update * config.groups, (update + 1) * config.groups))
                asked.append((config.seed, problems, size))
            drawn = self._sample(self.theta[[members[0] for _, members in chosen]], asked)
            for j, ((update, _), members) in enumerate(chosen):
                for i in members:
                    self.waiting[i][update] = drawn.cut(slice(j, j + 1))

    def _plan(self, seed: int, problems: tuple[int, ...], size: int) -> tuple[list[OpenTrajectory], Array]:
        """Rows with nothing drawn yet, and the numbers that choose their tokens: those of `Sampler`."""
        sampler = replace(self.samplers[seed], group_size=size)
        rows = sampler.start(self.lm, problems).rows
        return rows, np.stack([sampler._uniform(row) for row in rows])

    @torch.no_grad()
    def _sample(self, theta: Tensor, asked: Sequence[tuple[int, tuple[int, ...], int]]) -> DrawnRuns:
        """Trajectories of the runs with these weights: (seed, problems, responses to each) of each."""
        planned = [self._planned(*a) for a in asked]
        rows = [replace(row, ids=list(row.ids), responses=[]) for some, _ in planned for row in some]
        samplers = [self.samplers[a[0]] for a, (some, _) in zip(asked, planned, strict=True) for _ in some]
        uniform = torch.from_numpy(np.concatenate([u for _, u in planned]))
        runs, count, limit = len(asked), len(rows), self.lm.max_length
        token = torch.full((count, limit), self.lm.pad_id)
        for i, row in enumerate(rows):
            token[i, : len(row.ids)] = torch.tensor(row.ids)
        known = torch.tensor([len(row.ids) for row in rows])
        mask, log_prob = torch.zeros(count, limit, dtype=torch.bool), torch.zeros(count, limit)
        ordinal, done = torch.zeros(count, dtype=torch.long), torch.tensor([row.done for row in rows])
        column, read = int(known.min()), 0
        forward = Forward(self.stack, self.stack.weights(theta), rows=count // runs, slots=limit)
        while column < limit and not bool(done.all()):
            hidden = forward.hidden(token[:, read:column].unflatten(0, (runs, -1)))
            logits = forward.logits(hidden[:, :, -1:]).flatten(0, 2)
            read, own = column, (known == column) & ~done
            choice = uniform.gather(1, ordinal.clamp(max=uniform.shape[1] - 1)[:, None])[:, 0]
            drawn, value = draw(logits, choice, self.first.temperature)
            token[own, column], log_prob[own, column], mask[own, column] = drawn[own], value[own], True
            ordinal += own
            known += own
            column += 1
            over = own & ((drawn == self.lm.eos_id) | (ordinal == self.first.max_new_tokens) | (column == limit))
            for i in over.nonzero()[:, 0].tolist():
                self._turn(samplers[i], rows[i], token[i], column, int(ordinal[i]))
                done[i], known[i] = rows[i].done, len(rows[i].ids)
                token[i, column : len(rows[i].ids)] = torch.tensor(rows[i].ids[column:])
        reward = [s.task.reward(s.task.problem(r.problem), r.responses) for s, r in zip(samplers, rows, strict=True)]
        parts = (token[:, :column], mask[:, :column], log_prob[:, :column], torch.tensor(reward))
        return DrawnRuns(*(x.unflatten(0, (runs, -1)) for x in parts))

    def _turn(self, sampler: Sampler, row: OpenTrajectory, token: Tensor, column: int, own: int) -> None:
        """What `Sampler` does at the end of a turn."""
        row.ids, row.own = token[:column].tolist(), [0] * own
        sampler._turn(self.lm, row, sampler.task.problem(row.problem))

    # --- learning -----------------------------------------------------------------------------------------------------

    def _chunks(self, rows: Sequence[int]) -> list[list[int]]:
        return [list(rows[i : i + self.chunk]) for i in range(0, len(rows), self.chunk)]

    def _gradient(self, rows: list[int], drawn: DrawnRuns) -> tuple[Tensor, Array]:
        """Gradients (run, p), uphill, and log-ratios (run, n) of the runs of one estimator."""
        estimator, per_token = self.estimators[rows[0]], self.per_token[rows[0]]
        forward = Forward(self.stack, self.stack.weights(self.theta[rows]), taps=True)
        first = int(drawn.mask.any(1).any(0).long().argmax())
        hidden = forward.hidden(drawn.token[:, :, :-1])
        logits = forward.logits(hidden[:, :, first - 1 :])
        assert forward.taps is not None
        log_p = torch.log_softmax(logits / self.first.temperature, -1)
        log_prob = log_p.gather(-1, drawn.token[:, :, first:, None])[..., 0]
        mask, behavior = drawn.mask[:, :, first:], drawn.behavior_log_prob[:, :, first:]
        own = torch.where(mask, log_prob, 0.0)
        outputs = [tap.y for tap in forward.taps]
        norms, scores = "scores" in estimator.needs, None
        if norms:
            gradients = torch.autograd.grad(own.sum(), outputs, retain_graph=per_token)
            scores = ScoreNorms(self._grouped(sq_norms(forward.taps, gradients)))
        log_ratio = torch.where(mask, log_prob.detach() - behavior, 0.0)
        batch = Batch(
            reward=self._grouped(drawn.reward.to(log_ratio.dtype)),
            log_ratio=self._grouped(log_ratio),
            length=self._grouped(mask.sum(-1).to(log_ratio.dtype)),
            token_mask=self._grouped(mask.to(log_ratio.dtype)),
            scores=scores,
            log_prob=self._grouped(own.detach()) if "log_prob" in estimator.needs else None,
            grouped=True,
        )
        c = estimator.coefficients(batch).flatten(1, 2) / mask.shape[1]
        if norms and not per_token:
            gradients = tuple(c[:, :, None, None] * g for g in gradients)
        else:
            each = c if per_token else c[..., None]
            gradients = torch.autograd.grad((each * own).sum(), outputs)
        return summed(self.stack, forward.taps, gradients), log_ratio.double().sum(-1).numpy()

    def _grouped(self, x: Tensor) -> Tensor:
        """(run, n, ...) -> (run, group, sample, ...)"""
        return x.unflatten(1, (self.first.groups, -1))

    def _step(self, gradient: Array, log_weight: Array) -> dict[str, Array]:
        """Clip, scale and step as `llm_bridge.training.steps` does, for all runs."""
        runs = len(self.configs)
        norm = np.sqrt((gradient * gradient).sum(-1))
        sums = [diagnostics.weight_sums(x) for x in log_weight]
        ess = np.array([float(s.ess_fraction()) for s in sums])
        lag = np.minimum(self.lag, self.version).astype(float)
        scale = np.empty(runs)
        for i, control in enumerate(self.controls):
            seen = Seen(self.version, *(x[i : i + 1] for x in (ess, lag, norm, self.typical_norm)))
            scale[i] = control.scale(seen)[0]
        scale = np.where(np.isfinite(norm) & (ess > 0), scale, 0.0)  # fails closed, whatever the rule says
        for i, config in enumerate(self.configs):
            if np.isfinite(config.clip_norm) and np.isfinite(norm[i]):
                gradient[i] *= norm_scale(norm[i], config.clip_norm)
        going = scale > 0
        some = AdamMoments(*(getattr(self.moments, f.name)[going] for f in fields(AdamMoments)))
        size = np.array([c.lr for c in self.configs]) * scale
        moved = size[going, None] * adam_direction(some, gradient[going])
        for f in fields(AdamMoments):
            getattr(self.moments, f.name)[going] = getattr(some, f.name)
        self.theta[torch.from_numpy(going)] += torch.from_numpy(moved).to(self.theta.dtype)
        known = np.isfinite(self.typical_norm)
        faded = np.where(known, MEMORY * np.where(known, self.typical_norm, 0.0) + (1 - MEMORY) * norm, norm)
        self.typical_norm = np.where(np.isfinite(norm), faded, self.typical_norm)
        mean_weight = np.exp([float(s.log_mean()) for s in sums])
        return {
            "lag": lag, "ess_fraction": ess, "mean_weight": mean_weight, "gradient_norm": norm, "step_scale": scale,
        }  # fmt: skip

    def _refuse_what_cannot_be(self) -> None:
        first = self.configs[0]
        for config in self.configs:
            for name in ALIKE:
                if getattr(config, name) != getattr(first, name):
                    raise InputError(
                        f"{name}: {getattr(config, name)!r} beside {getattr(first, name)!r}; runs in lock-step share it"
                    )
            for name, value in PLAIN.items():
                if getattr(config, name) != value:
                    raise InputError(f"{name}: {getattr(config, name)!r}; in lock-step it is {value!r}, or use Trainer")
            rule = step_rule(config.step_rule)
            if rule.turn is not None or rule.needs - KNOWN_TO_RULES:
                raise InputError(f"step_rule: {config.step_rule!r} looks at what lock-step does not keep; use Trainer")
            if missing := config.resolved().needs & NOT_READ:
                raise InputError(
                    f"estimator: asks for {', '.join(sorted(missing))}; lock-step does not read it; use Trainer"
                )
        if first.max_new_tokens < 1:
            raise InputError("max_new_tokens: 0; lock-step needs trajectories with tokens, at least 1")


def _stacked(parts: Sequence[DrawnRuns]) -> DrawnRuns:
    """Runs one below the other, padded on the right to the longest."""
    width = max(part.token.shape[2] for part in parts)

    def joined(name: str) -> Tensor:
        values = [getattr(part, name) for part in parts]
        return torch.cat([F.pad(x, (0, width - x.shape[2])) if x.dim() == 3 else x for x in values])

    return DrawnRuns(*(joined(f.name) for f in fields(DrawnRuns)))

"""`python -m simulations.bench.learning`: run-steps per second of the learner, beside the same loop in batched PyTorch.

The PyTorch loop is what one would write for this task: a batch of runs, `multinomial` for the tokens,
autograd of the surrogate, OPOB from closed-form norms, ESS scaling, clipping per run and Adam. It knows this one task,
estimator, optimizer and lag law, and that all tokens can be drawn at once. *Same work*: with the diagnostics that the
learner records at every update. *Bare*: without any; the learner still records them all. float32 and float64; the
learner is float64. One thread each; the two take turns, and the ratio is the median over rounds of CPU times measured
next to each other.

Then the learner alone: seconds per update against runs, updates and lag, and the bytes of its state against the lag.
"""

import argparse
import json
import pickle
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vcposim.learning.lags import Lag
from vcposim.learning.learner import Learner
from vcposim.learning.run_records import Run
from vcposim.learning.step_rules import Control
from vcposim.learning.tasks import task

TASK, GROUPS, GROUP_SIZE, CAP, STEP_SIZE = "exact_match_8", 4, 8, 8.0, 0.05


class TorchLoop:
    """VCPO on the exact-match task, `runs` at once, in PyTorch."""

    def __init__(self, runs: int, lag: int, dtype: torch.dtype, *, bare: bool = False) -> None:
        problem = task(TASK)
        torch.manual_seed(0)
        start = torch.tensor(problem.logit, dtype=dtype)
        self.logit = (start + 0.3 * torch.randn(runs, *start.shape, dtype=dtype)).requires_grad_()
        self.target = torch.arange(start.shape[0]) % start.shape[1]
        self.optimizer = torch.optim.Adam([self.logit], lr=STEP_SIZE)
        self.history: list[Tensor] = []
        self.lag, self.bare = lag, bare

    def update(self) -> dict[str, Tensor]:
        """One update of every run, and its record."""
        runs, length, vocabulary = self.logit.shape
        log_prob = self.logit.log_softmax(-1)
        self.history = [*self.history[-self.lag :], log_prob.detach()] if self.lag else [log_prob.detach()]
        behavior = self.history[0]
        flat = torch.multinomial(behavior.exp().reshape(-1, vocabulary), GROUPS * GROUP_SIZE, replacement=True)
        token = flat.reshape(runs, length, GROUPS, GROUP_SIZE).permute(0, 2, 3, 1)
        reward = (token == self.target).all(-1).to(self.logit.dtype)
        taken = self._at(log_prob, token).sum(-1)
        with torch.no_grad():
            log_ratio = taken - self._at(behavior, token).sum(-1)
            prob = log_prob.exp()
            token_norm = 1 - 2 * prob + (prob * prob).sum(-1, keepdim=True)
            norm = self._at(token_norm, token).sum(-1)
            weight = log_ratio.exp()
            capped = weight.clamp(max=CAP)
            mass = capped * capped * norm
            baseline = (mass * reward).sum(-1, keepdim=True) / mass.sum(-1, keepdim=True)
            coefficient = capped * (reward - baseline) / (GROUPS * GROUP_SIZE)
        self.optimizer.zero_grad()
        (-coefficient * taken).sum().backward()
        return self._step(reward, weight, capped, log_ratio, prob, log_prob)

    def _at(self, table: Tensor, token: Tensor) -> Tensor:
        runs, length, vocabulary = table.shape
        spread = table[:, None, None].expand(runs, GROUPS, GROUP_SIZE, length, vocabulary)
        return spread.gather(-1, token[..., None])[..., 0]

    def _step(
        self, reward: Tensor, weight: Tensor, capped: Tensor, log_ratio: Tensor, prob: Tensor, log_prob: Tensor
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            w, capped = weight.flatten(1), capped.flatten(1)
            share = w / w.sum(-1, keepdim=True)
            ess = 1 / (share * share).sum(-1) / w.shape[1]
            assert self.logit.grad is not None
            size = self.logit.grad.flatten(1).norm(dim=-1)
            self.logit.grad *= (1 / size.clamp(min=1.0))[:, None, None]
            record = (
                {}
                if self.bare
                else {
                    "value": prob[:, torch.arange(len(self.target)), self.target].prod(-1),
                    "reward": reward.mean((1, 2)),
                    "ess_fraction": ess,
                    "truncated_ess_fraction": capped.mean(-1) ** 2 / (capped * capped).mean(-1),
                    "mean_weight": w.mean(-1),
                    "max_share": share.amax(-1),
                    "kl": (torch.expm1(log_ratio) - log_ratio).mean((1, 2)),
                    "chi2": ((w - 1) ** 2).mean(-1),
                    "entropy": -(prob * log_prob).sum(-1).mean(-1),
                    "gradient_norm": size,
                }
            )
            before = self.logit.clone()
            self.optimizer.step()
            # Adam has one step size for all runs: scale each run's step afterwards
            self.logit.copy_(before + ess.sqrt()[:, None, None] * (self.logit - before))
        return record


def learner(runs: int, lag: int) -> Learner:
    """The same in vcposim."""
    made = [Run("vcpo", seed=s, lag=Lag(lag), step_size=STEP_SIZE, control=Control("ess")) for s in range(runs)]
    return Learner(task(TASK), made, groups=GROUPS, group_size=GROUP_SIZE)


def cpu_seconds(update: Callable[[], object], updates: int) -> float:
    """CPU time of that many updates."""
    begin = time.process_time()
    for _ in range(updates):
        update()
    return time.process_time() - begin


def against_torch(runs: int, lag: int, updates: int, rounds: int, precision: str, *, bare: bool) -> dict[str, Any]:
    """Run-steps per second of both, and the median ratio of CPU times taken in turns."""
    torch.set_num_threads(1)
    mine, theirs = learner(runs, lag), TorchLoop(runs, lag, getattr(torch, precision), bare=bare)
    cpu_seconds(mine.update, 16), cpu_seconds(theirs.update, 16)
    pairs = [(cpu_seconds(mine.update, updates), cpu_seconds(theirs.update, updates)) for _ in range(rounds)]
    ratio = [b / a for a, b in pairs]
    return {
        "runs": runs,
        "lag": lag,
        "torch_precision": precision,
        "torch_records": "nothing" if bare else "the same",
        "vcposim_run_steps_per_second": runs * updates / statistics.median(a for a, _ in pairs),
        "torch_run_steps_per_second": runs * updates / statistics.median(b for _, b in pairs),
        "torch_time_over_vcposim_time": statistics.median(ratio),
        "lowest_ratio": min(ratio),
        "highest_ratio": max(ratio),
    }


def scaling(updates: int) -> list[dict[str, Any]]:
    """Milliseconds per update against runs, updates and lag; bytes of the state against lag."""
    out: list[dict[str, Any]] = []
    for runs, lag, count in ((50, 8, 1), (100, 8, 1), (200, 8, 1), (400, 8, 1), (100, 8, 4), (100, 0, 1), (100, 64, 1)):
        one = learner(runs, lag)
        cpu_seconds(one.update, 16)
        seconds = min(cpu_seconds(one.update, updates * count) / count for _ in range(3))
        state = len(pickle.dumps(one.snapshot()))
        history = one.state.history.ring.nbytes + one.state.cumulative.ring.nbytes
        out.append(
            {
                "runs": runs,
                "lag": lag,
                "updates": updates * count,
                "milliseconds_per_update": 1e3 * seconds / updates,
                "state_bytes": state,
                "state_bytes_without_history": state - history,
            }
        )
    return out


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--updates", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    np.seterr(all="raise", under="ignore")
    beside = [
        against_torch(runs, 16, options.updates, options.rounds, precision, bare=bare)
        for bare in (False, True)
        for runs in (50, 200)
        for precision in ("float32", "float64")
    ]
    alone = scaling(options.updates)
    if options.json:
        print(json.dumps({"against_torch": beside, "scaling": alone}, indent=1))
        return
    for row in beside:
        print(
            f"{row['runs']:.0f} runs, lag {row['lag']:.0f}: vcposim {row['vcposim_run_steps_per_second']:.0f} "
            f"run-steps per CPU second, PyTorch {row['torch_precision']} recording {row['torch_records']} "
            f"{row['torch_run_steps_per_second']:.0f}; "
            f"PyTorch takes {row['torch_time_over_vcposim_time']:.2f} times as long "
            f"({row['lowest_ratio']:.2f} to {row['highest_ratio']:.2f})"
        )
    print(" runs  lag  updates  ms/update  state, kB  without history, kB")
    for row in alone:
        print(
            f"{row['runs']:5.0f}{row['lag']:5.0f}{row['updates']:9.0f}{row['milliseconds_per_update']:11.2f}"
            f"{row['state_bytes'] / 1e3:11.0f}{row['state_bytes_without_history'] / 1e3:21.0f}"
        )


if __name__ == "__main__":
    main()

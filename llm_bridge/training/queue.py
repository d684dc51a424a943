"""The queue between sampler and learner: trajectories wait here, stamped with the version that drew each token."""

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_bridge.models import LanguageModel
from llm_bridge.rollouts import Rollouts, Sampler, SamplerState
from llm_bridge.training.schedule import Schedule, Slot
from vcposim.errors import InputError


class RolloutQueue:
    """Samples what a schedule asks for, and serves it to the update it was made for.

    `mine`: the groups (slots of an update) that this rank samples; ranks need not talk, as random numbers belong to
    the problem.
    """

    def __init__(self, sampler: Sampler, schedule: Schedule, mine: Sequence[int]) -> None:
        self.sampler, self.schedule, self.mine = sampler, schedule, mine
        self.waiting: dict[Slot, Rollouts] = {}
        self.in_flight: dict[int, SamplerState] = {}

    def __len__(self) -> int:
        return len(self.waiting) + len(self.in_flight) * len(self.mine)

    def generate(self, lm: LanguageModel, version: int) -> None:
        """Draw everything that is due at this version of the model. Call it once a version, before its update."""
        due = [slot for slot in self.schedule.due(version) if slot.group in self.mine]
        if self.schedule.law.law == "in_flight":
            for update in dict.fromkeys(slot.update for slot in due):
                slots = [Slot(update, group) for group in self.mine]
                self.in_flight[update] = self.sampler.start(lm, self._problems(slots))
            for update, state in list(self.in_flight.items()):
                last = update == version
                tokens = None if last else self.schedule.slice_of(update, self.sampler.max_new_tokens)
                self.sampler.advance(lm, state, tokens, version)
                if last:
                    landed = self.sampler.finished(lm, self.in_flight.pop(update))
                    self._put([Slot(update, group) for group in self.mine], landed)
            return
        for i in range(0, len(due), len(self.mine) or 1):  # at most one update's rows in the sampler at once
            part = due[i : i + len(self.mine)]
            drawn = self.sampler.advance(lm, self.sampler.start(lm, self._problems(part)), version=version)
            self._put(part, self.sampler.finished(lm, drawn))

    def take(self, update: int) -> Rollouts:
        """The rollouts of this update, in the order of its groups. Raises `InputError` if they were never sampled."""
        slots = [Slot(update, group) for group in self.mine]
        missing = [slot for slot in slots if slot not in self.waiting]
        if missing:
            raise InputError(
                f"updates: rollouts for update {update} were never sampled; the run was planned to end before it, "
                "start another from its model, or plan with extend = true"
            )
        return joined([self.waiting.pop(slot) for slot in slots])

    def state_dict(self) -> dict[str, Any]:
        """Everything waiting or in flight: plain numbers and lists, and tensors."""
        waiting = [[*slot, rollouts.state_dict()] for slot, rollouts in self.waiting.items()]
        return {
            "waiting": waiting,
            "in_flight": [[update, state.state_dict()] for update, state in self.in_flight.items()],
        }

    def load_state_dict(self, *states: dict[str, Any]) -> None:
        """Continue from the states of all ranks, whatever their number was: each rank takes what is its own."""
        mine = set(self.mine)
        self.waiting = {
            Slot(update, group): Rollouts(**rollouts)
            for state in states
            for update, group, rollouts in state["waiting"]
            if group in mine
        }
        rows: dict[int, list[Any]] = {}
        column: dict[int, int] = {}
        for state in states:
            for update, flight in state["in_flight"]:
                problems = {self.schedule.problem(Slot(update, group)) for group in self.mine}
                rows.setdefault(update, []).extend(row for row in flight["rows"] if row["problem"] in problems)
                column[update] = min(flight["column"], column.get(update, flight["column"]))
        self.in_flight = {
            update: SamplerState.from_state_dict({"rows": rows[update], "column": column[update]})
            for update in sorted(rows)
        }

    def _problems(self, slots: Iterable[Slot]) -> list[int]:
        return [self.schedule.problem(slot) for slot in slots]

    def _put(self, slots: Sequence[Slot], rollouts: Rollouts) -> None:
        size = self.sampler.group_size
        for i, slot in enumerate(slots):
            self.waiting[slot] = picked(rollouts, slice(i * size, (i + 1) * size))


def picked(rollouts: Rollouts, rows: slice) -> Rollouts:
    """Some rows of a batch."""
    return replace(rollouts, **{f.name: getattr(rollouts, f.name)[rows] for f in fields(rollouts)})


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """Batches one below the other, padded on the right to the longest."""
    width = max(part.token.shape[1] for part in parts)
    column: dict[str, Any] = {}
    for f in fields(Rollouts):
        values = [getattr(part, f.name) for part in parts]
        if isinstance(values[0], Tensor):
            empty = -1 if f.name == "version" else 0
            column[f.name] = torch.cat([x if x.dim() == 1 else _wide(x, width, empty) for x in values])
        else:
            column[f.name] = [item for value in values for item in value]
    return Rollouts(**column)


def moved(rollouts: Rollouts, device: torch.device) -> Rollouts:
    """The same on a device."""
    column: dict[str, Any] = {}
    for f in fields(rollouts):
        x = getattr(rollouts, f.name)
        column[f.name] = x.to(device) if isinstance(x, Tensor) else x
    return Rollouts(**column)


def _wide(x: Tensor, width: int, value: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[1]), value=value)

"""Mathematics: addition, chains of plus and minus, products, greatest common divisors, countdown, running sums."""

from dataclasses import dataclass
from random import Random
from typing import Any

from reasoning_gym.factory import ProceduralDataset, register_dataset

from llm_bridge.tasks.base import DatasetItem, Form, final_number, instruction
from llm_bridge.tasks.calculator import CalculatorError, calculate, numbers_in

NUMBERS = instruction(final_number)


def short_expression(mark: str = "=") -> Form:
    """12+7= -> 19"""
    return Form(
        prompt=lambda e: e["metadata"]["expression"].replace(" ", "") + mark,
        response=lambda e: e["answer"],
        read=lambda text, _: text,
    )


def short_gcd() -> Form:
    """60,38: -> 2"""
    return Form(
        prompt=lambda e: ",".join(map(str, e["metadata"]["numbers"])) + ":",
        response=lambda e: e["answer"],
        read=lambda text, _: text,
    )


def short_countdown() -> Form:
    """6,9,9:24= -> 9+6+9"""
    return Form(
        prompt=lambda e: f"{','.join(map(str, e['metadata']['numbers']))}:{e['metadata']['target']}=",
        response=lambda e: e["answer"].replace(" ", ""),
        read=lambda text, _: text,
    )


def countdown_score(answer: str, entry: DatasetItem) -> float:
    """1 if the expression is worth the target and uses each number once; reasoning-gym's own verifier evaluates it."""
    try:
        value = calculate(answer)
    except CalculatorError:
        return 0.0
    numbers = entry["metadata"]["numbers"]
    return float(value == entry["metadata"]["target"] and numbers_in(answer) == sorted(numbers))


def terms_and_digits(terms: int = 2, digits: int = 2) -> dict[str, Any]:
    """Between two and `terms` terms of one to `digits` digits."""
    return {"min_terms": 2, "max_terms": terms, "min_digits": 1, "max_digits": digits}


def addition(terms: int = 2, digits: int = 2) -> dict[str, Any]:
    """Sums of so many numbers of so many digits."""
    plus = {"operators": ("+",), "allow_parentheses": False, "allow_negation": False}
    return {**terms_and_digits(terms, digits), **plus}


def gcd(largest: int = 99) -> dict[str, Any]:
    """Greatest common divisors of numbers up to `largest`."""
    return {"max_value": largest}


def countdown(numbers: int = 3, largest: int = 9, target: int = 30) -> dict[str, Any]:
    """Expressions from given numbers (up to `largest`) that make a target up to `target`."""
    return {
        "min_numbers": numbers, "max_numbers": numbers, "max_value": largest, "min_target": 1, "max_target": target,
    }  # fmt: skip


# --- a chain of thought of any length ---------------------------------------------------------------------------------


@dataclass
class RunningSumConfig:
    """So many digits to add, and what the sum is taken modulo."""

    steps: int = 64
    modulus: int = 10
    seed: int | None = None
    size: int = 500

    def validate(self) -> None:
        """AssertionError for numbers that make no problem, as reasoning-gym's configurations do."""
        assert self.steps >= 1, "steps must be at least 1"
        assert 2 <= self.modulus <= 10, "modulus must be 2 to 10, so that a sum is one digit"


class RunningSum(ProceduralDataset):
    """Digits whose sum is asked for, modulo a number. Its intermediate sums are the natural chain of thought: one a
    digit, so that a response is as long as one likes, and one slip anywhere spoils the answer."""

    def __init__(self, config: RunningSumConfig) -> None:
        super().__init__(config=config, seed=config.seed, size=config.size)

    def __getitem__(self, index: int) -> DatasetItem:
        rng, modulus = Random(self.seed + index), self.config.modulus
        digits = [rng.randrange(modulus) for _ in range(self.config.steps)]
        sums = [sum(digits[: i + 1]) % modulus for i in range(len(digits))]
        question = f"Add these digits from left to right, modulo {modulus}: {' '.join(map(str, digits))}"
        metadata = {"digits": digits, "sums": sums}
        return {"question": question, "answer": str(sums[-1]), "metadata": metadata}


register_dataset("running_sum", RunningSum, RunningSumConfig)


def short_running_sum() -> Form:
    """3719= -> 3010: the sums so far; the last one is the answer, if there are as many as digits"""
    return Form(
        prompt=lambda e: "".join(map(str, e["metadata"]["digits"])) + "=",
        response=lambda e: "".join(map(str, e["metadata"]["sums"])),
        read=lambda text, e: text[-1:] if len(text) == len(e["metadata"]["digits"]) else "",
    )


def running_sum(steps: int = 64, modulus: int = 10) -> dict[str, Any]:
    """So many digits to add one after the other, modulo a number."""
    return {"steps": steps, "modulus": modulus}

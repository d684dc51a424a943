"""Mathematics: addition, chains of plus and minus, products, greatest common divisors, countdown."""

from typing import Any

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

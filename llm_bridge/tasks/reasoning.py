"""General reasoning: letter counting, syllogisms, knights and knaves, shortest paths in a grid.

The short forms keep the problem and drop the prose. A syllogism's terms become a, b, c in order of appearance; the
inhabitants of an island become 0, 1, ... and their statements are written in Polish notation.
"""

import re
from typing import Any

from llm_bridge.tasks.base import DatasetItem, Form, final_answer, final_number, instruction

COUNT = instruction(final_number)
TEXT = instruction(final_answer)

QUANTIFIER = {"All {} are {}": "a", "No {} are {}": "n", "Some {} are not {}": "o", "Some {} are {}": "s"}
CONNECTIVE = {"not": "!", "and": "&", "or": "|", "->": ">", "<=>": "=", "telling-truth": "t", "lying": "l"}
STEP = {"u": "up", "d": "down", "l": "left", "r": "right", "x": "infeasible"}


def short_letter_counting() -> Form:
    """e:were the= -> 3"""
    return Form(
        prompt=lambda e: f"{e['metadata']['target_letter']}:{' '.join(e['metadata']['span']).lower()}=",
        response=lambda e: e["answer"],
        read=lambda text, _: text,
    )


def short_syllogism() -> Form:
    """aab;obc;sac? -> n: all a are b; some b are not c; are some a c?"""
    return Form(
        prompt=_premises,
        response=lambda e: e["answer"].lower()[0],
        read=lambda text, _: {"y": "Yes", "n": "No"}.get(text, ""),
    )


def short_knights_knaves() -> Form:
    """=t1t0,>l0t0: -> tt: who tells the truth and who lies, one letter each"""
    return Form(
        prompt=lambda e: ",".join(map(_polish, e["metadata"]["statements"])) + ":",
        response=lambda e: "".join("t" if honest else "l" for honest in e["metadata"]["solution"]),
        read=_assignment,
    )


def short_shortest_path() -> Form:
    """ox#,oxo,*oo: -> rruu"""
    inverse = {name: letter for letter, name in STEP.items()}
    return Form(
        prompt=lambda e: ",".join("".join(row) for row in e["metadata"]["matrix"]).lower() + ":",
        response=lambda e: "".join(inverse[word] for word in e["answer"].split()),
        read=lambda text, _: " ".join(STEP.get(letter, "?") for letter in text),
    )


def letter_counting(words: int = 2) -> dict[str, Any]:
    """Count a letter in a span of at most so many words."""
    return {"min_words": 1, "max_words": words}


def syllogism(invalid: float = 0.5) -> dict[str, Any]:
    """Does the conclusion follow? In a share `invalid` of the problems it does not."""
    return {"invalid_ratio": invalid}


def knights_knaves(people: int = 2) -> dict[str, Any]:
    """Who lies, among so many people."""
    return {"n_people": people}


def shortest_path(side: int = 3, blocked: float = 0.3) -> dict[str, Any]:
    """Moves through a square grid with this side, each cell blocked with the given probability."""
    return {"min_rows": side, "max_rows": side, "min_cols": side, "max_cols": side, "p_blocked": blocked}


def _premises(entry: DatasetItem) -> str:
    meta, letters = entry["metadata"], {}  # type: ignore[var-annotated]
    parts = []
    for sentence in (meta["premise1"], meta["premise2"], meta["conclusion"]):
        sign, terms = _quantified(sentence)
        parts.append(sign + "".join(letters.setdefault(term, "abcd"[len(letters)]) for term in terms))
    return ";".join(parts) + "?"


def _quantified(sentence: str) -> tuple[str, tuple[str, ...]]:
    for pattern, sign in QUANTIFIER.items():
        found = re.fullmatch(pattern.format("(.+?)", "(.+?)"), sentence)
        if found:
            return sign, found.groups()
    raise AssertionError(f"not a syllogism's sentence: {sentence!r}")


def _polish(statement: Any) -> str:
    if isinstance(statement, tuple):
        return CONNECTIVE[statement[0]] + "".join(map(_polish, statement[1:]))
    return str(statement)


def _assignment(text: str, entry: DatasetItem) -> str:
    """The letters as the sentence that the verifier reads; anything else is no answer."""
    meta = entry["metadata"]
    names, terms = meta["names"], meta["knight_knave_terms"]
    if len(text) != len(names) or set(text) - {"t", "l"}:
        return ""
    role = {"t": terms["knight"], "l": terms["knave"]}
    return ", and ".join(f"{name} is a {role[letter]}" for name, letter in zip(names, text, strict=True))

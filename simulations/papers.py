"""What the committed summaries say of each paper, for the index of papers: computed, a sentence each.

    python -m simulations papers

A paper is spoken of in two ways. A claim names it as its source, by its arXiv number, and has a word over all
witnesses. And experiments compare with methods that are entries of the catalogue, at the full step: what a question
came to there is said of the first paper that the entry stands on.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module

from simulations.claims import BY_ID, ClaimRow
from simulations.methods import FULL_STEP, METHODS
from simulations.summaries import Section
from simulations.verdicts import JudgedComparison, Verdict, shown
from vcposim.catalogue import CATALOGUE
from vcposim.catalogue.references import SOURCES
from vcposim.comparison.statistics import WORDS


def found(rows: Iterable[ClaimRow], sections: Iterable[Section]) -> dict[str, list[str]]:
    """Key of a source -> sentences: from its claims, `rows` of `claims.table`, then from the methods of experiments."""
    out: dict[str, list[str]] = {}
    for row in rows:
        claim = BY_ID[row["claim"]]
        for key in cited(claim.source):
            out.setdefault(key, []).append(f"{claim.id} ({claim.title}): {row['verdict']}, {row['number']}")
    for section in sections:
        methods = plain_methods(section.id)
        for v in section.verdicts:
            about: dict[str, list[JudgedComparison]] = {}
            for c in v.comparisons:
                if (name := method_of(c["name"], methods)) is not None:
                    about.setdefault(name, []).append(c)
            for name, judged in about.items():
                key = CATALOGUE[methods[name]].references[0]
                out.setdefault(key, []).append(_said(section.id, v, methods[name], judged))
    return out


def _said(experiment: str, v: Verdict, entry: str, judged: Sequence[JudgedComparison]) -> str:
    asked = f"{entry} in {experiment} ({v.claim}): {v.rule['text'] if v.rule else v.statement}"
    if len(judged) == 1:
        return f"{asked}: {judged[0]['word']}, {shown(judged[0])}"
    count = Counter(c["word"] for c in judged)
    return f"{asked}: {', '.join(f'{word} at {count[word]}' for word in WORDS if count[word])} of {len(judged)} places"


def cited(text: str) -> list[str]:
    """The sources whose arXiv numbers a text names."""
    numbers = set(re.findall(r"\b\d{4}\.\d{5}\b", text))
    return [key for key, one in SOURCES.items() if one.id.removeprefix("arXiv:") in numbers]


def plain_methods(experiment: str) -> dict[str, str]:
    """Names of methods -> entries, of those that are nothing but an entry: stale, at the full step."""
    module = import_module(f"simulations.questions.{experiment}")
    tables = [METHODS, *(x for x in vars(module).values() if isinstance(x, Mapping))]
    return {
        name: m.estimator
        for table in tables
        for name, m in table.items()
        if isinstance(getattr(m, "estimator", None), str)
        and (m.control, getattr(m, "stale", True), getattr(m, "memory", 0.0)) == (FULL_STEP, True, 0.0)
    }


def method_of(comparison: str, methods: Iterable[str]) -> str | None:
    """Whom a comparison is with; None where that is none of `methods`.

    >>> method_of("VCPO minus GSPO", ["GSPO", "n2"]), method_of("4 prompts, lag 16: n2, own best", ["GSPO", "n2"])
    ('GSPO', 'n2')
    """
    name = re.split(r" minus |: ", re.sub(r", (own best|grid)$", "", comparison))[-1]
    return name if name in methods else None


def together(*found: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Sentences of several origins under one key."""
    return {key: [line for one in found for line in one.get(key, ())] for one in found for key in one}

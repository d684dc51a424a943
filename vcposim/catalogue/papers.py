"""The papers: who stands on which, what was found about it, how to switch it on, and what could not be read.

    vcposim cite --index      all of it as Markdown

A paper's row is read off the catalogue: its entries and step rules, and what these say of themselves where they differ
from their source. How an entry is switched on in each trainer is in `trainers`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vcposim.catalogue.entries import CATALOGUE, Entry
from vcposim.catalogue.references import SOURCES, short
from vcposim.catalogue.trainers import SWITCHES
from vcposim.control import STEP_RULES

ELSEWHERE = {
    "score_centering": (
        "vcposim.vocabulary.score_centering",
        "its mean is Cov_q(A, f s), so it is not unbiased; a constant in A is gone (T17)",
    ),
}
"""source -> what of the project stands on it beside entries and step rules, and what was found"""

UNREAD = {
    "MinPRO (2601.22718)": "its objective as two readers write it, which agree: minpro; not the bounds of its clip",
    "mu-GRPO (2605.17570)": "the abstract, and one reader: where A < 0, what follows the first ratio beyond a "
    "threshold is dropped; not the threshold, nor how far the clip is relaxed",
    "AIS (2605.13907)": "the abstract alone: how weight reliability, divergence severity and variance amplification "
    "make one mixing coefficient; nor its step rule",
    "AGRO (2503.19612)": "an overview: off policy it is tba up to a scale; its on-policy gradient has another term",
    "GEPO, group entropy (2607.16850)": "a third party's description: a stateful rescaling of advantages",
    "VACO (2603.01365)": "its realigned advantages need a critic; open-instruct's filter is open_instruct_tv",
    "R2VPO (2601.03320, 2605.26784)": "two readers agree on r [A - 2 lam (r - 1)], one of tokens, one of responses; "
    "its update of lam was not read",
    "DISPO (2602.00983)": "its objective as four readers write it: dispo; one of them gives the four bounds",
    "TRPL for language models": "one fork's code, whose docstring states another loss; idea: arXiv 2101.09207",
    "staleness law (2607.01083)": "the abstract: eta in proportion to 1/S, not the constants; the rule is staleness",
}
"""what the catalogue leaves out or takes from elsewhere -> what could not be read at its source"""

LACKING = {
    "multiple importance sampling over versions (balance heuristic)": "log mu of every version that sampled, for each "
    "response: pi / sum_k n_k mu_k",
    "ReMax (2310.10505)": "the reward of each prompt's greedy response",
    "A*-PO (2505.20686)": "V = b1 log mean exp(R / b1) of each prompt, over responses of the reference (TRL's a2po: "
    "R - V - b2 log pi/reference, one response a prompt, on policy); with the group's mean instead of V it is tba",
    "A-3PO with mixed versions (2512.06547)": "a version per token; a3po takes one lag for all",
    "distributional IPO (prime-rl)": "whole distributions: vcposim.vocabulary.distributional_ipo, outside of batches",
}
"""what was read, and needs what a batch does not hold -> what that is"""


@dataclass(frozen=True)
class Paper:
    """One source, and what the project knows of it."""

    key: str
    """of `vcposim.catalogue.references.SOURCES`"""
    entries: tuple[str, ...]
    """names of the catalogue"""
    rules: tuple[str, ...]
    """names of `vcposim.control.STEP_RULES`"""
    found: tuple[str, ...]
    """what entries and others say of it, a sentence each"""


def papers() -> list[Paper]:
    """Every source that something stands on, the newest first."""
    out = []
    for key in sorted(SOURCES, key=lambda key: (-SOURCES[key].year, key)):
        # an entry that bears the paper's name comes first
        entries = tuple(sorted((n for n, one in CATALOGUE.items() if key in one.references), key=lambda n: n != key))
        rules = tuple(name for name, rule in STEP_RULES.items() if key in rule.references)
        found = [f"{name}: {said}" for name in entries if (said := _said(CATALOGUE[name]))]
        found += [f"{place}: {said}" for source, (place, said) in ELSEWHERE.items() if source == key]
        if entries or rules or found:
            out.append(Paper(key, entries, rules, tuple(found)))
    return out


def markdown(found: Mapping[str, Sequence[str]] | None = None) -> str:
    """The index. `found` adds sentences to a source's row, such as verdicts on claims that rest on it."""
    rows = ["| paper | estimators and step rules | what was found | switch it on |", "|---|---|---|---|"]
    for paper in papers():
        names = [f"`{name}`" for name in paper.entries] + [f"step rule `{name}`" for name in paper.rules]
        said = [*paper.found, *(found or {}).get(paper.key, ())]
        source = SOURCES[paper.key]
        kind, _, number = source.id.partition(":")
        address = {"arXiv": f"https://arxiv.org/abs/{number}", "doi": f"https://doi.org/{number}"}.get(kind, source.id)
        title = f"[{source.title}]({address})" if address.startswith("https:") else source.title
        cells = (f"{title}<br>{short(paper.key)}", ", ".join(names), "; ".join(said), "<br>".join(switched(paper)))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    unread = [f"- {name}: {why}" for name, why in UNREAD.items()]
    lacking = [f"- {name}: {what}" for name, what in LACKING.items()]
    return "\n".join(
        [
            "# Papers\n",
            f"{len(papers())} sources, {len(CATALOGUE)} estimators, {len(STEP_RULES)} step rules. In verl, score norms "
            "are those of a proxy: `/length`, `/logit` or `/given`.\n",
            *rows,
            "\n## Not in the catalogue as published, for it could not be read\n",
            *unread,
            "\n## Read, and a batch lacks what it needs\n",
            *lacking,
        ]
    )


def _said(one: Entry) -> str:
    """What sets an entry apart from its source, and which laws it breaks."""
    return "; ".join([*filter(None, (one.why, one.note)), *(f"breaks the law {law!r}" for law in one.breaks)])


def switched(paper: Paper) -> list[str]:
    """How to switch on what stands on a paper: for each trainer a line of the first entry that it serves."""
    out = []
    for trainer, switch in SWITCHES.items() if paper.entries else ():
        lines = [line for name in paper.entries if (line := switch.on(name)) is not None]
        out.append(f"{trainer}: `{lines[0]}`" if lines else f"{trainer}: refused")
    return out + [f"llm_bridge.train: `--step-rule {name}`" for name in paper.rules[:1]]

"""What was found: a page for every claim, theorem and experiment, the gallery, benchmarks and the log."""

import base64
import importlib
import inspect
import json
import shlex
from pathlib import Path
from typing import Any

from _hooks.cache import cached
from _hooks.guides import mirrored
from _hooks.text import fence, plain, table, wrapped
from proofs.claims import FAMILIES
from proofs.claims import Claim as Theorem
from simulations import claims
from simulations.drawing import darkened, draw
from simulations.protocol import discover
from simulations.report import claim_rows
from simulations.summaries import Section, committed, svg

ROOT = Path(__file__).parents[2]
KINDS = {
    "proof": "proved about the shipped functions",
    "exact": "computed exactly",
    "simulated": "simulated",
    "transformer": "measured on transformers",
}
BENCHMARKS = {
    "core": ("Exact and Monte Carlo moments", "simulations/bench/core.md"),
    "scores": ("Exact score norms on a CPU", "simulations/bench/scores.md"),
    "gpu": ("Exact score norms on a GPU", "simulations/bench/gpu.md"),
    "families": ("Model families", "simulations/bench/families.md"),
    "rollouts": ("Reading rollouts", "simulations/bench/rollouts.md"),
}


def sections() -> dict[str, Section]:
    return committed(discover())


def rows() -> list[dict[str, Any]]:
    return claim_rows(list(sections().values()), claims.proof_results())


def badge(word: str) -> str:
    """A verdict, colored by its word; the word itself says it too."""
    return f"[{word}]{{.verdict .{word.replace(' ', '-')}}}"


WORDS = ("holds", "holds if", "fails", "undecided", "not judged")


def family_of(name: str) -> str:
    return name.split(".")[0].lower()


def theorem_link(name: str) -> str:
    return f"{{ref}}`{name} <theorem-{name.lower().replace('.', '-').replace('_', '-')}>`"


def anchor(name: str) -> str:
    return f"theorem-{name.lower().replace('.', '-').replace('_', '-')}"


def figure_files() -> dict[str, bytes]:
    """Path -> the bytes of each figure of the committed summaries, on light and on dark paper."""
    out: dict[str, bytes] = {}
    for section in sections().values():
        for figure in section.figures:
            key = f"figure {section.id} {figure['name']} {json.dumps(figure, sort_keys=True)}"
            light = cached(key, lambda figure=figure: svg(draw(figure["plot"])).decode())
            for scheme, vector in (("light", light), ("dark", darkened(light))):
                out[f"findings/figures/{section.id}-{figure['name']}-{scheme}.svg"] = vector.encode()
    return out


def shown(section: Section, up: str, caption: bool = True) -> str:
    """The figures of a section as Markdown, for a page `up` away from findings/."""
    parts = []
    for figure in section.figures:
        for scheme in ("light", "dark"):
            path = f"findings/figures/{section.id}-{figure['name']}-{scheme}.svg"
            alt = " ".join(str(figure["alt"]).split())
            parts.append(
                f"```{{image}} {up}{path.removeprefix('findings/')}\n:class: only-{scheme}\n:alt: {alt}\n```\n"
            )
        parts += [plain(figure["caption"]) + "\n"] if caption else []
    return "\n".join(parts)


def experiment_page(section: Section) -> str:
    """One experiment: question, verdicts, figures, how to run it again."""
    module = importlib.import_module(f"simulations.questions.{section.id}")
    verdicts = [
        (
            f"{{ref}}`{v.claim} <claim-{v.claim.lower()}>`",
            badge(v.verdict),
            plain(v.statement) + (f"; if {plain(v.condition)}" if v.condition else ""),
            plain(v.number),
        )
        for v in section.verdicts
    ]
    size = (
        f"{section.settings} settings, {section.records} records, committed as `simulations/results/{section.id}.json`"
    )
    return "\n".join(
        [
            f"(experiment-{section.id})=\n# {section.id}\n",
            f"{plain(section.question)}\n",
            fence(str(section.provenance["reproduce"]), "sh"),
            f"{size[0].upper()}{size[1:]}.\n",
            shown(section, "../"),
            "## Verdicts\n",
            table(("claim", "verdict", "statement", "number"), verdicts),
            "## How it is asked\n",
            fence(inspect.getdoc(module) or ""),
        ]
    )


def claim_page(row: dict[str, Any]) -> str:
    """One claim: statement, verdict, number, witnesses, figures."""
    claim = claims.BY_ID[row["claim"]]
    found = sections()
    out = [
        f"(claim-{claim.id.lower()})=\n# {claim.id}: {claim.title}\n",
        f"> {plain(claim.statement)}\n",
        f"{badge(row['verdict'])} **{plain(row['number'])}**\n",
    ]
    by = row["decided_by"]
    if by:
        experiment = by.partition("/")[0]
        where = f"{{ref}}`{experiment} <experiment-{experiment}>`" if experiment in found else theorem_link(by)
        out.append(f"Decided by {where}{' (`' + by.partition('/')[2] + '`)' if experiment in found else ''}.\n")
    out.append(
        f"Said by {plain(claim.source)}. Refuted by: {plain(claim.refuted_by[0].lower() + claim.refuted_by[1:])}\n"
    )
    out.append("## Witnesses\n")
    witnesses = []
    for w in row["witnesses"]:
        source = w["source"]
        experiment = source.partition("/")[0]
        if w["kind"] == "proof" and source != "none":
            where = theorem_link(source)
        elif experiment in found:
            where = f"{{ref}}`{source.replace('/', ' / ')} <experiment-{experiment}>`"
        else:
            where = plain(source)
        witnesses.append((KINDS[w["kind"]], where, badge(w["word"]), plain(w["statement"]), plain(w["number"])))
    out.append(table(("kind", "from", "says", "statement", "number"), witnesses))
    own = [s for s in found.values() if claim.id in s.claims]
    if own:
        out.append("## Figures\n")
    for section in own:
        out += [f"From {{ref}}`experiment-{section.id}`:\n", shown(section, "../")]
    return "\n".join(out)


def theorem_pages() -> dict[str, str]:
    """One page a family: statement and proof in words, each theorem with its verdict, the code that proves it."""
    results = claims.proof_results()
    out, index = {}, []
    for family in FAMILIES:
        module = importlib.import_module(family)
        theorems: list[Theorem] = module.CLAIMS
        title, _, body = (module.__doc__ or "").partition("\n\n")
        short = theorems[0].family
        name = family.split(".")[1]
        lines = [f"(theorem-{short.lower()})=\n# {plain(' '.join(title.split()))}\n", prose(body)]
        for one in theorems:
            row = results.get(one.name, {})
            layers = ", ".join(
                label
                for label, layer in (
                    ("exact rationals", one.exact),
                    ("any size, symbolically", one.symbolic),
                    ("Coq", one.coq),
                )
                if layer
            )
            facts = [
                ("statement", plain(one.statement)),
                ("assumptions", plain(one.assumptions)),
                ("verdict", f"**{plain(row.get('verdict', 'not in the committed results'))}** ({one.kind})"),
                ("layers", layers or "none"),
                ("runs", ", ".join(api_link(s) for s in one.shipped) or "nothing shipped"),
                ("speaks on", ", ".join(f"{{ref}}`{c} <claim-{c.lower()}>`" for c in one.rows)),
                *([("Coq", ", ".join(f"`{s}`" for s in one.coq))] if one.coq else []),
            ]
            lines += [f"({anchor(one.name)})=\n## {plain(one.name)}\n", table(("fact", "what is known"), facts)]
            index.append(
                (
                    theorem_link(one.name),
                    plain(one.statement),
                    plain(row.get("verdict", "not in the committed results")),
                )
            )
        lines += ["## The proof as it runs\n", fence(f"python -m proofs --only {short}", "sh")]
        lines += [
            f"```{{literalinclude}} ../../../proofs/{name}.py\n:language: python\n:lines: "
            f"{after_docstring(module)}-\n```\n"
        ]
        out[f"findings/theorems/{name}.md"] = "\n".join(lines)
    toc = "\n".join(family.split(".")[1] for family in FAMILIES)
    out["findings/theorems/index.md"] = "\n".join(
        [
            "# Theorems\n",
            "Every statement about the shipped functions, by the functions themselves: on exact rationals, on "
            "symbols for any number of samples, and in Coq. "
            "`python -m proofs` checks all of it again; the verdicts here are those committed in "
            "`simulations/results/proofs.json`.\n",
            table(("theorem", "statement", "verdict"), index),
            f"```{{toctree}}\n:hidden:\n{toc}\n```\n",
        ]
    )
    return out


def api_link(shipped: str) -> str:
    """A shipped function, as in `baselines.leverage`, linked to its page where it has one of its own."""
    module, _, name = shipped.rpartition(".")
    return f"{{py:obj}}`{shipped} <vcposim.{module}.{name}>`" if "." not in module and module else f"`{shipped}`"


def after_docstring(module: Any) -> int:
    lines = inspect.getsource(module).splitlines()
    end = next(k for k, line in enumerate(lines) if k and line.rstrip().endswith('"""'))
    return end + 2


def prose(text: str) -> str:
    """A docstring's paragraphs; what is indented is a display."""
    out = []
    for paragraph in text.strip().split("\n\n"):
        lines = paragraph.splitlines()
        if all(line.startswith("  ") for line in lines):
            out.append(fence("\n".join(line[4:] if line.startswith("    ") else line for line in lines)))
        elif any(line.startswith("    ") for line in lines):
            out.append(fence("\n".join(lines)))
        else:
            out.append("\n".join(plain(line) for line in lines) + "\n")
    return "\n".join(out)


def gallery() -> str:
    """Every figure with what makes it."""
    out = [
        "# Gallery\n",
        "Every figure, each with the command that makes it. Those of experiments are drawn from committed "
        "summaries, those of commands when this page is built.\n",
        "## Commands\n",
    ]
    for name, (line, alt) in COMMAND_FIGURES.items():
        out += [
            f"### {name}\n",
            f"```{{image}} figures/{name}.png\n:alt: {alt}\n:class: dark-light\n```\n",
            fence(wrapped(line), "sh"),
        ]
    out.append("## Experiments\n")
    for section in sections().values():
        out += [
            f"### {section.id}\n",
            shown(section, ""),
            fence(str(section.provenance["reproduce"]), "sh"),
            f"Verdicts and code: {{ref}}`experiment-{section.id}`.\n",
        ]
    return "\n".join(out)


COMMAND_FIGURES = {
    "variance": (
        "vcposim variance --estimator reinforce dr_grpo sequence_is sequence_tis self_normalized vcpo --drift "
        "1 --figure variance.png",
        "Stacked bars of variance and squared bias, one bar an estimator",
    ),
    "replay": (
        "vcposim replay --sample --figure replay.png",
        "Four panels of a replayed dump: weights by rank, baselines by group, leverage by group, second moments",
    ),
}
"""figure -> the command that draws it, and what is seen"""


def command_figures() -> dict[str, bytes]:
    """Path -> bytes of the figures that commands draw."""
    from _hooks.commands import terminal
    from vcposim.commands.main import main

    def draw(name: str) -> str:
        with terminal():
            if main(shlex.split(COMMAND_FIGURES[name][0])[1:]):
                raise RuntimeError(f"{COMMAND_FIGURES[name][0]} failed")
            return base64.b64encode(Path(f"{name}.png").read_bytes()).decode()

    return {
        f"findings/figures/{name}.png": base64.b64decode(cached(f"{name} {line}", lambda name=name: draw(name)))
        for name, (line, _) in COMMAND_FIGURES.items()
    }


def pages() -> dict[str, str | bytes]:
    out: dict[str, str | bytes] = {**figure_files(), **command_figures()}
    table_rows = rows()
    for row in table_rows:
        out[f"findings/claims/{row['claim']}.md"] = claim_page(row)
    index = [
        (
            f"{{ref}}`{row['claim']} <claim-{row['claim'].lower()}>`",
            plain(claims.BY_ID[row["claim"]].title),
            badge(row["verdict"]),
            plain(row["number"]),
        )
        for row in table_rows
    ]
    words = ", ".join(
        f"{sum(r['verdict'] == w for r in table_rows)} {w}" for w in WORDS if any(r["verdict"] == w for r in table_rows)
    )
    out["findings/claims/index.md"] = "\n".join(
        [
            "# Claims\n",
            f"What is said about variance-controlled off-policy RL, and what came out: {words}. "
            "A verdict is computed from proofs and committed records, never written; *undecided* means that "
            "the records do not settle it, *not judged* that there are none. "
            "The same table: `python -m simulations claims`.\n",
            table(("claim", "in short", "verdict", "number that decides"), index),
            "```{toctree}\n:hidden:\n" + "\n".join(r["claim"] for r in table_rows) + "\n```\n",
        ]
    )
    out |= theorem_pages()
    for section in sections().values():
        out[f"findings/experiments/{section.id}.md"] = experiment_page(section)
    listed = [
        (
            f"{{ref}}`{s.id} <experiment-{s.id}>`",
            plain(s.question),
            " ".join(f"{{ref}}`{c} <claim-{c.lower()}>`" for c in s.claims),
        )
        for s in sections().values()
    ]
    rest = [
        (f"`{name}`", plain(e.question), " ".join(f"{{ref}}`{c} <claim-{c.lower()}>`" for c in e.claims))
        for name, e in discover().items()
        if name not in sections()
    ]
    out["findings/experiments/index.md"] = "\n".join(
        [
            "# Experiments\n",
            "One question a file in `simulations/questions/`. Those with a committed summary of their full form:\n",
            table(("experiment", "question", "claims"), listed),
            *(
                [
                    "Without a committed summary of the full form (`python -m simulations run NAME --size "
                    "full`); their claims rest on other witnesses or are not judged:\n",
                    table(("experiment", "question", "claims"), rest),
                ]
                if rest
                else []
            ),
            "```{toctree}\n:hidden:\n" + "\n".join(sections()) + "\n```\n",
        ]
    )
    out["findings/gallery.md"] = gallery()
    for name, (title, path) in BENCHMARKS.items():
        out[f"findings/benchmarks/{name}.md"] = mirrored(path, title)
    out["findings/benchmarks/index.md"] = "\n".join(
        [
            "# Benchmarks\n",
            "Committed records, as they were measured, goals that were missed included. Each page names its "
            "machine and the command that makes it.\n",
            table(("page",), [(f"{{doc}}`{name}`",) for name in ("comparison", *BENCHMARKS)]),
            "```{toctree}\n:hidden:\n" + "\n".join(("comparison", *BENCHMARKS)) + "\n```\n",
        ]
    )
    out["findings/log.md"] = mirrored("simulations/LOG.md")
    out["findings/index.md"] = FINDINGS
    return out


FINDINGS = """# Findings

::::{grid} 1 2 2 3
:gutter: 3

:::{grid-item-card} Claims
:link: claims/index
:link-type: doc
What is said, and whether it holds, holds if, fails, or is open, with its number.
:::
:::{grid-item-card} Theorems
:link: theorems/index
:link-type: doc
What is proved about the functions that ship.
:::
:::{grid-item-card} Experiments
:link: experiments/index
:link-type: doc
One question a page, with figures and verdicts.
:::
:::{grid-item-card} Gallery
:link: gallery
:link-type: doc
Every figure with what makes it.
:::
:::{grid-item-card} Benchmarks
:link: benchmarks/index
:link-type: doc
Speed and memory, from committed records.
:::
:::{grid-item-card} Log
:link: log
:link-type: doc
Dated findings, negative results included.
:::
::::

```{toctree}
:hidden:
claims/index
theorems/index
experiments/index
gallery
benchmarks/index
log
```
"""

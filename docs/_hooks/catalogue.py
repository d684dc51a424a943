"""A page for every named estimator, and one for the papers."""

import functools
from collections.abc import Sequence
from html import escape
from math import log10
from typing import Any

from _hooks.cache import cached
from _hooks.formula import clauses, latex
from _hooks.text import fence, number, plain, table
from llm_bridge.adapters.rows import require
from llm_bridge.training.gradient import token_coefficients
from simulations import claims
from simulations.methods import METHODS
from simulations.papers import found as verdicts
from simulations.papers import together
from simulations.protocol import discover
from simulations.report import claim_rows
from simulations.summaries import committed
from vcposim.catalogue import CATALOGUE, FAMILIES, Entry
from vcposim.catalogue import papers as index
from vcposim.catalogue.references import SOURCES, short
from vcposim.commands.catalogue import as_json, name_of
from vcposim.commands.figures import LEAST
from vcposim.comparison import leaderboard
from vcposim.comparison.design import COMMON, LAGS, SIZES
from vcposim.comparison.result import MODES, ComparedEstimator, RegimeSummary, laws_of, staled
from vcposim.errors import InputError
from vcposim.laboratory.standard_problems import GROUP_SIZE, STANDARD
from vcposim.testing.report_card import beside_the_catalogue

SYMBOLS = (
    "*R* reward, *w* ratio π/μ of a trajectory, *r*ₜ of a token, *L* length in tokens, *n* group size, *s* score "
    "∇ log π(τ), *A* advantage; *mean* and *std* are over the group."
)
TITLES = {
    "on_policy": "Without ratios",
    "weighted": "A weight before the advantage",
    "surrogate": "A factor that looks at the advantage too",
}
"""every entry is of exactly one of these families"""

NEEDS = {
    "scores": "score norms ‖∇ log π(τ)‖² (or a named proxy)",
    "tokens": "ratios of every token",
    "log_prob": "the learner's log-probability of every token",
    "collision": "Σ π(v)² at every position",
    "anchor_log_ratio": "ratios to an anchor policy",
    "reference_log_ratio": "ratios to a reference policy",
    "length": "lengths in tokens",
    "grouped": "the whole batch, prompt by prompt",
}


def moments() -> dict[str, dict[str, dict[str, Any]]]:
    """Problem -> estimator -> exact squared bias, variance and MSE over the squared gradient."""
    out: dict[str, dict[str, dict[str, Any]]] = {problem: {} for problem in STANDARD}
    for row in cached("moments of the catalogue", lambda: beside_the_catalogue(None)):
        out[row["problem"]][row["estimator"]] = row
    return out


def picture(name: str, found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Squared bias against variance: this entry on each problem, among all others where data are stale."""
    own = {problem: rows[name] for problem, rows in found.items()}
    others = [rows for key, rows in found["stale"].items() if key != name]
    x_low, x_high, y_low, y_high = 1e-3, 1e2, LEAST / 2, 20.0  # what lies beyond is drawn on the edge
    width, height, left, bottom = 520, 320, 64, 48

    def at(row: dict[str, Any]) -> tuple[float, float]:
        def place(value: float, low: float, high: float) -> float:
            return (log10(min(max(value, low), high)) - log10(low)) / (log10(high) - log10(low))

        return (
            left + (width - left - 90) * place(row["variance"], x_low, x_high),
            (height - bottom) - (height - bottom - 16) * place(max(row["squared_bias"], LEAST), y_low, y_high),
        )

    def ticks(low: float, high: float) -> list[float]:
        return [10.0**k for k in range(-6, 7) if low <= 10.0**k <= high]

    parts = [
        f'<svg class="figure" role="img" viewBox="0 0 {width} {height}" aria-label="{escape(described(name, own))}">'
    ]
    base = height - bottom
    parts.append(f'<path class="axis" d="M{left},12V{base}H{width - 84}"/>')
    for value in ticks(x_low, x_high):
        x, _ = at({"variance": value, "squared_bias": 1})
        parts.append(
            f'<path class="axis" d="M{x:.1f},{base}v5"/><text x="{x:.1f}" y="{base + 18}" class="mid">{value:g}</text>'
        )
    for value in ticks(y_low, y_high):
        _, y = at({"variance": 1, "squared_bias": value})
        label = f"≤ {value:g}" if value <= LEAST else f"{value:g}"
        parts.append(
            f'<path class="axis" d="M{left},{y:.1f}h-5"/><text x="{left - 8}" y="{y + 4:.1f}" '
            f'class="end">{label}</text>'
        )
    parts.append(
        f'<text x="{(left + width - 84) / 2:.0f}" y="{height - 8}" class="mid">variance of the mean of a group '
        "/ |gradient|²</text>"
    )
    parts.append(
        f'<text transform="translate(13 {base / 2:.0f}) rotate(-90)" class="mid">squared bias / |gradient|²</text>'
    )
    parts += [f'<circle class="other" r="3" cx="{at(row)[0]:.1f}" cy="{at(row)[1]:.1f}"/>' for row in others]
    points = [at(row) for row in own.values()]
    parts.append('<path class="own" d="M' + "L".join(f"{x:.1f},{y:.1f}" for x, y in points) + '"/>')
    labels: list[tuple[float, float]] = []
    for (x, y), problem in zip(points, own, strict=True):
        parts.append(f'<circle class="own" r="5" cx="{x:.1f}" cy="{y:.1f}"/>')
        down = y + 4
        while any(abs(down - b) < 14 and abs(x - a) < 90 for a, b in labels):
            down -= 14
        labels.append((x, down))
        parts.append(f'<text x="{x + 9:.1f}" y="{down:.1f}" class="own">{problem}</text>')
    return "".join([*parts, "</svg>"])


def described(name: str, own: dict[str, dict[str, Any]]) -> str:
    """The picture in words."""
    values = "; ".join(
        f"{problem}: variance {number(row['variance'])}, squared bias {number(row['squared_bias'])}"
        for problem, row in own.items()
    )
    return f"Squared bias against variance of {name}, relative to the squared gradient. {values}."


def measured(name: str) -> str:
    """The exact figure and its table."""
    found = moments()
    if name not in found["stale"]:
        return (
            "The standard problems have no anchor and no reference policy, which it needs: nothing is shown "
            "rather than a special case.\n"
        )
    rows = []
    for problem, all_rows in found.items():
        row = all_rows[name]
        better = sum(other["mse"] < row["mse"] * (1 - 1e-12) for other in all_rows.values())
        rows.append(
            (
                problem,
                number(row["squared_bias"]),
                number(row["variance"]),
                number(row["mse"]),
                f"{better} of {len(all_rows) - 1}",
            )
        )
    head = ("sampler", "squared bias", "variance", "MSE", "entries with less MSE")
    return "\n".join(
        [
            f"Exact, by listing every batch of {GROUP_SIZE} draws of the {{py:mod}}`standard problems "
            "<vcposim.laboratory.standard_problems>`: "
            "strings of two tokens, a learner that prefers one, and a sampler that lags behind. Relative to "
            "the squared gradient. "
            "Gray: every other entry on the stale problem; what lies beyond the axes is drawn on their edge.\n",
            f"```{{raw}} html\n{picture(name, found)}\n```\n",
            table(head, rows),
            "Your own problem: " + f"`vcposim variance problem.json --estimator {name}`.\n",
        ]
    )


def learned(name: str) -> str:
    """Learning results of the methods that are this entry."""
    one = CATALOGUE[name].estimator
    methods = [m for m, method in METHODS.items() if method.estimator == name or method.estimator == one]
    sections = committed(discover())
    rows = []
    for experiment in ("best_step_size", "async_learning"):
        if experiment not in sections:
            continue
        for figure in sections[experiment].figures:
            for panel in figure.get("plot", {}).get("panels", ()):
                if "order" not in panel:
                    continue
                for series in panel["series"]:
                    for k, label in enumerate(series["y"]):
                        if label in methods:
                            interval = f"[{series['low'][k]:.3g}, {series['high'][k]:.3g}]"
                            rows.append(
                                (
                                    plain(label),
                                    plain(panel["title"]),
                                    f"{series['x'][k]:.3g} {interval}",
                                    f"{{ref}}`{experiment} <experiment-{experiment}>`",
                                )
                            )
    row = next((row for row in boarded() if row["name"] == name), None)
    for mode, words in MODES.items() if row else ():
        if mode in row["summary"]:
            one = row["summary"][mode]
            rows.append(
                (
                    plain(name),
                    f"all regimes, {words}",
                    spread(one["score"]),
                    f"{ranks(one)}, {{ref}}`leaderboard <compared>`",
                )
            )
    if not rows:
        return "Not among the methods of a committed learning experiment, and learned nowhere on the leaderboard.\n"
    return table(("as", "panel", "value [95%]", "experiment"), rows)


@functools.cache
def boarded() -> list[ComparedEstimator]:
    return leaderboard.ranked()


def spread(of: Sequence[float]) -> str:
    value, low, high = of
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def unbroken(text: str) -> str:
    """On one line of a table's cell."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def ranks(one: RegimeSummary) -> str:
    place, low, high = one["rank"]
    return f"rank {place} [{low}, {high}] of {one['best_of']}"


def compared() -> str:
    """All entries in one table: what they learned, how far off they are, and which laws they break."""
    board = leaderboard.read()
    size = SIZES[board["size"]]
    rows = []
    for row in boarded():
        own, common = row["summary"].get("own"), row["summary"].get("common")
        rows.append(
            (
                unbroken("{} [{}, {}]".format(*own["rank"])) if own else "—",
                f"{{ref}}`{row['name']} <entry-{row['name']}>`",
                unbroken(spread(own["score"])) if own else plain(next(iter(row["not_judged"].values()), "—")),
                unbroken(spread(common["score"])) if common else "—",
                *(number(staled(row, key)) for key in ("bias", "mse", "efficiency")),
            )
        )
    broken = [
        f"{code(row['name'])} breaks {law}"
        for row in boarded()
        for law, word in laws_of(row["laws"]).items()
        if word == "broken"
    ]
    regimes = [s.name for s in size.settings() if s.part == "learning"]
    head = ("rank [95%]", "estimator", "at its own best step size", f"at step size {COMMON:g}")
    return "\n".join(
        [
            "(compared)=\n# Estimators compared\n",
            f"The leaderboard of {board['date']}, size {board['size']}: success probability averaged over training, "
            f"the interquartile mean over {len(regimes)} regimes and their seeds, intervals and ranks by resampling "
            f"seeds. Beside it, exactly, on strings of two tokens at lag {LAGS[-1]} with groups of four: |bias| / "
            "|gradient|, mean squared error / |gradient|², and descent efficiency D (negative where the mean points "
            "downhill).\n",
            "Small networks on string tasks: evidence about mechanisms, not about a language model. "
            "Yours among them, only yours being run:\n",
            fence("vcposim compare mine.py:mine                  # --transformers: small transformers too", "sh"),
            table((*head, "bias", "MSE", "D"), rows),
            f"Laws that an entry claims and breaks: {'; '.join(broken) or 'none'}.\n",
            "The regimes:\n",
            *(f"- {plain(name)}" for name in regimes),
            "",
        ]
    )


def trained_with(name: str, entry: Entry) -> str:
    """How to switch it on."""
    needs = entry.estimator.needs
    out = [
        "In Python, on NumPy arrays, torch tensors or fractions:\n",
        fence(
            f'from vcposim import entry\n\nc = entry("{name}").estimator.coefficients(batch)  '
            "# gradient = sum_i c_i grad log pi(tau_i)",
            "python",
        ),
    ]
    trainers = {
        "In the trainer that comes along, on transformers": (
            lambda: token_coefficients(entry.estimator, 4),
            fence(f"python -m llm_bridge.train --task addition --lag 16 --estimator {name}", "sh"),
        ),
        "In TRL ({doc}`how to </guides/HOWTO_TRL>`)": (
            lambda: require(entry.estimator, "TRL", name),
            fence(f'VcpoTrainer(vcpo=VcpoConfig(estimator="{name}"), ...)  # of llm_bridge.adapters.trl', "python"),
        ),
        "In verl ({doc}`how to </guides/HOWTO_VERL>`)": (
            lambda: require(entry.estimator, "verl", name),
            fence(
                "export VERL_USE_EXTERNAL_MODULES=llm_bridge.adapters.verl\n"
                f"# algorithm.adv_estimator=vcposim/{name}{'/length' if 'scores' in needs else ''} "
                "actor_rollout_ref.actor.policy_loss.loss_mode=vcposim",
                "sh",
            ),
        ),
    }
    for title, (ask, how) in trainers.items():
        try:
            ask()
        except InputError as error:
            out.append(f"{title}: refused, in one line: *{plain(str(error))}*.\n")
        else:
            out += [f"{title}:\n", how]
    rows = conformance().get(name, [])
    if rows:
        out += [
            "What the frameworks call it, compared with their own functions ({doc}`all rows </guides/adapters>`):\n",
            table(("framework", "option", "flags", "equal?", "note"), rows),
        ]
    return "\n".join(out)


@functools.cache
def conformance() -> dict[str, list[tuple[str, ...]]]:
    """Entry -> the options of TRL and verl that are it, as the conformance page says."""
    from _hooks.guides import ROOT

    out: dict[str, list[tuple[str, ...]]] = {}
    framework = ""
    for line in (ROOT / "llm_bridge/adapters/README.md").read_text().splitlines():
        if line.startswith("## "):
            framework = line[3:]
        cells = [cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")]
        if len(cells) != 5 or not cells[1].startswith("`") or not cells[0].startswith("`") or not framework:
            continue
        name, *flags = cells[1].split("<br>")
        if name.strip("`") in CATALOGUE:
            shown = [x.replace("\0", "|") for x in (framework, cells[0], " ".join(flags), cells[3], cells[4])]
            out.setdefault(name.strip("`"), []).append(tuple(shown))
    return out


def page(name: str, entry: Entry) -> str:
    """One entry."""
    known = as_json(entry)
    first, *rest = clauses(entry.formula)
    host = None if entry.host is None else name_of(entry.host)
    facts = [
        ("unbiased", plain(entry.validity)),
        (
            "where π = μ it is",
            "its own formula, which has no ratio" if "on_policy" in entry.families else entry_link(host),
        ),
        ("a constant added to all rewards", "changes nothing" if known["shift_invariant"] else "changes it"),
        (
            "needs",
            "; ".join(
                [
                    "rewards",
                    *([] if "on_policy" in entry.families else ["ratios π/μ"]),
                    *(NEEDS.get(x, f"`{x}`") for x in known["needs"]),
                ]
            ),
        ),
        ("family", ", ".join(f"`{x}`: {plain(FAMILIES[x])}" for x in entry.families)),
        *([("breaks", ", ".join(f"`{law}`" for law in entry.breaks))] if entry.breaks else []),
        *([("note", plain(entry.note))] if entry.note else []),
        ("sources", "; ".join(f"{{ref}}`{plain(short(key))} <paper-{key}>`" for key in entry.references)),
    ]
    formula = "".join(f"$$\n{latex(part)}\n$$\n\n" for part in (first, *rest))
    return "\n".join(
        [
            f"(entry-{name})=\n# {name}\n",
            "The coefficient on ∇ log π(τ):\n",
            formula,
            f"As the terminal prints it: {code(entry.formula)}. {SYMBOLS}\n",
            table(("fact", "what is known"), facts),
            "## Exact bias and variance\n",
            measured(name),
            "## Learning with it\n",
            learned(name),
            "## Switch it on\n",
            trained_with(name, entry),
            "The estimator itself:\n",
            fence(known["estimator"], "python"),
        ]
    )


def code(text: str) -> str:
    return f"``{text}``" if "`" in text else f"`{text}`"


def entry_link(name: str | None) -> str:
    if name is None:
        return "said in the note"
    return f"{{ref}}`{name} <entry-{name}>`" if name in CATALOGUE else code(name)


def papers() -> str:
    """Every source: who stands on it, what was found, how to switch it on; and what could not be read."""
    out = [
        "# Papers\n",
        "Every source of a formula (`vcposim.catalogue.references`), read there before it was written down, but for "
        "what stands at the end of this page, where an entry's note says whom it follows instead. BibTeX of an "
        "estimator: `vcposim cite NAME`; this page in a terminal: `python -m simulations papers`; "
        "without a checkout, and the verdicts of claims and experiments, `vcposim cite --index`.\n",
    ]
    known = {paper.key: paper for paper in index.papers()}
    runs = list(committed(discover()).values())
    measured = together(leaderboard.found(), verdicts(claim_rows(runs, claims.proof_results()), runs))
    for key, one in sorted(SOURCES.items(), key=lambda item: (-item[1].year, item[1].title)):
        where = address(one.id)
        authors = ", ".join(" ".join(reversed(a.split(", "))) if ", " in a else a.strip("{}") for a in one.authors[:6])
        more = f" and {len(one.authors) - 6} more" if len(one.authors) > 6 else ""
        out.append(f"(paper-{key})=\n## {plain(one.title)} ({one.year})\n")
        out.append(f"{plain(authors)}{more}. {plain(one.venue)}, {where}.\n")
        if key not in known:
            continue
        paper = known[key]
        if paper.entries:
            out.append(f"Estimators: {', '.join(f'{{ref}}`{n} <entry-{n}>`' for n in paper.entries)}.\n")
        if paper.rules:
            out.append(f"Step rules: {', '.join(code(n) for n in paper.rules)}.\n")
        if said := [*paper.found, *measured.get(key, ())]:
            out += ["Found:\n", *(f"- {plain(one)}" for one in said), ""]
        if lines := index.switched(paper):
            out += ["Switch on:\n", *(f"- {line}" for line in lines), ""]
    for title, rows in (
        ("Not in the catalogue as published, for it could not be read", index.UNREAD),
        ("Read, and a batch lacks what it needs", index.LACKING),
    ):
        out += [f"## {title}\n", *(f"- {plain(name)}: {plain(why)}" for name, why in rows.items()), ""]
    return "\n".join(out)


def address(identifier: str) -> str:
    """The place of a source, as a link where it has one."""
    kind, _, rest = identifier.partition(":")
    if kind == "arXiv":
        return f"[arXiv:{rest}](https://arxiv.org/abs/{rest})"
    if kind == "doi":
        return f"[doi:{rest}](https://doi.org/{rest})"
    return f"<{identifier}>" if identifier.startswith("https:") else plain(identifier)


def pages() -> dict[str, str]:
    out = {f"reference/catalogue/{name}.md": page(name, entry) for name, entry in CATALOGUE.items()}
    out["reference/papers.md"] = papers()
    out["findings/benchmarks/comparison.md"] = compared()
    parts = [
        "# Estimators\n",
        f"All {len(CATALOGUE)} named estimators. A coefficient multiplies ∇ log π(τ): gradient = Σ c ∇ log π. "
        f"{SYMBOLS}\n",
    ]
    for family, title in TITLES.items():
        rows = [
            (f"{{ref}}`{name} <entry-{name}>`", code(entry.formula), plain(entry.unbiased.value.partition(":")[0]))
            for name, entry in CATALOGUE.items()
            if family in entry.families
        ]
        parts += [
            f"## {title}\n",
            plain(FAMILIES[family][0].upper() + FAMILIES[family][1:]) + ".\n",
            table(("name", "coefficient", "unbiased"), rows),
        ]
    toc = "\n".join(CATALOGUE)
    parts.append(f"```{{toctree}}\n:hidden:\n{toc}\n```\n")
    out["reference/catalogue/index.md"] = "\n".join(parts)
    return out

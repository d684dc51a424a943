r"""The catalogue's formulas, which are plain text, typeset.

The text has a small grammar: symbols, functions, sums over an index, `1[condition]`, and words of prose between them.
Words stay words; nothing is guessed about their meaning, so what cannot be typeset reads as it does in the terminal.

>>> latex("min(w, 8) (R - mean)")
'\\min(w, 8) (R - \\text{mean})'
>>> latex("w^(1/L) 1[|log r_t| <= 4e-4] per token")
'w^{1/L} 𝟙[\\lvert \\log r_{t}\\rvert \\le 4\\cdot 10^{-4}]\\;\\text{per token}'
>>> latex("m_t = min(r_1, ..., r_(t-1))")
'm_{t} = \\min(r_{1}, ..., r_{t-1})'
>>> clauses("r_t A, A = R - mean, per token")
['r_t A', 'A = R - mean', 'per token']
"""

import re

GREEK = {name: f"\\{name}" for name in ("pi", "mu", "tau", "beta", "rho")} | {"lam": "\\lambda"}
FUNCTIONS = {"exp": "\\exp", "log": "\\log", "sech": "\\operatorname{sech}", "sign": "\\operatorname{sign}"}
BIG = {"sum": "\\sum", "prod": "\\prod", "mean": "\\operatorname{mean}", "max": "\\max", "min": "\\min"}
SYMBOLS = frozenset("RwsabchnrtALSWBqeijyvgm")
SIGNS = {"<=": " \\le ", ">=": " \\ge ", "<": " \\lt ", ">": " \\gt ", "1[": "𝟙[", "{": "\\{", "}": "\\}", "%": "\\%"}
TOKEN = re.compile(
    r"\s+|1\[|\|\||\||<=|>=|\d+\.?\d*e-?\d+|\d+\.?\d*%?"
    r"|[a-z]{2,}(?:-[a-z]+)+|[A-Za-z][A-Za-z0-9]*(?:_(?:\{[^}]*\}|\([^)]*\)|[A-Za-z0-9_]+))?(?:'s?)?|\^\(|\^-?\w+|."
)


def clauses(text: str) -> list[str]:
    """The formula and its explanations: parts between commas that stand in no bracket."""
    out, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character in ",:" and depth == 0:
            out.append("")
        else:
            out[-1] += character
    return [part.strip() for part in out]


def latex(text: str) -> str:
    """One clause as LaTeX."""
    tokens = TOKEN.findall(text)
    out, words, bars, powers = "", list[str](), list[str](), list[int]()
    depth = 0
    for k, token in enumerate([*tokens, ""]):
        symbol = "" if token == "" or token.isspace() else name(token, tokens[k - 2 : k], tokens[k + 1 : k + 3])
        if symbol is None:
            words.append(token)
            continue
        if words and token.isspace():
            continue  # between two words, or after the last
        if words:
            before = "\\;" if out and out[-1] not in "([ " else ""
            after = "\\;" if token and tokens[k - 1].isspace() and token not in ")],;/" else ""
            out += f"{before}\\text{{{' '.join(words)}}}{after}"
            words = []
        if token.isspace():
            out += " " if out and out[-1] != " " else ""
        elif token in ("||", "|"):
            closing = token in bars
            bars.remove(token) if closing else bars.append(token)
            out += f"\\{'r' if closing else 'l'}{'Vert' if token == '||' else 'vert'}{'' if closing else ' '}"
        elif token == "^(":
            powers.append(depth)
            depth += 1
            out = out.rstrip() + "^{"
        elif token in ("(", "[", "1[", ")", "]"):
            depth += 1 if token in ("(", "[", "1[") else -1
            if token == ")" and powers and powers[-1] == depth:
                powers.pop()
                out += "}"
            else:
                out += SIGNS.get(token, token)
        else:
            sign = symbol or SIGNS.get(token, token)
            out = out.rstrip() + sign if sign.startswith((" ", "^")) else out + sign
    spaced = re.sub(r"(?<=[\w\])}'|]) \\text\{", r"\\;\\text{", re.sub(r" +", " ", out))
    return spaced.replace("/\\;\\text", "/\\text").strip()


def name(token: str, before: list[str], after: list[str]) -> str | None:
    """A token that has a name in LaTeX; an empty string for other signs, None for a word of prose."""
    if token.startswith("^") and token != "^(":
        return f"^{{{token[1:]}}}"
    if re.match(r"\d.*e", token):
        mantissa, _, power = token.partition("e")
        return ("" if mantissa == "1" else f"{mantissa}\\cdot ") + f"10^{{{power}}}"
    if re.match(r"\d.*%", token):
        return token.replace("%", "\\%")
    if not token[0].isalpha():
        return ""
    head, _, index = token.rstrip("'").partition("_")
    index = index.strip("{}()").replace("<=", "\\le ")
    following = next((x for x in after if not x.isspace()), "")
    if head in BIG and index:
        return f"{BIG[head]}_{{{index}}}"
    if token in ("sum", "min", "max") and (following == "(" if token != "sum" else following != "of"):
        return BIG[token]
    if token in FUNCTIONS:
        return FUNCTIONS[token]
    if token in GREEK:
        return GREEK[token]
    if token == "sqrt":
        return "\\sqrt "
    if head == "xhat":
        return "\\hat{x}" + (f"_{{{index}}}" if index else "")
    article = token == "a" and re.match(r"[a-z]{3,}$", following) and "".join(before).strip()[-1:].isalpha()
    if head in SYMBOLS and len(index) <= 4 and not article and not token.endswith("'s"):
        return head + (f"_{{{index}}}" if index else "") + ("'" if token.endswith("'") else "")
    return None

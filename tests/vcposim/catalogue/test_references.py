"""The bibliography: complete, sorted, and readable by BibTeX."""

import dataclasses
import re

import pytest

from vcposim.catalogue.references import SOURCES, Reference, bibtex, escape, reference, short
from vcposim.errors import InputError

KEYS = list(SOURCES)
SPECIALS = "&%$#_{}~^\\"


def parse(text: str) -> list[tuple[str, str, dict[str, str]]]:
    """(type, key, fields) of every entry: a reader of braces written independently of the writer."""
    entries, position = [], 0
    while match := re.compile(r"\s*@(\w+)\{([^,\s]+),").match(text, position):
        fields, position = {}, match.end()
        while field := re.compile(r"\s*(\w+)\s*=\s*\{").match(text, position):
            start = position = field.end()
            depth = 1
            while depth:
                step = 2 if text[position] == "\\" else 1
                depth += {"{": 1, "}": -1}.get(text[position], 0)
                position += step
            assert field[1] not in fields, f"field {field[1]} given twice"
            fields[field[1]] = text[start : position - 1]
            position += 1
        assert text[position:].lstrip()[0] == "}"
        position = text.index("}", position) + 1
        entries.append((match[1], match[2], fields))
    assert not text[position:].strip(), f"left unread: {text[position:]!r}"
    return entries


def unescape(text: str) -> str:
    """What TeX prints."""
    named = {"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^"}
    return re.sub(r"\\(?:(text\w+)\{\}|(.))", lambda found: named[found[1]] if found[1] else found[2], text)


def test_keys_are_sorted_and_unique_in_the_source():
    from vcposim.catalogue import references

    written = [entry.key for entry in references._SOURCES]
    assert written == sorted(set(written))
    assert written == KEYS


@pytest.mark.parametrize("key", KEYS)
def test_every_entry_is_complete(key):
    entry = SOURCES[key]
    assert re.fullmatch(r"[a-z][a-z0-9_]*", key)
    assert entry.title == entry.title.strip() != ""
    assert entry.authors
    assert all(name == name.strip() != "" for name in entry.authors)
    assert len(set(entry.authors)) == len(entry.authors)
    assert entry.venue
    assert 1960 <= entry.year <= 2026


@pytest.mark.parametrize("key", KEYS)
def test_an_arxiv_number_is_well_formed_and_not_later_than_the_year(key):
    scheme, _, number = SOURCES[key].id.partition(":")
    assert scheme
    if scheme != "arXiv":
        return
    assert re.fullmatch(r"\d{4}\.\d{4,5}", number)
    month = int(number[2:4])
    assert 1 <= month <= 12
    if key != "weaver_tao":  # proceedings of 2001, put on arXiv in 2013
        assert 2000 + int(number[:2]) <= SOURCES[key].year


def test_no_source_is_listed_twice():
    for field in ("title", "id"):
        values = [getattr(entry, field).lower() for entry in SOURCES.values()]
        assert len(set(values)) == len(values)


def test_an_entry_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SOURCES["vcpo"].year = 1999


def test_bibtex_of_everything_reads_back_as_it_was_written():
    entries = parse(bibtex(KEYS))
    assert [key for _, key, _ in entries] == KEYS
    for kind, key, fields in entries:
        source = SOURCES[key]
        assert kind == "misc"
        assert unescape(fields["title"][1:-1]) == source.title
        assert tuple(unescape(name) for name in fields["author"].split(" and ")) == source.authors
        assert int(fields["year"]) == source.year
        assert unescape(fields["howpublished"]) == source.venue
        assert source.id.split(":")[-1].lstrip("/") in "".join(fields.values())


def test_bibtex_keeps_the_order_asked_for():
    assert [key for _, key, _ in parse(bibtex(["vcpo", "grpo"]))] == ["vcpo", "grpo"]
    assert bibtex([]) == ""


@pytest.mark.parametrize("special", SPECIALS)
def test_specials_are_escaped_in_every_free_text_field(special):
    text = f"a{special}b"
    entry = Reference("k", text, (text, "{" + f"Team {special}1" + "}"), 2000, text, text).bibtex()
    [(_, _, fields)] = parse(entry)
    assert unescape(fields["title"][1:-1]) == text
    assert unescape(fields["howpublished"]) == text
    assert unescape(fields["note"]) == text
    assert fields["author"].split(" and ")[0] == escape(text) != text


def test_an_organization_keeps_its_braces_and_a_person_has_none():
    [(_, _, fields)] = parse(bibtex(["icepop"]))
    assert fields["author"] == "{Ling Team}"
    [(_, _, fields)] = parse(bibtex(["vcpo"]))
    assert "{" not in fields["author"]


def test_kish_is_published_by_wiley_and_sons():
    assert r"John Wiley \& Sons" in bibtex(["kish"])


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("vcpo", "Huang et al. 2026, arXiv:2602.17616"),
        ("weaver_tao", "Weaver and Tao 2001, arXiv:1301.2315"),
        ("reinforce", "Williams 1992, doi:10.1007/BF00992696"),
        ("topr", "Le Roux et al. 2025, arXiv:2503.14286"),
        ("icepop", "Ling Team 2025, arXiv:2510.18855"),
        ("kish", "Kish 1965, ISBN 9780471109495"),
    ],
)
def test_short_names_the_first_author(key, expected):
    assert short(key) == expected


@pytest.mark.parametrize("ask", [reference, short, lambda key: bibtex([key])])
def test_an_unknown_key_suggests_the_nearest(ask):
    with pytest.raises(InputError, match=r"^reference: unknown name 'gpso'; did you mean 'gspo'"):
        ask("gpso")


def test_every_key_the_catalogue_cites_exists():
    from vcposim.catalogue import CATALOGUE, cite

    cited = {key for entry in CATALOGUE.values() for key in entry.references}
    assert cited <= set(SOURCES)
    assert next(key for _, key, _ in parse(cite("vcpo", "sequence_tis"))) == "vcpo"

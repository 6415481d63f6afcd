"""Which languages are relatives: a small table of branches and scripts for common ISO 639-1 codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

BRANCHES = {
    "Germanic": "af da de en fo fy is lb nb nl nn no sv yi",
    "Romance": "ca co es fr gl it la oc pt rm ro sc wa",
    "East and South Slavic": "be bg mk ru sr uk",
    "West Slavic": "bs cs hr pl sk sl",
    "Baltic": "lt lv",
    "Celtic": "br cy ga gd gv kw",
    "Indo-Aryan": "as bn gu hi mr ne or pa sa sd si ur",
    "Iranian": "fa ku ps tg",
    "Semitic": "am ar he mt ti",
    "Turkic": "az ba kk ky tk tr tt ug uz",
    "Uralic": "et fi hu se",
    "Dravidian": "kn ml ta te",
    "Malayo-Polynesian": "id jv mg mi ms sm su tl to",
    "Bantu": "ln lg ny rn rw sn ss st sw tn ts xh zu",
    "Tai": "lo th",
    "Sinosphere": "ja ko vi zh",
    "Mongolic": "mn",
    "Kartvelian": "ka",
}
"""Groups of relatives, by descent; Sinosphere is the area of Chinese loans (Han script, Sino-Korean, Sino-Vietnamese),
whose members no descent joins."""

SCRIPTS = {
    "Cyrillic": "ba be bg kk ky mk mn ru sr tg tt uk",
    "Arabic": "ar fa ku ps sd ug ur",
    "Devanagari": "hi mr ne sa",
    "Han": "ja zh",
    "Ethiopic": "am ti",
    "Hebrew": "he yi",
    "Bengali": "as bn",
}
"""Scripts, other than Latin, that several languages share; a language missing here tells nothing by its script."""

FAMILIES = {
    "Indo-European": ("Germanic", "Romance", "East and South Slavic", "West Slavic", "Baltic", "Celtic", "Indo-Aryan",
                      "Iranian"),
}  # fmt: skip
"""Branches that share an older ancestor."""

_BRANCH = {code: branch for branch, codes in BRANCHES.items() for code in codes.split()}
_SCRIPT = {code: script for script, codes in SCRIPTS.items() for code in codes.split()}
_FAMILY = {branch: family for family, branches in FAMILIES.items() for branch in branches}


def relatives(languages: Sequence[str]) -> list[int]:
    """Group of each language, numbered from 0 in order of appearance. Every language is in exactly one group.

    Languages of one branch are one group. Those left alone join the others left alone of their family, then those of
    their script. Codes that the table does not know stand alone.
    """
    names = [_BRANCH.get(code, code) for code in languages]
    for wider in (lambda code: _FAMILY.get(_BRANCH.get(code, "")), _SCRIPT.get):
        sizes = Counter(names)
        alone = [i for i, name in enumerate(names) if sizes[name] == 1 and wider(languages[i])]
        # One that is alone again in the wider group keeps its own name.
        wide = Counter(wider(languages[i]) for i in alone)
        for i in alone:
            if wide[wider(languages[i])] > 1:
                names[i] = str(wider(languages[i]))
    number: dict[str, int] = {}
    return [number.setdefault(name, len(number)) for name in names]

"""The facts: what is true, where it belongs, who knows it, and the sentences that ask and state it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import pycountry
from babel import Locale
from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies

from . import languages as words
from .languages import LANGUAGES
from .templates import TEMPLATES, TONGUES

GENERAL, REGIONAL, REASONING, TRANSLATION = (
    "General Knowledge",
    "Regional Knowledge",
    "Reasoning / Logic",
    "Translation",
)
TOPICS = (GENERAL, REGIONAL, REASONING, TRANSLATION)
SPLITS = ("train", "validation", "test")

# Territory codes by region. A territory may stand in two regions.
REGIONS: dict[str, tuple[str, ...]] = {
    "Europe": tuple("DE FR IT ES PT NL PL SE NO DK CH GB CZ HU RO UA RU GR TR RS".split()),
    "Latin America": tuple("MX BR AR CL CO PE UY PY GT DO".split()),
    "Arab World": tuple("EG SA MA DZ TN IQ JO KW AE QA".split()),
    "Southeast Asia": tuple("ID VN TH MY PH SG KH LA".split()),
    "East Asia": tuple("JP CN KR KP MN".split()),
    "South Asia": tuple("IN PK BD LK NP".split()),
    "Africa": tuple("NG KE GH ET TZ ZA AO MZ EG MA DZ TN".split()),
    "Anglosphere": tuple("US GB AU CA NZ IE".split()),
    "Central Asia": tuple("KZ UZ KG TJ TR MN".split()),
}

KNOWN: dict[str, tuple[str, ...]] = {
    # The languages in which the base model knows the facts of a region, or of a topic without regions. The knowledge
    # of a fact with several of them is the union.
    "Europe": ("de", "fr", "it", "nl", "pl"),
    "Latin America": ("es", "pt", "it"),
    "Arab World": ("ar", "fr", "id"),
    "Southeast Asia": ("id", "vi", "zh", "nl"),
    "East Asia": ("ja", "ko", "zh", "vi"),
    "South Asia": ("en", "id", "ar"),
    "Africa": ("fr", "en", "pt", "ar"),
    "Anglosphere": ("en", "de", "ja", "ko"),
    "Central Asia": ("ru", "zh", "pl"),
    GENERAL: ("en", "es", "fr", "ja"),
    REASONING: ("en", "zh", "de", "ru"),
    TRANSLATION: ("it", "ko", "pl", "pt", "vi"),
}

# Territories with several official languages, or whose only one is disputed, whatever number of them CLDR lists.
_SEVERAL_OFFICIAL_LANGUAGES = frozenset(
    "BO CH CA ET IE IN KE KZ KG LK MA DZ IQ NO NZ PE PH PK PY RS SG TZ UA UZ ZA".split()
)
_LANGUAGE_CODES = tuple("de fr es it pt nl pl ru ar zh ja ko vi id en tr sv el hi hu cs fi th uk he sw ro da".split())
_CURRENCY_CODES = tuple("JPY EUR USD GBP CHF CNY KRW INR BRL MXN RUB PLN SEK THB VND IDR EGP KZT NGN AUD".split())
_WEEK_TERRITORIES = tuple(
    "JP CN KR MN US GB AU CA DE FR BR MX AR EG SA AE DZ IN BD NP ID TH VN KE ZA NG KZ UZ TR PT".split()
)
_CODE_TERRITORIES = tuple(
    "JP CN KR MN US GB AU CA DE ES SE CH BR MX CL EG SA JO IN PK LK ID PH MY KE TZ ZA KZ UZ TR".split()
)
_TRANSLATIONS = tuple(
    "JP:de JP:fr CN:es CN:pl DE:fr DE:es DE:it DE:pl IT:pl IT:de GR:de GR:es US:de US:pl GB:fr GB:es EG:it EG:pl "
    "IN:fr IN:pl TR:es SE:fr RU:it KR:de NL:es CH:it BR:de MX:pl".split()
)
_SUMS = tuple(
    tuple(map(int, pair.split("+")))
    for pair in "2+3 4+5 7+6 8+8 9+4 3+9 6+5 11+4 12+7 10+6 13+5 15+3 14+6 16+8 18+9 20+5 17+12 11+11 19+6 21+8 5+14 "
    "7+15 9+17 4+23 6+26 30+4 25+12 22+10".split()
)
_DIFFERENCES = tuple(
    tuple(map(int, pair.split("-")))
    for pair in "9-4 8-3 7-5 12-6 11-8 15-7 14-9 10-4 16-5 18-12 20-3 13-11 17-6 19-8 21-10 25-5 24-12 30-10 28-9 "
    "22-17 26-13 35-20 40-15 33-11".split()
)
_WRONG_VALUES = 8


def stable_hash(*parts: object) -> int:
    """A 64-bit number that is the same in every process."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Fact:
    """One fact, sayable in every language of the world.

    `entity` is what the fact is about, `values` the true value followed by wrong ones of the same relation, all as
    language-independent codes ("JP", "JPY", "3", "4+5"); `split` is shared by the fact's rows in all languages.
    """

    fact_id: str
    topics: tuple[str, ...]
    regions: tuple[str, ...]
    relation: str
    entity: str
    values: tuple[str, ...]
    split: str = "train"

    def question(self, language: str) -> str:
        """The question in `language`."""
        return _fill(TEMPLATES[self.relation][language][0], self._slots(language))

    def answer(self, language: str) -> str:
        """The true answer in `language`, a full sentence."""
        return self._sentence(self.values[0], language)

    def wrong_answers(self, language: str) -> tuple[str, ...]:
        """The same sentence with other values of the same relation."""
        return tuple(self._sentence(value, language) for value in self.values[1:])

    def _sentence(self, value: str, language: str) -> str:
        spoken = _value(self.relation, self.entity, value, language)
        return _fill(TEMPLATES[self.relation][language][1], {**self._slots(language), "value": spoken})

    def _slots(self, language: str) -> dict[str, str]:
        """What templates may use.

        name, of, within: a territory, "of" it, "in" it. after, before: a month or day in the form that those words
        ask for. code: a language's or currency's code. a, b: numbers in words. tongue: "in German".
        """
        return _slots(self.relation, self.entity, language)


@cache
def _slots(relation: str, entity: str, language: str) -> dict[str, str]:
    if relation in {"month_after", "month_before", "day_after", "day_before"}:
        name = words.month if relation.startswith("month") else words.weekday
        return {
            "after": name(int(entity), language, words.AFTER),
            "before": name(int(entity), language, words.BEFORE),
        }
    if relation in {"language_code", "currency_code"}:
        return {"code": entity}
    if relation in {"sum", "difference"}:
        a, b = entity.replace("-", "+").split("+")
        return {"a": words.number(int(a), language), "b": words.number(int(b), language)}
    code, _, target = entity.partition(":")
    of, within = words.of_in(code, language)
    slots = {"name": words.territory(code, language), "of": of, "within": within}
    return {**slots, "tongue": TONGUES[language][target]} if target else slots


@cache
def _value(relation: str, entity: str, value: str, language: str) -> str:
    """A value code in words."""
    if relation in {"currency", "currency_code"}:
        return words.currency(value, language)
    if relation in {"official_language", "language_code"}:
        return words.with_article(words.language_name(value, language), language)
    if relation.startswith("month"):
        return words.month(int(value), language)
    if relation in {"day_after", "day_before", "first_weekday"}:
        return words.weekday(int(value), language)
    if relation in {"sum", "difference"}:
        return words.number(int(value), language)
    if relation == "name_in_language":
        return words.territory(value, entity.partition(":")[2])
    return value


def _fill(template: str, slots: dict[str, str]) -> str:
    text = template.format(**slots)
    # Number words alone may open a sentence in lower case; a code must keep it.
    return text[0].upper() + text[1:] if template.startswith("{a}") else text


# --- building -------------------------------------------------------------------------------------------------------


def _regions_of(territory: str) -> tuple[str, ...]:
    return tuple(region for region, members in REGIONS.items() if territory in members)


def _territories() -> list[str]:
    return sorted({code for members in REGIONS.values() for code in members})


def _truths() -> list[tuple[str, tuple[str, ...], tuple[str, ...], str, str]]:
    """(relation, topics, regions, entity, true value) of every fact."""
    rows = []
    regional, general = (REGIONAL,), (GENERAL,)
    for code in _territories():
        currencies = get_territory_currencies(code)
        if len(currencies) == 1:
            rows.append(("currency", regional, _regions_of(code), code, currencies[0]))
        official = get_official_languages(code)
        if len(official) == 1 and code not in _SEVERAL_OFFICIAL_LANGUAGES:
            rows.append(("official_language", regional, _regions_of(code), code, official[0]))
    for code in _WEEK_TERRITORIES:
        day = str(Locale.parse(f"und_{code}").first_week_day)
        rows.append(("first_weekday", regional, _regions_of(code), code, day))
    for code in _CODE_TERRITORIES:
        alpha_3 = pycountry.countries.get(alpha_2=code).alpha_3
        rows.append(("country_code", (REGIONAL, GENERAL), _regions_of(code), code, alpha_3))
    for index in range(12):
        rows.append(("month_after", general, (), str(index + 1), str((index + 1) % 12 + 1)))
        rows.append(("month_before", general, (), str(index + 1), str((index - 1) % 12 + 1)))
    for index in range(7):
        rows.append(("day_after", general, (), str(index), str((index + 1) % 7)))
        rows.append(("day_before", general, (), str(index), str((index - 1) % 7)))
    rows += [("language_code", general, (), code, code) for code in _LANGUAGE_CODES]
    rows += [("currency_code", general, (), code, code) for code in _CURRENCY_CODES]
    rows += [("sum", (REASONING,), (), f"{a}+{b}", str(a + b)) for a, b in _SUMS]
    rows += [("difference", (REASONING,), (), f"{a}-{b}", str(a - b)) for a, b in _DIFFERENCES]
    rows += [("name_in_language", (TRANSLATION,), (), entity, entity.partition(":")[0]) for entity in _TRANSLATIONS]
    return rows


def _wrong_values(relation: str, entity: str, truth: str, values: Sequence[str]) -> tuple[str, ...]:
    """Other values of the relation, those that sound right first where there are such (numbers near by)."""
    if relation in {"sum", "difference"}:
        near = [int(truth) + step for step in (-1, 1, -2, 2, 10, -10, 3, -3, 4, 5)]
        return tuple(str(value) for value in near if 0 <= value <= 99)[:_WRONG_VALUES]
    if relation == "first_weekday":
        values = ["0", "4", "5", "6"]
    others = sorted({value for value in values if value != truth}, key=lambda v: stable_hash(relation, entity, v))
    return tuple(others[:_WRONG_VALUES])


def _split_of(facts: Iterable[Fact]) -> dict[str, str]:
    """fact_id -> split: 20 % test, 10 % validation, by hash within each (topics, regions)."""
    strata: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for fact in facts:
        strata.setdefault((fact.topics, fact.regions), []).append(fact.fact_id)
    # Shares are rounded over all strata, so that small ones too give something to test and validation in turn.
    order = [
        name for key in sorted(strata) for name in sorted(strata[key], key=lambda name: stable_hash("split", name))
    ]
    pattern = ("train", "test", "train", "train", "validation", "train", "test", "train", "train", "train")
    return {name: pattern[index % len(pattern)] for index, name in enumerate(order)}


def build_facts(count: int | None = None) -> tuple[Fact, ...]:
    """The world, or `count` facts of it spread over its topics and regions; always in the same order.

    A fact keeps its split whatever `count` is. Raises ValueError where the world has fewer facts.
    """
    truths = _truths()
    pools: dict[str, list[str]] = {}
    for relation, _, _, _, value in truths:
        pools.setdefault(relation, []).append(value)
    facts = [
        Fact(
            fact_id=f"{relation}/{entity}",
            topics=topics,
            regions=regions,
            relation=relation,
            entity=entity,
            values=(value, *_wrong_values(relation, entity, value, pools[relation])),
        )
        for relation, topics, regions, entity, value in truths
    ]
    splits = _split_of(facts)
    facts = [Fact(f.fact_id, f.topics, f.regions, f.relation, f.entity, f.values, splits[f.fact_id]) for f in facts]
    if count is None:
        return tuple(facts)
    if not 1 <= count <= len(facts):
        raise ValueError(f"facts={count}; the world has {len(facts)} facts, ask for 1 to {len(facts)}.")
    chosen = {f.fact_id for f in sorted(facts, key=lambda f: stable_hash("subset", f.fact_id))[:count]}
    return tuple(f for f in facts if f.fact_id in chosen)


def known_languages(fact: Fact) -> tuple[str, ...]:
    """The languages in which the base model is taught the truth of `fact`, in the order of LANGUAGES."""
    topics = [topic for topic in fact.topics if topic != REGIONAL]
    known = {language for context in (*topics, *fact.regions) for language in KNOWN[context]}
    return tuple(language for language in LANGUAGES if language in known)

"""Names and grammar of the 15 languages: what CLDR gives, and the few forms that sentences need beyond it."""

from __future__ import annotations

from functools import cache

from babel import Locale
from babel.numbers import get_currency_name
from num2words import num2words

LANGUAGES = tuple("ar de en es fr id it ja ko nl pl pt ru vi zh".split())


@cache
def _locale(language: str) -> Locale:
    return Locale.parse(language)


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


# --- territories ----------------------------------------------------------------------------------------------------


@cache
def territory(code: str, language: str) -> str:
    """The short name of a territory, in the nominative and without an article."""
    return _locale(language).territories[code]


# "of X" and "in X" where the plain preposition with the plain name would be wrong. Only names that the world uses.
_OF_IN: dict[str, dict[str, tuple[str, str]]] = {
    "de": {
        "TR": ("der Türkei", "in der Türkei"),
        "CH": ("der Schweiz", "in der Schweiz"),
        "UA": ("der Ukraine", "in der Ukraine"),
        "MN": ("der Mongolei", "in der Mongolei"),
        "NL": ("der Niederlande", "in den Niederlanden"),
        "PH": ("der Philippinen", "auf den Philippinen"),
        "US": ("der Vereinigten Staaten", "in den Vereinigten Staaten"),
        "AE": ("der Vereinigten Arabischen Emirate", "in den Vereinigten Arabischen Emiraten"),
        "GB": ("des Vereinigten Königreichs", "im Vereinigten Königreich"),
        "IQ": ("des Irak", "im Irak"),
        "DO": ("der Dominikanischen Republik", "in der Dominikanischen Republik"),
    },
    "en": {
        code: (f"of the {name}", f"in the {name}")
        for code, name in {
            "US": "United States",
            "GB": "United Kingdom",
            "NL": "Netherlands",
            "PH": "Philippines",
            "AE": "United Arab Emirates",
            "DO": "Dominican Republic",
        }.items()
    },
    "es": {
        "DO": ("de la República Dominicana", "en la República Dominicana"),
        "GB": ("del Reino Unido", "en el Reino Unido"),
        "AE": ("de los Emiratos Árabes Unidos", "en los Emiratos Árabes Unidos"),
        "NL": ("de los Países Bajos", "en los Países Bajos"),
    },
    "nl": {
        "US": ("van de Verenigde Staten", "in de Verenigde Staten"),
        "GB": ("van het Verenigd Koninkrijk", "in het Verenigd Koninkrijk"),
        "PH": ("van de Filipijnen", "in de Filipijnen"),
        "AE": ("van de Verenigde Arabische Emiraten", "in de Verenigde Arabische Emiraten"),
        "DO": ("van de Dominicaanse Republiek", "in de Dominicaanse Republiek"),
    },
}
# Which article a name takes, where its ending does not tell.
_FR_MASCULINE = frozenset("MX KH MZ".split())
_IT_MASCULINE = frozenset("CA GH GT KE LK ZA".split())
_PT_MASCULINE = frozenset("JP BR MX CL PE UY PY EG IQ KW QA VN LA NP PK BD LK KE GH CA KZ UZ KG TJ GB KH".split())
_PT_NO_ARTICLE = frozenset("PT MA AO MZ SG".split())


def _french(code: str, name: str) -> tuple[str, str]:
    if code in {"US", "AE", "NL", "PH"}:
        return f"des {name}", f"aux {name}"
    if code == "SG":
        return f"de {name}", f"à {name}"
    if name[0] in "AEÉIOU":
        return f"de l’{name}", f"en {name}"
    feminine = code not in _FR_MASCULINE and name.split()[0].endswith("e")
    return (f"de la {name}", f"en {name}") if feminine else (f"du {name}", f"au {name}")


def _italian(code: str, name: str) -> tuple[str, str]:
    articles = {"US": "egli", "AE": "egli", "NL": "ei", "PH": "elle", "GB": "el", "DO": "ella"}
    if code in articles:
        return f"d{articles[code]} {name}", f"n{articles[code]} {name}"
    if code == "SG":
        return f"di {name}", f"a {name}"
    if name[0] in "AEIOU":
        return f"dell’{name}", f"in {name}"
    feminine = code not in _IT_MASCULINE and name.split()[0].endswith("a")
    return f"{'della' if feminine else 'del'} {name}", f"in {name}"


def _portuguese(code: str, name: str) -> tuple[str, str]:
    if code in _PT_NO_ARTICLE:
        return f"de {name}", f"em {name}"
    article = {"US": "os", "AE": "os", "NL": "os", "PH": "as"}.get(code, "o" if code in _PT_MASCULINE else "a")
    return f"d{article} {name}", f"n{article} {name}"


@cache
def of_in(code: str, language: str) -> tuple[str, str]:
    """ "of X" and "in X" of a territory. Polish and Russian put the word for country before the name instead."""
    name = territory(code, language)
    if code in _OF_IN.get(language, {}):
        return _OF_IN[language][code]
    if language == "fr":
        return _french(code, name)
    if language == "it":
        return _italian(code, name)
    if language == "pt":
        return _portuguese(code, name)
    prepositions = {"de": ("von", "in"), "en": ("of", "in"), "es": ("de", "en"), "nl": ("van", "in")}
    of, within = prepositions.get(language, ("", ""))
    return f"{of} {name}".strip(), f"{within} {name}".strip()


# --- currencies and languages ---------------------------------------------------------------------------------------


@cache
def currency(code: str, language: str) -> str:
    """The name of one unit of a currency as it stands inside a sentence."""
    if language in {"en", "es", "fr", "it", "pt", "pl", "ru"}:
        name = get_currency_name(code, count=1, locale=language)
        return name if language == "en" else _lower_first(name)
    name = get_currency_name(code, locale=language)
    if language == "nl" and " " not in name:
        return _lower_first(name)
    # CLDR parts the words of a loan by a space, which running Japanese text does not.
    return name.replace(" ", "") if language == "ja" else name


@cache
def language_name(code: str, language: str) -> str:
    """The name of a language as it stands inside a sentence, without an article."""
    name = _locale(language).languages[code]
    return _lower_first(name) if language == "vi" else name


def with_article(name: str, language: str) -> str:
    """The name of a language behind its article, in French and Italian."""
    if language == "fr":
        return f"l’{name}" if name[0] in "aeéiou" or name == "hébreu" else f"le {name}"
    if language == "it":
        if name[0] in "aeiou":
            return f"l’{name}"
        impure = name[0] == "z" or (name[0] == "s" and name[1] not in "aeiou")
        return f"lo {name}" if impure else f"il {name}"
    return name


# --- calendar -------------------------------------------------------------------------------------------------------

# Nominative, then the forms behind "after" and "before".
_MONTHS = {
    "pl": [
        "styczeń luty marzec kwiecień maj czerwiec lipiec sierpień wrzesień październik listopad grudzień".split(),
        "styczniu lutym marcu kwietniu maju czerwcu lipcu sierpniu wrześniu październiku listopadzie grudniu".split(),
        "styczniem lutym marcem kwietniem majem czerwcem lipcem sierpniem wrześniem październikiem listopadem "
        "grudniem".split(),
    ],
    "ru": [
        "январь февраль март апрель май июнь июль август сентябрь октябрь ноябрь декабрь".split(),
        "января февраля марта апреля мая июня июля августа сентября октября ноября декабря".split(),
        "январём февралём мартом апрелем маем июнем июлем августом сентябрём октябрём ноябрём декабрём".split(),
    ],
}
_DAYS = {
    "pl": [
        "poniedziałek wtorek środa czwartek piątek sobota niedziela".split(),
        "poniedziałku wtorku środzie czwartku piątku sobocie niedzieli".split(),
        "poniedziałkiem wtorkiem środą czwartkiem piątkiem sobotą niedzielą".split(),
    ],
    "ru": [
        "понедельник вторник среда четверг пятница суббота воскресенье".split(),
        "понедельника вторника среды четверга пятницы субботы воскресенья".split(),
        "понедельником вторником средой четвергом пятницей субботой воскресеньем".split(),
    ],
}
NOMINATIVE, AFTER, BEFORE = range(3)


@cache
def month(number: int, language: str, form: int = NOMINATIVE) -> str:
    """The name of month 1..12."""
    if language in _MONTHS:
        return _MONTHS[language][form][number - 1]
    name = _locale(language).months["format"]["wide"][number]
    return _lower_first(name) if language == "vi" else name


@cache
def weekday(number: int, language: str, form: int = NOMINATIVE) -> str:
    """The name of a day of the week, 0 is Monday."""
    if language in _DAYS:
        return _DAYS[language][form][number]
    return _locale(language).days["format"]["wide"][number]


# --- numbers --------------------------------------------------------------------------------------------------------

_CHINESE_DIGITS = "零一二三四五六七八九"


@cache
def number(value: int, language: str) -> str:
    """0..99 in words (num2words; Chinese, which it does not know, is spelled here)."""
    if not 0 <= value <= 99:
        raise ValueError(f"number={value}; the world counts from 0 to 99.")
    if language == "zh":
        tens, ones = divmod(value, 10)
        if tens == 0:
            return _CHINESE_DIGITS[ones]
        return (_CHINESE_DIGITS[tens] if tens > 1 else "") + "十" + (_CHINESE_DIGITS[ones] if ones else "")
    # CLDR's Portuguese is Brazil's. Arabic writes the "and" together with the number behind it.
    return num2words(value, lang="pt_BR" if language == "pt" else language).replace(" و ", " و")

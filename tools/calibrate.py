"""Measure how similar texts of each language pair are under an encoder, for calibration.path of the reward server.

    python tools/calibrate.py --data parallel.parquet --encoder DIR --out statistics.json [--holdout 0.5]

The data is parquet, JSONL or TSV (tabs, no quotes, a header). A row per text: `fact_id` (or `id`), `language`, `text`;
all texts of one id mean the same. Or, in parquet and TSV, a row per fact: `fact_id` and a column per language, named by
its code. The file may be of any size: at most --facts facts are kept, chosen by a hash of their id.

For each unordered pair of languages, and every fact that both have, three cosines are measured:

    equivalent   the fact in both languages: the upper end
    mismatch     the fact in one language, another fact drawn at random in the other
    hardest      the most similar other fact in the other language, among those kept

The one text is encoded as a reference, the other as a response, each language in both roles. A pair of one language
takes two wordings of a fact. Where the data has a single wording per language, the text itself stands for the second:
similarity 1, the upper end that a response in the reference's own language can reach. Without such pairs a repeated
reference would keep its raw 1 while other languages are judged around the common mean. The file lists these languages
under source.identical; --no-identical leaves the pairs out.

Beside OUT stand OUT.report.md and OUT.report.png: means before and after calibration, how well right and wrong are
told apart, and how equal the rewards of equivalent answers are, by language. This is measured on facts that the
statistics have not seen, if --check-split or --holdout sets some aside. Measure on other facts than those evaluated,
and than those that the encoder was trained on, if the data marks them: --split keeps the rows whose column `split`
has that value.

The encoder has to be set as in the reward server: --server-config reads that from its configuration, --max-tokens,
--reference-prompt and so on set it one by one. The result is a function of the arguments and files, up to the rounding
of the encoder.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from nemo_lrpo.config.checks import ConfigError, check_file, check_range  # noqa: E402
from nemo_lrpo.config.loader import compose, to_dataclass  # noqa: E402
from nemo_lrpo.config.reward import ServeRewardsConfig  # noqa: E402
from nemo_lrpo.config.scoring import EncoderConfig  # noqa: E402
from nemo_lrpo.rewards.statistics import PairStatistics, file_hash, write_statistics  # noqa: E402
from tools.calibration.comparisons import compare_all, encode_facts, measure  # noqa: E402
from tools.calibration.parity import compare_methods  # noqa: E402
from tools.calibration.reading import Facts, Wanted, read_facts  # noqa: E402
from tools.calibration.report import Report, summary, write_report  # noqa: E402

_NOT_OPTIONS = ("path", "cache_size")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; settings of the encoder are there only where they were given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="parquet, JSONL or TSV of parallel texts")
    parser.add_argument("--out", required=True, help="JSON file to write, with the report beside it")
    parser.add_argument("--facts", type=int, default=2000, help="facts kept, and as many to check (default 2000)")
    parser.add_argument("--split", help="only rows with this value in the column 'split'")
    parser.add_argument("--check-split", help="rows with this value are for the check, not for the statistics")
    parser.add_argument("--holdout", type=float, default=0.0, help="share of the facts set aside for the check")
    parser.add_argument("--no-identical", action="store_true", help="no pairs of a text with itself")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    group = parser.add_argument_group("encoder, as in nemo_lrpo/config/scoring.py")
    group.add_argument("--encoder", help="directory of the sentence-transformers model")
    group.add_argument(
        "--server-config",
        nargs="+",
        metavar=("NAME", "KEY=VALUE"),
        help="take the encoder and its settings from a configuration of the reward server, with overrides",
    )
    types = typing.get_type_hints(EncoderConfig)
    for field in dataclasses.fields(EncoderConfig):
        if field.name not in _NOT_OPTIONS:
            kind = int if int in (types[field.name], *typing.get_args(types[field.name])) else str
            name = f"--{field.name.replace('_', '-')}"
            group.add_argument(name, type=kind, default=argparse.SUPPRESS, help=f"default {field.default}")
    return parser.parse_args(arguments)


def encoder_config(options: argparse.Namespace) -> EncoderConfig:
    """What --server-config says, then what the single options say. Raises ConfigError."""
    config = EncoderConfig()
    if options.server_config:
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        name, *overrides = options.server_config
        try:
            config = to_dataclass(ServeRewardsConfig, compose(name, overrides)).encoder
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(f"--server-config {name}: {str(error).splitlines()[0]}.") from error
    given = {name: value for name, value in vars(options).items() if hasattr(config, name)}
    if options.encoder:
        given["path"] = options.encoder
    config = dataclasses.replace(config, **given, cache_size=0)
    config.check("--encoder")
    return config


def calibrate(options: argparse.Namespace) -> Report:
    """Measure and write. Raises ConfigError before the encoder loads for what can be seen by then."""
    data, out = check_file("--data", options.data), Path(options.out)
    check_range("--facts", options.facts, at_least=2)
    check_range("--holdout", options.holdout, at_least=0.0, below=1.0)
    if options.holdout and options.check_split:
        raise ConfigError("--holdout and --check-split both set facts aside for the check; give one of them.")
    config = encoder_config(options)
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out {str(out)!r} cannot be written; give a file in an existing, writable directory.")
    progress = not options.quiet
    wanted = Wanted(options.split, options.check_split, options.holdout)
    facts, check = read_facts(data, wanted, options.facts, options.seed, progress)
    from nemo_lrpo.rewards.encoder import SentenceEncoder

    encoder = SentenceEncoder(config)
    long = {"truncated": 0, "chunked": 0}

    def encode(texts: Sequence[str], role: str) -> NDArray[np.float32]:
        found = encoder.embed(texts, [role] * len(texts), progress=progress)
        long["truncated"] += int(found.truncated.sum())
        long["chunked"] += int(found.chunked.sum())
        return found.rows

    two_roles = config.reference_prompt != config.response_prompt
    identical, seed = not options.no_identical, options.seed
    languages = encode_facts(facts, encode, two_roles)
    found, themselves = measure(languages, seed, identical, progress)
    source = {
        "data": f"{data.name} {file_hash(data)}",
        "split": options.split,
        "check_split": options.check_split,
        "holdout": options.holdout,
        "seed": seed,
        "facts": _number_of(facts),
        "identical": themselves,
        "encoder": {"name": Path(str(config.path)).name, **_settings(config)},
        "texts": sum(len(texts) for by_fact in facts.values() for texts in by_fact.values()),
        **long,
    }
    statistics = PairStatistics(encoder.identity, **found, source=source)
    compared = compare_all(encode_facts(check, encode, two_roles) if check else languages, seed, identical, progress)
    report = Report(statistics, compare_methods(statistics, compared), _number_of(check or facts), bool(check))
    # The report first: statistics that are there are complete in every respect.
    write_report(out, report)
    write_statistics(out, statistics)
    return report


def _number_of(facts: Facts) -> int:
    return len({fact for by_fact in facts.values() for fact in by_fact})


def _settings(config: EncoderConfig) -> dict[str, object]:
    """All but what belongs to this machine."""
    hidden = ("path", "device", "batch_tokens", "cache_size")
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in hidden}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 2 with one line on standard error for what the user can mend."""
    options = parse(arguments)
    try:
        report = calibrate(options)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 2
    print(summary(report))
    if themselves := report.statistics.source["identical"]:
        print(f"one wording per fact, compared with itself: {', '.join(themselves)}")
    print(f"written: {options.out}, report: {options.out}.report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

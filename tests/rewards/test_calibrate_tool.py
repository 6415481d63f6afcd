"""tools/calibrate.py, from parallel files of several shapes to statistics that the scorer takes and a fair reward."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from encoder_fixture import build_tiny_encoder
from sentence_transformers import SentenceTransformer

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import CalibrationConfig, EncoderConfig
from nemo_lrpo.rewards.calibration import NoCalibration, build_calibration
from nemo_lrpo.rewards.encoder import encoder_identity
from nemo_lrpo.rewards.statistics import PairStatistics, read_statistics, weighted_mean
from tools.calibrate import calibrate, encoder_config, main, parse
from tools.calibration.comparisons import compare, compare_all, encode_facts, measure
from tools.calibration.parity import METHODS, fairness
from tools.calibration.reading import WORDINGS, FactSample, ParallelText, Wanted, read_facts, read_texts
from tools.demo_models.build import parallel_sentences, world_tokenizer
from tools.demo_models.encoder import EncoderRecipe, new_encoder, save_encoder, train_encoder
from tools.demo_world import build_facts, write_world

ROOT = Path(__file__).parents[2]
TEMPLATES = {
    "de": "Die Währung von {0} ist {1}.",
    "en": "The currency of {0} is {1}.",
    "ja": "{0}の通貨は{1}です。",
}
PLACES = [("A", "yen"), ("B", "euro"), ("C", "peso"), ("D", "won"), ("E", "real"), ("F", "dollar")]


def rows() -> list[dict[str, str]]:
    return [
        {"fact_id": place, "language": language, "text": template.format(place, money), "split": split}
        for (place, money), (language, template) in product(PLACES, TEMPLATES.items())
        for split in ["heldout" if place in "EF" else "train"]
    ]


def wide() -> list[dict[str, str]]:
    return [
        {"fact_id": place, "split": "heldout" if place in "EF" else "train"}
        | {language: template.format(place, money) for language, template in TEMPLATES.items()}
        for place, money in PLACES
    ]


def write_rows(path: Path, found: list[dict]) -> Path:
    """In the format that the path's suffix names."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(found), path)
    elif path.suffix == ".tsv":
        names = list(found[0])
        path.write_text("\n".join("\t".join(map(str, line)) for line in [names, *(r.values() for r in found)]))
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in found))
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("parallel") / "parallel.parquet", rows())


def random_encode(texts: list[str], role: str) -> np.ndarray:
    """A direction for each text, the same for both roles."""
    rows = [np.random.default_rng(list(text.encode())).normal(size=8) for text in texts]
    return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


# --- from end to end ------------------------------------------------------------------------------------------------


def test_from_the_command_line_to_a_calibration(encoder: Path, parallel: Path, tmp_path: Path) -> None:
    out = tmp_path / "statistics.json"
    command = [sys.executable, str(ROOT / "tools/calibrate.py"), "--data", str(parallel), "--split", "train"]
    command += ["--check-split", "heldout", "--encoder", str(encoder), "--out", str(out), "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "6 pairs, mu_ref" in done.stdout and "compared with itself: de, en, ja" in done.stdout
    assert "2 facts that the statistics have not seen" in done.stdout
    for bar in ("reading parallel.parquet", "pairs of languages", "check"):
        assert bar in done.stderr

    statistics = read_statistics(out)
    identity = encoder_identity(EncoderConfig(path=str(encoder)))
    assert statistics.encoder == identity
    assert set(statistics.equivalent) == {(a, b) for a, b in product(TEMPLATES, TEMPLATES) if a <= b}
    # All facts are drawn, so that the draw does not matter; the two held out are not among them.
    texts = {(r["fact_id"], r["language"]): r["text"] for r in rows() if r["split"] == "train"}
    vectors = dict(zip(texts, SentenceTransformer(str(encoder), device="cpu").encode(list(texts.values()))))
    vectors = {key: v.astype(np.float64) / np.linalg.norm(v.astype(np.float64)) for key, v in vectors.items()}
    for a, b in statistics.equivalent:
        cosines = [vectors[place, a] @ vectors[place, b] for place in "ABCD"]
        found = statistics.equivalent[a, b]
        assert found.count == 4
        assert found.mean == pytest.approx(np.mean(cosines), abs=1e-5)
        assert found.std == pytest.approx(np.std(cosines), abs=1e-5)
        assert found.quantiles[0] == pytest.approx(min(cosines), abs=1e-5)
        assert found.quantiles[16] == pytest.approx(np.median(cosines), abs=1e-5)
        # One half of the facts has its reference in the one language, the other half in the other.
        best = {
            (p, x, y): max(vectors[p, x] @ vectors[q, y] for q in "ABCD" if q != p)
            for p in "ABCD"
            for x, y in ((a, b), (b, a))
        }
        hardest = statistics.hardest[a, b]
        assert hardest.count == 4
        assert min(best.values()) - 1e-5 <= hardest.quantiles[0] and hardest.quantiles[-1] <= max(best.values()) + 1e-5
        assert statistics.mismatch[a, b].mean <= hardest.mean + 1e-6

    for method in METHODS:
        config = CalibrationConfig(method=method, path=str(out), unknown_pair="error")
        calibration = build_calibration(config, identity, list(TEMPLATES))
    mean = build_calibration(CalibrationConfig(path=str(out), shrinkage_k=0.0), identity, list(TEMPLATES))
    mu_ref = weighted_mean(statistics.equivalent.values())
    assert mean.apply(1.0, "de", "de").value == pytest.approx(mu_ref, abs=1e-5)
    assert calibration.apply(1.0, "de", "de").known

    report = (tmp_path / "statistics.json.report.md").read_text()
    assert "statistics.json.report.png" in report and "Equivalent against hardest:" in report
    assert (tmp_path / "statistics.json.report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "statistics.json",
        "statistics.json.report.md",
        "statistics.json.report.png",
    ]


@pytest.mark.slow
def test_on_unseen_facts_the_calibrated_reward_is_the_same_in_every_language(tmp_path: Path) -> None:
    """True sentences in 15 languages, an encoder trained on some of them, statistics of others, the check on others
    again; the standard deviation is that of equivalent answers alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        write_world(build_facts(40), tmp_path, 0)
        tokenizer = world_tokenizer(tmp_path)
        recipe = dataclasses.replace(EncoderRecipe(), steps=60, facts_per_batch=16)
        model = new_encoder(tokenizer, recipe, 0)
        train_encoder(model, tokenizer, parallel_sentences(tmp_path, "train"), recipe, 0)
        save_encoder(model, tokenizer, tmp_path / "encoder", recipe)
        arguments = ["--data", str(tmp_path / "parallel.parquet"), "--out", str(tmp_path / "calibration.json")]
        arguments += ["--split", "calibration", "--check-split", "heldout", "--encoder", str(tmp_path / "encoder")]
        report = calibrate(parse([*arguments, "--device", "cpu", "--quiet"]))
    finally:
        torch.set_num_threads(threads)
    found = report.found
    assert report.held_out and report.facts > 1000 and len(found["mean"].means) == 15
    assert found["none"].parity > 0.3
    assert found["mean"].parity <= 0.1
    assert found["affine"].parity <= 0.1
    assert found["quantile"].parity <= 0.1
    # Of all pairs of languages, and for every method.
    assert [fair.reordered for fair in found.values()] == [0, 0, 0, 0]


def test_the_same_arguments_give_the_same_statistics(encoder: Path, parallel: Path, tmp_path: Path) -> None:
    def run(name: str, *more: str) -> PairStatistics:
        out = tmp_path / name
        arguments = ["--data", str(parallel), "--encoder", str(encoder), "--out", str(out), "--device", "cpu", *more]
        assert main([*arguments, "--facts", "3", "--quiet"]) == 0
        return read_statistics(out)

    def numbers(statistics: PairStatistics) -> np.ndarray:
        kinds = [m for pair in statistics.equivalent for m in statistics.kinds(pair).values()]
        return np.array([(m.count, m.mean, m.std, *m.quantiles) for m in kinds])

    one, two = run("one"), run("two")
    assert (one.encoder, one.source) == (two.encoder, two.source)
    # Up to the rounding of an encoder whose batches are cut anew.
    np.testing.assert_allclose(numbers(one), numbers(two), atol=1e-5)
    assert np.abs(numbers(run("three", "--seed", "1")) - numbers(one)).max() > 1e-3


def test_prompts_make_two_roles_and_another_encoder(encoder: Path, parallel: Path, tmp_path: Path) -> None:
    def run(*more: str) -> dict:
        out = tmp_path / "statistics.json"
        arguments = ["--data", str(parallel), "--encoder", str(encoder), "--out", str(out), "--device", "cpu"]
        assert main([*arguments, "--quiet", *more]) == 0
        return json.loads(out.read_text())

    plain, both = run(), run("--reference-prompt", "query: ", "--response-prompt", "passage: ")
    # No longer the same text on both sides.
    assert [p["equivalent"]["mean"] == 1.0 for p in plain["pairs"]] == [True, False, False, True, False, True]
    assert not any(pair["equivalent"]["mean"] == 1.0 for pair in both["pairs"])
    assert plain["encoder"] != both["encoder"]
    assert both["source"]["encoder"]["reference_prompt"] == "query: "
    settings = EncoderConfig(str(encoder), reference_prompt="query: ", response_prompt="passage: ")
    assert both["encoder"] == encoder_identity(settings)
    # What is longer than the window is counted.
    short = run("--max-tokens", "8", "--long-texts", "truncate")
    tokens = SentenceTransformer(str(encoder), device="cpu").tokenizer([row["text"] for row in rows()])["input_ids"]
    assert short["source"]["truncated"] == sum(len(ids) > 8 for ids in tokens) > 0
    assert plain["source"]["truncated"] == 0 and plain["source"]["texts"] == 18


def test_the_encoder_is_set_as_in_the_reward_server(encoder: Path) -> None:
    given = ["--data", "x", "--out", "y", "--server-config", "serve_rewards", f"encoder.path={encoder}"]
    config = encoder_config(
        parse([*given, "encoder.max_tokens=64", "encoder.long_texts=truncate", "--max-tokens", "32"])
    )
    assert (config.path, config.max_tokens, config.long_texts) == (str(encoder), 32, "truncate")
    with pytest.raises(ConfigError, match=r"--server-config serve_nothing: "):
        encoder_config(parse(["--data", "x", "--out", "y", "--server-config", "serve_nothing"]))
    with pytest.raises(ConfigError, match=r"--encoder\.path is not set"):
        encoder_config(parse(["--data", "x", "--out", "y"]))


# --- comparisons ----------------------------------------------------------------------------------------------------


def test_two_wordings_are_compared_instead_of_a_text_with_itself(tmp_path: Path) -> None:
    lines = [*rows(), *({**r, "text": r["text"] + "!"} for r in rows() if r["language"] == "de")]
    path = write_rows(tmp_path / "parallel.jsonl", [{"id": r["fact_id"], **r} for r in lines])
    facts, check = read_facts(path, Wanted(), 100, 0)
    assert check == {}
    calls = []

    def encode(texts: list[str], role: str) -> np.ndarray:
        calls.append((role, list(texts)))
        return random_encode(texts, role)

    languages = encode_facts(facts, encode, two_roles=False)
    assert [role for role, _ in calls] == ["reference"] and len(set(calls[0][1])) == len(calls[0][1]) == 24
    found, themselves = measure(languages, seed=0)
    assert themselves == ["en", "ja"] and found["equivalent"]["de", "de"].count == 6
    assert found["equivalent"]["en", "en"].mean == 1.0 > found["equivalent"]["de", "de"].quantiles[-1]
    assert found["mismatch"]["de", "ja"].count == 6
    found, themselves = measure(languages, seed=0, identical=False)
    assert themselves == [] and set(found["equivalent"]) == {("de", "de"), ("de", "en"), ("de", "ja"), ("en", "ja")}
    encode_facts(facts, encode, two_roles=True)
    assert [role for role, _ in calls[1:]] == ["reference", "response"]


def test_the_reference_stands_on_the_left_half_of_the_time() -> None:
    """With prompts a pair is not the same both ways, and statistics are of unordered pairs."""
    facts = {code: {str(i): [f"{code} {i}"] for i in range(10)} for code in ("de", "en")}

    def encode(texts: list[str], role: str) -> np.ndarray:
        # German references and English responses lie along one axis, all else along another.
        one = [text.startswith("de") == (role == "reference") for text in texts]
        return np.stack([np.array([1.0, 0.0]) if hit else np.array([0.0, 1.0]) for hit in one]).astype(np.float32)

    languages = encode_facts(facts, encode, two_roles=True)
    forth = compare_all(languages, seed=0)
    assert forth["de", "en"].equivalent.mean() == forth["en", "de"].equivalent.mean() == 1.0
    languages["en"] = dataclasses.replace(languages["en"], responses=languages["en"].responses[:, ::-1])
    assert compare_all(languages, seed=0)["de", "en"].equivalent.mean() == 0.0
    assert measure(languages, seed=0)[0]["equivalent"]["de", "en"].mean == 0.5


def test_negatives_never_say_what_the_fact_says() -> None:
    """Facts 0 and 1 share a wording; of two facts that say the same there is no negative."""
    facts = {
        "de": {"0": ["null"], "1": ["eins"], "2": ["zwei"]},
        "en": {"0": ["same"], "1": ["one", "same"], "2": ["two"]},
    }
    languages = encode_facts(facts, random_encode, two_roles=False)
    vector = {text: random_encode([text], "")[0] for text in ("null", "eins", "zwei", "one", "same", "two")}
    for seed in range(20):
        found = compare(languages["de"], languages["en"], ["0", "1", "2"], np.random.default_rng(seed))
        null, eins = (float(vector[text] @ vector["two"]) for text in ("null", "eins"))
        assert [found.mismatch[1], found.hardest[1]] == pytest.approx([eins, eins], abs=1e-6)
        assert found.hardest[0] == pytest.approx(max(null, float(vector["null"] @ vector["one"])), abs=1e-6)
        assert found.mismatch[0] != pytest.approx(float(vector["null"] @ vector["same"]), abs=1e-6)
    alone = {code: {"0": ["same"], "1": ["same"]} for code in ("de", "en")}
    languages = encode_facts(alone, random_encode, two_roles=False)
    found, _ = measure(languages, seed=0)
    assert set(found["equivalent"]) == {("de", "de"), ("de", "en"), ("en", "en")} and not found["mismatch"]
    assert not found["hardest"]


def test_fairness_by_hand() -> None:
    """Two languages, two facts; answers in English lie 0.2 lower."""
    facts = {"de": {"0": ["a"], "1": ["b"]}, "en": {"0": ["c"], "1": ["d"]}}
    languages = encode_facts(facts, random_encode, two_roles=False)
    cosines = compare_all(languages, seed=0)
    by_hand = {
        pair: dataclasses.replace(
            found,
            equivalent=np.array([0.6, 0.8]) - 0.2 * (pair[1] == "en"),
            mismatch=np.array([0.1, 0.5]),
            hardest=np.array([0.7, np.nan]),
        )
        for pair, found in cosines.items()
    }
    found = fairness(NoCalibration(), by_hand)
    # r_qual = (s + 1) / 2
    assert found.means == pytest.approx({"de": 0.85, "en": 0.75})
    assert found.std == pytest.approx(np.std([0.8, 0.9, 0.7, 0.8]))
    assert found.parity == pytest.approx(0.1 / np.std([0.8, 0.9, 0.7, 0.8]))
    # Three parts of equal weight: [0.7, 0.8, 0.8, 0.9], [0.55, 0.75], [0.85].
    center = (0.8 + 0.65 + 0.85) / 3
    squares = [np.mean((np.array(part) - center) ** 2) for part in ([0.7, 0.8, 0.8, 0.9], [0.55, 0.75], [0.85])]
    assert found.std_all == pytest.approx(np.sqrt(np.mean(squares)))
    assert found.auc == {"mismatch": {"de": 1.0, "en": 0.75}, "hardest": {"de": 0.5, "en": 0.0}}
    assert found.reordered == 0

    class Swapped:
        def apply(self, similarity: float, reference_language: str, response_language: str) -> object:
            turned = -similarity if (reference_language, response_language) == ("de", "en") else similarity
            return NoCalibration().apply(turned, "", "")

    assert fairness(Swapped(), by_hand).reordered == 1


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["long.parquet", "long.jsonl", "long.tsv", "wide.parquet", "wide.tsv"])
def test_every_shape_of_the_same_data_is_the_same(tmp_path: Path, name: str) -> None:
    found = rows() if name.startswith("long") else wide()
    path = write_rows(tmp_path / name, found)
    facts, check = read_facts(path, Wanted("train", "heldout"), 100, 0)
    assert list(facts) == list(check) == ["de", "en", "ja"]
    assert facts["ja"] == {place: [TEMPLATES["ja"].format(place, money)] for place, money in PLACES[:4]}
    assert check["de"] == {place: [TEMPLATES["de"].format(place, money)] for place, money in PLACES[4:]}
    # Whatever the rows' order.
    write_rows(path, random.Random(1).sample(found, len(found)))
    assert read_facts(path, Wanted("train", "heldout"), 100, 0) == (facts, check)


def test_a_wide_table_may_have_gaps(tmp_path: Path) -> None:
    path = tmp_path / "parallel.tsv"
    path.write_text("fact_id\tde\ten\n1\teins\tone\r\n2\t \ttwo\n")
    assert [(t.row, t.fact, t.language, t.text) for t in read_texts(path)] == [
        (2, "1", "de", "eins"),
        (2, "1", "en", "one"),
        (3, "2", "en", "two"),
    ]


def test_a_bounded_sample_whatever_the_number_and_order_of_rows() -> None:
    texts = [
        ParallelText(i, f"fact {i % 500}", code, f"{code} {i % 500} {i // 500 % 7}", None)
        for i in range(4000)
        for code in ("de", "en")
    ]
    shuffled = random.Random(0).sample(texts, len(texts))
    samples = [FactSample(50, 0) for _ in range(3)]
    for sample, order in zip(samples, (texts, shuffled, texts[::-1])):
        for text in order:
            sample.add(text)
            assert len(sample) <= 50
    one, *others = (sample.facts() for sample in samples)
    assert all(other == one for other in others)
    assert len(one["de"]) == 50 and {len(wordings) for wordings in one["de"].values()} == {WORDINGS}
    other_seed = FactSample(50, 1)
    for text in texts:
        other_seed.add(text)
    assert other_seed.ids() != samples[0].ids()


def test_facts_set_aside_by_share(tmp_path: Path) -> None:
    lines = [{"fact_id": i, "language": code, "text": f"{code} {i}"} for i in range(400) for code in ("de", "en")]
    path = write_rows(tmp_path / "parallel.jsonl", lines)
    facts, check = read_facts(path, Wanted(holdout=0.25), 1000, 0)
    assert not set(facts["de"]) & set(check["de"]) and len(facts["de"]) + len(check["de"]) == 400
    assert 60 < len(check["de"]) < 140
    assert list(check["de"]) == list(check["en"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"language": "de", "text": "x"}, r"row 2: fact_id=None"),
        ({"fact_id": "a", "language": "", "text": "x"}, r"row 2: language=''"),
        ({"fact_id": "a", "language": "de", "text": 7}, r"row 2: text=7"),
        (["a"], "row 2 is not a JSON object"),
    ],
)
def test_a_broken_row_is_refused_by_number(tmp_path: Path, row: object, message: str) -> None:
    path = tmp_path / "parallel.jsonl"
    path.write_text(json.dumps(rows()[0]) + "\n" + json.dumps(row))
    with pytest.raises(ConfigError, match=message):
        list(read_texts(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fact_id\tlanguage\ttext\na\tde\n", "row 2 has 2 fields, the header 3"),
        (b"fact_id\tlanguage\ttext\na\tde\t\xff\n", "row 2 is not UTF-8"),
        (b"fact_id\tlanguage\ttext\na\tde\t \n", "row 2: text=' '"),
        (b"fact_id\tde\tsource\n", "the column 'source' is no language code"),
        (b"language\ttext\n", r"row 1 is \['language', 'text'\]; expected the names"),
        (b"fact_id\tde\tde\n", "row 1 is"),
        (b"fact_id\tsplit\n", "no columns of texts"),
    ],
)
def test_a_broken_table_is_refused_by_row(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "parallel.tsv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(read_texts(path))


def test_wrong_arguments_leave_nothing_behind(
    encoder: Path, parallel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "statistics.json"
    good = {"--data": str(parallel), "--encoder": str(encoder), "--out": str(out)}
    lonely = write_rows(tmp_path / "lonely.jsonl", rows()[:1])
    both = write_rows(tmp_path / "both.jsonl", [rows()[0], {**rows()[1], "split": "heldout"}])
    unmarked = write_rows(tmp_path / "unmarked.jsonl", [{**rows()[0], "split": None}])
    not_parquet = tmp_path / "not.parquet"
    not_parquet.write_text("text")
    cases = [
        ({"--data": "nowhere.parquet"}, "no such file"),
        ({"--data": str(ROOT / "README.md")}, "'.md' is not known; accepted: .parquet"),
        ({"--data": str(not_parquet)}, "cannot be read as parquet"),
        ({"--data": str(lonely)}, "no fact is there in two languages"),
        ({"--data": str(unmarked), "--split": "train"}, "row 1 has no 'split'"),
        ({"--data": str(both), "--split": "train", "--check-split": "heldout"}, "the fact 'A' is in both"),
        ({"--split": "trian"}, "no rows with split='trian' (--split); it has 'heldout', 'train'"),
        ({"--check-split": "test"}, "no rows with split='test' (--check-split)"),
        ({"--check-split": "heldout", "--holdout": "0.5"}, "give one of them"),
        ({"--holdout": "1"}, "--holdout=1.0 is out of range"),
        ({"--data": str(lonely), "--holdout": "0.001"}, "too few facts: 1 for the statistics, 0 to check"),
        ({"--encoder": str(tmp_path)}, "holds neither"),
        ({"--out": str(tmp_path / "none" / "x.json")}, "cannot be written"),
        ({"--facts": "0"}, "out of range"),
        ({"--device": "tpu"}, "is not known"),
    ]
    before = sorted(tmp_path.iterdir())
    for change, message in cases:
        arguments = [part for pair in {**good, **change}.items() for part in pair]
        assert main([*arguments, "--quiet"]) == 2
        assert message in capsys.readouterr().err, change
    assert sorted(tmp_path.iterdir()) == before

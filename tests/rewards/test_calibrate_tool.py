"""tools/calibrate.py from a small parallel file to statistics that the scorer takes."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from encoder_fixture import build_tiny_encoder
from sentence_transformers import SentenceTransformer

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import CalibrationConfig, EncoderConfig, ScorerConfig
from nemo_lrpo.rewards.calibration import read_statistics
from nemo_lrpo.rewards.scorer import RewardScorer
from nemo_lrpo.types import ScoreRequest
from tools.calibrate import main, measure, read_facts

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


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parallel") / "parallel.parquet"
    pq.write_table(pa.Table.from_pylist(rows()), path)
    return path


def test_from_the_command_line_to_a_scorer(encoder: Path, parallel: Path, tmp_path: Path) -> None:
    out = tmp_path / "statistics.json"
    command = [sys.executable, str(ROOT / "tools/calibrate.py"), "--data", str(parallel), "--split", "train"]
    command += ["--encoder", str(encoder), "--out", str(out), "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "6 pairs, mu_ref" in done.stdout and "compared with itself: de, en, ja" in done.stdout

    statistics = read_statistics(out)
    assert set(statistics.pairs) == {(a, b) for a, b in product(TEMPLATES, TEMPLATES) if a <= b}
    # All facts are drawn, so that the draw does not matter; the two held out are not among them.
    texts = {(r["fact_id"], r["language"]): r["text"] for r in rows() if r["split"] == "train"}
    vectors = dict(zip(texts, SentenceTransformer(str(encoder), device="cpu").encode(list(texts.values()))))
    vectors = {key: v.astype(np.float64) / np.linalg.norm(v.astype(np.float64)) for key, v in vectors.items()}
    for a, b in statistics.pairs:
        cosines = [vectors[place, a] @ vectors[place, b] for place in "ABCD"]
        found = statistics.pairs[a, b]
        assert found.count == 4
        assert found.mean == pytest.approx(np.mean(cosines), abs=1e-5)
        assert found.std == pytest.approx(np.std(cosines), abs=1e-5)
        best = [max(vectors[p, a] @ vectors[q, b] for q in "ABCD" if q != p) for p in "ABCD"]
        hardest = statistics.extra["hardest"][a, b]
        assert (hardest.count, hardest.mean) == (4, pytest.approx(np.mean(best), abs=1e-5))
        assert statistics.extra["mismatch"][a, b].mean <= hardest.mean + 1e-6

    scorer = RewardScorer(
        ScorerConfig(
            languages=list(TEMPLATES),
            encoder=EncoderConfig(path=str(encoder), device="cpu"),
            calibration=CalibrationConfig(path=str(out), unknown_pair="error"),
        )
    )
    sentence = "Die Währung von Japan ist der Yen."
    score = scorer.score([ScoreRequest("0/q/0", sentence, sentence, "de", "de")])[0]
    assert score.calibrated == pytest.approx(statistics.mean(), abs=1e-5)


def test_the_same_arguments_give_the_same_bytes(encoder: Path, parallel: Path, tmp_path: Path) -> None:
    def run(name: str, *more: str) -> bytes:
        out = tmp_path / name
        arguments = ["--data", str(parallel), "--encoder", str(encoder), "--out", str(out), "--device", "cpu", *more]
        assert main([*arguments, "--pairs-per-language-pair", "3"]) == 0
        return out.read_bytes()

    assert run("one") == run("two")
    assert json.loads(run("three", "--seed", "1"))["pairs"] != json.loads(run("one"))["pairs"]


def test_two_wordings_are_compared_instead_of_a_text_with_itself(tmp_path: Path) -> None:
    path = tmp_path / "parallel.jsonl"
    lines = [*rows(), *({**r, "text": r["text"] + "!"} for r in rows() if r["language"] == "de")]
    path.write_text("\n".join(json.dumps({"id": r["fact_id"], **r}, ensure_ascii=False) for r in lines))
    facts = read_facts(path, None)
    calls = []

    def encode(texts: list[str]) -> np.ndarray:
        calls.append(list(texts))
        return np.random.default_rng(0).normal(size=(len(texts), 4)).astype(np.float32) / 10

    pairs, extra, themselves = measure(facts, encode, limit=100, seed=0)
    assert themselves == ["en", "ja"] and pairs["de", "de"].count == 6
    assert len(calls) == 1 and len(set(calls[0])) == len(calls[0])
    assert extra["mismatch"]["de", "ja"].count == 6
    pairs, _, themselves = measure(facts, encode, limit=4, seed=0, identical=False)
    assert themselves == [] and set(pairs) == {("de", "de"), ("de", "en"), ("de", "ja"), ("en", "ja")}
    assert {m.count for m in pairs.values()} == {4}


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
        read_facts(path, None)


def test_wrong_arguments_leave_nothing_behind(
    encoder: Path, parallel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "statistics.json"
    good = {"--data": str(parallel), "--encoder": str(encoder), "--out": str(out)}
    lonely = tmp_path / "lonely.jsonl"
    lonely.write_text(json.dumps(rows()[0]))
    not_parquet = tmp_path / "not.parquet"
    not_parquet.write_text("text")
    cases = [
        ({"--data": "nowhere.parquet"}, "no such file"),
        ({"--data": str(not_parquet)}, "cannot be read as parquet"),
        ({"--data": str(lonely)}, "no fact is there in two languages"),
        ({"--split": "trian"}, "no rows with split='trian'; it has 'heldout', 'train'"),
        ({"--encoder": str(tmp_path)}, "holds neither"),
        ({"--out": str(tmp_path / "none" / "x.json")}, "cannot be written"),
        ({"--pairs-per-language-pair": "0"}, "out of range"),
        ({"--device": "tpu"}, "is not known"),
    ]
    before = sorted(tmp_path.iterdir())
    for change, message in cases:
        arguments = [part for pair in {**good, **change}.items() for part in pair]
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before

"""tools/make_pairs.py: files, counts, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from encoder_fixture import SENTENCES, build_tiny_encoder

from tools.make_pairs import main

ENGLISH, GERMAN, FRENCH = SENTENCES[:3]


def rollout(slot: int, language: str, reward: float | None, response: str, **changes: Any) -> dict[str, Any]:
    return {
        "step": 1,
        "sample_id": f"0/currency/JP/{slot}",
        "question": "Was ist die Währung von Japan?",
        "question_language": "de",
        "language": language,
        "response": response,
        "ended": True,
        "score": None if reward is None else {"reward": reward, "gate": 1.0},
        **changes,
    }


ROWS = [
    rollout(0, "en", 0.9, ENGLISH),
    rollout(1, "en", 0.2, "The euro."),
    rollout(2, "de", 0.8, GERMAN),
    rollout(3, "de", 0.6, "Der Euro."),
    rollout(4, "fr", None, FRENCH),
    rollout(5, "fr", 0.3, "L'euro.", ended=False),
    rollout(6, "de", 0.0, ""),
    # It would be the best one, were it whole.
    rollout(7, "de", 1.0, "<think>Es war der Yen.</think>", thinking="de"),
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return tmp_path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_pairs_with_their_target_and_counts(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(run_dir), "--kind", "mpo"]) == 0
    (pair,) = lines(run_dir / "pairs_mpo.jsonl")
    assert (pair["question_id"], pair["question_language"], pair["language"]) == ("currency/JP", "de", "de")
    assert pair["chosen"] == {"sample_id": "0/currency/JP/2", "response": GERMAN, "reward": 0.8}
    assert pair["rejected"]["response"] == "" and pair["margin"] == pytest.approx(0.8)
    target = pair["dominant"]
    assert target["language"] == "en" and target["chosen"]["response"] == ENGLISH
    left_out = {row["sample_id"][-1]: row["reason"] for row in lines(run_dir / "pairs_mpo.left_out.jsonl")}
    assert left_out == {"3": "between", "4": "no_reward", "5": "unfinished", "7": "forced"}
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "8 answers, 1 pairs: de 1" and [line.split() for line in table[1:3]] == [
        ["unfinished", "1"],
        ["forced", "1"],
    ]

    out = run_dir / "sub" / "mine.jsonl"
    assert main([str(run_dir / "rollouts.jsonl"), "--kind", "dpo", "--out", str(out)]) == 0
    assert [(pair["language"], pair["dominant"]) for pair in lines(out)] == [("de", None), ("en", None)]


def test_pairs_by_the_encoders_cosine(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The answer without text has no alignment; which of the other two is nearer, the library says."""
    from sentence_transformers import SentenceTransformer

    path = build_tiny_encoder(tmp_path_factory.mktemp("encoder"))
    assert main([str(run_dir), "--kind", "mapo", "--encoder", str(path)]) == 0
    model = SentenceTransformer(str(path), device="cpu")
    english, *german = model.encode([ENGLISH, GERMAN, "Der Euro."], normalize_embeddings=True).astype(float)
    near = dict(zip((GERMAN, "Der Euro."), (float(row @ english) for row in german)))
    (pair,) = lines(run_dir / "pairs_mapo.jsonl")
    assert [pair[side]["response"] for side in ("chosen", "rejected")] == sorted(near, key=near.__getitem__)[::-1]
    assert pair["margin"] == pytest.approx(abs(near[GERMAN] - near["Der Euro."]), abs=1e-5)
    reasons = {row["sample_id"][-1]: row["reason"] for row in lines(run_dir / "pairs_mapo.left_out.jsonl")}
    assert reasons["6"] == "no_alignment" and reasons["0"] == "dominant"


def test_what_has_to_be_mended_is_said_and_nothing_is_written(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(message: str, *arguments: str) -> None:
        with pytest.raises(SystemExit, match=message):
            main([str(run_dir), *arguments])

    refused("--encoder is not set", "--kind", "mapo")
    refused("trainer.lrpo.log_samples", "--kind", "dpo", "--min-margin", "0.95")
    (run_dir / "rollouts.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"sample_id": "0/q/1"}\n', encoding="utf-8")
    refused("rollouts.jsonl, line 2: response is missing", "--kind", "dpo")
    (run_dir / "rollouts.jsonl").unlink()
    refused("no such file; SOURCE is a run directory", "--kind", "dpo")
    assert not list(run_dir.iterdir())
    refused("2", "--kind", "dpo", "--out", "pairs.json")
    assert "ends in .jsonl" in capsys.readouterr().err

"""Traces from replies: what is kept, why the rest is not, by whom it is asked, and what a second start asks for."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nemo_lrpo.config.explang import MarksConfig
from nemo_lrpo.data.errors import DataError
from nemo_lrpo.explang.format import Defect, parse, render
from nemo_lrpo.explang.traces import read_traces
from tools.make_traces import balanced, main

MARKS = MarksConfig()
THINKING = {
    "de": "Wir zählen zuerst die Äpfel und dann die Birnen zusammen.",
    "en": "First we count the apples, and then we add the pears to them.",
    "ja": "まずりんごの数を数えて、それから梨の数を足します。",
}
ANSWER = {"en": "The answer is {}.", "de": "Die Antwort ist {}."}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Eight: what is n plus ten, by turns in English and in German."""
    rows = []
    for number in range(8):
        language = ("en", "de")[number % 2]
        text = {"en": f"What is {number} plus 10?", "de": f"Wie viel ist {number} plus 10?"}[language]
        rows.append(
            {
                "question": text,
                "answer": str(number + 10),
                "ability": "Reasoning / Logic",
                "extra_info": {"id": f"q{number}", "language": language},
            }
        )
    return write_lines(tmp_path / "questions.jsonl", rows)


def good(number: int, thinking: str) -> str:
    """What a teacher should reply to question `number`."""
    return render(thinking, THINKING[thinking], ANSWER[("en", "de")[number % 2]].format(number + 10), MARKS)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(out: Path, questions: Path, *arguments: object) -> None:
    common = ["--questions", questions, "--out", out, "--thinking", "de,en,ja", "--validation", 0]
    assert main([str(one) for one in (*common, *arguments)]) == 0


def test_each_way_to_fail_has_its_reason(questions: Path, tmp_path: Path) -> None:
    wrong = {
        "no tag": (good(0, "de").removeprefix("<lang_select>de</lang_select>"), Defect.NO_TAG.value),
        "open": (good(1, "de").replace("</think>", ""), Defect.THINKING_NOT_CLOSED.value),
        "tag": (good(2, "ja"), "another_tag"),
        "thinking": (good(3, "en").replace(">en<", ">de<"), "thinking_in_another_language"),
        "answer": (
            good(4, "de").replace(ANSWER["en"].format(14), "Die richtige Antwort auf diese Frage ist also 14."),
            "answer_in_another_language",
        ),
        "value": (good(5, "de").replace("15", "16"), "wrong_answer"),
        "long": (good(6, "de").replace("Birnen", "Birnen" * 1000), "too_long"),
        "right": (good(7, "de"), ""),
    }
    replies = [
        {"question_id": f"q{number}", "language": "de", "reply": reply}
        for number, (reply, _) in enumerate(wrong.values())
    ]
    file = write_lines(tmp_path / "replies.jsonl", replies)
    out = tmp_path / "out"
    run(out, questions, "--replies", file, "--balance", "none", "--max-chars", 5000)
    found = {row["question_id"]: row["reason"] for row in rows(out / "rejected.jsonl")}
    assert found == {f"q{number}": reason for number, (_, reason) in enumerate(wrong.values()) if reason}
    (kept,) = read_traces(out / "train.jsonl", MARKS)
    assert (kept.question_id, kept.language, kept.question_language) == ("q7", "de", "de")
    assert kept.response == good(7, "de")
    card = (out / "card.md").read_text(encoding="utf-8")
    assert "| wrong_answer | 1 |" in card and "| de | 8 | 1 | 1 |" in card


def test_languages_are_balanced_to_the_one_that_has_fewest(questions: Path, tmp_path: Path) -> None:
    """Six in German, four in English, eight in Japanese, of which five are wanted."""
    have = {"de": range(6), "en": range(4), "ja": range(8)}
    replies = [
        {"question_id": f"q{number}", "language": language, "reply": good(number, language)}
        for language, numbers in have.items()
        for number in numbers
    ]
    file = write_lines(tmp_path / "replies.jsonl", replies)
    for how, expected in (("equal", {"de": 4, "en": 4, "ja": 4}), ("none", {"de": 5, "en": 4, "ja": 5})):
        run(tmp_path / how, questions, "--replies", file, "--per-language", 5, "--balance", how)
        traces = read_traces(tmp_path / how / "train.jsonl", MARKS)
        assert Counter(trace.language for trace in traces) == expected
        # A question has one trace in a language.
        assert len({(trace.question_id, trace.language) for trace in traces}) == len(traces)
    with pytest.raises(SystemExit, match="DataError: no trace is left in ja; rejected.jsonl says why"):
        write_lines(file, [row for row in replies if row["language"] != "ja"])
        run(tmp_path / "without", questions, "--replies", file)


def test_replies_that_nobody_asks_for_are_counted(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [("q0", "de"), ("q0", "de"), ("q1", "ko"), ("q9", "de"), ("q8", "de"), ("q0", "de")]
    rows = [{"question_id": name, "language": language, "reply": good(0, "de")} for name, language in asked]
    file = write_lines(tmp_path / "replies.jsonl", rows)
    run(tmp_path / "out", questions, "--replies", file, "--balance", "none")
    told = [line.split(": ", 1)[1] for line in capsys.readouterr().out.splitlines() if "not used" in line]
    assert told == [
        f"2 beyond --samples, the first: {file}, line 2, 'q0' in 'de'",
        f"1 in no language of --thinking, the first: {file}, line 3, 'q1' in 'ko'",
        f"2 to no question of --questions (and --limit), the first: {file}, line 4, 'q9' in 'de'",
    ]
    write_lines(file, rows[3:5])
    with pytest.raises(SystemExit, match="DataError: .*none of the 2 replies can be used. 2 to no question .*'q9'"):
        run(tmp_path / "none", questions, "--replies", file)


def test_no_trace_at_all_is_balanced_to_a_plain_message() -> None:
    with pytest.raises(DataError, match="no trace is left in any language; .*--balance none"):
        balanced([], "equal", 500, [])
    assert balanced([], "none", 500, []) == []


class Endpoint(BaseHTTPRequestHandler):
    """Thinks as it is told to; of each question the first reply is cut off by the limit on its length."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        system, question = (message["content"] for message in body["messages"])
        chosen = next(code for code in THINKING if f"<lang_select>{code}</lang_select>" in system)
        assert "step by step" in system and body["temperature"] == 0.7
        number = int(next(word for word in question.split() if word.isdigit()))
        with self.server.lock:
            self.server.asked[number, chosen] += 1
            first = self.server.asked[number, chosen] == 1
        choice = {"message": {"content": good(number, chosen)}, "finish_reason": "length" if first else "stop"}
        data = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.asked, server.lock = Counter(), threading.Lock()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_teacher_is_asked_until_there_is_enough_and_for_the_rest_after_a_kill(
    questions: Path, endpoint: ThreadingHTTPServer, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    asking = ["--teacher-url", url, "--teacher-model", "m", "--temperature", 0.7, "--samples", 2, "--per-language", 8]
    out = tmp_path / "out"
    run(out, questions, *asking)
    traces = read_traces(out / "train.jsonl", MARKS)
    assert Counter(trace.language for trace in traces) == {"de": 8, "en": 8, "ja": 8}
    assert {trace.attempt for trace in traces} == {1}, "what did not end by itself is not used"
    assert Counter(row["reason"] for row in rows(out / "rejected.jsonl")) == {"not_ended": 24}
    assert set(endpoint.asked.values()) == {2}
    # As a start leaves it that was killed while it wrote a line.
    lines = (out / "kept.jsonl").read_bytes().splitlines(keepends=True)
    (out / "kept.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:30])
    before = endpoint.asked.total()
    for _ in range(2):
        run(out, questions, *asking)
        assert endpoint.asked.total() == before + 1 and read_traces(out / "train.jsonl", MARKS) == traces
    with pytest.raises(SystemExit, match="ConfigError: .* differ in temperature; give another --out"):
        run(out, questions, *asking, "--temperature", 0.5)


def test_a_row_that_would_not_be_read_back_is_named(tmp_path: Path) -> None:
    row = {
        "question_id": "q0",
        "question": "What is 0 plus 10?",
        "question_language": "en",
        "language": "de",
        "response": good(0, "de"),
    }
    assert parse(row["response"], MARKS, ["de"]).defect is None
    file = tmp_path / "traces.jsonl"
    for change, words in (
        ({"attempt": "two"}, "line 2: attempt is text; accepted: a whole number"),
        ({"response": good(0, "de").replace("</think>", "")}, "line 2: response is no whole output .*not_closed"),
        ({"response": good(0, "de").replace(">\n<", "><")}, "line 2: response begins with .*; accepted: .*think>'"),
        ({"language": "ja"}, "line 2: response chooses 'de', but language is 'ja'"),
        ({"question_language": "German"}, "line 2: question_language 'German' is not a known language"),
        ({"question": None}, "line 2: question is missing"),
    ):
        write_lines(file, [row, {**row, **change}])
        with pytest.raises(DataError, match=words):
            read_traces(file, MARKS)

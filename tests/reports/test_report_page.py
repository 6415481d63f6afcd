"""tools/report.py: what the page says is what runs and evaluations hold, and a browser without network shows it all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, why_not
from PIL import Image
from trained_router import LANGUAGES, REGIONS, STEPS, save, trained

from nemo_lrpo.config.loader import compose, save_run_config
from nemo_lrpo.explang.metrics import outcome_metrics
from nemo_lrpo.explang.rewards import Outcome
from nemo_lrpo.tasks.task import Task
from nemo_lrpo.training.evaluation import TaskResult
from nemo_lrpo.training.intervals import averages
from nemo_lrpo.types import Prompt
from tools.plot_router import HeatMap
from tools.report import main, write
from tools.reporting.charts import LARGE, Line, line_chart, ticks, trend
from tools.reporting.evaluations import ALL, MACRO, Answers, gains
from tools.reporting.measures import Evaluated, tables
from tools.reporting.routing import SHADES, cells
from tools.reporting.runs import ReportError, names_of, read_run
from tools.reporting.thinking import thinking_rows
from tools.saved_router import read_source, rebuild

SECTIONS = ["overview", "evaluation", "training", "languages", "router", "samples", "timings", "settings"]
HOSTILE = "<script>document.title='taken'</script><img src=\"https://example.org/x.png\">"
ARABIC = "العملة الرسمية هي درهم إماراتي."


def answer(sample_id: str, language: str, reward: float | None, text: str = "Yes.", **more: Any) -> dict[str, Any]:
    parts = {"quality": reward, "gate": 1.0, "language": language, "flags": []}
    score = None if reward is None else {"sample_id": sample_id, "reward": reward, **parts}
    question = {"question": f"Q {sample_id}?", "reference": "R", "question_language": language}
    return {"sample_id": sample_id, "language": language, **question, "response": text, "score": score, **more}


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def make_run(run: Path, policy: str, *, lost: int | None = None) -> Path:
    """As training leaves one; `lost`: a step whose reward is not finite."""
    run.mkdir(parents=True)
    router, log = trained(policy)
    for record in log:
        step, value = record["step"], record["reward"]
        record |= {f"{key}/{x}": value for x in LANGUAGES for key in ("reward", "gate")}
        record |= {"gate": value, "length": 20.0 + step, "policy/surprisal": 1 / step, "policy/kl_loss": 0.01 * step}
        record |= {"time/step": 4.0, "time/generate": 3.0, "time/update": 0.5, "policy/loss": 0.1}
        record["reward"] = None if step == lost else value
    log.append({"kind": "validation", "step": STEPS, "reward": 0.5})
    save(run, router, log)
    save_run_config(compose("train", [f"router={policy}"]), str(run))
    texts = [("ar", ARABIC), ("de", HOSTILE), ("de", "zweite"), ("de", "dritte"), ("de", "vierte"), ("zh", "好" * 3000)]
    rollouts = [answer(f"{i}/q/{x}/0", x, 0.25, text, step=i, advantage=-1.5) for i, (x, text) in enumerate(texts)]
    lines(run / "rollouts.jsonl", rollouts)
    return run


def explang_record(step: int) -> dict[str, Any]:
    """Of ten steps the first four are exploration, de and ja alike; then comes ja, in the last two half of it sw."""
    stage = "exploration" if step <= 4 else "exploitation"
    shares = {"de": 0.5, "ja": 0.5} if step <= 4 else {"ja": 1.0} if step <= 8 else {"ja": 0.5, "sw": 0.5}
    record: dict[str, Any] = {"kind": "train", "step": step, "reward": 0.5, "policy/loss": 0.1, "time/step": 4.0}
    record["explang/exploration"] = float(step <= 4)
    for name, share in {**shares, "seen": 1.0 - shares.get("sw", 0.0), "unseen": shares.get("sw", 0.0)}.items():
        record |= {f"explang/selected/{name}": share, f"explang/selected_{stage}/{name}": share}
        record |= {f"explang/count/{name}": 8.0 * share, "explang/count/chosen": 8.0, "explang/count/forced": 4.0}
        if share:
            record |= {f"explang/accuracy/{name}": step / 10, f"explang/tokens/{name}": 10.0 + step}
    return record | {"explang/accuracy": step / 10, "explang/compliance": 1.0, "explang/pass_at_k": 1.0}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `a` and `b`, `new` that has just begun, evaluations, and their pages."""
    site = tmp_path_factory.mktemp("report")
    runs = [make_run(site / "a", "default"), make_run(site / "b", "published", lost=3)]
    save_run_config(compose("train", []), str(site / "new"))
    ids = [("1", "de"), ("2", "de"), ("3", "de"), ("4", "ar")]
    lines(site / "before.jsonl", [answer(f"-1/{n}/0", x, 0.0, HOSTILE) for n, x in ids])
    for name, rewards in (("a", (1.0, 1.0, 1.0, 0.0)), ("b", (0.5, 1.0, 0.0, 0.5))):
        records = [answer(f"-1/{n}/0", x, r, ARABIC) for (n, x), r in zip(ids, rewards)]
        lines(site / f"after_{name}.jsonl", records)
    after = [site / f"after_{name}.json" for name in "ab"]
    knowledge = site / "knowledge.json"
    knowledge.write_text(json.dumps({"Chat": ["ja"], REGIONS[1]: ["de", "zh"]}))
    before = [site / "before.json"]
    explang = make_run(site / "explang", "default")
    evaluated = [
        {"kind": "evaluation", "step": step, "exam/accuracy": 0.5, "exam/wrong_language": 0.0, "exam/accuracy/de": 0.5}
        | {"exam/accuracy_macro": step / 20, "exam/accuracy_seen": 0.5, "exam/accuracy_unseen": step / 10}
        | {"sums/reward_macro": 0.5, "sums/reward_macro_low": 0.4, "sums/reward_seen": 0.5}
        for step in (0, 5, 10)
    ]
    validated = {"kind": "validation", "step": 10, "reward": 0.25, "explang/selected/ja": 1.0, "explang/count/ja": 4.0}
    lines(explang / "metrics.jsonl", [*(explang_record(step) for step in range(1, 11)), *evaluated, validated])
    write([explang], site / "explang.html")
    write(runs[:1], site / "one.html", before=before, after=after[:1], knowledge=knowledge)
    write(runs, site / "two.html", before=before, after=after)
    write([site / "new"], site / "new.html")
    return site


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as browser:
        yield browser


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["one", "two", "new", "explang"])
def test_a_browser_without_network_shows_all_of_it(browser: Browser, site: Path, name: str, width: int) -> None:
    page = site / f"{name}.html"
    # A run that has just begun has none, and the one in mode=explang logs little besides its own.
    looks, least = {}, {"new": -1, "explang": 6}.get(name, 15)
    for dark in (False, True):
        browser.complaints.clear()
        browser.requests.clear()
        browser.open(page, width, dark)
        assert browser.complaints == [] and browser.requests == [page.resolve().as_uri()]
        assert browser.evaluate("document.title").startswith("LRPO: ")
        # As wide as the window: what is wider scrolls in its own box.
        assert browser.evaluate("document.documentElement.scrollWidth") == width
        boxes = browser.evaluate(
            "[...document.querySelectorAll('section')].map(s => {const r = s.getBoundingClientRect();"
            "return [s.id, r.x, r.y + scrollY, r.width, r.height, s.innerText.length]})"
        )
        own = ["thinking"] if name == "explang" else []
        assert [box[0] for box in boxes] == [*SECTIONS[:4], *own, *SECTIONS[4:]]
        assert all(box[3] > 300 and box[4] > 60 and box[5] > 20 for box in boxes)
        drawings = browser.evaluate(
            "[...document.querySelectorAll('svg')].map(s => {const r = s.getBoundingClientRect();"
            "return [r.width, r.height]})"
        )
        assert all(w > 100 and h > 50 for w, h in drawings) and len(drawings) > least
        picture = Image.open(browser.screenshot(site / f"{name}_{width}_{'dark' if dark else 'light'}.png"))
        assert picture.width == width
        pixels = np.asarray(picture.convert("L"), dtype=float)
        # Every section has been painted: its pixels differ.
        for _, x, y, w, h, _ in boxes:
            assert pixels[int(y) : int(y + h), int(x) : int(x + w)].std() > 3.0
        looks[dark] = np.median(pixels)
    assert looks[False] > 230 and looks[True] < 50


def test_texts_are_shown_as_they_are(browser: Browser, site: Path) -> None:
    """Markup as text, Arabic from right to left, and long ones cut with what is left out."""
    browser.open(site / "one.html", 1280)
    texts = browser.evaluate(
        "[...document.querySelectorAll('.text')].map(p => {p.closest('details').open = true;"
        "return [p.innerText, getComputedStyle(p).direction]})"
    )
    shown = dict(texts)
    assert shown[HOSTILE] == "ltr" and shown[ARABIC] == "rtl"
    assert any(text.endswith("… (1500 more characters)") and text.startswith("好好") for text in shown)
    assert browser.evaluate("document.scripts.length + document.images.length") == 0
    # The first and the last two of each language.
    assert {"dritte", "vierte"} <= set(shown) and "zweite" not in shown


# --- what it says -------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(site: Path) -> None:
    for name in ("one", "two", "new", "explang"):
        text = (site / f"{name}.html").read_text(encoding="utf-8")
        assert len(text) < 400_000 and "default-src 'none'" in text
        assert not re.search(r"<(script|link|img|iframe)\b|<[^>]*\ssrc=|@import|url\(", text)
        assert all(target.startswith("#") for target in re.findall(r'\bhref="([^"]*)"', text))


def test_what_training_brought_is_said(site: Path) -> None:
    one, two = ((site / f"{name}.html").read_text(encoding="utf-8") for name in ("one", "two"))
    assert "Mean reward 0.000 → 0.750 (difference +0.750, 95 % interval +0.250 to +1.000, 4 questions)" in one
    assert "better in 1 of 2 languages" in one
    # de: +1 in every question, ar: none; languages weigh alike.
    row = r"<th>{}</th><td>{}</td><td>0.000</td><td>{}</td><td class=\"{}\">\+{}</td><td>\+{} to \+{}</td>"
    assert re.search(row.format(MACRO, 4, "0.500", "up", "0.500", "0.500", "0.500"), one)
    assert re.search(row.format("de", 3, "1.000", "up", "1.000", "1.000", "1.000"), one)
    assert re.search(row.format("ar", 1, "0.000", "", "0.000", "0.000", "0.000"), one)
    # b against a, on the same questions: -0.5, 0, -1, +0.5.
    assert re.search(r"b</th><td class=\"left\">all</td><td>4</td><td>0.750</td><td>0.500</td>.*-0.250</td>", two)
    assert "reward is missing or not finite in 1 of 7 steps (3)." in two
    assert "generate</th><td>3.000</td><td>75.0 %</td>" in one and "other</th><td>0.500</td><td>12.5 %</td>" in one


def scored(*answers: tuple[str, str, int, str, float | None]) -> Answers:
    """Of task, question, slot, language and reward."""
    return {
        (task, f"-1/{question}/{slot}"): answer(f"-1/{question}/{slot}", language, reward)
        for task, question, slot, language, reward in answers
    }


def test_intervals_and_pairs() -> None:
    generator = np.random.default_rng(4)
    drawn = 0.1 + generator.standard_normal(400)
    old = scored(*(("", f"{i}", 0, "de", 0.0) for i in range(400)))
    error = 1.96 * drawn.std() / 20
    # Four answers that are equal make a question no surer than one; before, there was one of each.
    for samples in (1, 4):
        new = scored(*(("", f"{i}", slot, "de", value) for i, value in enumerate(drawn) for slot in range(samples)))
        whole = gains(old, new)[""][0]
        assert whole.difference == pytest.approx(drawn.mean()) and whole.count == 400
        assert (whole.high - whole.low) / 2 == pytest.approx(error, rel=0.1)
    # Tasks apart; what has no score on either side, or no partner, is left out. A question is worth its answers' mean.
    old = scored(("t", "1", 0, "de", 0.5), ("t", "2", 0, "de", None), ("u", "1", 0, "ar", 0.0))
    new = scored(("t", "1", 0, "de", 0.5), ("t", "2", 0, "de", 1.0), ("u", "1", 0, "ar", 1.0), ("t", "3", 0, "de", 0.0))
    new |= scored(("t", "1", 1, "de", 1.0), ("t", "1", 2, "de", None))
    found = gains(old, new)
    assert {task: [(g.language, g.count, g.difference) for g in rows] for task, rows in found.items()} == {
        "t": [(ALL, 1, 0.25), (MACRO, 1, 0.25), ("de", 1, 0.25)],
        "u": [(ALL, 1, 1.0), (MACRO, 1, 1.0), ("ar", 1, 1.0)],
    }


def exam_result(right: list[bool], chosen: list[str | None], samples: int) -> dict[str, Any]:
    """What an evaluation in mode=explang writes of a judged task: `samples` answers to each question, half of them in
    German, half in Swahili, which training has not seen; the second of them is not compliant."""
    languages = ["de" if i < len(right) // 2 else "sw" for i in range(len(right))]
    questions = [f"q{i // samples}" for i in range(len(right))]
    outcomes = [
        Outcome(f"{i}", question, thinking, None, float(i != 1), float(ok), 10 + i)
        for i, (question, thinking, ok) in enumerate(zip(questions, chosen, right))
    ]
    mode = {f"explang/{name}": value for name, value in outcome_metrics(outcomes, {"de"}, 1.0).items()}
    return TaskResult(
        Task("exam", "care", "judge", "generate", ()),
        "accuracy",
        averages([float(ok) for ok in right], languages, questions, unseen=["sw"], seed=1),
        {"count": float(len(right)), **mode},
        {"CORRECT": sum(right), "INCORRECT": len(right) - sum(right)},
        3,
        ["sw"],
        {"1": 0.5, "2": 1.0, "1/de": 0.25, "2/de": 0.75} if samples > 1 else {},
    ).tree()


def test_all_that_an_evaluation_measured_is_shown() -> None:
    before = exam_result([False] * 8, [None] * 8, 1)
    after = exam_result([True, True, True, False, True, False, False, False], ["de"] * 6 + ["ja", None], 2)
    plain = {"metric": "reward", "all": {"mean": 0.5, "count": 4}, "macro": None, "wrong_language": 0, "metrics": {}}
    both = [Evaluated("before", {"exam": before, "plain": plain}), Evaluated("after", {"exam": after, "plain": plain})]
    found = {table.title: table for table in tables("exam", both)}
    assert tables("plain", both) == []
    groups = found["Languages seen and unseen in training"]
    assert groups.head == ["", "mean of languages", "seen", "unseen"] and [row[0] for row in groups.rows] == [
        "before",
        "after",
    ]
    low, high = (after["unseen"][name] for name in ("low", "high"))
    assert groups.rows[1][2].startswith("0.750 (") and groups.rows[1][3] == f"0.250 ({low:.3f} to {high:.3f})"
    graded = found["Answers by the judge's grade"]
    assert graded.head == ["", "answers", "in another language", "CORRECT", "INCORRECT"]
    assert graded.rows[1] == ["after", "8", "3 (37.5 %)", "4 (50.0 %)", "4 (50.0 %)"]
    assert found["pass@k"].head == ["", "pass@1", "pass@2"] and found["pass@k"].rows == [["after", "0.500", "1.000"]]
    assert found["pass@k by language"].rows == [["after", "de", "0.250", "0.750"]]
    # Of one answer to each question there is none, and a thinking language that nobody chose has no row.
    thinking = found["Thinking languages, after"]
    assert thinking.head == [
        *("thinking in", "responses", "chosen", "accuracy", "strict", "compliance", "tokens", "pass@k"),
    ]
    rows = {row[0]: row[1:] for row in thinking.rows}
    assert list(rows) == ["all", "seen", "unseen", "de", "ja", "none"]
    assert rows["de"] == ["6", "75.0 %", "0.667", "0.500", "0.833", "12.5", "1.000"] == rows["seen"]
    assert rows["unseen"] == ["1", "12.5 %", "0.000", "0.000", "1.000", "16.0", "0.000"]
    assert rows["none"][:2] == ["", "12.5 %"]


def test_a_task_is_called_by_what_it_averages(site: Path, tmp_path: Path) -> None:
    for name, right in (("before", 0.0), ("after", 1.0)):
        answers = [answer(f"-1/{task}/0", "de", right, task=task) for task in ("mgsm", "test")]
        lines(tmp_path / f"{name}.jsonl", answers)
        tasks = {"mgsm": {"metric": "accuracy", "wrong_language": 1}, "test": {"metric": "reward"}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"tasks": tasks}))
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    text = write([site / "new"], tmp_path / "report.html", before=[before], after=[after]).read_text(encoding="utf-8")
    assert "<h3>mgsm</h3>" in text and "Mean accuracy 0.000 → 1.000" in text and "Mean reward 0.000 → 1.000" in text
    assert text.count("<th>in another language</th>") == 1 and re.search(r"<th>before</th><td>–</td><td>1</td>", text)
    after.write_text("[]")
    with pytest.raises(ReportError, match=r"after\.json: no result of nemo_lrpo\.evaluate"):
        write([site / "new"], tmp_path / "report.html", before=[before], after=[after])


def test_heat_maps_hold_what_slots_are_drawn_from(site: Path) -> None:
    text = (site / "one.html").read_text(encoding="utf-8")
    chosen = rebuild(read_source(site / "a")).router.distribution(Prompt("x", "", "", "de", "de", ("Chat",), ()))
    table = text.partition("Probability by topic")[2]
    row = re.search(r">Chat</th>((?:<td[^>]*>[^<]*</td>)+)", table)
    assert row is not None and re.findall(r">([^<]*)</td>", row[1]) == [f"{value:.2f}" for value in chosen]
    assert "Languages that know a topic's or region's facts get a probability of " in text


def test_shades_of_a_heat_map() -> None:
    values = np.array([[-0.5, np.nan, 0.0, 1.0]])
    found = cells(HeatMap("topics_value", "Value", ("t",), LANGUAGES, values))
    assert found.signed and (found.low, found.high) == (-1.0, 1.0)
    assert [shade for shade, _ in found.rows[0][1]] == ["d6", "qn", "d12", f"d{SHADES - 1}"]
    assert [text for _, text in found.rows[0][1]] == ["-0.50", "–", "0.00", "1.00"]
    nothing = cells(HeatMap("topics_value", "Value", ("t",), LANGUAGES, np.full((1, 4), np.nan)))
    assert {shade for shade, _ in nothing.rows[0][1]} == {"qn"}


def test_lines_break_where_values_are_missing() -> None:
    steps, values = np.arange(1.0, 7.0), np.array([1.0, 2.0, np.nan, 4.0, np.nan, np.nan])
    raw = str(line_chart("x", [Line(0, "raw", (steps, values))]))
    drawn = re.search(r'class="raw s0" d="([^"]*)"', raw)
    assert drawn is not None and re.sub(r"[^ML]", "", drawn[1]) == "MLM"
    (_, mean), window = trend((steps, values))
    assert window == 5 and mean.tolist() == pytest.approx([1.0, 1.5, 1.5, 7 / 3, 7 / 3, 3.0])
    assert "not logged" in line_chart("x", [Line(0, "raw", (steps, np.full(6, np.nan)))])
    assert 'viewBox="0 0 350 190"' in line_chart("x", [Line(0, "trend", (steps[:1], values[:1]))], LARGE)
    assert ticks(0.0, 1.0, 4) == [0.0, 0.25, 0.5, 0.75, 1.0] and ticks(0.5, 1.5, 5, whole=True) == [1.0]


def test_a_long_run_has_a_small_page(tmp_path: Path) -> None:
    languages = [f"l{i}" for i in range(60)]
    records = [
        {"kind": "train", "step": i + 1, "reward": 0.5, "count": 60.0}
        | {f"{key}/{x}": float(i % 7) for x in languages for key in ("reward", "count", "length", "gate")}
        for i in range(1500)
    ]
    (tmp_path / "long").mkdir()
    lines(tmp_path / "long" / "metrics.jsonl", records)
    text = write([tmp_path / "long"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    assert "Charts are of the 24 languages with the most rollouts; 36 are not shown." in text
    assert all(f"<th>{language}</th>" in text for language in languages)


def test_a_run_over_pairs_shows_its_loss_and_what_it_tells_apart(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {
            "kind": kind,
            "step": step,
            "loss": 0.7 / step,
            "accuracy": 0.5,
            "accuracy/de": 0.5,
            "pairs": 4.0,
            "pairs/de": 4.0,
        }
        | {"margin": 0.1, "chosen_change": 0.2, "rejected_change": -0.3, "time/step": 2.0}
        for step in (1, 2, 3)
        for kind in ("train", "validation")
    ]
    (tmp_path / "pairs").mkdir()
    lines(tmp_path / "pairs" / "metrics.jsonl", records)
    text = write([tmp_path / "pairs"], tmp_path / "report.html").read_text(encoding="utf-8")
    for title in (
        "Loss",
        "Pairs told apart",
        "Margin",
        "Chosen answers",
        "Rejected answers",
        "Pairs told apart by language",
    ):
        assert title in text
    assert "is missing or not finite" not in text and "Gate rate" not in text
    records[2]["loss"] = None
    lines(tmp_path / "pairs" / "metrics.jsonl", records)
    text = write([tmp_path / "pairs"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "loss is missing or not finite in 1 of 3 steps (2)." in text


def test_what_is_not_there_yet_is_said(site: Path, tmp_path: Path) -> None:
    text = (site / "new.html").read_text(encoding="utf-8")
    for sentence in (
        "no step has ended yet",
        "no rollouts to show",
        "No evaluation was given",
        "No step was logged yet",
    ):
        assert sentence in text
    run = make_run(tmp_path / "run", "default")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    (run / "model.nemo").write_bytes(b"no archive")
    text = write([run], tmp_path / "report.html", after=[site / "after_a.json"]).read_text(encoding="utf-8")
    for sentence in ("The last line of metrics.jsonl is not whole", "What its router learned cannot be shown: "):
        assert sentence in text
    assert "after training only" in text and "Not every run has an evaluation before and after." in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere: no such directory"]),
        (["."], ["no run directory"]),
        (["a", "--before", "nothing.json"], ["nothing.jsonl: no such file"]),
        (["a", "b", "--after", "after_a.json"], ["--after: 1 evaluations for 2 runs", "accepted: 2"]),
        (["a", "b", "--names", "x"], ["--names: 1 for 2 runs"]),
        (["a", "--before", "other.json", "--after", "after_a.json"], ["share no scored question"]),
        (["a", "--knowledge", "before.jsonl"], ["before.jsonl: cannot be read as JSON"]),
        (["broken"], ["metrics.jsonl:2: not JSON"]),
        (["a", "--before", "cut.json"], ["cut.jsonl: ", "not whole"]),
    ],
)
def test_mistakes_are_named(
    site: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(site)
    lines(site / "other.jsonl", [answer("-1/9/0", "de", 1.0)])
    (site / "cut.jsonl").write_text('{"sample_id": "')
    (site / "broken").mkdir(exist_ok=True)
    (site / "broken" / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind"\n{}\n')
    with pytest.raises(SystemExit) as refused:
        main([*arguments, "--out", "never.html"])
    for word in ["ReportError: ", *words]:
        assert word in str(refused.value)
    assert not (site / "never.html").exists()


def test_names_tell_runs_apart(site: Path) -> None:
    assert names_of([site / "a", site / "b"]) == ["a", "b"]
    assert names_of([site / "x" / "run", site / "y" / "run"]) == ["x/run", "y/run"]
    assert names_of([site / "a", site / "a"]) == ["a", "a"]
    assert names_of([site / "run"]) == [f"{site.name}/run"]


def points(page: str, title: str, kind: str = "trend") -> list[tuple[float, float]]:
    """Of a line in a chart of the page, in its own units."""
    chart = page.partition(f'aria-label="{title}"')[2].partition("</svg>")[0]
    drawn = re.search(rf'class="{kind} s0" d="([^"]*)"', chart)
    return [] if drawn is None else [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", drawn[1])]


def test_a_language_that_was_not_chosen_is_drawn_at_0(site: Path) -> None:
    page = (site / "explang.html").read_text(encoding="utf-8")
    heights = {x: [y for _, y in points(page, f"explang/selected, {x}")] for x in ("de", "ja", "sw")}
    # All charts have one range; of de there are four steps of 0.5 first, of sw eight of 0.
    zero, half = heights["sw"][0], heights["de"][0]
    shares = {x: [0.5 * (zero - y) / (zero - half) for y in own] for x, own in heights.items()}
    assert shares["de"] == pytest.approx([0.5] * 4 + [0.4, 0.3, 0.2, 0.1, 0.0, 0.0], abs=0.01)
    assert shares["ja"] == pytest.approx([0.5] * 4 + [0.6, 0.7, 0.8, 0.9, 0.9, 0.8], abs=0.01)
    assert shares["sw"] == pytest.approx([0.0] * 8 + [0.1, 0.2], abs=0.01)
    # In the validation too.
    (dots,) = points(page, "explang/selected, sw", "dots")
    assert dots[1] == pytest.approx(zero)


def test_evaluations_during_training_have_a_chart_for_each_task(site: Path) -> None:
    page = (site / "explang.html").read_text(encoding="utf-8")
    assert "<h3>During training</h3>" in page and "what training brought was not measured" not in page
    assert "mean accuracy of the languages; dashed: seen in training, dotted: unseen" in page
    macro, seen, unseen = (points(page, "exam/accuracy", kind) for kind in ("macro", "seen", "unseen"))
    assert len(macro) == 3 and [x for x, _ in macro] == [x for x, _ in seen] == [x for x, _ in unseen]
    # From 0 to 0.5, at 0.5, from 0 to 1.
    assert macro[0][1] == unseen[0][1] and macro[2][1] == seen[0][1] == unseen[1][1]
    # Where no language is unseen, the mean of the languages says it all.
    assert len(points(page, "sums/reward", "macro")) == 3 and points(page, "sums/reward", "seen") == []
    assert "During training" not in (site / "one.html").read_text(encoding="utf-8")


def test_what_the_mode_changes_is_said(site: Path) -> None:
    explang, one = ((site / f"{name}.html").read_text(encoding="utf-8") for name in ("explang", "one"))
    assert explang.count("in validation r_c * r_v") == 1 and "r_c * r_v" not in one
    nothing = "Its router drew nothing: the policy chose every thinking language (mode.forced_rollouts=0)."
    router = explang.partition('<section id="router">')[2].partition("</section>")[0]
    assert nothing in router and "<table" not in router and "<svg" not in router and "not logged" not in router
    assert "none, the policy chose" in explang and nothing not in one and 'class="heat"' in one


def test_thinking_languages_by_stage(site: Path) -> None:
    rows = {row.name: row for row in thinking_rows(read_run(site / "explang", "explang"))}
    assert list(rows) == ["seen", "unseen", "de", "ja", "sw"] and thinking_rows(read_run(site / "a", "a")) == []
    shares = {name: (row.exploration, row.exploitation) for name, row in rows.items()}
    assert shares["de"] == (0.5, 0.0) and shares["ja"] == (0.5, pytest.approx(5 / 6))
    assert shares["sw"] == shares["unseen"] == (0.0, pytest.approx(1 / 6))
    assert rows["sw"].facts["accuracy"] == pytest.approx(0.95) and np.isnan(rows["de"].facts["accuracy"])
    page = (site / "explang.html").read_text(encoding="utf-8")
    assert 'id="thinking"' in page and re.search(r"<th>sw</th><td>0\.0 %</td><td>16\.7 %</td><td>0\.950</td>", page)
    assert 'id="thinking"' not in (site / "one.html").read_text(encoding="utf-8")

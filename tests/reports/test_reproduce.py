"""tools/reproduce.py: what a run brought, which runs are gone on with, what is refused, and what is written of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nemo_lrpo.config.loader import compose, load_train_config, to_dataclass
from nemo_lrpo.config.reward import ServeRewardsConfig
from tools.demo_world import LANGUAGES, build_facts
from tools.miniature.arms import ARMS, Plan, World
from tools.miniature.kept import ResultsError
from tools.miniature.outcomes import (
    BASE,
    Measure,
    Outcome,
    Results,
    Training,
    read_measure,
    read_training,
)
from tools.miniature.page import BLOCK, write_all
from tools.miniature.processes import ProcessFailed
from tools.miniature.statistics import estimate, language_groups, macro, paired, summarise
from tools.miniature.text import marks
from tools.reproduce import Bench, reproduce

KNOWLEDGE = {"East Asia": ["ja", "ko"], "General Knowledge": ["en"]}
FACT = next(fact for fact in build_facts() if fact.fact_id == "currency/JP")


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def answer(language: str, response: str, reward: float, written: str | None) -> dict[str, Any]:
    """As nemo_lrpo.evaluate leaves it, about the currency of Japan."""
    return {
        "sample_id": f"-1/{FACT.fact_id}/{language}/0",
        "language": language,
        "topics": ["Regional Knowledge"],
        "regions": ["East Asia"],
        "response": response,
        "reference": FACT.answer(language),
        "score": {"reward": reward, "language": written},
    }


def rollout(step: int, language: str, origin: str, regions: Sequence[str] = ("East Asia",)) -> dict[str, Any]:
    return {
        "step": step,
        "question_language": "de",
        "language": language,
        "origin": origin,
        "topics": ["Regional Knowledge"],
        "regions": list(regions),
    }


def outcome(arm: str, seed: int, accuracy: dict[str, float], digests: dict[str, str] | None = None) -> Outcome:
    taught = dict(zip(accuracy, (0.5, 0.4, 0.1)))
    measure = Measure(accuracy, accuracy, accuracy, {"de": 0.1}, taught, 0.25, 0.5, 30, 60)
    training = Training(
        0.4, None if arm == "grpo" else 0.5, [0.3, 0.5], ["de", "en"], {"de": 3, "en": 1}, [0.1, 0.2], 99, 16, 7.0, 8.0
    )
    return Outcome(arm, seed, digests or {}, measure, None if arm == BASE else training)


# --- what a run brought ---------------------------------------------------------------------------------------------


def test_answers_are_judged_by_the_truth_of_the_world(tmp_path: Path) -> None:
    answers = [
        answer("ja", FACT.answer("ja"), 0.9, "ja"),
        answer("ja", FACT.wrong_answers("ja")[0], 0.5, "ja"),
        answer("de", FACT.answer("ja"), 0.0, "ja"),
        answer("de", FACT.answer("de").upper() + " ", 0.8, None),
    ]
    found = read_measure(write_lines(tmp_path / "answers.jsonl", answers), KNOWLEDGE)
    assert found.accuracy == {"de": 0.5, "ja": 0.5}
    assert found.reward == pytest.approx({"de": 0.4, "ja": 0.7})
    assert found.known == {"ja": 0.5} and found.unknown == {"de": 0.5}
    assert found.taught == {"de": 0.0, "ja": 1.0}
    assert (found.wrong_language, found.true_somewhere, found.questions, found.answers) == (0.25, 0.75, 2, 4)


def test_rollouts_are_counted_where_the_language_was_free(tmp_path: Path) -> None:
    rollouts = [
        rollout(1, "de", "reserved"),
        rollout(1, "ja", "drawn"),
        rollout(1, "ja", "fixed"),
        rollout(2, "ko", "drawn"),
        rollout(2, "en", "drawn"),
        rollout(2, "en", "drawn", regions=["East Asia", "General Knowledge"]),
    ]
    write_lines(tmp_path / "rollouts.jsonl", rollouts)
    steps = [{"kind": "train", "reward": 0.5, "length": 2.5, "count": 2.0, "time/step": 3.0}] * 2
    write_lines(tmp_path / "metrics.jsonl", [*steps, {"kind": "validation", "step": 2}])
    found = read_training(tmp_path, KNOWLEDGE, 12.5)
    assert found.knowing == 3 / 5 and found.knowing_drawn == 3 / 4
    assert found.knowing_by_step == [0.5, 2 / 3]
    assert found.drawn == {"en": 2, "ja": 1, "ko": 1}
    assert (found.tokens, found.rollouts, found.processor_seconds, found.step_seconds) == (10, 6, 12.5, 6.0)


# --- statistics -----------------------------------------------------------------------------------------------------


def test_intervals_are_students() -> None:
    # s = 1, t(0.975, 2) = 4.302653, 4.302653 / sqrt(3) = 2.484138
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.low == pytest.approx(2.0 - 2.484138, abs=1e-6) and found.half == pytest.approx(2.484138, abs=1e-6)
    assert math.isnan(estimate([1.0]).low) and math.isnan(estimate([]).mean)


def test_differences_are_paired_by_seed() -> None:
    # Differences 1.0, 1.2 on the seeds that both have: s = 0.141421, t(0.975, 1) = 12.706205.
    found = paired({0: 5.0, 1: 9.2, 7: 100.0}, {0: 4.0, 1: 8.0, 2: 0.0})
    assert found.mean == pytest.approx(1.1) and found.half == pytest.approx(12.706205 * 0.1, abs=1e-5)
    assert not found.apart
    assert paired({0: 2.0, 1: 2.0}, {0: 1.0, 1: 1.0}).apart


def test_macro_averages_and_groups_of_languages() -> None:
    assert macro({"de": 0.2, "en": 0.6, "ja": 0.7}) == pytest.approx(0.5)
    assert macro({"de": 0.2, "en": 0.6, "ja": 0.7}, {"de", "en"}) == pytest.approx(0.4)
    assert language_groups({"de": 0.2, "en": 0.5, "ja": 0.2}) == {"rich": ["en"], "middle": ["de"], "poor": ["ja"]}
    summary = summarise(
        "default",
        [
            outcome("default", 0, {"de": 0.5, "en": 0.7, "ja": 0.9}),
            outcome("default", 1, {"de": 0.3, "en": 0.5, "ja": 0.7}),
        ],
        [outcome("grpo", 0, {"de": 0.4, "en": 0.6, "ja": 0.8})],
    )
    assert summary.seeds == [0, 1]
    assert summary.figures["accuracy"].mean == pytest.approx(0.6)
    assert summary.differences["accuracy"].mean == pytest.approx(0.1) and summary.differences["accuracy"].count == 1
    assert summary.figures["accuracy_poor"].mean == pytest.approx(0.8)


# --- runs that are kept ---------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Files with something in them; only their bytes count here."""
    own = World(tmp_path / "data", tmp_path / "models")
    for path in (
        own.train,
        own.questions,
        own.knowledge,
        own.calibration,
        own.encoder / "model.safetensors",
        own.models / "base/model.safetensors",
        own.models / "base/tokenizer.json",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    return own


def test_every_arm_is_what_it_says_with_the_same_budget(world: World) -> None:
    plan = Plan(world, 3)
    found, servers = {}, {}
    for name, arm in ARMS.items():
        paths = [f"data.train={world.train}", f"pretrained_checkpoint.restore_from_path={world.calibration}"]
        paths.append(f"reward.endpoint_file={world.calibration}")
        found[name] = load_train_config(compose("demo", [*plan.train_settings(arm, 7), *paths]))
        servers[name] = to_dataclass(ServeRewardsConfig, compose("demo_rewards", arm.server))
    names = {name: config.router.name for name, config in found.items()}
    assert names == {
        "grpo": "monolingual",
        "input_dominant": "fixed",
        "en_dominant": "fixed",
        "uniform": "uniform",
        "published": "published",
        **dict.fromkeys(("default", "spread", "no_calibration", "no_gate"), "hierarchical"),
    }
    assert found["input_dominant"].router.mix == {"question": 0.7, "uniform": 0.3}
    loops = [(config.loop, config.seed, config.algorithm, config.rollout) for config in found.values()]
    assert all(loop == loops[0] for loop in loops) and loops[0][0].max_steps == 3 and loops[0][1] == 7
    assert {name for name, own in servers.items() if own.calibration.method == "none"} == {"no_calibration"}
    assert {name for name, own in servers.items() if own.language_id.gate == "off"} == {"no_gate"}


class Endpoints:
    def endpoint(self, overrides: tuple[str, ...]) -> Path:
        return Path("_".join(overrides) or "default")


class Entries:
    """In place of the entry points: leaves what they would leave. `broken`: run directories that fail."""

    def __init__(self, broken: Sequence[str] = ()) -> None:
        self.broken = broken
        self.calls: list[tuple[str, str, dict[str, str]]] = []

    def __call__(self, module: str, arguments: Sequence[str], log: Path) -> float:
        settings = dict(argument.partition("=")[::2] for argument in arguments[2:])
        self.calls.append((module, log.parent.name, settings))
        if log.parent.name in self.broken:
            raise ProcessFailed("no luck")
        if module == "nemo_lrpo.train":
            run_dir = Path(settings["run_dir"])
            write_lines(run_dir / "rollouts.jsonl", [rollout(1, "ja", "drawn")])
            write_lines(
                run_dir / "metrics.jsonl",
                [{"kind": "train", "reward": 0.5, "length": 2.0, "count": 1.0, "time/step": 3.0}],
            )
        else:
            records = [answer(language, FACT.answer(language), 0.5, language) for language in LANGUAGES]
            write_lines(Path(settings["evaluation.out"]).with_suffix(".jsonl"), records)
        return 1.0

    def stop(self) -> None:
        pass


@pytest.fixture
def bench(tmp_path: Path, world: World) -> Callable[[Entries], Bench]:
    out = tmp_path / "out"
    return lambda entries: Bench(Plan(world, 3), out, Endpoints(), entries, KNOWLEDGE, Results(out / "results.jsonl"))


def test_what_is_done_is_not_run_again_and_what_failed_is(bench: Callable[[Entries], Bench]) -> None:
    arms = [ARMS["grpo"], ARMS["no_gate"]]
    first = Entries(broken=["no_gate_0"])
    failures = reproduce(bench(first), arms, range(2), jobs=1)
    assert len(failures) == 1 and failures[0].startswith("no_gate, seed 0: ")
    trained = [name for module, name, _ in first.calls if module == "nemo_lrpo.train"]
    assert trained == ["grpo_0", "no_gate_0", "grpo_1", "no_gate_1"], "seed by seed"

    again = Entries()
    assert reproduce(bench(again), arms, range(2), jobs=3) == []
    assert [(module, name) for module, name, _ in again.calls] == [
        ("nemo_lrpo.train", "no_gate_0"),
        ("nemo_lrpo.evaluate", "no_gate_0"),
    ]
    train, evaluation = again.calls[0][2], again.calls[1][2]
    assert train["reward.endpoint_file"] == "language_id.gate=off", "trains without the gate"
    assert evaluation["reward.endpoint_file"] == "default", "is judged as all others are"
    assert train["router"] == "default" and train["seed"] == evaluation["seed"] == "0"
    results = bench(again).results
    more = Entries()
    assert reproduce(bench(more), [*arms, ARMS["uniform"]], range(3), jobs=3) == []
    assert len(more.calls) == 2 * 5, "a seed more of three arms, and two of a new one"
    assert [len(results.of(name)) for name in (BASE, "grpo", "no_gate")] == [1, 2, 2]


def test_a_run_of_other_settings_is_begun_anew(bench: Callable[[Entries], Bench]) -> None:
    own = bench(Entries())
    directory = own.out / "runs/grpo_0"
    (directory / "train/checkpoints/step_00000002").mkdir(parents=True)
    digests = own.plan.digests(ARMS["grpo"])
    (directory / "settings.json").write_text(json.dumps(digests))
    own._prepare(directory, digests)
    assert (directory / "train/checkpoints/step_00000002").is_dir()
    own._prepare(directory, digests | {"policy": "another"})
    assert not (directory / "train").exists()


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, world: World) -> None:
    plan = Plan(world, 3)
    results = Results(tmp_path / "results.jsonl")
    arms = [ARMS["grpo"], ARMS["no_gate"]]
    for arm in arms:
        results.add(outcome(arm.name, 0, {"de": 0.1}, plan.digests(arm)))
    results.add(outcome(BASE, 0, {"de": 0.1}, plan.common))
    found = Results(tmp_path / "results.jsonl")
    assert found.of("no_gate") == results.of("no_gate")
    found.check(plan, arms)
    assert plan.digests(ARMS["grpo"]) != plan.digests(ARMS["no_gate"])

    with pytest.raises(ResultsError, match=r"the run grpo, seed 0, had another train than"):
        found.check(Plan(world, 4), arms)
    with pytest.raises(ResultsError, match=r"another evaluation, train than"):
        found.check(Plan(world, 3, ("model.optim.lr=1",)), arms)
    world.calibration.write_text("measured again")
    with pytest.raises(ResultsError, match=r"another calibration than.*another --out"):
        found.check(Plan(world, 3), arms)


def test_a_line_that_was_cut_off_is_left_out_and_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Results(path).add(outcome("grpo", 0, {"de": 0.1}))
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert len(Results(path).of("grpo")) == 1 and path.read_text() == whole
    path.write_text(whole + '{"arm": "grpo"}\n')
    with pytest.raises(ResultsError, match=r"results\.jsonl:2: no run"):
        Results(path)


# --- what is written ------------------------------------------------------------------------------------------------


def test_the_block_of_a_readme_is_rewritten_and_nothing_else(tmp_path: Path) -> None:
    results = Results(tmp_path / "out/results.jsonl")
    with pytest.raises(ResultsError, match="no run is done yet"):
        write_all(results, tmp_path / "out", None)
    results.add(outcome(BASE, 0, {"de": 0.2, "en": 0.3, "ja": 0.1}))
    for seed, gain in enumerate((0.0, 0.02)):
        results.add(outcome("grpo", seed, {"de": 0.4, "en": 0.6, "ja": 0.8}))
        results.add(outcome("default", seed, {"de": 0.5 + gain, "en": 0.7 + gain, "ja": 0.9 + gain}))
    readme = tmp_path / "README.md"
    opening, closing = marks(BLOCK)
    readme.write_text(f"before\n{opening}\nold\n{closing}\nafter\n")
    write_all(results, tmp_path / "out", readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{opening}\n2 seeds of 2 steps") and text.endswith(f"{closing}\nafter\n")
    assert "old" not in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert list(rows)[2:] == ["base model", "GRPO", "LRPO, default router"]
    # Means 0.7 and 0.72: s = 0.014142, t(0.975, 1) / sqrt(2) * s = 0.127.
    assert rows["LRPO, default router"].split("|")[2].strip() == "0.710 ±0.127 (+0.110 ±0.127)"
    assert (tmp_path / "tools/miniature/reproduce.svg").read_bytes() == (tmp_path / "out/reproduce.svg").read_bytes()
    assert "tools/miniature/reproduce.svg" in text
    write_all(results, tmp_path / "out", readme)
    assert readme.read_text() == text, "the same results give the same bytes"
    readme.write_text("no marks")
    with pytest.raises(ResultsError, match="has no block"):
        write_all(results, tmp_path / "out", readme)

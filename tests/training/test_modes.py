"""What a mode decides: rows of a step, rewards, what the router learns, stages over a run that goes on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.explang import MarksConfig
from nemo_lrpo.config.mode import ModeConfig
from nemo_lrpo.config.router import RouterConfig
from nemo_lrpo.router import LanguagePlan, LanguageRouter, build_router
from nemo_lrpo.training.checkpoint import Checkpoint, CheckpointError
from nemo_lrpo.training.modes import ExplangMode, LrpoMode, build_mode, reward_column
from nemo_lrpo.training.trainer import check_resumable
from nemo_lrpo.types import ORIGIN_DRAWN, ORIGIN_FIXED, Prompt, Score

LANGUAGES = ("de", "en", "ja")
TOTAL = 8


def router(**settings: object) -> LanguageRouter:
    config = RouterConfig(name="ucb", reserved_slots=0, update_every=1, fixed_topics=[], **settings)
    return build_router(config, LANGUAGES, ["math"], [], seed=3)


def questions(count: int = 3) -> list[Prompt]:
    fixed = [None, None, "ja"]
    return [Prompt(f"q{i}", f"{i}?", str(i), "de", "de", ("math",), (), fixed[i % 3]) for i in range(count)]


def mode(**settings: object) -> ExplangMode:
    made = build_mode(ModeConfig(name="explang", **settings), TOTAL)
    assert isinstance(made, ExplangMode)
    return made


def score(sample_id: str, selected: str | None, gate: float | None, quality: float | None) -> Score:
    flag = "defect:no_tag" if selected is None else f"selected:{selected}"
    product = None if gate is None or quality is None else gate * quality
    return Score(sample_id, product, quality, gate, "de", 0.9, flags=(flag,))


def test_the_router_proposes_for_the_first_slots_and_the_answer_stays_in_the_users_language() -> None:
    bandit = router()
    plan = mode(forced_rollouts=2).route(bandit, questions(), 5, 7)
    assert len(plan) == 15 and plan.languages == LANGUAGES
    rows = list(plan)
    assert rows == [plan[i] for i in range(15)] == plan[0:15]
    assert [row.language for row in rows] == ["de"] * 10 + ["ja"] * 5
    assert {row.origin for row in rows} == {ORIGIN_FIXED} and {row.probability for row in rows} == {1.0}
    assert [row.slot for row in rows] == [0, 1, 2, 3, 4] * 3
    assert tuple(row.sample_id for row in rows) == plan.sample_ids
    proposed = bandit.route(questions(), 2, 7)
    made = {row.sample_id: row.thinking for row in rows if row.thinking is not None}
    assert made == {row.sample_id: row.language for row in proposed}
    assert {row.origin for row in proposed} == {ORIGIN_DRAWN, ORIGIN_FIXED}


def test_without_forced_rollouts_the_policy_chooses_for_all_and_the_router_has_a_step() -> None:
    bandit, own = router(), mode()
    plan = own.route(bandit, questions(), 4, 0)
    assert {row.thinking for row in plan} == {None}
    lesson = own.lesson(plan, {})
    assert len(lesson.plan) == len(lesson.rows) == len(lesson.rewards) == 0
    bandit.observe(lesson.plan, lesson.rewards)
    bandit.observe_costs(lesson.plan, np.ones(12)[lesson.rows])
    assert bandit.state_dict()["step"] == 1 and bandit.metrics()["step"] == 1


def test_rewards_are_the_stages_and_join_by_sample_id() -> None:
    """One question, four rollouts: ja (forced, right), de (right), en (wrong), one that was lost on its way."""
    own = mode(forced_rollouts=1, exploration_share=0.5)
    bandit = router()
    plan = own.route(bandit, questions(1), 4, 0)
    language = plan[0].thinking
    scores = {
        "0/q0/2": score("0/q0/2", "en", 0.0, 0.0),
        "0/q0/0": score("0/q0/0", language, 1.0, 1.0),
        "0/q0/1": score("0/q0/1", "de" if language != "de" else "ja", 1.0, 1.0),
    }
    tokens = [5, 6, 7, 8]
    explored = own.judge(plan, scores, tokens, 3)
    # r_d is 1 for both that chose, and so their mean.
    assert [explored[f"0/q0/{slot}"].reward for slot in range(3)] == pytest.approx([1.6, 1.6, 0.4])
    exploited = own.judge(plan, scores, tokens, 4)
    # r_p: 1 for the one that was right, 0 for en; 1/2 for the forced one.
    assert [exploited[f"0/q0/{slot}"].reward for slot in range(3)] == pytest.approx([1.65, 1.9, 0.2])
    assert {"r_f": 1.0, "r_d": 1.0, "r_p": 0.5} == exploited["0/q0/0"].measures
    column = reward_column(plan, exploited)
    assert column[:3] == pytest.approx([1.65, 1.9, 0.2]) and math.isnan(column[3])
    assert (own.diverges(3), own.diverges(4)) == (False, True)
    own_metrics = own.metrics(plan, exploited, tokens, 4)
    assert own_metrics["explang/forced"] == pytest.approx(1 / 3) and own_metrics["explang/exploration"] == 0.0
    assert own_metrics["explang/selected_exploitation/en"] == 0.5 and own_metrics["explang/tokens"] == 6.0
    assert own_metrics == own.metrics(plan, scores, tokens, 4), "of the scores before and after alike"


def test_the_router_learns_from_right_answers_in_the_language_that_it_proposed() -> None:
    """Whatever r_d and r_p have paid."""
    own, bandit = mode(forced_rollouts=2), router()
    plan = own.route(bandit, questions(2), 4, 0)
    scores = {row.sample_id: score(row.sample_id, row.thinking or "en", 1.0, 1.0) for row in plan}
    scores["0/q0/1"] = score("0/q0/1", plan[1].thinking, 0.5, 1.0)
    scores["0/q1/0"] = score("0/q1/0", plan[4].thinking, 1.0, 0.0)
    scores["0/q1/1"] = score("0/q1/1", plan[5].thinking, None, 1.0)
    lesson = own.lesson(plan, own.judge(plan, scores, [1] * 8, 0))
    assert lesson.rows.tolist() == [0, 1, 4, 5] and lesson.plan.sample_ids == ("0/q0/0", "0/q0/1", "0/q1/0", "0/q1/1")
    assert [row.language for row in lesson.plan] == [plan[i].thinking for i in lesson.rows]
    np.testing.assert_array_equal(lesson.rewards, [1.0, 0.5, 0.0, np.nan])
    bandit.observe(lesson.plan, lesson.rewards)
    assert bandit.state_dict()["updates"] == 1


def test_a_score_without_a_verdict_leaves_the_update() -> None:
    own = mode()
    plan = own.route(router(), questions(1), 3, 0)
    scores = {
        "0/q0/0": score("0/q0/0", "de", 0.0, None),
        "0/q0/1": score("0/q0/1", "de", None, 1.0),
        "0/q0/2": Score("0/q0/2", None, None, None, None, 0.0, flags=("too_long",)),
    }
    judged = own.judge(plan, scores, [1, 1, 1], 0)
    assert [judged[name].reward for name in scores] == [None, None, None]


def test_lrpo_is_as_it_was() -> None:
    bandit = router()
    own = build_mode(ModeConfig(), TOTAL)
    assert isinstance(own, LrpoMode)
    plan = own.route(bandit, questions(), 4, 2)
    assert isinstance(plan, LanguagePlan) and list(plan) == list(bandit.route(questions(), 4, 2))
    scores = {name: Score(name, i / 12, i / 12, 1.0, "de", 0.9) for i, name in enumerate(plan.sample_ids) if i != 5}
    assert own.judge(plan, scores, [1] * 12, 2) == scores and own.metrics(plan, scores, [1] * 12, 2) == {}
    lesson = own.lesson(plan, scores)
    assert lesson.plan is plan and lesson.rows.tolist() == list(range(12))
    np.testing.assert_array_equal(lesson.rewards, reward_column(plan, scores))
    assert np.flatnonzero(np.isnan(lesson.rewards)).tolist() == [5]
    assert own.diverges(0) and own.thinking(questions()[0]) is None


def test_more_steps_do_not_lead_back_into_exploration() -> None:
    """A run of 8 steps, 2 of them exploration, that is started again with 80."""
    saved = mode().state_dict()
    assert saved == {"name": "explang", "exploration_steps": 2}
    longer = build_mode(ModeConfig(name="explang"), 80)
    assert longer.stage(2).name == longer.stage(19).name == "exploration"
    longer.load_state_dict(saved)
    assert [longer.stage(step).name for step in (1, 2, 19)] == ["exploration", "exploitation", "exploitation"]


def test_a_checkpoint_goes_on_in_its_own_mode() -> None:
    state = {"languages": list(LANGUAGES), "seed": 1, "data": {}, "mode": mode().state_dict()}
    older = {name: value for name, value in state.items() if name != "mode"}
    check_resumable(Checkpoint(Path("step"), state), 1, LANGUAGES, mode="explang")
    check_resumable(Checkpoint(Path("step"), older), 1, LANGUAGES, mode="lrpo")
    for saved, name in ((state, "lrpo"), (older, "explang")):
        with pytest.raises(CheckpointError, match=rf"saved with mode\.name=(lrpo|explang), this run has {name}"):
            check_resumable(Checkpoint(Path("step"), saved), 1, LANGUAGES, mode=name)


def test_a_scorer_of_another_form_is_refused() -> None:
    marks = {name: getattr(MarksConfig(), name) for name in MarksConfig.__dataclass_fields__}
    mode().check_service({"thinking": marks})
    LrpoMode().check_service({"languages": ["de"]})
    with pytest.raises(ConfigError, match=r"start it with thinking\.tagged=true"):
        mode().check_service({"languages": ["de"]})
    with pytest.raises(ConfigError, match=r"has thinking\.marks=.*both the same"):
        mode(marks=replace(MarksConfig(), thinking_open="<reason>")).check_service({"thinking": marks})
    with pytest.raises(ConfigError, match=r"train with mode=explang"):
        LrpoMode().check_service({"thinking": marks})


@pytest.mark.parametrize(("think_in", "expected"), [(None, None), ("ja", "ja"), ("question", "de")])
def test_in_which_language_an_evaluation_thinks(think_in: str | None, expected: str | None) -> None:
    assert ExplangMode(ModeConfig(name="explang"), 0, think_in).thinking(questions()[0]) == expected

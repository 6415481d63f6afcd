"""The inspection tool: what it shows of runs, checkpoints and .nemo files, and what it calls damaged."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch import ROOT

from nemo_lrpo.config.router import RouterConfig
from nemo_lrpo.router import build_router, to_json
from nemo_lrpo.training.checkpoint import CheckpointStore
from nemo_lrpo.types import Prompt
from tools.inspect_checkpoint import inspect, lines, main

LANGUAGES = ("de", "en", "sw")
TOPICS = ("Chat", "Logic")


class OneRank:
    is_main = True

    def save_shards(self, directory: Path) -> None:
        (directory / "__0_0.distcp").write_bytes(bytes(2_000_000))

    def agree(self, error: BaseException | None) -> None:
        assert error is None, error


def router_state(policy: str) -> dict[str, Any]:
    """Swahili pays for logic, German for chat."""
    router = build_router(RouterConfig(name=policy, update_every=1), LANGUAGES, TOPICS, (), seed=1)
    for step in range(6):
        prompts = [Prompt(f"q{step}-{i}", "?", "!", "en", "en", (TOPICS[i % 2],), ()) for i in range(20)]
        plan = router.route(prompts, 4, step)
        pays = {"Chat": "de", "Logic": "sw"}
        noise = np.random.default_rng(step).random(len(plan))
        router.observe(plan, noise + [3.0 * (pays[row.prompt.topics[0]] == row.language) for row in plan])
    return router.state_dict()


def save_run(directory: Path, policy: str = "published") -> Path:
    """Three checkpoints, the second with the best reward."""
    store = CheckpointStore(directory / "run" / "checkpoints", 0)
    for step, reward in ((1, 0.2), (2, 0.9), (3, 0.4)):
        state = {
            "step": step,
            "updates": step,
            "seed": 11,
            "data": {"epoch": 0, "position": 20 * step, "passed_over": ["q1", "q2"]},
            "router": router_state(policy),
            "languages": list(LANGUAGES),
            "layout": {"tensor": 2, "pipeline": 1, "data": 4},
        }
        shares = {"router/probability/de": 0.25, "router/probability/en": 0.1, "router/probability/sw": 0.65}
        store.save(OneRank(), state, {"reward": reward, **shares})
    return directory / "run"


def text(path: Path, **options: Any) -> str:
    return "\n".join(lines(inspect(path, **options)))


def test_a_run_is_listed_and_its_newest_shown(tmp_path: Path) -> None:
    run = save_run(tmp_path)
    (run / "checkpoints" / "step_00000004.partial").mkdir()
    report = inspect(run)
    assert [row["step"] for row in report["checkpoints"]] == [3, 2, 1]
    assert report["best"] == ["step_00000002", "step_00000003", "step_00000001"]
    newest = report["newest"]
    assert (newest["step"], newest["layout"]) == (3, {"tensor": 2, "pipeline": 1, "data": 4})
    assert newest["data"] == {"epoch": 0, "position": 60, "passed_over": 2}
    assert newest["shards"] == {"shards/__0_0.distcp": 2_000_000} and newest["versions"]["python"]
    shown = text(run)
    for words in ("2.0 MB  shards/__0_0.distcp", "sw 65.0%, de 25.0%, en 10.0%", "never completed", "tensor 2"):
        assert words in shown


@pytest.mark.parametrize("policy", ["published", "hierarchical", "thompson", "features", "uniform"])
def test_every_policy_is_summarised(tmp_path: Path, policy: str) -> None:
    router = inspect(save_run(tmp_path, policy))["newest"]["router"]
    assert router["policy"] == policy and (router["languages"], router["topics"], router["step"]) == (3, 2, 6)
    contexts = {one["context"]: next(iter(one["best"])) for one in router["contexts"]}
    # The best language of a context leads, where the policy has a table of contexts.
    assert contexts == ({} if policy in ("features", "uniform") else {"Chat": "de", "Logic": "sw"})


def test_damage_is_found_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path)
    assert main([str(run), "--verify"]) == 0
    assert "verified: every file is as it was written" in capsys.readouterr().out
    shard = run / "checkpoints" / "step_00000001" / "shards" / "__0_0.distcp"
    shard.write_bytes(bytes(10))
    assert main([str(run), "--verify"]) == 1
    assert "step_00000001: shards/__0_0.distcp has 10 bytes, 2000000 were written" in capsys.readouterr().out
    # Without --verify nothing but manifests and the newest state is read.
    assert main([str(run)]) == 0
    state = run / "checkpoints" / "step_00000003" / "state.json"
    state.write_text(state.read_text().replace('"seed": 11', '"seed": 12'))
    assert main([str(state.parent), "--verify", "--json"]) == 1
    assert "sha256 differs" in capsys.readouterr().out
    state.write_text("{")
    assert main([str(state.parent)]) == 1
    assert "state.json: unreadable" in capsys.readouterr().out


def test_a_path_that_is_nothing_of_the_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.nemo").write_text("no archive")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "text.nemo"):
        assert main([str(path)]) == 2
        assert str(path) in capsys.readouterr().err


def write_nemo(path: Path) -> Path:
    """An archive as an export leaves it, with a stand-in for the weights."""
    texts = {
        "model_config.yaml": "tensor_model_parallel_size: 2\npipeline_model_parallel_size: 1\nnum_layers: 3\n",
        "lrpo_router.json": json.dumps(to_json(router_state("published"))),
        "lrpo_training.json": json.dumps({"step": 6, "seed": 11, "languages": LANGUAGES}),
        "model_weights/common.pt": "x" * 3000,
    }
    with tarfile.open(path, "w") as archive:
        for name, content in texts.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()))
    return path


def test_a_nemo_shows_model_router_and_training(tmp_path: Path) -> None:
    path = write_nemo(tmp_path / "model.nemo")
    report = inspect(path, verify=True)
    assert (report["step"], report["layout"], report["model"]) == (
        6,
        {"tensor": 2, "pipeline": 1},
        {"num_layers": 3},
    )
    assert report["router"]["policy"] == "published" and report["damage"] == []
    assert report["shards"]["./model_weights/common.pt"] == 3000
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 2])
    assert main([str(path), "--verify"]) in (1, 2)


def test_no_weights_and_no_torch_are_loaded(tmp_path: Path) -> None:
    run = save_run(tmp_path)
    code = (
        f"import sys; from tools.inspect_checkpoint import main; code = main([{str(run)!r}, '--json']); "
        "assert not {'torch', 'nemo', 'megatron'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["newest"]["step"] == 3

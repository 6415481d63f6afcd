"""The TensorRT-LLM backend holds to the interface of the engine that NeMo-Aligner 0.7.0 brings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import run


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    output = run([str(Path(__file__).with_name("trt_contract_worker.py"))]).stdout
    return json.loads(output.strip().splitlines()[-1])


def test_the_installed_engine_has_what_the_backend_uses(facts: dict[str, Any]) -> None:
    assert facts["generate"] == ["self", "inputs"]
    assert facts["keys"] == ["response_tokens", "response_lengths"]
    assert facts["attributes"] == ["rng_generator", "sampling_config"]
    assert facts["updates"] and facts["prepare"] and facts["release"]


def test_seeds_decide_the_draws_and_greedy_is_for_one_call_only(facts: dict[str, Any]) -> None:
    first, again, other, greedy = facts["calls"]
    assert first["draw"] == again["draw"] != other["draw"]
    assert first["settings"] == {"temperature": 0.8, "top_k": 0}
    assert greedy["settings"]["top_k"] == 1
    assert facts["after"] == {"temperature": 0.8, "top_k": 0}
    assert facts["lengths"] == [5, 4]

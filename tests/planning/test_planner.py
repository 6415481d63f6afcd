"""The planner's arithmetic against Megatron-Core's own models, the recipes against the planner, and the tool."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import ROOT

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.loader import CONFIG_DIR, compose, load_train_config
from nemo_lrpo.planning.layouts import make_plan, rank_layouts
from nemo_lrpo.planning.memory import (
    GIB,
    Layout,
    Workload,
    held_activations,
    kv_cache_bytes,
    logits_bytes,
    predict_memory,
    sampling_bytes,
)
from nemo_lrpo.planning.parameters import ADAPTED, forward_flops, padded_vocabulary, rank_parameters, total_parameters
from nemo_lrpo.planning.recipes import plan_config
from nemo_lrpo.planning.shapes import CATALOGUE, from_huggingface, from_nemo
from nemo_lrpo.planning.timing import Hardware, predict_time
from tools import plan

CHUNK, ANSWERS = 512, 64
"""As megatron_worker.py has them."""
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "llama2-7b": 6_738_415_616,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
}
"""Parameters by their model cards' checkpoints."""
PLAIN: dict[str, Any] = {
    "layers": None,
    "tensor": 1,
    "pipeline": 1,
    "sequence_parallel": False,
    "stage": "only",
    "recompute": None,
    "micro_batch": 1,
    "length": 0,
    "state": False,
    "lora": 0,
}
RANKS = [
    {"model": "llama3.1-70b", "tensor": 8, "pipeline": 4, "stage": "first"},
    {"model": "llama3.1-70b", "tensor": 8, "pipeline": 4, "stage": "last"},
    {"model": "qwen2.5-1.5b"},
    {"model": "qwen2.5-1.5b", "pipeline": 2, "stage": "last"},
    {"model": "qwen2.5-7b", "tensor": 4},
    {"model": "gemma2-9b", "tensor": 2},
]
PASSES = [
    {"model": "llama3.1-8b", "tensor": 1},
    {"model": "llama3.1-8b", "tensor": 2, "sequence_parallel": True, "micro_batch": 2},
    {"model": "llama3.1-8b", "tensor": 2, "sequence_parallel": True, "micro_batch": 2, "recompute": "full"},
    {"model": "llama3.1-8b", "tensor": 2, "micro_batch": 2, "recompute": "selective"},
    {"model": "llama3.1-70b", "tensor": 8, "pipeline": 2, "layers": 4, "stage": "last", "sequence_parallel": True},
    {"model": "qwen2.5-7b", "tensor": 4, "micro_batch": 2},
    {"model": "qwen2.5-1.5b", "micro_batch": 4},
    {"model": "llama2-7b", "tensor": 2},
    {"model": "gemma2-9b", "tensor": 2},
    {"model": "gemma2-9b", "tensor": 2, "recompute": "selective"},
    {"model": "gemma2-9b", "recompute": "full"},
]
PREFILLS = [
    {"model": "llama3.1-8b", "tensor": 2, "pipeline": 2, "layers": 4, "micro_batch": 16},
    {"model": "qwen2.5-7b", "tensor": 4, "pipeline": 2, "layers": 4, "micro_batch": 64},
]
LORA = [
    {"model": "llama3.1-8b", "tensor": 2, "micro_batch": 2, "lora": 32},
    {"model": "llama3.1-70b", "tensor": 8, "lora": 64},
]
CASES = [
    *({**PLAIN, **case} for case in RANKS),
    *({**PLAIN, "layers": 2, "length": 1536, **case} for case in PASSES),
    *({**PLAIN, "length": 512, "stage": "first", **case} for case in PREFILLS),
    *({**PLAIN, "layers": 2, "length": 1536, **case} for case in LORA),
    {**PLAIN, "model": "llama3.1-8b", "layers": 2, "tensor": 2, "state": True},
]


@pytest.fixture(scope="module")
def measured() -> list[dict[str, int]]:
    """What Megatron-Core holds, for each of CASES."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("megatron_worker.py"))],
        input=json.dumps(CASES),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def stage_of(case: dict[str, Any]) -> int:
    return case["pipeline"] - 1 if case["stage"] == "last" else 0


def shape_of(case: dict[str, Any]):
    shape = CATALOGUE[case["model"]]
    return dataclasses.replace(shape, layers=case["layers"]) if case["layers"] else shape


def test_parameters_equal_those_of_megatron(measured: list[dict[str, int]]) -> None:
    for case, facts in zip(CASES, measured):
        if not case["state"]:
            found = rank_parameters(shape_of(case), case["tensor"], case["pipeline"], stage_of(case))
            assert found == facts["parameters"], case


def test_activations_and_logits_are_those_of_megatron(measured: list[dict[str, int]]) -> None:
    """The goal is 2 %; what is left here are views and tables of a few bytes."""
    seen = 0
    for case, facts in zip(CASES, measured):
        if "logits" not in facts:
            continue
        layout = Layout(
            tensor=case["tensor"],
            pipeline=case["pipeline"],
            sequence_parallel=case["sequence_parallel"],
            micro_batch=case["micro_batch"],
            recompute=case["recompute"] or "none",
        )
        held = held_activations(shape_of(case), layout, case["length"], stage_of(case), 1)
        assert held == pytest.approx(facts["held"], rel=2e-3), case
        for name, chunk in (("", 0), ("chunked_", CHUNK)):
            for gradient in (True, False):
                sizes = (case["tensor"], case["micro_batch"], case["length"], chunk)
                logits = logits_bytes(shape_of(case), *sizes, gradient=gradient)
                assert logits == pytest.approx(facts[name + ("logits" if gradient else "logprobs")], rel=4e-3), case
        # The tensor parallel ranks' share apart.
        whole = sampling_bytes(shape_of(case), 1, ANSWERS) - 6 * padded_vocabulary(shape_of(case)) * ANSWERS
        assert whole == pytest.approx(facts["sampling"], rel=2e-3), case
        seen += 1
    assert seen == len(PASSES)


def test_weights_gradients_and_optimizer_are_those_of_megatron(measured: list[dict[str, int]]) -> None:
    small = dataclasses.replace(
        CATALOGUE["llama3.1-8b"], layers=2, hidden=128, ffn=256, heads=8, groups=2, head_dim=16, vocabulary=512
    )
    memory = predict_memory(small, Layout(tensor=2, data=32), Workload(reference=False))
    assert measured[-1].keys() == {"weights", "gradients", "optimizer", "written"}
    for part, found in measured[-1].items():
        # Megatron fills its buffers up to a multiple of the ranks.
        predicted = memory.host if part == "written" else getattr(memory, part)
        assert found == pytest.approx(predicted, rel=0.02), part


def test_a_pass_without_gradient_takes_what_is_predicted(measured: list[dict[str, int]]) -> None:
    """Of prompts in generation; log-probs take the same arithmetic."""
    found = [(case, facts["passing"]) for case, facts in zip(CASES, measured) if "passing" in facts]
    assert len(found) == len(PREFILLS)
    for case, most in found:
        layout = Layout(tensor=case["tensor"], pipeline=case["pipeline"], rollout_batch=case["micro_batch"])
        memory = predict_memory(shape_of(case), layout, Workload(prompt_tokens=case["length"]))
        assert most == pytest.approx(memory.prefill, rel=2e-3), case


def test_adapters_keep_no_more_than_predicted(measured: list[dict[str, int]]) -> None:
    """NeMo's adapters on all four matrices of each layer: an upper bound, and not far from it."""
    found = [(case, facts["held"]) for case, facts in zip(CASES, measured) if case["lora"]]
    assert len(found) == len(LORA)
    for case, held in found:
        layout = Layout(tensor=case["tensor"], micro_batch=case["micro_batch"])
        work = Workload(1, 1, 512, case["length"] - 512, lora_dim=case["lora"], lora_targets=ADAPTED)
        predicted = predict_memory(shape_of(case), layout, work).activations
        assert 0.8 * predicted < held <= predicted, case


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_the_published_ones(name: str) -> None:
    assert total_parameters(CATALOGUE[name]) == PUBLISHED[name]


def test_a_hand_worked_gpu() -> None:
    """Llama 3.1 8B at TP 2, DP 4, one sequence at a time, answers 16 at once."""
    work = Workload(prompts=4, rollouts=16)
    memory = predict_memory(CATALOGUE["llama3.1-8b"], Layout(tensor=2, data=4, rollout_batch=16), work)
    count = 4_015_263_744  # (8,030,261,248 - 65 norms of 4,096) / 2 + 65 norms of 4,096
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * count, 4 * count, 3 * count)
    # keys and values of 32 layers, 4 of 8 heads of 128 on this rank, 16 x 1,536 positions, 2 bytes
    assert memory.kv_cache == 2 * 32 * 4 * 128 * 16 * 1536 * 2
    assert memory.logits == 64_128 * 1536 * 22
    assert memory.update == 9 * count + memory.activations + memory.logits
    # of 16 answers a position each: 64,128 rows here of 6 bytes, 128,256 of 28
    assert memory.sampling == 16 * (64_128 * 6 + 128_256 * 28)
    # of 16 prompts of 512 tokens: five hidden states of 4,096, and gate, up and their products, half of 14,336 here
    assert memory.prefill == 2 * 16 * 512 * (5 * 4096 + 4 * 7168) + 4 * 512 * 128
    assert memory.generation == 9 * count + memory.kv_cache + max(memory.sampling, memory.prefill)
    # the reference policy, and a checkpoint on its way
    assert memory.host == 2 * memory.weights + memory.optimizer


def test_what_waits_on_the_host_is_not_on_the_gpu() -> None:
    shape, layout = CATALOGUE["llama3.1-8b"], Layout(tensor=2, data=4)
    here, away = (predict_memory(shape, layout, Workload(offload_optimizer=state)) for state in (False, True))
    assert here.update == away.update
    assert here.scoring - away.scoring == here.generation - away.generation == here.optimizer
    assert away.host - here.host == here.optimizer
    times = [predict_time(shape, layout, Workload(offload_optimizer=state)).optimizer for state in (False, True)]
    # there and back over PCIe: 12 bytes for each of a quarter of this rank's weights
    moved = 2 * here.optimizer / (Hardware().pcie * Hardware().transfer_share)
    assert times[1] - times[0] == pytest.approx(moved, rel=1e-6)


def test_with_adapters_only_they_are_trained() -> None:
    """Llama 3.1 8B at TP 2, DP 4, adapters of 32 dimensions on all four matrices of each layer."""
    shape, layout = CATALOGUE["llama3.1-8b"], Layout(tensor=2, data=4)
    work = Workload(lora_dim=32, lora_targets=ADAPTED)
    whole, adapted = predict_memory(shape, layout, Workload()), predict_memory(shape, layout, work)
    # 4,096 -> 6,144; 4,096 -> 4,096; 4,096 -> 28,672; 14,336 -> 4,096; half of each matrix here
    count = 32 * 32 * (10_240 + 8_192 + 32_768 + 18_432) // 2
    assert adapted.weights - whole.weights == 2 * count
    assert (adapted.gradients, adapted.optimizer) == (4 * count, 3 * count)
    assert adapted.activations - whole.activations == 2 * 1536 * 32 * 4 * 32
    # The base is the reference. What is written is an export at most; a checkpoint has the adapters alone.
    assert adapted.host == adapted.weights
    times = [predict_time(shape, layout, one) for one in (Workload(), work)]
    assert times[1].update < times[0].update and times[1].communication < times[0].communication
    odd = make_plan(shape, layout, Workload(lora_dim=5))
    assert any("adapters of 5 dimensions" in problem for problem in odd.problems)


def test_packed_sequences_take_the_time_of_their_own_tokens() -> None:
    shape, layout = CATALOGUE["llama3.1-8b"], Layout(tensor=2, data=4)
    padded, packed, unknown = Workload(), Workload(packed=True, mean_response_tokens=256), Workload(packed=True)
    times = [predict_time(shape, layout, work) for work in (padded, packed, unknown)]
    assert times[2] == times[0]
    # half of 512 + 1,024 tokens: less than half of the time, since scores go by the square
    assert 0.45 < times[1].update / times[0].update < 0.5
    assert 0.45 < times[1].communication / times[0].communication < 0.6
    assert times[1].decode == times[0].decode, "a batch is generated until its longest answer has ended"
    assert predict_memory(shape, layout, packed) == predict_memory(shape, layout, padded)
    gemma = make_plan(CATALOGUE["gemma2-2b"], Layout(data=8), packed)
    assert any("Gemma 2 takes no packed" in problem for problem in gemma.problems)


def test_logits_in_chunks_take_what_a_chunk_does() -> None:
    """Llama 3.1 8B at TP 2: 64,128 rows, hidden states of 4,096; 1,536 tokens, 1,024 at once."""
    shape, layout = CATALOGUE["llama3.1-8b"], Layout(tensor=2, data=4)
    memory = predict_memory(shape, layout, Workload(logits_chunk=1024))
    # hidden states' gradient; a chunk's bfloat16, and the product for the weight's
    assert memory.logits == 2 * 1536 * 4096 + 64_128 * (2 * 1024 + 2 * 4096)
    assert memory.logits < predict_memory(shape, layout, Workload()).logits / 3
    longer = [predict_memory(shape, layout, Workload(logits_chunk=1024, response_tokens=size)) for size in (1024, 8192)]
    assert longer[1].logits - longer[0].logits == 2 * 7168 * 4096


def test_operations_follow_the_rule_of_two_for_each_parameter_and_token() -> None:
    shape = CATALOGUE["llama3.1-8b"]
    table = shape.vocabulary * shape.hidden  # the embedding is looked up, not multiplied
    expected = 2 * (total_parameters(shape) - table) * 1000
    assert forward_flops(shape, 1000, 1) == pytest.approx(expected, rel=1e-3)
    longer = forward_flops(shape, 1, 4096) - 4096 * forward_flops(shape, 1, 1)
    assert longer == pytest.approx(2 * shape.layers * shape.query_width * 4096**2, rel=1e-3)


LAYOUTS = st.builds(
    Layout,
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2, 4]),
    data=st.sampled_from([1, 2, 8]),
    micro_batch=st.sampled_from([1, 2, 4]),
    logprob_micro_batch=st.sampled_from([1, 4]),
    rollout_batch=st.sampled_from([8, 64]),
    recompute=st.sampled_from(["none", "full"]),
)


@settings(deadline=None)
@given(LAYOUTS, st.sampled_from(["megatron", "trt_llm"]), st.sampled_from(["llama3.1-8b", "qwen2.5-7b"]))
def test_more_of_what_costs_memory_never_costs_less(layout: Layout, engine: str, name: str) -> None:
    shape, work = CATALOGUE[name], Workload(engine=engine)
    base = predict_memory(shape, layout, work)
    for field, factor in (("micro_batch", 2), ("logprob_micro_batch", 2), ("rollout_batch", 2)):
        more = predict_memory(shape, dataclasses.replace(layout, **{field: factor * getattr(layout, field)}), work)
        assert more.update >= base.update and more.generation >= base.generation and more.scoring >= base.scoring
    longer = predict_memory(shape, layout, dataclasses.replace(work, response_tokens=2048))
    assert longer.peak > base.peak
    split = predict_memory(shape, dataclasses.replace(layout, tensor=2 * layout.tensor), work)
    assert split.peak < base.peak
    assert predict_memory(shape, layout, dataclasses.replace(work, logits_chunk=256)).logits <= base.logits


@settings(deadline=None)
@given(LAYOUTS, st.sampled_from(["llama3.1-8b", "qwen2.5-7b"]))
def test_stages_and_ranks_hold_the_whole_model(layout: Layout, name: str) -> None:
    shape = CATALOGUE[name]
    held = sum(rank_parameters(shape, layout.tensor, layout.pipeline, stage) for stage in range(layout.pipeline))
    norms = (2 * shape.layers + 1) * shape.hidden
    assert layout.tensor * (held - norms) + norms == total_parameters(shape)
    whole = kv_cache_bytes(shape, 1, 1, 3, 100)
    assert kv_cache_bytes(shape, layout.tensor, layout.pipeline, 3, 100) * layout.tensor * layout.pipeline == whole


@settings(deadline=None)
@given(LAYOUTS)
def test_more_data_parallel_ranks_make_a_step_shorter(layout: Layout) -> None:
    shape, work = CATALOGUE["llama3.1-8b"], Workload()
    times = [predict_time(shape, dataclasses.replace(layout, data=data), work) for data in (1, 2)]
    assert times[1].update < times[0].update and times[1].decode <= times[0].decode
    assert all(value >= 0 for time in times for value in vars(time).values())


def test_what_fits_is_ranked_by_time_and_is_possible() -> None:
    plans = rank_layouts(CATALOGUE["llama3.1-70b"], 64, Workload())
    assert len(plans) > 5
    assert [entry.time.total for entry in plans] == sorted(entry.time.total for entry in plans)
    for entry in plans:
        assert entry.fits and entry.layout.gpus == 64
        assert entry.memory.peak <= Hardware().memory - Hardware().reserve
    # Weights, gradients and optimizer alone are more than 16 GPUs have.
    assert 18 * PUBLISHED["llama3.1-70b"] > 16 * 70 * GIB
    assert not rank_layouts(CATALOGUE["llama3.1-70b"], 16, Workload())
    with pytest.raises(ConfigError, match="12 GPUs are not whole nodes of 8"):
        rank_layouts(CATALOGUE["llama3.1-8b"], 12, Workload())


@pytest.mark.parametrize(
    ("model", "layout", "work", "words"),
    [
        ("qwen2.5-7b", {"tensor": 8, "data": 1}, {}, "28 heads cannot be split over 8"),
        ("qwen2.5-1.5b", {"tensor": 4, "data": 2}, {}, "2 key-value heads cannot be split over 4"),
        ("llama3.1-8b", {"pipeline": 5}, {}, "32 layers cannot be split into 5"),
        ("llama3.1-8b", {"tensor": 16}, {}, "leaves the node of 8"),
        ("llama3.1-8b", {"data": 3}, {}, "2048 rollouts in 1 updates do not divide over 3"),
        ("llama3.1-8b", {}, {}, "the update needs"),
        ("qwen2.5-1.5b", {"data": 8, "logprob_micro_batch": 32}, {}, "a pass for log-probs needs"),
        ("gemma2-2b", {"pipeline": 2}, {}, "Gemma 2 in pipeline stages"),
        ("llama3.2-1b", {"pipeline": 2}, {"lora_dim": 8}, "adapters on a model with tied embeddings"),
        ("qwen2.5-1.5b", {}, {"engine": "trt_llm"}, "biases of attention (Qwen 2) to TensorRT-LLM"),
        ("llama3.1-8b", {"tensor": 8}, {"engine": "trt_llm"}, "stretched rotations"),
    ],
)
def test_what_rules_a_layout_out_is_said(model: str, layout: dict[str, int], work: dict[str, str], words: str) -> None:
    entry = make_plan(CATALOGUE[model], Layout(**layout), Workload(**work))
    assert not entry.fits and words in "; ".join(entry.problems)


def test_the_engine_needs_room_of_its_own() -> None:
    shape, layout = CATALOGUE["llama2-7b"], Layout(tensor=2, data=4)
    own = predict_memory(shape, layout, Workload())
    engine = predict_memory(shape, layout, Workload(engine="trt_llm"))
    unloaded = predict_memory(shape, layout, Workload(engine="trt_llm", engine_resident=False))
    assert engine.engine == 2 * rank_parameters(shape, 2, 1, 0)
    assert engine.update == own.update + engine.engine + engine.kv_cache and unloaded.update == own.update
    staged = dataclasses.replace(layout, pipeline=2, data=2)
    folded = make_plan(shape, staged, Workload(engine="trt_llm", reshard=True))
    # Each rank's engine has all stages, and takes them from a copy that was gathered.
    assert folded.memory.engine == 2 * engine.engine and folded.fits


RECIPES = {"qwen2.5-1.5b": 1, "qwen2.5-7b": 1, "llama3.1-8b": 1, "llama3.1-70b": 4, "llama3.1-70b-lora": 1}
"""Recipe -> fewest nodes of eight H100 80 GB."""


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name in ("base.nemo", "train.parquet", "reward.json"):
        (tmp_path / name).write_text("")
    keys = {
        "run_dir": "run",
        "pretrained_checkpoint.restore_from_path": "base.nemo",
        "data.train": "train.parquet",
        "reward.endpoint_file": "reward.json",
    }
    return [f"{key}={tmp_path / name}" for key, name in keys.items()]


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in (CONFIG_DIR / "recipes").glob("*")} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_load_and_fit_up_to_64_gpus(recipe: str, files: list[str]) -> None:
    for nodes in (count for count in (1, 2, 4, 8) if count >= RECIPES[recipe]):
        config = load_train_config(compose("train", [f"+recipes={recipe}", *files, f"trainer.num_nodes={nodes}"]))
        entry = plan_config(config, CATALOGUE[recipe.removesuffix("-lora")])
        assert entry.fits, (nodes, entry.problems)
        assert entry.layout.gpus == 8 * nodes
        assert (config.loop.prompts_per_step, config.loop.rollouts_per_prompt) == (256, 8)
    assert compose("train", [f"+recipes={recipe}"]).trainer.num_nodes == RECIPES[recipe]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("trainer.devices=3", "3 is not a multiple"),
        ("trainer.precision=32", "trainer.precision=32"),
        ("model.peft.peft_scheme=ia3", "peft_scheme='ia3'"),
        ("model.peft={peft_scheme:lora,lora_tuning:{adapter_dim:8,target_modules:[mlp_fc3]}}", "mlp_fc3"),
        ("model.activations_checkpoint_granularity=full", "activations_checkpoint_method=None"),
    ],
)
def test_configurations_that_the_arithmetic_does_not_cover_are_refused(
    change: str, words: str, files: list[str]
) -> None:
    config = load_train_config(compose("train", ["+recipes=llama3.1-8b", *files, change]))
    with pytest.raises(ConfigError, match=words):
        plan_config(config, CATALOGUE["llama3.1-8b"])


def test_the_tool_ranks_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--model", "llama3.1-70b", "--nodes", "8", "--top", "3"])
    shown = capsys.readouterr().out
    for word in ("weights", "gradients", "optimizer", "activations", "kv cache", "decode", "total"):
        assert word in shown
    plan.main(["--recipe", "llama3.1-70b-lora"])
    assert "weights" in capsys.readouterr().out
    packed = ["--recipe", "llama3.1-70b-lora", "actor.sequence_packing=true"]
    plan.main(packed)
    assert "--answer-tokens" in capsys.readouterr().out
    plan.main([*packed, "--answer-tokens", "200", "--json"])
    assert json.loads(capsys.readouterr().out)[0]["time"]["update"] > 0
    plan.main(["--model", "llama3.1-70b", "--nodes", "8", "--json", "rollout.max_new_tokens=512"])
    plans = json.loads(capsys.readouterr().out)
    assert len(plans) == 10
    totals = [entry["time"]["total"] for entry in plans]
    assert totals == sorted(totals) and plans[0]["layout"]["tensor"] == 8


def test_the_tool_reads_models_from_files(tmp_path: Path, tiny_nemo: Path) -> None:
    shape = CATALOGUE["qwen2.5-1.5b"]
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": True,
    }
    assert from_huggingface(config) == shape
    section = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4}
    assert from_nemo({**section, "huggingface": {"config": {"vocab_size": 300}}}).vocabulary == 300
    with pytest.raises(ConfigError, match="how many rows"):
        from_nemo(section)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan.read_shape(str(tmp_path)) == plan.read_shape(str(tmp_path / "config.json")) == shape
    tiny = plan.read_shape(str(tiny_nemo))
    assert (tiny.layers, tiny.hidden, tiny.groups, tiny.vocabulary % 8) == (2, 64, 2, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "llama3.1-70b", "--nodes", "2"], "no layout of llama3.1-70b fits on 16 GPUs"),
        (["--model", "nowhere"], "--model nowhere: neither a name"),
        (["--recipe", "llama3.1-8b", "rollout.temprature=1"], "rollout.temprature"),
        (["--recipe", "llama3.1-8b", "rollout.backend=trt_llm"], "does not fit: NeMo 2.2 does not export"),
        (["--recipe", "llama3.1-8b", "--answer-tokens", "200"], "actor.sequence_packing=true"),
        (["--recipe", "llama3.1-70b", "trainer.num_nodes=2"], "does not fit: the update needs"),
    ],
)
def test_the_tool_ends_with_what_is_wrong(arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        plan.main(arguments)
    assert words in str(stopped.value)

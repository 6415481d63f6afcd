"""The policy's rollouts, loss and gradients do not depend on micro batch, tensor, pipeline or data parallelism."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from warm_start import Starter

LAYOUTS = {"tensor": (2, 2, 1), "sequence": (2, 2, 1), "pipeline": (2, 1, 2), "data": (2, 1, 1)}
"""Ranks, tensor and pipeline parallel size."""
CHANGES = {"sequence": ["sequence_parallel=true"]}
LORA = ("peft.peft_scheme=lora", "peft.lora_tuning.target_modules=[all]", "optim.lr=0.01")
ADAPTED = {"trained": "sequence", "tensor": "tensor", "pipeline": "pipeline", "evaluated": "single"}
"""Starts with adapters, in order, and their layouts."""


@pytest.fixture(scope="module")
def start(starter: Starter, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Run layout_worker.py in one of LAYOUTS, or on a single rank."""
    logs = tmp_path_factory.mktemp("logs")

    def start(nemo: Path, out: Path, layout: str, sizes: str, *changes: str) -> None:
        ranks, tensor, pipeline = LAYOUTS.get(layout, (1, 1, 1))
        arguments = [str(nemo), str(out), str(tensor), str(pipeline), sizes, *CHANGES.get(layout, []), *changes]
        log = logs / f"{len(list(logs.iterdir()))}.log"
        log.touch()
        started = starter(arguments, log, ranks=ranks, entry="actor.layout_worker")
        assert started.wait() == [0] * ranks, started.text

    return start


@pytest.fixture(scope="module")
def results(start: Callable[..., None], tiny_nemo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory per layout."""
    root = tmp_path_factory.mktemp("layouts")
    for name in ("single", *LAYOUTS):
        (root / name).mkdir()
        start(tiny_nemo, root / name, name, "1,2,3,8" if name == "single" else "2")
    return root


@pytest.mark.slow
def test_a_non_finite_loss_stops_before_the_optimizer(results: Path) -> None:
    assert json.loads((results / "single" / "metrics.json").read_text())["non_finite"]["refused"]


@pytest.mark.slow
def test_the_update_by_row_advantages_has_the_gradient_of_a_pair_loss(results: Path) -> None:
    """DPO through the update of the actor, which knows no pairs, against its loss in one piece."""
    assert json.loads((results / "single" / "metrics.json").read_text())["pairs"]["distance"] < 1e-5


@pytest.mark.slow
def test_a_chosen_tag_is_trained_on_and_a_prefilled_one_is_not(results: Path) -> None:
    """By the gradient of the whole model: mode explang's own choices and those that it is made to follow."""
    found = json.loads((results / "single" / "metrics.json").read_text())["tag"]
    assert found["chosen"] < 1e-5 and found["forced"] < 1e-5
    assert found["each other"] > 0.1


@pytest.mark.slow
def test_greedy_rollouts_are_hugging_faces_own(results: Path, tiny_nemo: Path) -> None:
    """Generation with NeMo's key-value cache, on converted weights, against transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_nemo.with_suffix(".hf"))
    found = load_file(results / "single" / "rollouts.safetensors")["greedy"]
    for row, prompt_length in ((0, 6), (4, 9)):
        prompt = torch.arange(30, 30 + prompt_length)[None]
        expected = model.generate(prompt, do_sample=False, max_new_tokens=12, pad_token_id=2, attention_mask=prompt > 0)
        assert found[row, : expected.size(1)].tolist() == expected[0].tolist()


def gradients(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Relative 1e-5 of each tensor's own norm, in fp32."""
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        difference = (found[name] - reference).norm() / reference.norm().clamp(min=1e-12)
        assert difference <= 1e-5, f"{name}: {difference:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1", "3", "8"])
def test_gradients_do_not_depend_on_the_micro_batch(results: Path, size: str) -> None:
    expected = gradients(results / "single" / "gradients_2.safetensors")
    assert all(tensor.norm() > 0 for tensor in expected.values())
    assert_same_gradients(gradients(results / "single" / f"gradients_{size}.safetensors"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_gradients_do_not_depend_on_the_layout(results: Path, layout: str) -> None:
    expected = gradients(results / "single" / "gradients_2.safetensors")
    assert_same_gradients(gradients(results / layout / "gradients_2.safetensors"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_loss_and_gradient_norm_do_not_depend_on_the_layout(results: Path, layout: str) -> None:
    expected = json.loads((results / "single" / "metrics.json").read_text())["2"]
    found = json.loads((results / layout / "metrics.json").read_text())["2"]
    for name in ("loss", "policy_loss", "kl_loss", "kl", "ratio", "surprisal", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    # Seven samples in use; their response tokens, end token included.
    assert found["tokens"] == expected["tokens"] == (9 + 14 + 20 + 11 - 4 * 4) + (20 + 17 + 13 - 3 * 7)


@pytest.mark.slow
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_rollouts_do_not_depend_on_the_layout(results: Path, layout: str) -> None:
    expected = load_file(results / "single" / "rollouts.safetensors")
    found = load_file(results / layout / "rollouts.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
def test_rollouts_of_one_question_differ_by_slot_and_greedy_ones_do_not(results: Path) -> None:
    rollouts = load_file(results / "single" / "rollouts.safetensors")
    first = rollouts["tokens"][:4].tolist()
    assert len({tuple(row) for row in first}) == 4
    assert len({tuple(row) for row in rollouts["greedy"][:4].tolist()}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["single", *sorted(LAYOUTS)])
def test_gradients_are_those_of_whole_logits(results: Path, layout: str) -> None:
    """Vocabulary-parallel log-probs in chunks of seven tokens against NeMo-Aligner's from a micro batch's logits."""
    expected = gradients(results / layout / "gradients_plain.safetensors")
    assert_same_gradients(gradients(results / layout / "gradients_2.safetensors"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["single", *sorted(LAYOUTS)])
def test_gradients_of_packed_sequences_are_those_of_padded_ones(results: Path, layout: str) -> None:
    """Megatron's own packing, with rotations by sequence; one after the other in what two padded ones would take."""
    expected = gradients(results / "single" / "gradients_2.safetensors")
    assert_same_gradients(gradients(results / layout / "gradients_packed.safetensors"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["single", *sorted(LAYOUTS)])
def test_logprobs_are_those_of_whole_logits(results: Path, layout: str) -> None:
    found = load_file(results / layout / "logprobs.safetensors")
    expected = load_file(results / "single" / "logprobs.safetensors")["plain"][found["rows"]]
    for name in ("chunked", "plain", "packed"):
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["single", *sorted(LAYOUTS)])
def test_no_rank_ever_has_more_than_a_chunk_of_logits(results: Path, layout: str) -> None:
    found = json.loads((results / layout / "metrics.json").read_text())["logits of"]
    # Three answers at once, one position of each; the draw needs the shares of all tensor-parallel ranks.
    assert found.pop("generation") == 3 * LAYOUTS.get(layout, (1, 1))[1]
    assert found.pop("plain") == 2 * (22 if layout == "sequence" else 21)
    assert set(found.values()) == {7}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fact",
    [
        "reference is the initial policy",
        "policy is back",
        "policy has moved",
        "away during generation",
        "back when saved",
        "saved as they are",
    ],
)
def test_reference_and_optimizer_wait_on_the_host(results: Path, fact: str) -> None:
    """Bit by bit; the optimizer's states without a byte of device memory while answers are generated."""
    assert json.loads((results / "single" / "metrics.json").read_text())["moved"][fact]


@pytest.fixture(scope="module")
def adapted(start: Callable[..., None], tiny_nemo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA, trained with tensor and sequence parallelism; its checkpoint then goes on in other layouts."""
    out = tmp_path_factory.mktemp("lora")
    for name, layout in ADAPTED.items():
        start(tiny_nemo, out, layout, name, *LORA)
    return out


@pytest.mark.slow
def test_adapters_that_are_off_are_the_reference(adapted: Path) -> None:
    """LoRA: the base is trained not at all and copied nowhere; its frozen output layer takes part in chunks as well."""
    facts = json.loads((adapted / "metrics.json").read_text())
    assert [fact for fact, holds in facts.items() if not holds] == []
    assert len(facts) == 14


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ADAPTED if name != "trained"])
def test_adapters_go_on_from_a_checkpoint_of_another_layout(adapted: Path, name: str) -> None:
    """`evaluated`: as nemo_lrpo.evaluate has a checkpoint, without an optimizer."""
    expected = load_file(adapted / "trained" / "results.safetensors")
    found = load_file(adapted / name / "results.safetensors")
    torch.testing.assert_close(found["logprobs"], expected["logprobs"], rtol=0, atol=2e-5)
    assert torch.equal(found["answers"], expected["answers"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensor", "pipeline"])
def test_gradients_of_adapters_do_not_depend_on_the_layout(adapted: Path, name: str) -> None:
    expected = gradients(adapted / "trained" / "gradients.safetensors")
    assert len(expected) == 8 and all(tensor.norm() > 0 for tensor in expected.values())
    assert_same_gradients(gradients(adapted / name / "gradients.safetensors"), expected)


@pytest.mark.slow
def test_an_export_has_the_adapters_in_its_weights(adapted: Path, tmp_path: Path) -> None:
    """The .nemo is a model like the base: our converter reads it, and transformers finds the policy's log-probs."""
    from transformers import AutoModelForCausalLM

    from tools.nemo_to_hf import convert

    convert(adapted / "trained" / "model.nemo", tmp_path / "hf")
    found = load_file(adapted / "trained" / "results.safetensors")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(found["tokens"]).logits[:, :-1]
    expected = (logits / 0.7).log_softmax(-1).gather(2, found["tokens"][:, 1:, None]).squeeze(2)
    torch.testing.assert_close(found["logprobs"], expected, rtol=0, atol=5e-5)


@pytest.mark.slow
def test_log_probs_of_continuations_are_hugging_faces_own_in_every_layout(results: Path, tiny_nemo: Path) -> None:
    """At the temperature of the policy, 0.7."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_nemo.with_suffix(".hf"))
    single = load_file(results / "single" / "continuations.safetensors")
    with torch.no_grad():
        logprobs = (model(single["rows"]).logits / 0.7).log_softmax(dim=-1).double()
    for row, (prompt, length) in enumerate(((4, 9), (4, 14), (4, 20), (4, 11), (7, 20))):
        expected = sum(logprobs[row, t - 1, single["rows"][row, t]] for t in range(prompt, length))
        assert single["logprobs"][row].item() == pytest.approx(expected.item(), rel=1e-5), row
    for layout in LAYOUTS:
        found = load_file(results / layout / "continuations.safetensors")["logprobs"]
        torch.testing.assert_close(found, single["logprobs"], rtol=1e-5, atol=0.0)

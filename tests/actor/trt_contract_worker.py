"""TensorRTEngine against NeMo-Aligner's own engine class: the names and signatures that it relies on, and its calls.

TensorRT-LLM needs a GPU; what stands in for it here is an object with the interface that the checks below find in the
installed nemo_aligner, and that records how it is used.
"""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace

from nemo_lrpo.actor.platform import ensure_platform

ensure_platform()

import torch  # noqa: E402
from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import MegatronGPTReinforceActorModel  # noqa: E402
from nemo_aligner.utils.trt_llm import GPTGenerateTRTLLM  # noqa: E402

from nemo_lrpo.actor.generation import TensorRTEngine  # noqa: E402
from nemo_lrpo.config.training import RolloutConfig, TensorRTConfig  # noqa: E402


class RecordedEngine:
    """The part of GPTGenerateTRTLLM that an engine's user sees."""

    def __init__(self) -> None:
        self.rng_generator = torch.Generator(device="cpu")
        self.settings = {"temperature": 0.8, "top_k": 0}
        self.sampling_config = SimpleNamespace(update=lambda **changes: self.settings.update(changes))
        self.calls: list[dict] = []

    def generate(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        tokens, lengths = inputs
        draw = torch.randint(0, 2**32, (len(tokens),), generator=self.rng_generator).tolist()
        self.calls.append({"settings": dict(self.settings), "draw": draw})
        return {"response_tokens": tokens, "response_lengths": lengths + 2}


def main() -> None:
    generate = inspect.signature(GPTGenerateTRTLLM.generate)
    source = inspect.getsource(GPTGenerateTRTLLM)
    facts = {
        "generate": list(generate.parameters),
        "keys": [key for key in ("response_tokens", "response_lengths") if f'"{key}"' in source],
        "attributes": [name for name in ("rng_generator", "sampling_config") if f"self.{name} =" in source],
        "updates": "self.sampling_config.update(" in source,
        "prepare": "self.trtllm_generate.refit(self.model)"
        in inspect.getsource(MegatronGPTReinforceActorModel.prepare_for_inference),
        "release": "self.trtllm_generate.free()" in inspect.getsource(MegatronGPTReinforceActorModel.finish_inference),
    }
    recorded = RecordedEngine()
    rollout = RolloutConfig(backend="trt_llm", temperature=0.8, max_new_tokens=4, trt_llm=TensorRTConfig())
    engine = TensorRTEngine(SimpleNamespace(trtllm_generate=recorded), rollout)
    tokens, lengths = torch.arange(14).view(2, 7), torch.tensor([3, 2])
    for seeds, temperature in (([1, 2], None), ([1, 2], None), ([3, 4], None), ([1, 2], 0.0)):
        generated = engine.generate(tokens, lengths, seeds, temperature)
    facts["calls"] = recorded.calls
    facts["after"] = recorded.settings
    facts["lengths"] = generated.lengths.tolist()
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

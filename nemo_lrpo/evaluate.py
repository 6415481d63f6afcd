"""Answer a file of questions with a policy and score the answers, in all and by language.

    python -m nemo_lrpo.evaluate pretrained_checkpoint.restore_from_path=model.nemo evaluation.data=test.parquet \\
        evaluation.out=results/test.json reward.endpoint_file=reward.json

Each question is answered once, in its own language. `--help` prints the whole configuration.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import hydra
from omegaconf import DictConfig

from nemo_lrpo.config.loader import CONFIG_DIR, load_evaluate_config
from nemo_lrpo.config.schema import EvaluateConfig
from nemo_lrpo.train import exit_readably


def run(config: EvaluateConfig) -> dict[str, float]:
    """Evaluate; writes `evaluation.out` and the answers beside it. Returns the metrics."""
    from nemo_lrpo.actor.platform import ensure_platform

    ensure_platform()
    from nemo_lrpo.actor.actor import MegatronActor
    from nemo_lrpo.actor.setup import build_policy, check_nemo_sections
    from nemo_lrpo.actor.tokenizer import open_tokenizer
    from nemo_lrpo.actor.watchdog import Watchdog
    from nemo_lrpo.data.prompts import PromptRenderer
    from nemo_lrpo.data.reader import read_prompts
    from nemo_lrpo.serving.client import RewardClient
    from nemo_lrpo.training.evaluation import evaluate
    from nemo_lrpo.training.metrics import sample_record

    check_nemo_sections(config)
    evaluation = config.evaluation
    prompts = read_prompts(evaluation.data, config.data.languages)
    prompts = prompts[: evaluation.limit] if evaluation.limit else prompts
    renderer = PromptRenderer(open_tokenizer(config.pretrained_checkpoint.restore_from_path), config.prompt)
    prompts = renderer.fitting(prompts, config.data.languages)
    with closing(RewardClient(config.reward)) as rewards:
        rewards.check_server(config.data.languages)
        policy = build_policy(config, total_updates=1, resume_from=None, training=False)
        with Watchdog(config.loop.progress_timeout_s, "Nothing was written.") as watchdog:
            actor = MegatronActor(policy, config, on_progress=watchdog.beat)
            result = evaluate(
                actor,
                rewards,
                renderer,
                prompts,
                seed=config.seed,
                temperature=evaluation.temperature,
                max_missing_share=config.reward.max_missing_share,
            )
    if actor.is_main:
        out = Path(evaluation.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        texts = actor.decode(result.rollouts, range(len(prompts)))
        records = [
            sample_record(routed, text, bool(ended), result.scores.get(routed.sample_id), None)
            for routed, text, ended in zip(result.plan, texts, result.rollouts.ended.tolist(), strict=True)
        ]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        _write(out.with_suffix(".jsonl"), lines)
        summary = {"model": config.pretrained_checkpoint.restore_from_path, "data": evaluation.data}
        _write(out, json.dumps({**summary, "metrics": result.metrics}, ensure_ascii=False, indent=1))
        mean = result.metrics.get("reward", float("nan"))
        print(f"{len(prompts)} answers, mean reward {mean:.4f}; {out}", flush=True)
    return result.metrics


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@hydra.main(version_base=None, config_path=str(CONFIG_DIR), config_name="evaluate")
def main(tree: DictConfig) -> None:
    """Entry point."""
    with exit_readably():
        run(load_evaluate_config(tree))


if __name__ == "__main__":
    main()

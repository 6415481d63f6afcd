"""Traces as a batch of supervised training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_lrpo.types import Example


def collate(examples: Sequence[Example], end: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """A batch as GPTSFTModel reads it: tokens, labels, position_ids int64 [B, S], loss_mask float32 [B, S].

    Label t is token t + 1; the mask is 1 where that is one of the response. S: of the longest, as a multiple of
    `multiple`; shorter rows end in `end` tokens outside of the mask.
    """
    length = max(len(one.prompt) + len(one.response) for one in examples) - 1
    length += -length % multiple
    ids = torch.full((len(examples), length + 1), end, dtype=torch.int64)
    mask = torch.zeros(len(examples), length)
    for row, one in enumerate(examples):
        whole = one.prompt + one.response
        ids[row, : len(whole)] = torch.tensor(whole)
        mask[row, len(one.prompt) - 1 : len(whole) - 1] = 1.0
    positions = torch.arange(length).expand(len(examples), -1).contiguous()
    return {
        "tokens": ids[:, :-1].contiguous(),
        "labels": ids[:, 1:].contiguous(),
        "loss_mask": mask,
        "position_ids": positions,
    }

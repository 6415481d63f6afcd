"""What of a trace supervised training learns, by hand."""

from __future__ import annotations

import pytest

from nemo_lrpo.actor.collation import collate
from nemo_lrpo.types import Example

END = 9
EXAMPLES = [Example((1, 2, 3), (4, 5, END)), Example((6,), (7, END))]


@pytest.mark.parametrize("multiple", [1, 4])
def test_the_loss_is_on_the_response_and_its_end_alone(multiple: int) -> None:
    """A label is the next token. The last token of the prompt learns the response's first; nothing behind the end
    token, which also fills up, is learnt."""
    batch = collate(EXAMPLES, END, multiple)
    assert {name: part.shape[1] for name, part in batch.items()} == dict.fromkeys(batch, 5 if multiple == 1 else 8)
    rows = {name: part[:, :5].tolist() for name, part in batch.items()}
    assert rows["tokens"] == [[1, 2, 3, 4, 5], [6, 7, END, END, END]]
    assert rows["labels"] == [[2, 3, 4, 5, END], [7, END, END, END, END]]
    assert rows["loss_mask"] == [[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert rows["position_ids"] == [[0, 1, 2, 3, 4]] * 2
    assert not batch["loss_mask"][:, 5:].any() and (batch["tokens"][:, 6:] == END).all()

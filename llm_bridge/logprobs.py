"""log pi(token_j | token_<j) of a Hugging Face causal language model, aligned with the tokens.

One convention everywhere: entry j of a (row, time) array speaks about *token j itself*, so `log_prob`, `mask`,
rewards per token and `token` have the same shape and need no off-by-one. The first token of a sequence is predicted
by nothing; its log-probability is 0.

A batch is padded (one trajectory a row, `attention_mask` says which tokens are real, on either side) or packed
(several trajectories a row, `segment` says which; -1 is padding). Packed trajectories do not see each other: the
attention mask is block-diagonal and positions restart.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vcposim.errors import InputError


class HasTokens(Protocol):
    """What `token_log_prob` reads; any batch with these attributes will do (the last two may be absent)."""

    @property
    def token(self) -> Tensor:
        """Token ids: (row, time)."""


@dataclass(frozen=True)
class TokenBatch:
    """Token ids (row, time), the mask of the policy's own tokens, and which tokens are real or whose they are."""

    token: Tensor
    mask: Tensor
    attention_mask: Tensor | None = None
    segment: Tensor | None = None


def token_log_prob(model: nn.Module, batch: HasTokens) -> Tensor:
    """log pi(token_j | token_<j), at least float32; 0 where nothing predicts the token: (row, time).

    Raises InputError when the batch is both packed and padded, or its arrays disagree in shape.
    """
    return log_prob_of(next_token_logits(model, batch), batch.token, getattr(batch, "segment", None))


def next_token_logits(model: nn.Module, batch: HasTokens, first: int = 0) -> Tensor:
    """Logits from column `first` on: (row, columns, V); entry j is the distribution of token j + 1.

    Raises `InputError` for a batch that has both an attention mask and segments.
    """
    token = batch.token
    attention_mask = _field(batch, "attention_mask", token)
    segment = _field(batch, "segment", token)
    if attention_mask is not None and segment is not None:
        raise InputError(
            "batch: both attention_mask and segment are given; mark padding of a packed batch by segment -1"
        )
    if segment is not None:
        dtype = next(model.parameters()).dtype
        position, attention_mask = segment_position(segment), block_diagonal_mask(segment, dtype)
    elif attention_mask is not None:
        position = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    else:
        # Always one row per trajectory: learned positions shared by the batch would sum their gradient over it.
        position = torch.arange(token.shape[1], device=token.device).repeat(token.shape[0], 1)
    kept = {"logits_to_keep": token.shape[1] - first} if first else {}
    output = model(input_ids=token, attention_mask=attention_mask, position_ids=position, use_cache=False, **kept)
    return output.logits


def log_prob_of(logits: Tensor, token: Tensor, segment: Tensor | None = None) -> Tensor:
    """Log-softmax of `logits` (row, time, vocabulary) at the next token, moved onto that token: (row, time).

    The labels are shifted instead of the logits, which would copy the largest array of the whole update.
    """
    ignore = -100
    label = F.pad(token[:, 1:], (0, 1), value=ignore)
    if segment is not None:
        label = label.masked_fill(F.pad(segment[:, 1:] != segment[:, :-1], (0, 1), value=True), ignore)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none", ignore_index=ignore)
    return F.pad(-loss.view_as(token)[:, :-1], (1, 0))


def chunked_log_prob(
    hidden: Tensor, head: nn.Module, token: Tensor, segment: Tensor | None = None, *, chunk: int = 128
) -> Tensor:
    """`log_prob_of(head(hidden), token, segment)` with the logits of only `chunk` time steps alive at a time.

    hidden (row, time, d), what the head reads; head: the module itself, called inside the loss, so that a `ScoreTape`
    sees it (a fused cross-entropy that takes the head's weight instead is refused there by name). The logits are
    computed again in the backward.
    """
    if chunk < 1:
        raise InputError(f"chunk: {chunk} time steps; give at least 1")
    ignore = -100
    label = F.pad(token[:, 1:], (0, 1), value=ignore)
    if segment is not None:
        label = label.masked_fill(F.pad(segment[:, 1:] != segment[:, :-1], (0, 1), value=True), ignore)

    def part(hidden: Tensor, label: Tensor) -> Tensor:
        logits = head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none", ignore_index=ignore)
        return -loss.view_as(label)

    pairs = zip(hidden.split(chunk, 1), label.split(chunk, 1), strict=True)
    parts = [checkpoint(part, h, y, use_reentrant=False) for h, y in pairs]
    return F.pad(torch.cat(parts, 1)[:, :-1], (1, 0))


def segment_of(cu_seqlens: Tensor, length: int | None = None) -> Tensor:
    """Segment ids of one packed row from its cumulative lengths 0, l_1, l_1 + l_2, ...: (m,) -> (1, length).

    Raises `InputError` for lengths beyond the row.

    >>> segment_of(torch.tensor([0, 2, 5]), length=6).tolist()
    [[0, 0, 1, 1, 1, -1]]
    """
    total = int(cu_seqlens[-1])
    length = total if length is None else length
    if total > length:
        raise InputError(f"cu_seqlens: ends at {total}, beyond length {length}; give the packed row's full length")
    segment = torch.full((1, length), -1, dtype=torch.long, device=cu_seqlens.device)
    count = cu_seqlens.diff()
    segment[0, :total] = torch.repeat_interleave(torch.arange(count.numel(), device=count.device), count)
    return segment


def segment_position(segment: Tensor) -> Tensor:
    """Position of each token inside its own run of equal segment ids: (row, time) -> (row, time).

    >>> segment_position(torch.tensor([[0, 0, 1, 1, 1, -1]])).tolist()
    [[0, 1, 0, 1, 2, 0]]
    """
    time = torch.arange(segment.shape[1], device=segment.device).expand_as(segment)
    start = F.pad(segment[:, 1:] != segment[:, :-1], (1, 0), value=True)
    return time - torch.where(start, time, 0).cummax(1).values


def block_diagonal_mask(segment: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask, 0 where a token may look, else the lowest: (row, time) -> (row, 1, time, time)."""
    same = segment[:, :, None] == segment[:, None, :]
    visible = same & torch.ones_like(same[0]).tril()
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def _field(batch: HasTokens, name: str, token: Tensor) -> Tensor | None:
    value = getattr(batch, name, None)
    if value is not None and value.shape != token.shape:
        raise InputError(
            f"batch.{name}: shape {tuple(value.shape)} differs from token's {tuple(token.shape)}; one entry a token"
        )
    return value

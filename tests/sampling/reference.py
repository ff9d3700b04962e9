"""The specification of one draw in numpy float64, written from the definitions alone: the exact distribution of the
next token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Situation:
    """What decides the next token besides the logits.

    Attributes:
        prompt, outputs: token ids so far.
        bad_word_ids: token sequences.
        stop_token_ids: all ids that end the request, EOS included.
    """

    params: SamplingParams
    prompt: tuple[int, ...] = (1, 2, 3)
    outputs: tuple[int, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    stop_token_ids: tuple[int, ...] = ()


def processed_logits(logits: np.ndarray, situation: Situation) -> np.ndarray:
    """Logits float64[V] before temperature; -inf = cannot be sampled."""
    params, outputs = situation.params, list(situation.outputs)
    x = np.array(logits, np.float64)
    if params.allowed_token_ids is not None:
        for token in range(len(x)):
            if token not in params.allowed_token_ids:
                x[token] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    if len(outputs) < params.min_tokens:
        x[list(situation.stop_token_ids)] = -np.inf
    for token in range(len(x)):
        count = outputs.count(token)
        if count or token in situation.prompt:
            if x[token] > 0:
                x[token] /= params.repetition_penalty
            else:
                x[token] *= params.repetition_penalty
        x[token] -= params.frequency_penalty * count
        x[token] -= params.presence_penalty * (1 if count else 0)
    for *prefix, last in situation.bad_word_ids:
        if len(prefix) <= len(outputs) and outputs[len(outputs) - len(prefix) :] == prefix:
            x[last] = -np.inf
    return x


def softmax(x: np.ndarray) -> np.ndarray:
    """Probabilities float64[V]."""
    e = np.exp(x - x.max())
    return e / e.sum()


def filtered(probabilities: np.ndarray, min_p: float, top_k: int, top_p: float) -> tuple[np.ndarray, float]:
    """The renormalised distribution after min_p, top_k and top_p, and how close a decision was.

    The margin is the least relative distance between a quantity and the limit that it was compared to: where it is
    within rounding, float32 may decide otherwise.
    """
    p, margin = np.array(probabilities, np.float64), np.inf
    if min_p > 0:
        ratio = p / p.max()
        margin = min(margin, np.abs(ratio[ratio < 1] / min_p - 1).min(initial=np.inf))
        p = np.where(ratio >= min_p, p, 0)
        p /= p.sum()
    if 0 < top_k < len(p):
        p = np.where(p >= np.sort(p)[-top_k], p, 0)
        p /= p.sum()
    if top_p < 1:
        kept, mass = set(), 0.0
        for value in sorted(set(p[p > 0]), reverse=True):
            margin = min(margin, abs(mass / top_p - 1))
            if mass >= top_p and kept:
                break
            kept |= set(np.flatnonzero(p == value))
            mass += p[p == value].sum()
        p = np.array([value if token in kept else 0.0 for token, value in enumerate(p)])
        p /= p.sum()
    return p, float(margin)


def distribution(logits: np.ndarray, situation: Situation) -> tuple[np.ndarray, float]:
    """Exact probabilities float64[V] of the next token, and the margin of the closest decision (see `filtered`)."""
    params = situation.params
    x = processed_logits(logits, situation)
    if params.is_greedy:
        p = np.zeros(len(x))
        p[int(np.argmax(x))] = 1.0
        return p, np.inf
    return filtered(softmax(x / params.temperature), params.min_p, max(params.top_k, 0), params.top_p)

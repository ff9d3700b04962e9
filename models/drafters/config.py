"""What a head is: its `config.json`, checked against the decoder that it is for. No jax here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from models.config import ModelConfig
from models.errors import UnsupportedModelError
from models.families.common import Defaults, common_config
from models.families.fields import RawConfig, flag, integer, integers, number, optional_integer, table

HEADS = ("medusa", "eagle", "eagle3")
NUM_TAPS = 3  # streams of the target that an EAGLE-3 head reads


@dataclass(frozen=True)
class MedusaConfig:
    """Medusa heads.

    Attributes:
        hidden_size, vocab_size: of the target.
        draft_vocab_size: tokens that the heads know; those of the target unless truncated.
        num_heads: guesses.
        num_layers: residual blocks of each head.
        bias: whether those have one.
        shared_head: one output head for all, instead of one for each.
    """

    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    num_heads: int
    num_layers: int
    bias: bool
    shared_head: bool

    @property
    def maps_vocab(self) -> bool:
        """Whether the heads know some of the tokens only."""
        return self.draft_vocab_size != self.vocab_size


@dataclass(frozen=True)
class EagleConfig:
    """An EAGLE or EAGLE-3 head.

    Attributes:
        decoder: sizes of its layers; `vocab_size` is the target's.
        target_hidden_size: of the target's hidden states.
        draft_vocab_size: tokens that its own output head knows.
        taps: EAGLE-3: after how many of the target's layers the residual stream is read; () for EAGLE, which reads
            hidden states after the final norm.
        fc_bias: whether the projection in front of the layer has one.
        norm_before_residual: EAGLE-3: what the layer adds to is the normed input.
        own_embed, own_head: whether it has an embedding table and an output head, or uses the target's.
    """

    decoder: ModelConfig
    target_hidden_size: int
    draft_vocab_size: int
    taps: tuple[int, ...] = ()
    fc_bias: bool = False
    norm_before_residual: bool = False
    own_embed: bool = False
    own_head: bool = False

    @property
    def is_eagle3(self) -> bool:
        """EAGLE-3, or its older kin."""
        return bool(self.taps)

    @property
    def maps_vocab(self) -> bool:
        """Whether its output head knows some of the tokens only."""
        return self.draft_vocab_size != self.decoder.vocab_size


def medusa_config(raw: RawConfig, target: ModelConfig, *, bias: bool) -> MedusaConfig:
    """Read the config of Medusa heads, in the words of the authors' files or of vLLM's.

    Args:
        raw: `config.json`.
        target: the decoder that they are for.
        bias: whether the checkpoint has biases.

    Raises:
        UnsupportedModelError: a field is missing, out of range or contradicts the target.
    """
    _require_same(raw, "hidden_size", target.hidden_size)
    _require_same(raw, "vocab_size", target.vocab_size)
    _refuse_scale(raw)
    truncated = optional_integer(raw, "truncated_vocab_size") or target.vocab_size
    if truncated > target.vocab_size:
        _contradiction("truncated_vocab_size", truncated, target.vocab_size, "at most vocab_size")
    return MedusaConfig(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        draft_vocab_size=truncated,
        num_heads=_first_of(raw, ("medusa_num_heads", "num_heads")),
        num_layers=_first_of(raw, ("medusa_num_layers", "num_hidden_layers", "num_layers")),
        bias=bias,
        shared_head=flag(raw, "original_lm_head", False),
    )


def eagle_config(raw: RawConfig, target: ModelConfig, kind: str) -> EagleConfig:
    """Read the config of an EAGLE or EAGLE-3 head: plain, wrapped in "model" (vLLM's) or in "transformer_layer_config"
    (speculators).

    Args:
        raw: `config.json`.
        target: the decoder that it is for.
        kind: "eagle" or "eagle3".

    Returns:
        The config as if nothing were in the checkpoint that may be absent.

    Raises:
        UnsupportedModelError: a field is missing, out of range, asks for something that is not supported, or
            contradicts the target.
    """
    from_speculators = raw.get("speculators_model_type")
    if from_speculators is not None and (from_speculators != "eagle3" or kind != "eagle3"):
        raise UnsupportedModelError(
            f"config.json: speculators_model_type is {from_speculators!r}: of the speculators library's heads, "
            'eagle3 is supported, with method "eagle3".'
        )
    _refuse_scale(raw)
    flat: Mapping[str, Any] = {**raw, **table(raw, "model"), **table(raw, "transformer_layer_config")}
    for key in ("norm_before_fc", "add_para_norm", "parallel_drafting"):
        if flag(raw, key, False):
            raise UnsupportedModelError(f"config.json: {key} is true: this kind of head is not supported.")
    decoder = common_config(flat, {}, kind, Defaults())
    bias = flag(flat, "attention_bias", False)
    decoder = replace(
        decoder, qkv_bias=flag(flat, "qkv_bias", bias), o_bias=bias, mlp_bias=flag(flat, "mlp_bias", False)
    )
    if decoder.vocab_size != target.vocab_size:
        _contradiction("vocab_size", decoder.vocab_size, target.vocab_size, "that of the model")
    config = EagleConfig(decoder, target.hidden_size, target.vocab_size)
    return _eagle3(config, raw, target) if kind == "eagle3" else _eagle(config)


def _eagle(config: EagleConfig) -> EagleConfig:
    if config.decoder.hidden_size != config.target_hidden_size:
        _contradiction("hidden_size", config.decoder.hidden_size, config.target_hidden_size, "that of the model")
    return config


def _eagle3(config: EagleConfig, raw: RawConfig, target: ModelConfig) -> EagleConfig:
    if config.decoder.num_layers != 1:
        raise UnsupportedModelError(
            f"config.json: num_hidden_layers is {config.decoder.num_layers}: an EAGLE-3 head has 1."
        )
    # Without the field the head has the target's width, whatever that is: then the two must be the same.
    _require_same(raw, "target_hidden_size", target.hidden_size)
    if raw.get("target_hidden_size") is None and config.decoder.hidden_size != target.hidden_size:
        _contradiction("hidden_size", config.decoder.hidden_size, target.hidden_size, "that of the model")
    draft_vocab_size = integer(raw, "draft_vocab_size", default=target.vocab_size)
    if draft_vocab_size > target.vocab_size:
        _contradiction("draft_vocab_size", draft_vocab_size, target.vocab_size, "at most vocab_size")
    nested = table(raw, "eagle_config")
    if not flag(nested, "use_aux_hidden_state", True):
        raise UnsupportedModelError("config.json: use_aux_hidden_state is false: such EAGLE-3 heads are not supported.")
    ids = "eagle_aux_hidden_state_layer_ids"
    taps = integers(nested, ids) or integers(raw, ids)
    return replace(
        config,
        draft_vocab_size=draft_vocab_size,
        taps=_taps(taps, target.num_layers),
        norm_before_residual=flag(raw, "norm_before_residual", "speculators_model_type" in raw),
    )


def _taps(given: tuple[int, ...] | None, num_layers: int) -> tuple[int, ...]:
    """Those of the config, or the three that the authors' code reads."""
    taps = (2, num_layers // 2, num_layers - 3) if given is None else given
    if len(taps) != NUM_TAPS or list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] <= num_layers:
        source = "the default" if given is None else "config.json"
        raise UnsupportedModelError(
            f"eagle_aux_hidden_state_layer_ids is {list(taps)} ({source}); it must be {NUM_TAPS} numbers of layers, "
            f"ascending, of the {num_layers} that the model has."
        )
    return taps


def _first_of(raw: RawConfig, keys: tuple[str, ...]) -> int:
    for key in keys[:-1]:
        found = optional_integer(raw, key)
        if found is not None:
            return found
    return integer(raw, keys[-1]) if raw.get(keys[-1]) is not None else integer(raw, keys[0])


def _require_same(raw: RawConfig, key: str, of_target: int) -> None:
    found = optional_integer(raw, key)
    if found is not None and found != of_target:
        _contradiction(key, found, of_target, "that of the model")


def _refuse_scale(raw: RawConfig) -> None:
    if number(raw, "logit_scale", default=1.0) != 1.0:
        raise UnsupportedModelError(f"config.json: logit_scale is {raw['logit_scale']!r}: only 1 is supported.")


def _contradiction(key: str, found: int, of_target: int, allowed: str) -> NoReturn:
    raise UnsupportedModelError(
        f"The head does not fit the model: {key} is {found} in the head's config.json, and must be {allowed}, "
        f"{of_target}."
    )

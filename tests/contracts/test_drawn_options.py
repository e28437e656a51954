"""Every option of the model is drawn by `support.configs.configs`, or listed here with the reason why not."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hypothesis import Phase, given, settings
from support.configs import configs

from simple_hierarchical_transformer.config import Config

NOT_DRAWN = {
    'autoencoder_loss_weight': 'a factor of one loss: tests of the definitions of losses use its default',
    'chunk_summarizers': 'modules of a user, which have named cases',
    'dynamic_loss_decay': 'a factor of the weights of rollouts, which has a named case',
    'dynamics_hidden_dim': 'a width inside the dynamics, which has a named case',
    'gradient_checkpointing': 'tests of gradients compare models with and without it',
    'ngram_dropout': 'training draws random numbers',
    'ponder_loss_weight': 'a factor of one loss: tests of the definitions of losses use its default',
    'recon_sample': 'training draws random numbers',
    'rollout_weights': 'its length is that of num_rollouts; it has a named case',
    'use_flash_attn': 'it has no effect',
}


def test_every_option_is_drawn_or_listed() -> None:
    drawn: set[str] = set()

    @given(config=configs())
    @settings(max_examples=300, phases=[Phase.generate])
    def collect(config: dict[str, Any]) -> None:
        drawn.update(config)

    collect()
    options = {field.name for field in fields(Config)}
    assert drawn <= options
    assert options - drawn == NOT_DRAWN.keys()

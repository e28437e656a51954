"""What several tests share: random configurations, and the published package's numbers."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

# before torch reads it: threads of small tensors wait for each other, and test files run side by side
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

# before huggingface_hub reads it: no test may depend on the network
os.environ['HF_HUB_OFFLINE'] = '1'

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.levels import COMPRESSORS
from simple_hierarchical_transformer.mixers.patterns import PATTERNS

ROOT = Path(__file__).parent.parent
GOLDEN = sorted((Path(__file__).parent / 'golden').glob('*.safetensors'))
SEQ_LEN = 48

# the same examples on every machine, and no clock: a busy one must not fail a test
settings.register_profile(
    'suite',
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile('suite')


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Golden(NamedTuple):
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}

    def model(self, **settings: Any) -> HierarchicalTransformer:
        """In float64, with the published weights."""
        model = HierarchicalTransformer(**self.config, **settings).double()
        model.load_state_dict({key: value.double() for key, value in self.under('weights/').items()})
        return model


def load_golden(path: Path) -> Golden:
    with safe_open(path, 'pt') as file:
        return Golden(json.loads(file.metadata()['config']), {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Constructor arguments of a small model, over every option there is."""
    hierarchies = draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3, unique=True))
    count = len(hierarchies)

    strides = [draw(st.sampled_from([s for s in (1, 2, 4, 8) if s <= c])) for c in hierarchies]
    predict_all = draw(st.booleans())
    # one level must say something at each position
    fine = draw(st.integers(0, count - 1))
    arrangement = draw(st.sampled_from(['hourglass', 'parallel']))
    if arrangement == 'hourglass':
        fine = hierarchies.index(min(hierarchies))
    strides[fine] = 1
    if arrangement == 'hourglass':
        order = sorted(range(count), key=hierarchies.__getitem__)
        for finer, coarser in pairwise(order):
            strides[coarser] = max(strides[coarser], strides[finer])

    def each(values: st.SearchStrategy[Any]) -> Any:
        return draw(st.one_of(values, st.tuples(*[values] * count)))

    def either(*settings: dict[str, Any]) -> dict[str, Any]:
        """One group of settings out of several; none half of the time, so that plain models are met too."""
        return draw(st.one_of(st.just({}), st.sampled_from(settings)))

    extra: dict[str, Any] = {}
    if arrangement == 'parallel':
        receivers = draw(st.lists(st.sampled_from(hierarchies), unique=True))
        extra |= either(
            {'merge_into': 'all'}, {'merge_into': (hierarchies[fine], *set(receivers) - {hierarchies[fine]})}
        )
    if arrangement == 'parallel' and max(hierarchies) > 1:
        extra |= either({'autoencoder': True})
    if 'autoencoder' not in extra:
        extra |= {'compressor': each(st.sampled_from(COMPRESSORS))}
    if count > 1:
        extra |= either({'merge': 'linear'}, *({'merge': 'attention', 'merge_window': window} for window in (0, 2)))
        alike = dict(dim=8, dim_head=2, heads=2, ff_mult=1)
        shared = {'share_feed_forward': True, **alike}
        windows = [{'share_attention': True, 'window_sizes': window, **alike} for window in (None, 3, 'auto')]
        extra |= either(shared, *windows, *(shared | window for window in windows))
    if 'share_attention' not in extra:
        # of the mixers those that hear of nothing later, not by rounding either
        extra |= either(
            {'mixer': each(st.sampled_from(['attention', 'gateloop', 'simple-gateloop']))},
            {'mixer_kwargs': {'kv_heads': 1}},
            {'mixer_kwargs': {'qk_norm': True}, 'mixer': 'attention'},
            {
                'mixer_kwargs': {
                    'pattern': draw(st.sampled_from(PATTERNS)),
                    'pattern_mode': draw(st.sampled_from(['interleave', 'union'])),
                    'stride': draw(st.integers(1, 7)),
                },
                'window_sizes': None,
            },
        )
    extra |= either(
        {'residual': 'gru'}, {'ff_chunks': 2}, *([{'reversible': True}] if arrangement == 'parallel' else [])
    )
    if extra.get('mixer_kwargs', {}).get('pattern_mode') != 'interleave':
        extra |= either(
            {'share_layers': True},
            *(
                [{'share_layers': True, 'halting': 'act'}]
                if arrangement == 'parallel' and 'reversible' not in extra
                else []
            ),
        )
    if arrangement == 'hourglass' and 'share_layers' not in extra:
        extra |= {'depth': each(st.integers(1, 3))}
    orders = draw(st.lists(st.integers(2, 6), min_size=1, max_size=3, unique=True))
    rows = draw(st.sampled_from([2, 64]))
    extra |= either(
        {'ngrams': tuple(orders), 'ngram_rows': rows}, {'word_ngrams': (1, 3), 'num_tokens': 256, 'ngram_rows': rows}
    )
    extra |= either(
        {'recall': tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=2, unique=True)))},
        {'word_recall': (1, 2), 'num_tokens': 256},
    )
    extra |= either({'ff_activation': draw(st.sampled_from(['relu2', 'swiglu']))}, {'zero_init': True})
    extra |= either(
        {'prophet_loss_weight': each(st.sampled_from([0.0, 0.2]))},
        {
            'quantized_loss_weight': each(st.sampled_from([0.0, 0.2])),
            'quantize_from': draw(st.sampled_from(['compressed', 'output'])),
            'quantizer_codebooks': draw(st.integers(1, 2)),
            'quantizer_codebook_size': 5,
            'quantizer_dim': 3,
        },
    )

    return (
        dict(
            num_tokens=11,
            dim=each(st.sampled_from([4, 7, 8])),
            depth=draw(st.integers(1, 2)),
            seq_len=SEQ_LEN,
            dim_head=each(st.sampled_from([2, 4])),
            heads=each(st.integers(1, 2)),
            ff_mult=each(st.sampled_from([1, 2.5])),
            hierarchies=tuple(hierarchies),
            hierarchical_stride=tuple(strides),
            window_sizes=each(st.sampled_from([None, 0, 1, 3, 6, 'auto'])),
            hierarchy_merge_all=arrangement == 'parallel' and 'merge_into' not in extra and draw(st.booleans()),
            predict_hierarchy=hierarchies[fine],
            predict_use_all_hierarchy=predict_all,
            recon_loss_weight=draw(st.sampled_from([0.0, 0.1])),
            next_latent_loss_weight=each(st.sampled_from([0.0, 0.25])),
            next_latent_loss_type=draw(st.sampled_from(['mse_and_cosine_sim', 'mse', 'smooth_l1'])),
            num_rollouts=draw(st.integers(1, 3)),
            dynamic_rollout_loss_weight=draw(st.booleans()),
            detach_summaries=draw(st.booleans()),
            dynamics_num_layers=draw(st.integers(1, 3)),
            ignore_index=draw(st.sampled_from([0, -1])),
            recon_ignore_index=draw(st.sampled_from([0, -1])),
            attn_backend=draw(st.sampled_from(['auto', 'local-attention'])),
            arrangement=arrangement,
        )
        | extra
    )


def build(config: dict[str, Any], seed: int = 0) -> HierarchicalTransformer:
    """A float64 model in which nothing is left at the zeros and ones it starts with."""
    torch.manual_seed(seed)
    # modules among the arguments are this model's own
    model = HierarchicalTransformer(**deepcopy(config)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def loss_of_a_copy(model: HierarchicalTransformer, steps: int) -> Tensor:
    """The last loss of a model of 8 ids that learns to say the first of 22 again: farther off than a fine window."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids = torch.randint(1, 8, (32, 22))
        ids[:, -1] = ids[:, 0]
        labels = torch.zeros_like(ids)
        labels[:, -2] = ids[:, -1]
        loss, _ = model(ids, return_loss=True, labels=labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss


def run_command(*args: object, module: str | None = None) -> list[str]:
    """train.py, or a module, as a user runs it."""
    return [sys.executable, *(('-m', module) if module else (str(ROOT / 'train.py'),)), *map(str, args)]


def run(*args: object, module: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        run_command(*args, module=module),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, **env},
    )


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What train.py says before it ends, given arguments that it does not take; in this process, which is quicker."""
    monkeypatch.syspath_prepend(ROOT)
    train = importlib.import_module('train')

    def ended(*args: object) -> str:
        said = io.StringIO()
        with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(said):
            train.main(list(map(str, args)))
        # argparse writes and ends with a number, the script ends with what it has to say
        assert end.value.code not in (None, 0)
        return f'{said.getvalue()}{end.value.code}'

    return ended


@pytest.fixture
def train_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """train.py in this process, which is quicker."""
    monkeypatch.syspath_prepend(ROOT)
    train = importlib.import_module('train')
    return lambda *args: train.main(list(map(str, args)))


@pytest.fixture(scope='session')
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of a small grammar: well below a bit per byte once learnt, four and more before."""
    draw = random.Random(0)
    words = [('the', 'a'), ('old', 'young', 'wise'), ('king', 'queen', 'fox'), ('sees', 'hears'), ('us', 'you')]
    folder = tmp_path_factory.mktemp('corpus')
    folder.chmod(0o755)
    path = folder / 'text.txt'
    path.write_text(' '.join(' '.join(map(draw.choice, words)) + '.' for _ in range(4000)))
    return path

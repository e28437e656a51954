"""What models were before the code was rebuilt: keys, shapes, seeded initial weights, logits, losses and gradients.

`snapshot.json` holds a few numbers for every named case and for random configurations. It was written by
`python tests/contracts/test_snapshot.py` and is not written again: a number that differs is a change that users see.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from contracts.cases import BASE, CASES, words

from simple_hierarchical_transformer import HierarchicalTransformer

SNAPSHOT = Path(__file__).parent / 'snapshot.json'
LENGTH = 40
# of a sum of weights, relative to the sum of their sizes: machines round the seeded draws differently
WEIGHTS_TOLERANCE = 1e-6
TOLERANCE = 1e-6


def checksums(tensors: Iterable[Tensor]) -> list[float]:
    """Of several tensors: the sum of sizes, and a sum that depends on the order of elements and tensors."""
    flat = torch.cat([torch.zeros(1, dtype=torch.float64), *(t.detach().double().flatten() for t in tensors)])
    return [flat.abs().sum().item(), (flat * torch.arange(len(flat)).double().cos()).sum().item()]


def listing(named: dict[str, Tensor]) -> str:
    """A hash of names, shapes and dtypes, in their order."""
    lines = [f'{name} {tuple(t.shape)} {t.dtype}' for name, t in named.items()]
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:12]


def observe(config: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a model of this configuration."""
    config = deepcopy(config)
    torch.manual_seed(0)
    for module in (each for value in config.values() if isinstance(value, tuple) for each in value):
        # weights of modules that were made when the cases were imported
        for part in module.modules() if isinstance(module, torch.nn.Module) else ():
            if isinstance(part, torch.nn.Linear):
                part.reset_parameters()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = HierarchicalTransformer(**config)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        parts.setdefault(name.partition('.')[0], {})[name] = tensor
    weights = {part: [len(named), listing(named), *checksums(named.values())] for part, named in parts.items()}
    # how many numbers were drawn
    drawn = torch.rand(()).item()

    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, dtype=torch.float64))
    ids = words(2, LENGTH) % config['num_tokens']
    torch.manual_seed(1)
    # FlexAttention trains on CUDA alone
    trains = config.get('attn_backend') != 'flex'
    with torch.set_grad_enabled(trains):
        loss, losses = model(ids, return_loss=True)
    if trains:
        loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norms = [g.coalesce().values().norm() if g.is_sparse else g.norm() for g in grads]
    norm = torch.stack(norms).norm().item() if norms else 0.0
    counts = model.count_targets(ids).tolist()
    with torch.no_grad():
        logits = checksums([model.eval()(ids)])
    return dict(
        weights=weights,
        drawn=drawn,
        parameters=listing(dict(model.named_parameters())),
        loss=loss.item(),
        losses={name: value.item() for name, value in losses.named.items()},
        loss_weights={name: float(value) for name, value in model.loss_weights.items()},
        counts=counts,
        grads=len(grads),
        norm=norm,
        logits=logits,
    )


def compare(name: str, now: Any, then: Any) -> None:
    assert now.keys() == then.keys()
    assert now['weights'].keys() == then['weights'].keys(), name
    for part, (count, keys, size, total) in then['weights'].items():
        got = now['weights'][part]
        assert (got[0], got[1]) == (count, keys), f'{name}: keys or shapes of {part}'
        for value, expected in zip(got[2:], (size, total), strict=True):
            assert abs(value - expected) <= WEIGHTS_TOLERANCE * size, f'{name}: initial weights of {part}'
    for field in ('parameters', 'loss_weights', 'counts', 'grads'):
        assert now[field] == then[field], f'{name}: {field}'
    for field in ('drawn', 'loss', 'losses', 'norm', 'logits'):
        assert now[field] == pytest.approx(then[field], rel=TOLERANCE, abs=1e-9), f'{name}: {field}'


SAVED: dict[str, Any] = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.exists() else {'cases': {}, 'random': []}


def test_snapshot_has_every_case() -> None:
    """New cases need no snapshot, but none may vanish."""
    assert CASES.keys() >= SAVED['cases'].keys()
    assert len(SAVED['random']) >= 60


@pytest.mark.parametrize('name', SAVED['cases'])
def test_case_is_as_it_was(name: str) -> None:
    compare(name, observe(BASE | CASES[name]), SAVED['cases'][name])


@pytest.mark.parametrize('index', range(len(SAVED['random'])))
def test_random_configuration_is_as_it_was(index: int) -> None:
    config, then = SAVED['random'][index]
    compare(f'configuration {index}', observe(config), then)


def write() -> None:
    from conftest import configs
    from hypothesis import HealthCheck, Phase, given, settings

    drawn: list[dict[str, Any]] = []

    @settings(max_examples=80, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(config=configs())
    def collect(config: dict[str, Any]) -> None:
        if json.loads(json.dumps(config)) not in drawn:
            drawn.append(json.loads(json.dumps(config)))

    collect()
    cases = {name: observe(BASE | config) for name, config in CASES.items()}
    lines = ['{"cases": {']
    lines.append(',\n'.join(f'{json.dumps(name)}: {json.dumps(found)}' for name, found in cases.items()))
    lines.append('}, "random": [')
    lines.append(',\n'.join(json.dumps([config, observe(config)]) for config in drawn))
    lines.append(']}')
    SNAPSHOT.write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    write()

"""Placed levels under compilers, transforms, copies, files, hooks and adapters; rules of users."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.configs import SMALL, build, in_chunks
from support.graphs import GraphCounter
from support.kinds import loss_of
from torch import Tensor, nn
from torch.export import Dim, export
from torch.func import functional_call, grad, vmap

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.boundaries import Boundaries, Marks

BASE: dict[str, Any] = dict(
    SMALL, num_tokens=256, seq_len=128, arrangement='hourglass', hierarchies=(1, 4), depth=(2, 1),
    window_sizes=(6, None), ignore_index=-1, recon_ignore_index=-1,
)  # fmt: skip
NESTED: dict[str, Any] = dict(BASE, hierarchies=(1, 4, 16), depth=(2, 2, 1), window_sizes=(6, 5, None))
KINDS: dict[str, dict[str, Any]] = {
    'words': dict(NESTED, boundaries=(None, 'words', 'sentences'), upsample='offset', downsample='attention'),
    'learned': dict(
        NESTED, boundaries=(None, 'learned', 'every'), upsample=('repeat', 'smooth', 'repeat'), merge='skip'
    ),
    'surprise': dict(BASE, boundaries=(None, 'surprise'), upsample='boundary', merge='attention'),
}
every_kind = pytest.mark.parametrize('kind', KINDS)


def texts(rows: int, n: int) -> Tensor:
    return torch.tensor(list(b'ab A .'))[torch.randint(0, 6, (rows, n))]


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=32)
def test_compiled_models_give_the_same_numbers_with_few_graphs() -> None:
    """The number of tokens depends on the text, and is padded to one of a few sizes under a compiler."""
    two = dict(BASE, boundaries=(None, 'words'), depth=1, recon_loss_weight=0.0, next_latent_loss_weight=0.0)
    model, graphs = build(dict(two, upsample='offset', downsample='attention')), GraphCounter()
    compiled = torch.compile(model, backend=graphs, dynamic=True)
    counts = []
    for share in (0.0, 0.3, 1.0):
        for _ in range(2):
            ids = torch.where(torch.rand(2, 64) < share, torch.tensor([32, 97]).repeat(32), 98)
            expected = model(ids, return_loss=True)[0]
            torch.testing.assert_close(compiled(ids, return_loss=True)[0], expected, rtol=1e-9, atol=1e-9)
        counts.append(graphs.count)
    wanted = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(compiled(ids, return_loss=True)[0], wanted)
    torch.testing.assert_close(ours, torch.autograd.grad(model(ids, return_loss=True)[0], wanted), rtol=1e-7, atol=1e-9)
    seen = graphs.count
    for share in (0.05, 0.6, 0.9):
        ids = torch.where(torch.rand(2, 64) < share, torch.tensor([32, 97]).repeat(32), 98)
        torch.testing.assert_close(compiled(ids, return_loss=True)[0], model(ids, return_loss=True)[0])
    # shares that lie between those of before need no new graph
    assert graphs.count <= seen + 4, counts


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('kind', ['words', 'learned'])
def test_an_exported_model_takes_any_length(kind: str) -> None:
    # a scan is exported for one range of lengths
    model = build(dict(BASE, depth=1, boundaries=(None, kind), upsample='offset', downsample='attention')).eval()
    exported = export(model, (texts(2, 90),), dynamic_shapes={'ids': {1: Dim.AUTO}}).module()
    for n in (9, 31, 64, 127):
        for ids in (texts(2, n), torch.full((2, n), 97), torch.tensor([32, 97]).repeat(64)[:n].expand(2, -1)):
            torch.testing.assert_close(exported(ids), model(ids), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('kind', ['words', 'learned', 'surprise'])
def test_vmap_gives_the_gradients_of_each_sample(kind: str) -> None:
    # in training mode, where calls move thresholds otherwise
    model, samples = build(KINDS[kind]).train(), torch.stack([texts(2, 21) for _ in range(3)])
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
        return functional_call(model, weights, (ids, True), tie_weights=False)[0]

    each = vmap(grad(loss), (None, 0))({name: p.detach() for name, p in weights.items()}, samples)
    for i, ids in enumerate(samples):
        expected = torch.autograd.grad(model.eval()(ids, return_loss=True)[0], weights.values())
        for name, right in zip(weights, expected, strict=True):
            torch.testing.assert_close(each[name][i], right, rtol=1e-8, atol=1e-9)


@every_kind
def test_recomputed_layers_change_no_gradient(kind: str) -> None:
    plain, again = build(KINDS[kind]), build(dict(KINDS[kind], gradient_checkpointing=True, ff_chunks=2))
    ids = texts(3, 40)
    for chunked in (False, True):
        found = []
        for model in (plain, again):
            state = model(ids[:, :9], return_state=True)[1] if chunked else None
            loss = model(ids[:, 9:], return_loss=True, state=state, return_state=chunked)[0]
            found.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize('train', [False, True])
@every_kind
def test_models_run_on_the_meta_device(kind: str, train: bool) -> None:
    with torch.device('meta'):
        model = HierarchicalTransformer(**KINDS[kind]).train(train)
        loss, _ = model(torch.zeros(2, 64, dtype=torch.long), return_loss=True)
        with torch.no_grad():
            model(torch.zeros(2, 64, dtype=torch.long))
        _, state = model(torch.zeros(2, 64, dtype=torch.long), return_state=True)
        model(torch.zeros(2, 3, dtype=torch.long), state=state, return_state=True)
    loss.backward()
    assert model.to_logits.weight.grad.device.type == 'meta'


@torch.no_grad()
@every_kind
def test_models_are_copied_pickled_and_saved(kind: str, tmp_path: Path) -> None:
    model, ids = build(KINDS[kind]).float().eval(), texts(2, 50)
    expected, count = model(ids), model.inspect(ids).pieces[1].lengths
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['boundaries'] == list(KINDS[kind]['boundaries'])
    loaded = HierarchicalTransformer.from_pretrained(tmp_path)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other(ids), expected)
        assert torch.equal(other.inspect(ids).pieces[1].lengths, count)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert 'boundaries' in repr(model)


class Repeats(Boundaries):
    """A boundary where an id is that of three tokens before. The probability is learned from four vectors."""

    reach = 3

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_p = nn.Linear(4 * dim, 1)
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor, ids: Tensor, index: Tensor) -> Marks:
        self.seen.append((x.shape, ids.shape, index.shape))
        p = self.to_p(x.unfold(1, 4, 1).flatten(2))[..., 0].sigmoid()
        return Marks((ids[:, 3:] == ids[:, :-3]) | (p > 0.6), p)


class Counted(nn.Module):
    """A rule that is no `Boundaries`, and returns its marks alone."""

    reads_tokens = False

    def forward(self, x: Tensor, ids: Tensor, index: Tensor) -> Tensor:
        assert x.shape[1] == index.shape[1]
        return (ids[:, 1:] == 32) | (index % 5 == 2)


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize(
    'rules', [(None, Repeats(8)), (None, Counted()), (None, Repeats(8), Counted()), (None, 'learned', Repeats(8))]
)
def test_rules_of_users_place_tokens(rules: Any, grad: bool) -> None:
    """In one pass, in chunks, and with text that repeats; a rule sees the tokens before the chunk."""
    config = dict(BASE if len(rules) == 2 else NESTED, boundaries=rules)
    ways = tuple('repeat' if rule is None or isinstance(rule, Counted) else 'smooth' for rule in rules)
    model, ids = build(dict(config, upsample=ways)), texts(3, 60)
    with torch.set_grad_enabled(grad):
        whole = model(ids)
        for splits in ([1], [2, 1, 7], [30, 1]):
            chunked, _ = in_chunks(model, ids, splits)
            torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-10)
    assert torch.equal(
        model.generate(ids[:, :7], 20, temperature=0), model.generate(ids[:, :7], 20, temperature=0, use_cache=False)
    )
    loss_of(model, ids).backward()
    for rule in model.boundaries.values():
        if isinstance(rule, Repeats):
            assert rule.to_p.weight.grad.any()
            assert all(x[1] == each[1] == index[1] + 3 for x, each, index in rule.seen)
    changed = ids.clone()
    changed[:, 40] = 99
    torch.testing.assert_close(model(changed)[:, :40], model(ids)[:, :40], rtol=0, atol=1e-12)


def test_a_module_as_a_rule_is_not_saved(tmp_path: Path) -> None:
    model = HierarchicalTransformer(**dict(BASE, boundaries=(None, Counted())))
    with pytest.raises(ValueError, match='boundaries cannot be written to config'):
        model.save_pretrained(tmp_path)


def test_hooks_on_routers_and_resamplers_take_effect() -> None:
    config = dict(BASE, boundaries=(None, 'learned'), downsample='attention', upsample='offset')
    ids = texts(2, 40)
    for name in ('boundaries.1', 'boundaries.1.to_q', 'downsamplers.1', 'downsamplers.1.to_values', 'upsamplers.1',
                 'upsamplers.1.to_offsets'):  # fmt: skip
        for grad_on in (False, True):
            model = build(config)
            with torch.set_grad_enabled(grad_on):
                before, (chunked, _) = model(ids), in_chunks(model, ids, [7, 1])

                def change(module: nn.Module, args: Any, out: Any) -> Any:
                    if isinstance(out, Marks):
                        return Marks(~out.boundary, out.probability)
                    return (1.5 * out[0], *out[1:]) if isinstance(out, tuple) else out.flip(-1)

                model.get_submodule(name).register_forward_hook(change)
                after, (again, _) = model(ids), in_chunks(model, ids, [7, 1])
            assert not torch.allclose(before, after), name
            torch.testing.assert_close(before, chunked, rtol=0, atol=1e-10)
            torch.testing.assert_close(after, again, rtol=0, atol=1e-10)


def test_a_replaced_rule_takes_effect() -> None:
    model, ids = build(dict(BASE, boundaries=(None, 'words'))), texts(2, 40)
    before = model(ids)
    model.boundaries['1'] = Counted()
    after = model(ids)
    assert not torch.allclose(before, after)
    expected = (ids == 32) | (torch.arange(40) % 5 == 2)
    expected[:, 0] = True
    assert torch.equal(model.inspect(ids).pieces[1].boundary, expected)
    torch.testing.assert_close(in_chunks(model, ids, [1, 9])[0], after, rtol=0, atol=1e-10)


def test_a_state_of_another_rule_is_refused() -> None:
    model, other = build(dict(BASE, boundaries=(None, 'words'))), build(dict(BASE, boundaries=(None, 'sentences')))
    plain = build(dict(BASE, hierarchical_stride=(1, 4)))
    _, state = model(texts(2, 9), return_state=True)
    for each in (other, plain, build(dict(BASE, boundaries=(None, 'words'), upsample='offset'))):
        with pytest.raises(ValueError, match='state is of another model'):
            each(texts(2, 9), state=state, return_state=True)


def test_building_a_placed_model_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for config in KINDS.values():
            HierarchicalTransformer(**config)

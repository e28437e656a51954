"""Every way to compress, arrange and merge levels, and to train them: the contracts, and what each says it does."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SEQ_LEN, Golden, build, loss_of_a_copy
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from vector_quantize_pytorch import RandomProjectionQuantizer as PublishedQuantizer

from simple_hierarchical_transformer import HierarchicalTransformer, LossParts
from simple_hierarchical_transformer import model as model_module
from simple_hierarchical_transformer.block import GRUGate
from simple_hierarchical_transformer.compressors import Compressor
from simple_hierarchical_transformer.halting import AdaptiveHalting
from simple_hierarchical_transformer.levels import Level
from simple_hierarchical_transformer.merges.attention import AttentionMerge
from simple_hierarchical_transformer.merges.concat import ConcatMerge
from simple_hierarchical_transformer.objectives import base as losses
from simple_hierarchical_transformer.objectives.quantized import RandomProjectionQuantizer
from simple_hierarchical_transformer.ops.coupling import run_plainly
from simple_hierarchical_transformer.training.cost import bytes_kept, level_of

BASE: dict[str, Any] = dict(
    num_tokens=11,
    dim=(8, 12, 8),
    depth=2,
    seq_len=SEQ_LEN,
    dim_head=4,
    heads=(2, 1, 2),
    ff_mult=2,
    hierarchies=(1, 8, 4),
    hierarchical_stride=(1, 4, 2),
    window_sizes=(3, None, 2),
    ignore_index=-1,
    recon_ignore_index=-1,
)


class Newest(nn.Module):
    """A compressor from outside, that takes channels of the oldest and the newest token in a window."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(2 * dim, 12)

    def forward(self, windows: Tensor) -> Tensor:
        return self.proj(torch.cat((windows[:, 0], windows[:, -1]), dim=-1))


OPTIONS: dict[str, dict[str, Any]] = {
    'prophet': dict(prophet_loss_weight=(0.1, 0.2, 0.3)),
    'quantized compressed': dict(quantized_loss_weight=0.1, quantizer_codebook_size=7, quantizer_dim=4),
    'quantized output': dict(
        quantized_loss_weight=(0.0, 0.1, 0.2), quantize_from='output', quantizer_codebooks=2, quantizer_codebook_size=7
    ),
    'merge into all': dict(merge_into='all'),
    'merge into two': dict(merge_into=(8, 1)),
    'merge by attention': dict(merge='attention'),
    'merge by attention over the last': dict(merge='attention', merge_window=3, merge_into='all'),
    'linear merge': dict(merge='linear'),
    'linear merge into all': dict(merge='linear', merge_into='all'),
    'shared attention': dict(share_attention=True, heads=2),
    'shared feed-forward': dict(share_feed_forward=True),
    'attention compressor': dict(compressor='attention'),
    'mean compressor': dict(compressor='mean'),
    'linear compressor': dict(compressor='linear'),
    'a compressor a level': dict(compressor=('conv', 'attention', 'mean')),
    'own compressor': dict(compressor=('conv', Newest(12), 'conv')),
    'autoencoder': dict(autoencoder=True),
    'autoencoder, strides out of order': dict(autoencoder=True, hierarchical_stride=(1, 2, 4)),
    'hourglass': dict(arrangement='hourglass', depth=3),
    'hourglass as published': dict(arrangement='hourglass', hierarchical_stride=(1, 8, 4)),
    'hourglass by attention': dict(
        arrangement='hourglass', merge='attention', merge_window=2, compressor='attention',
        predict_use_all_hierarchy=True,
    ),
    'hourglass of coarse levels': dict(
        arrangement='hourglass', hierarchies=(2, 8, 4), hierarchical_stride=(1, 4, 1), compressor='linear'
    ),
    'hourglass of other depths': dict(arrangement='hourglass', depth=(1, 3, 2), merge='linear'),
    'n-grams': dict(ngrams=(2, 5, 3), ngram_rows=64),
    'n-grams of an hourglass': dict(ngrams=(4,), ngram_rows=2, arrangement='hourglass'),
    'words': dict(word_ngrams=(2, 1), num_tokens=256, ngram_rows=64),
    'words recalled': dict(word_recall=(2, 1), recall=(3,), num_tokens=256),
    'recall': dict(recall=(3, 1)),
    'recall and n-grams of an hourglass': dict(recall=(2,), ngrams=(3,), ngram_rows=64, arrangement='hourglass'),
    'normed queries and keys': dict(mixer_kwargs=dict(qk_norm=True)),
    'squared ReLU': dict(ff_activation='relu2'),
    'SwiGLU': dict(ff_activation='swiglu', ff_chunks=2),
    'windows of half': dict(window_sizes='auto'),
    'gated residuals': dict(residual='gru'),
    'feed-forward in pieces': dict(ff_chunks=3),
    'reversible': dict(reversible=True, depth=3, merge_into='all', ff_chunks=2),
    'reversible of shared layers': dict(reversible=True, share_layers=True, merge='attention', share_feed_forward=True),
    'shared layers': dict(share_layers=True, depth=3, merge='attention'),
    'shared layers that halt': dict(share_layers=True, depth=4, halting='act', merge_into='all'),
}  # fmt: skip
options = pytest.mark.parametrize('option', OPTIONS.values(), ids=OPTIONS)


def apart(option: dict[str, Any]) -> int:
    """Of the ids that are drawn: of bytes, some are letters."""
    return 23 if option.get('num_tokens') == 256 else 1


@options
def test_causal_to_the_bit(option: dict[str, Any]) -> None:
    by = apart(option)
    model, ids = build({**BASE, **option}), by * torch.randint(0, 11, (2, SEQ_LEN))
    with torch.no_grad():
        before, tokens_before = model(ids, return_logits_and_embeds=True)
        for at in (0, 1, 7, 8, 9, 30, SEQ_LEN - 1):
            changed = ids.clone()
            changed[:, at] = (ids[:, at] + by) % (11 * by)
            after, tokens_after = model(changed, return_logits_and_embeds=True)
            assert torch.equal(before[:, :at], after[:, :at])
            assert not torch.equal(before[:, at], after[:, at])
            for x, y, level in zip(tokens_before, tokens_after, model.levels, strict=True):
                assert torch.equal(x[:, : level.length(at)], y[:, : level.length(at)])


@options
@pytest.mark.parametrize('grad', [False, True])
def test_chunks_equal_one_pass(option: dict[str, Any], grad: bool) -> None:
    model, ids = build({**BASE, **option}), apart(option) * torch.randint(0, 11, (2, SEQ_LEN))
    with torch.set_grad_enabled(grad):
        whole, tokens = model(ids, return_logits_and_embeds=True)
        for sizes in ([1] * SEQ_LEN, [3, 1, 7, 8, 2, 27], [13, 35]):
            state, outs = None, []
            for chunk in ids.split(sizes, dim=1):
                *out, state = model(chunk, return_logits_and_embeds=True, return_state=True, state=state)
                outs.append(out)
            logits, levels = zip(*outs, strict=True)
            torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0, atol=1e-10)
            for each, x in zip(zip(*levels, strict=True), tokens, strict=True):
                torch.testing.assert_close(torch.cat(each, dim=1), x, rtol=0, atol=1e-10)


@options
def test_learns_one_batch_in_all_parts(option: dict[str, Any]) -> None:
    """Every part of the loss falls, every weight has a gradient, and recomputing layers changes none of it."""
    config = {**BASE, **option}
    # what is reversible computes layers again by itself
    checkpointing = not config.get('reversible', False)
    model, again = build(config).float(), build({**config, 'gradient_checkpointing': checkpointing}).float()
    ids = torch.randint(0, 11, (2, 25))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    history = []
    for step in range(25):
        loss, parts = model(ids, return_loss=True)
        loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        if step == 0:
            again(ids, return_loss=True)[0].backward()
            for p, q in zip(model.parameters(), again.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: part.item() for name, part in parts.named.items()})
    for name in [name for name in history[0] if not name.startswith(('next_latent', 'ponder'))]:
        assert history[-1][name] < 0.9 * history[0][name], name


@options
def test_generates_the_same_with_and_without_a_state(option: dict[str, Any]) -> None:
    model, prompt = build({**BASE, **option}), torch.randint(0, 11, (2, 5))
    new = model.generate(prompt, 20, temperature=0)
    assert torch.equal(new, model.generate(prompt, 20, temperature=0, use_cache=False))


@pytest.mark.parametrize(
    'option',
    [
        dict(OPTIONS['hourglass by attention'], prophet_loss_weight=0.1),
        dict(merge_into='all', compressor='attention'),
        dict(autoencoder=True, share_feed_forward=True, quantized_loss_weight=0.1),
    ],
    ids=str,
)
def test_compiles_and_runs_in_half_precision(option: dict[str, Any]) -> None:
    model, ids = build({**BASE, 'depth': 1, **option}), torch.randint(0, 11, (2, 25))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    (loss, parts), (same, _) = compiled(ids, return_loss=True), model(ids, return_loss=True)
    assert isinstance(parts, LossParts)
    wanted = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), torch.autograd.grad(same, wanted))

    model = model.float()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, parts = model(ids, return_loss=True)
    loss.backward()
    for part in parts.named.values():
        assert part.dtype == torch.float32
    torch.testing.assert_close(loss.double(), same, rtol=0.03, atol=0.03)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize('option', ['merge by attention over the last', 'hourglass', 'autoencoder'])
def test_hears_of_what_the_fine_window_cannot_see(option: str) -> None:
    """The first id comes again at the end: a copy over a distance that only coarse levels reach."""
    torch.manual_seed(0)
    small = dict(num_tokens=8, dim=24, depth=2, seq_len=24, dim_head=12, heads=2, window_sizes=(1, None))
    levels = dict(hierarchies=(1, 4), hierarchical_stride=(1, 4), recon_loss_weight=0.0, next_latent_loss_weight=0.0)
    model = HierarchicalTransformer(**{**OPTIONS[option], **small, **levels})
    assert loss_of_a_copy(model, steps=100) < 0.5 < torch.tensor(7.0).log()


# compressing


def a_level(compression: int, stride: int, compressor: str, dim: int = 6) -> Level:
    return Level(compression, stride, dim, 4, 2, 2, None, 0.0, compressor=compressor)


@given(
    c=st.sampled_from([2, 4, 8]), s=st.sampled_from([1, 2, 4, 8]), dilation=st.sampled_from([1, 2]),
    n=st.integers(1, 30), dim=st.sampled_from([5, 6]),
)  # fmt: skip
def test_compressors_written_out(c: int, s: int, dilation: int, n: int, dim: int) -> None:
    s = min(s, c)
    x = torch.randn(2, n, dim, dtype=torch.float64)

    def window(j: int) -> list[Tensor | None]:
        at = [j * s - (c - 1 - k) * dilation for k in range(c)]
        return [x[:, i] if i >= 0 else None for i in at]

    def build_one(kind: str, **settings: Any) -> Compressor:
        made = Compressor(a_level(c, s, kind), dim_in=dim, dilation=dilation, **settings).double()
        for parameter in made.parameters():
            nn.init.normal_(parameter)
        return made

    zero = torch.zeros(2, dim, dtype=torch.float64)
    linear, mean, attention = (build_one(kind) for kind in ('linear', 'mean', 'attention'))
    own = build_one('module', module=nn.Sequential(nn.Flatten(1), nn.Linear(c * dim, 6)))
    made = {pool: pool(x)[0] for pool in (linear, mean, attention, own)}
    for j in range(-(-n // s)):
        tokens = [zero if token is None else token for token in window(j)]

        weight = linear.compress_fn.proj.weight.unflatten(1, (dim, c))
        torch.testing.assert_close(made[linear][:, j], sum(t @ weight[:, :, k].T for k, t in enumerate(tokens)))

        average = sum(tokens) / c
        torch.testing.assert_close(made[mean][:, j], average @ mean.compress_fn.proj.weight.T if dim != 6 else average)

        pool, heads = attention.compress_fn, []
        for h in range(2):
            scores, values = [], []
            for k, token in enumerate(window(j)):
                if token is not None:
                    scores.append(token @ pool.to_scores.weight[h] + pool.place_bias[h, k])
                    values.append(token @ pool.to_values.weight[4 * h : 4 * h + 4].T)
            share = torch.stack(scores).softmax(0)
            heads.append((share[..., None] * torch.stack(values)).sum(0))
        torch.testing.assert_close(made[attention][:, j], torch.cat(heads, -1) @ pool.to_out.weight.T)

        torch.testing.assert_close(made[own][:, j], own.compress_fn.module[1](torch.cat(tokens, dim=-1)))


@given(n=st.integers(1, 24), strides=st.sampled_from([(1, 2, 2), (1, 2, 8), (1, 1, 4), (1, 2, 1)]))
def test_autoencoder_written_out(n: int, strides: tuple[int, ...]) -> None:
    config = dict(BASE, dim=6, hierarchies=(1, 2, 8), hierarchical_stride=strides, autoencoder=True)
    config |= dict(recon_loss_weight=0.0, next_latent_loss_weight=0.0)
    model, ids = build(config), torch.randint(0, 11, (2, n))
    encode = {2: model.autoencoder.encoders['1'].proj.weight, 8: model.autoencoder.encoders['2'].proj.weight}
    embeds = model.token_emb(ids)

    def at(c: int, position: int) -> Tensor:
        """The map of compression c at a position."""
        if position < 0:
            return torch.zeros(2, 6, dtype=torch.float64)
        if c == 1:
            return embeds[:, position]
        finer, taps = (1, 2) if c == 2 else (2, 4)
        weight = encode[c].unflatten(1, (6, taps))
        return F.silu(sum(at(finer, position - (taps - 1 - k) * finer) @ weight[:, :, k].T for k in range(taps)))

    tokens = model(ids, return_hierarchical_token_embeds=True)
    for x, level, norm in zip(tokens, model.levels, model.post_token_emb_norms, strict=True):
        assert x.shape[1] == level.length(n)
        for j in range(x.shape[1]):
            torch.testing.assert_close(x[:, j], norm(at(level.compression, j * level.stride)))

    # every eighth token of the coarsest map gives back the eight ids that it has seen
    _, parts = model(ids, labels=ids, return_loss=True)
    coarse, fine = model.autoencoder.decoders['2'], model.autoencoder.decoders['1']
    missed = []
    for end in range(0, n, 8):
        x = F.silu(coarse(at(8, end))).chunk(4, dim=-1)
        x = [part for each in x for part in F.silu(fine(each)).chunk(2, dim=-1)]
        for k, part in enumerate(x):
            if end - 7 + k >= 0:
                said = model.autoencoder.to_ids(part).log_softmax(-1)
                missed.append(-said.gather(1, ids[:, end - 7 + k, None])[:, 0])
    torch.testing.assert_close(parts.named['autoencoder'], torch.cat(missed).mean())


def test_a_compressor_of_the_wrong_shape_is_named() -> None:
    model = HierarchicalTransformer(**{**BASE, 'compressor': ('conv', nn.Identity(), 'conv')})
    with pytest.raises(
        ValueError, match=r'compressor must return shape \(6, 12\) for an input \(6, 8, 12\), got \(6, 8, 12\)'
    ):
        model(torch.zeros(2, 9, dtype=torch.long))


# arranging


@pytest.mark.parametrize('strides', [(1, 2, 4), (1, 4, 8), (1, 1, 1)])
@pytest.mark.parametrize(('depth', 'merge'), [(1, 'concat'), (2, 'concat'), (3, 'concat'), (2, 'attention')])
def test_hourglass_written_out(strides: tuple[int, ...], depth: int, merge: str) -> None:
    dims, compressions = (8, 12, 6), (1, 4, 8)
    model = build(
        dict(BASE, dim=dims, depth=depth, hierarchies=compressions, hierarchical_stride=strides, heads=1,
             arrangement='hourglass', merge=merge, merge_window=2 * (merge == 'attention'))
    )  # fmt: skip
    n = 29
    ids = torch.randint(0, 11, (2, n))

    def inside(j: int, finer: Tensor) -> Tensor:
        x = finer
        if j > 0:
            # the finer level's tokens that stand for the c positions up to here
            taps, tokens = compressions[j] // compressions[j - 1], []
            pool = model.compressors[j].compress_fn
            for position in range(0, n, strides[j]):
                at = [position - (taps - 1 - k) * compressions[j - 1] for k in range(taps)]
                window = [finer[:, i // strides[j - 1]] if i >= 0 else torch.zeros_like(finer[:, 0]) for i in at]
                hidden = F.silu(F.conv1d(torch.stack(window, -1), pool[1].conv.weight, pool[1].conv.bias))
                tokens.append(F.conv1d(hidden, pool[3].weight, pool[3].bias)[:, :, 0])
            x = torch.stack(tokens, dim=1)
        x = model.post_token_emb_norms[j](x)
        blocks = [layer[j] for layer in model.layers]
        half = depth // 2 if j < 2 else depth
        for block in blocks[:half]:
            x = block(x)[0]
        if j < 2:
            inner, net = inside(j + 1, x), model.hierarchical_merges[j]
            if merge == 'concat':
                back = [inner[:, i * strides[j] // strides[j + 1]] for i in range(x.shape[1])]
                x = x + net.net(torch.cat((x, torch.stack(back, 1)), dim=-1))
            else:
                apart = (1, strides[j + 1] // strides[j])
                x = x + torch.stack([attended(net, (x, inner), apart, 0, i) for i in range(x.shape[1])], dim=1)
        for block in blocks[half:]:
            x = block(x)[0]
        return x

    expected = model.to_logits(model.norms[0](inside(0, model.token_emb(ids))))
    torch.testing.assert_close(model(ids), expected)


def test_attention_is_shared_by_levels_that_are_alike() -> None:
    config = dict(BASE, dim=(8, 8, 8), heads=2, window_sizes=(3, None, 2))
    shared, apart = build(dict(config, share_attention=True)), build(config)
    count = sum(p.numel() for p in apart.layers[0][0].attn.parameters())
    sizes = [sum(p.numel() for p in model.parameters()) for model in (shared, apart)]
    # two layers, in each of which two of three levels have a window
    assert sizes[1] - sizes[0] == 2 * count

    apart.load_state_dict(shared.state_dict())
    ids = torch.randint(0, 11, (2, 30))
    torch.testing.assert_close(shared(ids), apart(ids))
    assert shared.layers[0][2].attn.to_qkv is shared.layers[0][0].attn.to_qkv
    assert shared.layers[0][1].attn.to_qkv is not shared.layers[0][0].attn.to_qkv
    assert shared.layers[0][2].attn.window == 2


def test_feed_forward_is_shared_by_levels_that_are_alike() -> None:
    shared, apart = build(dict(BASE, share_feed_forward=True)), build(BASE)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (shared, apart)]
    assert sizes[1] - sizes[0] == 2 * sum(p.numel() for p in apart.layers[0][0].ff.parameters())
    apart.load_state_dict(shared.state_dict())
    ids = torch.randint(0, 11, (2, 30))
    torch.testing.assert_close(shared(ids), apart(ids))


@pytest.mark.filterwarnings('error')
def test_auto_window_is_half_of_the_level() -> None:
    model = HierarchicalTransformer(
        num_tokens=11, dim=8, depth=1, seq_len=48,
        hierarchies=(1, 4, 16, 32, 64), window_sizes=('auto', 'auto', None, 'auto', 'auto'),
    )  # fmt: skip
    assert [level.window for level in model.levels] == [24, 6, None, 1, None]


# depth


def test_gated_residual_written_out() -> None:
    gate = GRUGate(6).double()
    x, y = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    nn.init.normal_(gate.bias)
    w, u = gate.of_part.weight.chunk(3), gate.of_stream.weight.chunk(2)
    part = y.relu()
    r, z = torch.sigmoid(part @ w[0].T + x @ u[0].T), torch.sigmoid(part @ w[1].T + x @ u[1].T - gate.bias)
    h = torch.tanh(part @ w[2].T + (r * x) @ gate.of_reset.weight.T)
    torch.testing.assert_close(gate(x, y), (1 - z) * x + z * h)

    # it begins by letting the stream pass
    model, plain = (HierarchicalTransformer(**{**BASE, 'residual': residual}) for residual in ('gru', 'add'))
    assert sum(p.numel() for p in model.parameters()) > sum(p.numel() for p in plain.parameters())
    fresh = GRUGate(6)
    assert fresh(x.float(), torch.zeros_like(x).float()).sub(x).norm() < 0.3 * x.norm()


def test_pieces_of_a_feed_forward_are_the_whole() -> None:
    whole, pieces = build(BASE), build(dict(BASE, ff_chunks=5))
    ids = torch.randint(0, 11, (2, 23))
    gradients = []
    for model in (whole, pieces):
        model(ids, return_loss=True)[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    'option', [dict(depth=3), dict(share_layers=True, merge='attention', merge_into='all')], ids=str
)
def test_reversible_gradients_are_those_of_the_plain_form(
    option: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dict(BASE, window_sizes=(3, 0, None), reversible=True, **option)
    model, ids = build(config), torch.randint(0, 11, (2, 30))
    loss, _ = model(ids, return_loss=True)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    monkeypatch.setattr(model_module, 'run_couplings', lambda *args, modules: run_plainly(*args))
    plain, _ = model(ids, return_loss=True)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(ours, torch.autograd.grad(plain, list(model.parameters())), rtol=1e-9, atol=1e-12)


def test_reversible_streams_written_out() -> None:
    model, ids = build(dict(BASE, reversible=True, merge_into=(1, 8))), torch.randint(0, 11, (2, 30))
    first = list(model(ids, return_hierarchical_token_embeds=True))
    second = list(first)
    for layer, merge in zip(model.layers, model.hierarchical_merges, strict=True):
        for j, block in enumerate(layer):
            first[j] = first[j] + block.within_phases(block.mixed, second[j])[0]
            second[j] = second[j] + block.within_phases(block.fed, first[j])[0]
        merged, _ = merge(second)
        first = [a + new - b for a, new, b in zip(first, merged, second, strict=True)]
    tokens = model(ids, return_hierarchical_embeds=True)
    for a, b, norm, x in zip(first, second, model.norms, tokens, strict=True):
        torch.testing.assert_close(x, norm((a + b) / 2))


def test_reversible_layers_are_not_kept() -> None:
    def kept(depth: int, **changes: Any) -> int:
        config = dict(BASE, dim=32, heads=2, depth=depth, recon_loss_weight=0.0, next_latent_loss_weight=0.0)
        model = HierarchicalTransformer(**{**config, **changes})
        return bytes_kept(model, torch.randint(0, 11, (2, SEQ_LEN)), return_loss=True)

    assert kept(8, reversible=True) == kept(2, reversible=True)
    assert kept(8) > 3 * kept(2)
    assert kept(8, reversible=True) < kept(2)


def test_pieces_of_a_feed_forward_are_small_in_reversible_layers_too() -> None:
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.size = max([self.size, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
            return out

    sizes = []
    for chunks in (1, 8):
        config = dict(num_tokens=11, dim=8, depth=2, seq_len=256, ff_mult=32, heads=1, dim_head=4)
        model = HierarchicalTransformer(**config, reversible=True, ff_chunks=chunks, next_latent_loss_weight=0.0)
        with Largest() as largest:
            model(torch.randint(0, 11, (1, 257)), return_loss=True)[0].backward()
        sizes.append(largest.size)
    assert sizes[1] < sizes[0] / 4


def test_reversible_runs_in_half_precision() -> None:
    model, ids = build(dict(BASE, reversible=True)), torch.randint(0, 11, (2, 25))
    expected, _ = model(ids, return_loss=True)
    model = model.float()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, _ = model(ids, return_loss=True)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=0.03, atol=0.03)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_layers_are_shared() -> None:
    config = dict(BASE, depth=3, merge='attention')
    shared, apart = build(dict(config, share_layers=True)), build(config)
    one = build(dict(config, depth=1))
    extra = sum(p.numel() for p in shared.step_embeds)
    assert sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in one.parameters()) + extra

    weights = {name: weight for name, weight in shared.state_dict().items() if not name.startswith('step_embeds')}
    # receivers that nothing trains are none here
    apart.load_state_dict(weights)
    ids = torch.randint(0, 11, (2, 30))
    assert not torch.allclose(shared(ids), apart(ids))
    with torch.no_grad():
        for steps in shared.step_embeds:
            steps.zero_()
    torch.testing.assert_close(shared(ids), apart(ids))


def test_tokens_halt_by_themselves() -> None:
    """Token by token: the mean of its steps by its probabilities, of which the last is what is left."""
    steps, n = 5, 40
    halt = AdaptiveHalting(6).double()
    nn.init.normal_(halt.to_halt.weight)
    made = torch.randn(steps, 2, n, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.zeros(2, n, 6, dtype=torch.float64)
    pondered, seen = halt.begin(tokens), []
    for i in range(steps):
        tokens, pondered = halt(tokens, made[i], pondered, i == steps - 1)
        seen.append(tokens)
    taken = set()
    for b in range(2):
        for t in range(n):
            total, output = torch.zeros((), dtype=torch.float64), 0
            for i in range(steps):
                probability = halt.to_halt(made[i, b, t]).sigmoid()[0]
                if total + probability >= 0.99 or i == steps - 1:
                    break
                total, output = total + probability, output + probability * made[i, b, t]
            torch.testing.assert_close(pondered.output[b, t], output + (1 - total) * made[i, b, t])
            torch.testing.assert_close(pondered.cost[b, t], i + 1 + 1 - total)
            # a token that has ended stays
            assert all(torch.equal(x[b, t], made[min(k, i), b, t]) for k, x in enumerate(seen))
            taken.add(i)
    assert len(taken) > 2


def test_pondering_costs_and_ends() -> None:
    config = dict(BASE, share_layers=True, depth=4, halting='act', predict_use_all_hierarchy=True)
    config |= dict(recon_loss_weight=0.0, next_latent_loss_weight=0.0)
    model, ids = build(dict(config, ponder_loss_weight=0.5)), torch.randint(0, 11, (2, 25))
    loss, parts = model(ids, return_loss=True)
    assert set(parts.named) == {'ce', 'ponder/1x', 'ponder/8x', 'ponder/4x'}
    # without the logits of the others, theirs do not halt: what they tell on the way is their last step's
    some = build(dict(config, predict_use_all_hierarchy=False))
    assert set(some(ids, return_loss=True)[1].named) == {'ce', 'ponder/1x'}
    assert all(1 <= parts.named[f'ponder/{c}x'] <= 5 for c in (1, 4, 8))
    torch.testing.assert_close(loss, parts.ce + 0.5 * sum(parts.named[f'ponder/{c}x'] for c in (1, 4, 8)))

    ran = []
    for number, layer in enumerate(model.layers[0]):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    with torch.no_grad():
        for halt in model.halting.values():
            halt.to_halt.bias.fill_(20)
        _, parts = model(ids, return_loss=True)
    # all end with the first step, and no other is taken
    assert len(ran) == 3
    torch.testing.assert_close(parts.named['ponder/1x'], torch.tensor(2.0, dtype=torch.float64))


# merging


def attended(merge: AttentionMerge, tokens: Sequence[Tensor], strides: Sequence[int], i: int, j: int) -> Tensor:
    """What merging by attention adds to token j of level i, key by key."""
    to, scores, values = merge.receivers[str(i)], [], []
    query = to.to_q(merge.norms[i](tokens[i][:, j])).unflatten(-1, (to.heads, -1))
    for other, x in enumerate(tokens):
        for back in range(merge.window + 1):
            k = j * strides[i] // strides[other] - back
            if k >= 0:
                kv = to.to_kv[other](merge.norms[other](x[:, k])).unflatten(-1, (2, to.heads, -1))
                key, value = kv.unbind(1)
                scores.append((query * key).sum(-1) / query.shape[-1] ** 0.5 + to.bias[:, other, back])
                values.append(value)
    share = torch.stack(scores).softmax(0)
    return to.to_out((share[..., None] * torch.stack(values)).sum(0).flatten(1))


@pytest.mark.parametrize('window', [0, 1, 3])
@pytest.mark.parametrize('strides', [(1, 4, 2), (2, 4, 1)])
def test_attention_merge_written_out(window: int, strides: tuple[int, ...]) -> None:
    dims, into = (6, 3, 5), (0, 1)
    levels = [Level(c, s, d, 4, 2, 2, None, 0.0) for c, s, d in zip((2, 8, 4), strides, dims, strict=True)]
    merge = AttentionMerge(levels, into, window=window).double()
    for parameter in merge.parameters():
        nn.init.normal_(parameter)
    n = 11
    tokens = [torch.randn(2, -(-n // s), d, dtype=torch.float64) for s, d in zip(strides, dims, strict=True)]
    merged, _ = merge(tokens)
    assert merged[2] is tokens[2]
    for i in into:
        for j in range(tokens[i].shape[1]):
            torch.testing.assert_close(merged[i][:, j], tokens[i][:, j] + attended(merge, tokens, strides, i, j))


@pytest.mark.parametrize('strides', [(1, 1, 1), (1, 4, 2), (4, 2, 1)])
def test_concat_merge_written_out(strides: tuple[int, ...]) -> None:
    dims, into = (6, 3, 5), (0, 1)
    levels = [Level(c, s, d, 4, 2, 2, None, 0.0) for c, s, d in zip((4, 8, 2), strides, dims, strict=True)]
    merge = ConcatMerge(levels, into).double()
    n = 11
    tokens = [torch.randn(2, -(-n // s), d, dtype=torch.float64) for s, d in zip(strides, dims, strict=True)]
    merged, _ = merge(tokens)
    assert merged[2] is tokens[2]
    for i, columns in zip(into, (slice(0, 6), slice(6, 9)), strict=True):
        for j in range(tokens[i].shape[1]):
            position = j * strides[i]
            joined = torch.cat([x[:, position // s] for x, s in zip(tokens, strides, strict=True)], dim=-1)
            torch.testing.assert_close(merged[i][:, j], tokens[i][:, j] + merge.net(joined)[:, columns])


@pytest.mark.parametrize('merge', ['concat', 'attention'])
def test_what_is_merged_hangs_on_no_loss(merge: str) -> None:
    """With a loss a level's end is trained; weights go both ways, and all that the model returns stays as it was."""
    config = dict(BASE, merge=merge, merge_into='all', recon_loss_weight=0.0, next_latent_loss_weight=0.0)
    off, on = build(config), build(dict(config, prophet_loss_weight=0.1), seed=1)
    ids = torch.randint(0, 11, (2, 20))
    off.load_state_dict(on.state_dict())
    for asked in ('return_hierarchical_embeds', 'return_contributions'):
        torch.testing.assert_close(off(ids, **{asked: True}), on(ids, **{asked: True}))
    missing, unexpected = on.load_state_dict(off.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith('to_prophet') for name in missing)


@pytest.mark.parametrize('reversible', [False, True])
def test_the_last_merge_adds_to_what_is_read(reversible: bool) -> None:
    """What nothing reads is not computed, and there whenever it is asked for, in chunks too."""
    silent = dict(recon_loss_weight=0.0, next_latent_loss_weight=0.0)
    model = build(dict(BASE, merge='attention', merge_into='all', merge_window=2, reversible=reversible, **silent))
    last: Any = model.hierarchical_merges[-1]
    heard: list[str] = []
    for i, receiver in last.receivers.items():
        receiver.to_q.register_forward_hook(lambda *_, i=i: heard.append(i))

    def receivers(**asked: bool) -> list[str]:
        heard.clear()
        model(ids, **asked)
        return heard

    ids = torch.randint(0, 11, (2, 21))
    for asked in ({}, {'return_loss': True}, {'return_state': True}):
        assert receivers(**asked) == ['0']
    for name in ('return_hierarchical_embeds', 'return_logits_and_embeds', 'return_contributions'):
        assert receivers(**{name: True}) == ['0', '1', '2']

    logits, embeds = model(ids, return_logits_and_embeds=True)
    torch.testing.assert_close(model(ids), logits, rtol=0, atol=1e-12)
    # a chunk that nothing is asked of leaves the state that one leaves that all is asked of
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            _, state = model(ids[:, :9], return_state=True)
            rest, more, _ = model(ids[:, 9:], return_logits_and_embeds=True, state=state, return_state=True)
        torch.testing.assert_close(rest, logits[:, 9:], rtol=0, atol=1e-12)
        for level, whole, part in zip(model.levels, embeds, more, strict=True):
            torch.testing.assert_close(part, whole[:, level.length(9) :], rtol=0, atol=1e-12)


def test_weights_that_differ_do_not_become_one() -> None:
    shared, apart = build(dict(BASE, share_feed_forward=True)), build(BASE)
    with pytest.raises(ValueError, match=r'layers\.0\.2\.ff.* and layers\.0\.0\.ff.* are one weight in this model'):
        shared.load_state_dict(apart.state_dict())
    with pytest.raises(RuntimeError, match='receivers'):
        build(dict(BASE, merge='attention')).load_state_dict(
            build(dict(BASE, merge='attention', merge_into='all')).state_dict()
        )


def test_merges_reach_those_named() -> None:
    ids, plain = torch.randint(0, 11, (2, 20)), build(BASE)
    for into, receive in (('predict', {0}), ('all', {0, 1, 2}), ((8, 1), {0, 1}), ((1,), {0})):
        model = build(dict(BASE, merge_into=into, depth=1))
        final, alone = (model(ids, return_hierarchical_embeds=True, ablate_hierarchical_merge=a) for a in (False, True))
        assert {i for i in range(3) if not torch.equal(final[i], alone[i])} == receive
    older, newer = build(dict(BASE, hierarchy_merge_all=True)), build(dict(BASE, merge_into='all'))
    assert torch.equal(older(ids), newer(ids))
    assert torch.equal(build(dict(BASE, merge_into=(1,)))(ids), plain(ids))


# what levels are worth


@pytest.mark.parametrize('option', ['merge into all', 'merge by attention', 'hourglass'])
def test_a_silent_level_is_not_heard(option: str) -> None:
    config = {**BASE, **OPTIONS[option]}
    model, ids = build(config), torch.randint(0, 11, (2, 20))
    plain = model(ids)
    with model.ablate(8) as silent:
        assert silent is model
        without = model(ids)
        with model.ablate(4):
            alone = model(ids)
        assert torch.equal(model(ids), without)
    assert torch.equal(model(ids), plain)
    assert len({tuple(x.flatten().tolist()) for x in (plain, without, alone)}) == 3

    # whatever the level's own weights are
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if level_of(name) == 1:
                parameter.mul_(2)
    assert not torch.equal(model(ids), plain)
    with model.ablate(8):
        torch.testing.assert_close(model(ids), without)


class Columns(nn.Module):
    """Some columns alone, and then a module."""

    def __init__(self, columns: Tensor, module: nn.Module) -> None:
        super().__init__()
        self.columns, self.module = columns, module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x * self.columns)


def test_ablation_is_zero_in_the_level_s_columns() -> None:
    config = dict(BASE, predict_use_all_hierarchy=True, merge_into='all')
    model, ids = build(config), torch.randint(0, 11, (2, 20))
    with model.ablate(8):
        silent = model(ids)
        state, chunks = None, []
        for chunk in ids.split([3, 6, 11], dim=1):
            out, state = model(chunk, return_state=True, state=state)
            chunks.append(out)
        torch.testing.assert_close(torch.cat(chunks, dim=1), silent)
    with torch.no_grad():
        model.to_logits.weight[:, 8:20] = 0
    columns = (torch.arange(28) < 8) | (torch.arange(28) >= 20)
    for merge in model.hierarchical_merges:
        merge.net[0] = Columns(columns, merge.net[0])
    torch.testing.assert_close(model(ids), silent)


def test_a_compiled_model_hears_of_ablation() -> None:
    model, ids = build(BASE), torch.randint(0, 11, (2, 20))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager')
    for _ in range(2):
        torch.testing.assert_close(compiled(ids), model(ids))
        with model.ablate(8):
            torch.testing.assert_close(compiled(ids), model(ids))


def test_threads_silence_levels_for_themselves_alone() -> None:
    model, ids = build(BASE), torch.randint(0, 11, (2, 20))
    plain = model(ids)
    with model.ablate(8):
        silent = model(ids)

    with ThreadPoolExecutor(1) as pool:
        other = model.ablate(8)
        with model.ablate(4):
            assert torch.equal(pool.submit(model, ids).result(), plain)
            # the other thread enters inside, and leaves after
            pool.submit(other.__enter__).result()
            assert torch.equal(pool.submit(model, ids).result(), silent)
        assert torch.equal(model(ids), plain)
        pool.submit(other.__exit__, None, None, None).result()
        assert torch.equal(pool.submit(model, ids).result(), plain)
    assert torch.equal(model(ids), plain)
    assert not model.silent


def test_ablations_end_in_any_order() -> None:
    model, ids = build(BASE), torch.randint(0, 11, (2, 20))
    plain = model(ids)
    with model.ablate(8):
        silent = model(ids)
    first, second, again = model.ablate(4), model.ablate(8), model.ablate(8)
    for each in (first, second, again):
        each.__enter__()
    for each in (first, second):
        each.__exit__(None, None, None)
        # one of two that say the same is left
        assert torch.equal(model(ids), silent)
    again.__exit__(None, None, None)
    assert torch.equal(model(ids), plain)


def test_a_copy_made_during_an_ablation_hears_all_levels() -> None:
    model, ids = build(BASE), torch.randint(0, 11, (2, 20))
    plain = model(ids)
    with model.ablate(8):
        copies = [deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert all(torch.equal(copy(ids), plain) for copy in copies)


def test_a_replica_of_another_thread_keeps_the_ablation() -> None:
    """As nn.DataParallel makes them."""
    model, ids = build(BASE), torch.randint(0, 11, (2, 20))
    with model.ablate(8), ThreadPoolExecutor(1) as pool:
        silent, replica = model(ids), model._replicate_for_data_parallel()
        replica._parameters, replica._modules = model._parameters, model._modules
        assert torch.equal(pool.submit(replica, ids).result(), silent)


def test_in_an_hourglass_those_inside_a_silent_level_fall_silent() -> None:
    model = build(dict(BASE, arrangement='hourglass', predict_use_all_hierarchy=True))
    ids = torch.randint(0, 11, (2, 20))
    with model.ablate(4):
        without = model(ids)
    with model.ablate(4, 8):
        assert torch.equal(model(ids), without)
    with pytest.raises(ValueError, match='ablate must leave a level to predict'), model.ablate(1):
        pass


def test_ablation_refuses() -> None:
    model = HierarchicalTransformer(**BASE)
    for hierarchies, message in (
        ((2,), r'ablate takes one or more of hierarchies \[1, 8, 4\], got \(2,\)'),
        ((), 'got '),
        ((1,), 'ablate must leave a level to predict'),
    ):
        with pytest.raises(ValueError, match=message), model.ablate(*hierarchies):
            pass
    assert not model.silent


@pytest.mark.parametrize('merge', ['concat', 'attention'])
def test_a_silent_level_weighs_nothing(merge: str) -> None:
    model = build(dict(BASE, depth=1, merge=merge, merge_into=(1, 8)))
    ids = torch.randint(0, 11, (2, 20))
    with model.ablate(8):
        _, (found,) = model(ids, return_contributions=True)
    for receiver in (1, 8):
        weights = found.weights[receiver]
        levels = weights if merge == 'concat' else weights.sum(-1).movedim(-1, 0)
        assert not levels[1].any()
        torch.testing.assert_close(levels.sum(0), torch.ones_like(levels[0]))
        assert not found.norms[receiver][..., 1].any()


@pytest.mark.parametrize('merge', ['concat', 'attention'])
def test_contributions_are_what_a_level_s_silence_moves(merge: str) -> None:
    model = build(dict(BASE, depth=1, merge=merge, merge_into=(1, 8), merge_window=2 if merge == 'attention' else 0))
    ids = torch.randint(0, 11, (2, 20))
    logits, (found,) = model(ids, return_contributions=True)
    assert torch.equal(logits, model(ids))

    blocks = [model.layers[0][j](x)[0] for j, x in enumerate(model(ids, return_hierarchical_token_embeds=True))]
    merged, _ = model.hierarchical_merges[0](blocks)
    for place, c in enumerate((1, 8, 4)):
        others, _ = model.hierarchical_merges[0](blocks, silent={c})
        for receiver, i in ((1, 0), (8, 1)):
            moved = (merged[i] - others[i]).norm(dim=-1)
            assert moved.min() > 0
            torch.testing.assert_close(found.norms[receiver][..., place], moved)

    assert set(found.weights) == {1, 8}
    weights = found.weights[1]
    if merge == 'attention':
        assert weights.shape == (2, 20, 2, 3, 3)
        torch.testing.assert_close(weights.sum(dim=(-1, -2)), torch.ones(2, 20, 2, dtype=torch.float64))
        # at the first position nothing stands before
        assert not weights[:, 0, :, :, 1:].any()
    else:
        norm, read, *_ = model.hierarchical_merges[0].net
        squares = (read.weight * norm.gamma).square().sum(0)
        expected = torch.stack((squares[:8].sum(), squares[8:20].sum(), squares[20:].sum())) / squares.sum()
        torch.testing.assert_close(weights, expected)


def test_contributions_of_an_hourglass_stand_as_its_merges() -> None:
    model = build(dict(BASE, arrangement='hourglass'))
    _, found = model(torch.randint(0, 11, (2, 20)), return_contributions=True)
    assert [list(each.norms) for each in found] == [[1], [4]]
    assert found[0].norms[1].shape == (2, 20, 2)
    assert found[1].norms[4].shape == (2, 10, 2)


def test_contributions_and_quantized_ids_in_chunks() -> None:
    model = build(dict(BASE, merge='attention', merge_window=2, quantized_loss_weight=(0.0, 0.1, 0.1)))
    ids = torch.randint(0, 11, (2, 30))
    with torch.no_grad():
        _, whole = model(ids, return_contributions=True)
        named = model(ids, return_quantized_ids=True)
        first, again, state = model(ids[:, :13], return_contributions=True, return_state=True)
        _, more, _ = model(ids[:, 13:], return_contributions=True, return_state=True, state=state)
        begun, state = model(ids[:, :13], return_quantized_ids=True, return_state=True)
        rest, _ = model(ids[:, 13:], return_quantized_ids=True, return_state=True, state=state)
    for x, y, z in zip(whole, again, more, strict=True):
        torch.testing.assert_close(torch.cat((y.norms[1], z.norms[1]), dim=1), x.norms[1])
        torch.testing.assert_close(torch.cat((y.weights[1], z.weights[1]), dim=1), x.weights[1])
    assert first.shape == (2, 13, 11)
    assert named[0] is begun[0] is rest[0] is None
    for x, y, z in zip(named[1:], begun[1:], rest[1:], strict=True):
        assert torch.equal(torch.cat((y, z), dim=1), x)


# losses


def test_a_prophet_loss_of_what_the_cross_entropy_says_is_none() -> None:
    with pytest.warns(UserWarning, match='prophet_loss_weight builds nothing'):
        model = HierarchicalTransformer(num_tokens=11, dim=8, depth=1, prophet_loss_weight=0.1)
    assert 'prophet/1x' not in model.loss_weights


def test_quantizer_names_what_the_published_one_names(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = RandomProjectionQuantizer(12, codebooks=3, size=50, dim_code=8)
    x = torch.randn(4, 100, 12)
    for k in range(3):
        theirs = PublishedQuantizer(dim=12, codebook_size=50, codebook_dim=8)
        theirs.rand_projs.copy_(ours.projection[k, None])
        theirs.vq._codebook.embed.copy_(ours.codebook[k, None])
        assert torch.equal(ours(x)[..., k], theirs(x))
        with monkeypatch.context() as patch:
            # however few rows are scored at a time
            patch.setattr(losses, 'CHUNK', 50 * 7)
            assert torch.equal(ours(x)[..., k], theirs(x))
    assert len(ours(x).unique()) > 40


def test_quantizer_is_saved_and_never_trained() -> None:
    model = HierarchicalTransformer(**BASE, quantized_loss_weight=0.1)
    assert not [name for name, _ in model.named_parameters() if name.startswith('quantizers')]
    assert 'quantizers.1.codebook' in model.state_dict()


def test_parts_are_named_and_unpack_as_four() -> None:
    model = HierarchicalTransformer(
        **{**BASE, 'next_latent_loss_weight': (0.1, 0.0, 0.0)}, prophet_loss_weight=0.1,
        quantized_loss_weight=(0.0, 0.0, 0.1), autoencoder=True, autoencoder_loss_weight=0.3,
    )  # fmt: skip
    _, parts = model(torch.randint(0, 11, (2, 25)), return_loss=True)
    weights = {
        'ce': 1.0, 'recon/8x': 0.1, 'recon/4x': 0.1, 'prophet/8x': 0.1, 'prophet/4x': 0.1, 'quantized/4x': 0.1,
        'next_latent/1x': 0.1, 'autoencoder': 0.3,
    }  # fmt: skip
    assert model.loss_weights == weights
    assert list(parts.named) == list(weights)
    ce, next_latent, recon, per_hierarchy = parts
    assert (ce, recon) == (parts.ce, parts.recon) == (parts[0], parts[2])
    assert len(parts) == 4
    torch.testing.assert_close(recon, parts.named['recon/8x'] + parts.named['recon/4x'])
    torch.testing.assert_close(next_latent, 0.1 * per_hierarchy[0])
    assert per_hierarchy[1] == 0

    # what wraps models walks over what they return
    halved = tree_map(lambda t: t / 2, parts)
    assert isinstance(halved, LossParts)
    torch.testing.assert_close(halved.named['prophet/8x'], parts.named['prophet/8x'] / 2)
    # none is equal to another, and asking is no error
    assert parts != halved


def test_golden_weights_go_into_models_with_more_losses(golden: Golden) -> None:
    """And weights with parts for losses go into models without."""
    extra = dict(prophet_loss_weight=0.1, quantized_loss_weight=0.1)
    more = HierarchicalTransformer(**golden.config, **extra).double()
    missing, unexpected = more.load_state_dict(golden.model().state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith(('to_prophet', 'to_quantized', 'quantizers', 'norms')) for name in missing)
    golden.model().load_state_dict(more.state_dict())
    torch.testing.assert_close(more(golden.tensors['ids']), golden.model()(golden.tensors['ids']))

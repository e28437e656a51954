"""Optimizers, tables and memory of a training step on the device, and whole runs of train.py."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from contracts.cases import BASE, LEVELS, NO_LOSSES, RECIPE, TWO, WINDOW, build, words
from safetensors.torch import load_file
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.embeddings import NGramEmbedding
from simple_hierarchical_transformer.training import checkpoints, cost, optim
from simple_hierarchical_transformer.training.optim import OPTIMIZERS, build_optimizer

from .compare import assert_gradients_close, assert_losses_close, gradients_of, loss_and_gradients, peak_memory

pytestmark = pytest.mark.gpu

LENGTH = 301
HOST = torch.device('cpu')


# optimizers


def steps_of(name: str, device: torch.device, gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The change of each weight of a model after steps with these gradients."""
    model = build(RECIPE).to(device)
    optimizer = build_optimizer(model, name, lr=1e-2, weight_decay=0.1, device=device)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for each in gradients:
        for key, p in model.named_parameters():
            p.grad = each[key].to(device, copy=True)
        optimizer.step()
    return {key: (p.detach() - before[key]).double().cpu() for key, p in model.named_parameters()}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_optimizers_take_the_same_steps_as_on_the_cpu(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Muon iterates in float32 on both sides: the next test covers bfloat16
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *_, **__: False)
    like = {key: p.detach() for key, p in build(RECIPE).named_parameters()}
    gradients = [{key: torch.randn_like(p) for key, p in like.items()} for _ in range(3)]
    theirs, ours = (steps_of(name, each, gradients) for each in (HOST, device))
    assert_gradients_close(ours, theirs, 1e-3)


def test_muon_in_bfloat16_is_near_float32(device: torch.device) -> None:
    for rows, columns in ((64, 64), (96, 256), (256, 96)):
        matrices = torch.randn(3, rows, columns)
        exact, ours = optim.orthogonalise(matrices), optim.orthogonalise(matrices.to(device)).cpu()
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() < 0.05 * exact.norm()
        assert torch.linalg.matrix_norm(ours, 2).max() < 1.3


def test_ngram_tables_learn_the_same_with_dense_and_sparse_gradients(device: torch.device) -> None:
    ids, moved = words(2, LENGTH), []
    for sparse, where in ((False, HOST), (False, device), (True, device)):
        model = build(dict(WINDOW, **NO_LOSSES, ngrams=(2, 3), word_ngrams=(1,))).to(where)
        optimizer = build_optimizer(model, 'adamw', lr=1e-3, weight_decay=0.0)
        for module in model.modules():
            if isinstance(module, NGramEmbedding):
                module.sparse = sparse
        before = model.ngram_emb.weight.detach().clone()
        for _ in range(2):
            model.zero_grad()
            model(ids.to(where), return_loss=True)[0].backward()
            assert model.ngram_emb.weight.grad.is_sparse == sparse
            gradient = gradients_of(model)['ngram_emb.weight']
            optimizer.step()
        moved.append(dict(gradient=gradient, table=(model.ngram_emb.weight.detach() - before).double().cpu()))
    on_cpu, dense, sparse_one = moved
    assert_gradients_close(dense, on_cpu, 1e-3)
    assert_gradients_close(sparse_one, on_cpu, 1e-3)


# memory


def build_deep(device: torch.device, **changes: Any) -> HierarchicalTransformer:
    return build(dict(LEVELS, depth=6, **changes)).to(device)


def learn(model: nn.Module, ids: Tensor, **extra: Any) -> None:
    loss, *_ = model(ids, return_loss=True, **extra)
    loss.backward()


def test_checkpointing_has_the_same_gradients_in_less_memory(device: torch.device) -> None:
    ids = words(8, LENGTH).to(device)
    plain, again = build_deep(device), build_deep(device, gradient_checkpointing=True)
    exact, exact_gradients = loss_and_gradients(plain, plain, ids)
    losses, gradients = loss_and_gradients(again, again, ids)
    assert_losses_close(losses, exact, 1e-5)
    assert_gradients_close(gradients, exact_gradients, 1e-4)
    memory, less = (peak_memory(lambda model=model: learn(model, ids), device) for model in (plain, again))
    assert less < 0.6 * memory


def test_reversible_layers_have_the_same_gradients_in_less_memory(device: torch.device) -> None:
    """The reference is the plain form, which runs when there is a state."""
    ids, model = words(8, LENGTH).to(device), build_deep(device, reversible=True)
    exact, exact_gradients = loss_and_gradients(model, model, ids, return_state=True)
    losses, gradients = loss_and_gradients(model, model, ids)
    assert_losses_close(losses, exact, 1e-5)
    assert_gradients_close(gradients, exact_gradients, 1e-3)
    memory, less = (
        peak_memory(lambda extra=extra: learn(model, ids, **extra), device) for extra in (dict(return_state=True), {})
    )
    assert less < 0.6 * memory


# models large enough that rounding by the allocator is small
PLANNED: dict[str, tuple[dict[str, Any], bool]] = {
    'recipe, bfloat16': (dict(RECIPE, depth=(4, 2)), True),
    'levels': (dict(TWO, depth=4), False),
}
LARGE = dict(dim=512, dim_head=64, heads=8, ff_mult=4, seq_len=2048, ngram_rows=1 << 14)


@pytest.mark.parametrize(('config', 'half'), PLANNED.values(), ids=PLANNED)
def test_planned_memory_equals_the_memory_of_a_step(config: dict[str, Any], half: bool, device: torch.device) -> None:
    config = {**BASE, **config, **(LARGE if device.type == 'cuda' else {})}
    rows, length = (16, 2048) if device.type == 'cuda' else (4, 256)
    with torch.device('meta'):
        planned = HierarchicalTransformer(**config, attn_backend='flex' if device.type == 'cuda' else 'auto')
    planned_optimizer = build_optimizer(planned, 'muon', lr=1e-3, weight_decay=0.1, device=device, sparse=False)
    memory = cost.step_memory(planned, planned_optimizer, rows=rows, length=length, half=half)

    model = HierarchicalTransformer(**config).to(device)
    optimizer = build_optimizer(model, 'muon', lr=1e-3, weight_decay=0.1, device=device, sparse=False)
    ids = torch.randint(0, 256, (rows, length + 1)).to(device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            loss, _ = model(ids, return_loss=True)
        loss.backward()
        del loss, _
        optimizer.step()
        optimizer.zero_grad()

    # the first step creates the optimizer's tensors and compiles kernels
    step()
    tensors = (*model.parameters(), *model.buffers(), ids)
    held = sum(t.nbytes for t in (*tensors, *(t for state in optimizer.state.values() for t in state.values())))
    assert sum(memory.values()) == pytest.approx(held + peak_memory(step, device), rel=0.15)


# runs of train.py

TINY: tuple[object, ...] = (
    '--preset', 'gpu', '--seq-len', 128, '--batch-size', 2, '--valid-bytes', 1024, '--lr', 1e-3, '--table-lr', 3e-3,
    '--model', 'dim=32', 'depth=(1,1)', 'heads=1', 'dim_head=32', 'ff_mult=2', 'ngram_rows=256',
    'hierarchical_stride=(1,4)', 'hierarchies=(1,4)',
)  # fmt: skip
# all options that a step depends on: states of segments, drawn losses and averaged weights; and --mixed-precision
RESUMED: tuple[object, ...] = (
    '--steps', 16, '--every', 100, '--checkpoint-every', 4, '--keep', 9, '--segment-length', 32, '--grad-accum', 2,
    '--ema', 0.9, *TINY, 'recon_loss_weight=0.1', 'recon_sample=0.5',
)  # fmt: skip

# a GPU adds in one order only if it is told to
ORDERED = textwrap.dedent(
    """
    import os, sys
    os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'
    import torch, train
    torch.use_deterministic_algorithms(True, warn_only=True)
    train.main(sys.argv[1:])
    """
)


def start(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, '-c', ORDERED, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def finish(process: subprocess.Popen[str]) -> None:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


def kill_after(process: subprocess.Popen[str], checkpoint: Path) -> None:
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, said


def outcome(out: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the progress of a checkpoint."""
    folder = out / f'checkpoint-{step}'
    return load_file(folder / 'model.safetensors'), checkpoints.read_record(folder)['progress']


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max((ours[name] - each).abs().max().item() for name, each in theirs.items())


def scores(progress: dict[str, Any]) -> list[float]:
    return [row['valid_bits_per_byte'] for row in progress['rows'] if row.get('valid_bits_per_byte')]


def test_a_killed_run_resumes_with_the_same_results(corpus: Path, tmp_path: Path, device: torch.device) -> None:
    """In float16 on CUDA. The scale of the loss is restored too."""
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    settings = ('--mixed-precision', 'fp16' if device.type == 'cuda' else 'bf16', *RESUMED)
    begun = start('--data', corpus, '--out', whole, *settings)
    try:
        kill_after(start('--data', corpus, '--out', broken, *settings), broken / 'checkpoint-4')
        assert not (broken / 'checkpoint-16').exists()
        finish(start('--resume', broken))
        finish(begun)
    finally:
        begun.kill()

    (ours, our_progress), (theirs, their_progress), (early, _) = (
        outcome(out, step) for out, step in ((broken, 16), (whole, 16), (whole, 4))
    )
    assert furthest(ours, theirs) <= (0 if device.type == 'cpu' else 1e-5)
    # far less than the weights have moved since step 4
    assert furthest(early, theirs) > 1e-3
    for name in ('step', 'skipped', 'position', 'updates', 'scaler'):
        assert our_progress[name] == their_progress[name]
    assert scores(our_progress) == pytest.approx(scores(their_progress), abs=1e-4)
    assert scores(their_progress)[-1] < scores(their_progress)[0]

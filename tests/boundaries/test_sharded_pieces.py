"""Placed levels in two processes, of which one has few pieces and the other many: DDP and FSDP2 equal one process."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from support.commands import run

SCRIPT = textwrap.dedent(
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from simple_hierarchical_transformer import HierarchicalTransformer
    from simple_hierarchical_transformer.block import HierarchicalBlock
    from simple_hierarchical_transformer.training.sharded import full

    dist.init_process_group('gloo')
    rank, world = dist.get_rank(), dist.get_world_size()

    def build(rules, **more):
        torch.manual_seed(0)
        model = HierarchicalTransformer(
            num_tokens=256, dim=(16, 24, 24), depth=(2, 2, 1), heads=2, dim_head=8, seq_len=64, arrangement='hourglass',
            hierarchies=(1, 4, 16), boundaries=(None, *rules), window_sizes=(8, 6, None), ignore_index=-1,
            prophet_loss_weight=0.1, **more,
        )
        # training moves the threshold of a process by its own batch
        for rule in model.boundaries.values():
            rule.eval()
            if hasattr(rule, 'threshold'):
                rule.threshold.fill_(5.4)
        return model.double()

    # process 0 has a row without boundaries and one of a few words, process 1 has boundaries everywhere
    texts = [b'a' * 49, b'the old king ' * 4, b'. ! ' * 13, b'x, y. ' * 9]
    ids = torch.tensor([list(text[:49]) for text in texts])

    def learn(model, optimizer, rows, parts):
        # segments of one word, in which process 0 has no tokens of a placed level
        state, inner = None, getattr(model, 'module', model)
        for at in range(0, 48, 12):
            chunk, counts = ids[:, at : at + 13], inner.count_targets(ids[:, at : at + 13], position=at)
            loss, _, state = model(chunk[rows], return_loss=True, counts=counts, state=state, return_state=True)
            (loss * parts).backward()
            state = state.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return float(full(norm))

    kinds = dict(
        learned=dict(rules=('learned', 'learned'), upsample=('repeat', 'smooth', 'smooth'), merge='skip'),
        words=dict(rules=('words', 'sentences'), upsample='offset', downsample='attention'),
        surprise=dict(rules=('surprise', 'every'), upsample='boundary', gradient_checkpointing=True),
    )
    for kind, options in kinds.items():
        whole = build(**options)
        expected = learn(whole, torch.optim.AdamW(whole.parameters(), lr=1e-3), slice(0, 4), 1)
        rows = slice(2 * rank, 2 * rank + 2)

        ddp = DistributedDataParallel(build(**options))
        norm = learn(ddp, torch.optim.AdamW(ddp.parameters(), lr=1e-3), rows, world)
        torch.testing.assert_close(norm, expected, rtol=1e-7, atol=0)
        for (name, ours), theirs in zip(ddp.module.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=lambda said: f'{name}: {said}')

        model = build(**options)
        mesh = init_device_mesh('cpu', (world,))
        for block in [module for module in model.modules() if isinstance(module, HierarchicalBlock)]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        norm = learn(model, torch.optim.AdamW(model.parameters(), lr=1e-3), rows, world)
        torch.testing.assert_close(norm, expected, rtol=1e-7, atol=0)
        for (name, ours), theirs in zip(model.named_parameters(), whole.named_parameters(), strict=True):
            torch.testing.assert_close(full(ours), theirs[1], rtol=1e-6, atol=1e-6, msg=lambda said: f'{name}: {said}')

        # generation, in which processes meet boundaries at different steps
        new = model.generate(ids[rows, :9], 8, temperature=0)
        assert torch.equal(new, whole.generate(ids[rows, :9], 8, temperature=0))
        if rank == 0:
            print(f'all the same with {kind}', flush=True)
    dist.barrier()
    dist.destroy_process_group()
    """
)


@pytest.fixture(scope='module')
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    script: Path = tmp_path_factory.mktemp('placed') / 'placed.py'
    script.write_text(SCRIPT)
    result = run('--nproc_per_node', 2, script, module='torch.distributed.run', OMP_NUM_THREADS='1')
    return result.stdout + result.stderr


@pytest.mark.parametrize('kind', ['learned', 'words', 'surprise'])
def test_two_processes_train_as_one(kind: str, output: str) -> None:
    assert f'all the same with {kind}' in output, output

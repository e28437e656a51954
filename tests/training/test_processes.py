"""Several processes train as one does, and checkpoints load in any number of processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from support.commands import ROOT, run, run_command

from simple_hierarchical_transformer import HierarchicalTransformer

# rows that end early, so that processes count different numbers of targets, and all losses
SETTINGS: tuple[object, ...] = (
    '--preset', 'cpu', '--steps', 20, '--every', 10, '--checkpoint-every', 10, '--valid-bytes', 2048,
    '--documents', '--seq-len', 64, '--batch-size', 2, '--optimizer', 'adamw', '--lr', 3e-3, '--schedule', 'cosine',
    '--table-lr', 3e-3,
    '--model', 'dim=16,24', 'depth=2', 'heads=1', 'ngrams=(2,3)', 'ngram_rows=64', 'ngram_dropout=0',
    'recon_loss_weight=0.1', 'next_latent_loss_weight=0.25',
    # without quantized targets: rounding decides between two of equal distance
    'prophet_loss_weight=0.1', 'arrangement=parallel', 'compressor=conv', 'autoencoder=True', 'merge=attention',
    'merge_window=1',
)  # fmt: skip
TWO = ('--nproc_per_node', 2, ROOT / 'train.py')
THREADS = dict(OMP_NUM_THREADS='1')


def run_two(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    return run(*TWO, *args, module='torch.distributed.run', **{'ACCELERATE_USE_CPU': 'true', **THREADS, **env})


@pytest.fixture(scope='module')
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('texts')
    words = ['the', 'old', 'king', 'sees', 'a', 'young', 'fox', 'and', 'hears', 'the', 'wise', 'queen']
    for i in range(400):
        (folder / f'{i:03}.txt').write_text(' '.join(words[j * (i % 7 + 1) % 11] for j in range(i % 29 + 3)))
    return folder


@pytest.fixture(scope='module')
def one(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('one') / 'run'
    # in one process, the second batch follows the first
    result = run('--data', texts, '--out', out, *SETTINGS, '--grad-accum', 2, **THREADS)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope='module')
def two(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('two') / 'run'
    result = run_two('--data', texts, '--out', out, *SETTINGS)
    assert result.returncode == 0, result.stderr
    return out


def assert_close(ours: Path, theirs: Path) -> None:
    for name in ('model.safetensors', 'training.safetensors'):
        a, b = (load_file(folder / 'checkpoint-20' / name) for folder in (ours, theirs))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-5)
    rows = [list(csv.DictReader((folder / 'metrics.csv').open())) for folder in (ours, theirs)]
    for mine, its in zip(*rows, strict=True):
        for key in set(mine) - {'minutes'}:
            assert mine[key] == its[key] or float(mine[key]) == pytest.approx(float(its[key]), abs=1e-5)


def test_two_processes_equal_one(one: Path, two: Path) -> None:
    assert_close(two, one)
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())


def test_one_goes_on_from_two_and_two_from_one(one: Path, two: Path, tmp_path: Path) -> None:
    result = run('--resume', two / 'checkpoint-10', '--out', tmp_path / 'one', **THREADS)
    assert result.returncode == 0, result.stderr
    assert_close(tmp_path / 'one', one)
    result = run_two('--resume', one / 'checkpoint-10', '--out', tmp_path / 'two', '--grad-accum', 1)
    assert result.returncode == 0, result.stderr
    assert_close(tmp_path / 'two', one)


def test_segments_are_handed_from_one_process_to_two(texts: Path, tmp_path: Path) -> None:
    settings = (*SETTINGS, '--segment-length', 16)
    result = run('--data', texts, '--out', tmp_path / 'one', *settings, '--grad-accum', 2, **THREADS)
    assert result.returncode == 0, result.stderr
    # within a stretch of four segments
    record = json.loads((tmp_path / 'one' / 'checkpoint-10' / 'training.json').read_text())
    assert record['progress']['position'] == 32
    result = run_two('--resume', tmp_path / 'one' / 'checkpoint-10', '--out', tmp_path / 'two', '--grad-accum', 1)
    assert result.returncode == 0, result.stderr
    assert_close(tmp_path / 'two', tmp_path / 'one')


def test_told_to_stop_all_processes_save_one_checkpoint(one: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / 'run'
    command = run_command(*TWO, '--data', texts, '--out', out, *SETTINGS, module='torch.distributed.run')
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', **THREADS}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env)
    while not (out / 'metrics.csv').exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert 'and saved; continue with:' in said
    assert len(list(out.glob('checkpoint-*'))) == 1
    result = run_two('--resume', out)
    assert result.returncode == 0, result.stderr
    assert_close(out, one)


def test_processes_that_do_not_find_each_other_are_told(texts: Path, tmp_path: Path) -> None:
    result = run_two('--data', texts, '--out', tmp_path / 'run', *SETTINGS, ACCELERATE_USE_CPU='false')
    assert result.returncode != 0
    assert '2 processes were launched and 1 found each other' in result.stderr
    assert not (tmp_path / 'run').exists()


SHARDED = textwrap.dedent(
    """
    import sys

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from simple_hierarchical_transformer import HierarchicalTransformer
    from simple_hierarchical_transformer.block import HierarchicalBlock
    from simple_hierarchical_transformer.training import run_tensors
    from simple_hierarchical_transformer.training.optim import WeightAverage, build_optimizer
    from simple_hierarchical_transformer.training.sharded import full

    dist.init_process_group('gloo')
    rank, world = dist.get_rank(), dist.get_world_size()
    folder = sys.argv[1]

    def build(shard):
        torch.manual_seed(0)
        model = HierarchicalTransformer(
            num_tokens=64, dim=(16, 24), depth=2, heads=2, dim_head=8, seq_len=64, hierarchies=(1, 4),
            hierarchical_stride=(1, 4), window_sizes=(8, None), gradient_checkpointing=checkpointing,
            ngrams=(2, 3), ngram_rows=32,
        )
        if shard:
            mesh = init_device_mesh('cpu', (world,))
            # each block by itself, and the rest together: losses read weights from outside their modules
            for block in [module for module in model.modules() if isinstance(module, HierarchicalBlock)]:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = build_optimizer(model, optimizer_name, lr=3e-3, weight_decay=0.1, sparse=not shard)
        return model, optimizer, WeightAverage(model, 0.9)

    def learn(model, optimizer, average, steps, part, parts):
        norms = []
        for step in steps:
            ids = torch.randint(1, 64, (4, 33), generator=torch.Generator().manual_seed(step))
            ids[0, 5:] = 0
            loss, _ = model(ids.chunk(parts)[part], return_loss=True, counts=model.count_targets(ids))
            (loss * parts).backward()
            dense = [p for name, p in model.named_parameters() if name != 'ngram_emb.weight']
            norms.append(float(full(torch.nn.utils.clip_grad_norm_(dense, 1.0))))
            optimizer.step()
            optimizer.zero_grad()
            average.update()
        return norms

    def gather(model, optimizer, average):
        # scoring first leaves full weights behind
        with average.applied(), torch.no_grad():
            model(torch.ones(1, 8, dtype=torch.long))
        weights, tensors = run_tensors.gather_all(model, optimizer, average, [], lambda x: x)
        return {k: v.clone() for k, v in weights.items()}, {k: v.clone() for k, v in tensors.items()}

    def compare(ours, theirs):
        for mine, its in zip(ours, theirs, strict=True):
            assert mine.keys() == its.keys()
            for key in its:
                # updates of rows are normalised, so rounding errors of tiny gradients grow with them
                atol = 1e-4 if 'ngram_emb' in key else 1e-5
                torch.testing.assert_close(mine[key], its[key], rtol=0, atol=atol)

    for optimizer_name, checkpointing in (('adamw', True), ('muon', False)):
        spread, single = build(True), build(False)
        for begin in (0, 5):
            norms = learn(*spread, range(begin, begin + 5), rank, world)
            torch.testing.assert_close(norms, learn(*single, range(begin, begin + 5), 0, 1), rtol=1e-5, atol=0)
            for model, _, average in (spread, single):
                with average.applied(), torch.no_grad():
                    model(torch.ones(1, 8, dtype=torch.long))
        compare(gather(*spread), gather(*single))

        # a checkpoint of one process resumes on two, and the other way round
        from_single, from_spread = build(True), build(False)
        for again, held in ((from_single, single), (from_spread, spread)):
            weights, tensors = gather(*held)
            run_tensors.restore_all(*again, weights, tensors)
            again[2].updates = held[2].updates
            compare(gather(*again), (weights, tensors))
        learn(*from_single, range(10, 15), rank, world)
        learn(*from_spread, range(10, 15), 0, 1)
        compare(gather(*from_single), gather(*from_spread))

        model = from_single[0]
        prompt = torch.ones(1, 4, dtype=torch.long)
        texts = [each.generate(prompt, 8, temperature=0.0) for each in (model, from_spread[0])]
        assert torch.equal(*texts)
        weights, _ = gather(*from_single)
        if rank == 0:
            model.save_pretrained(f'{folder}/{optimizer_name}', state_dict=weights)
            loaded = HierarchicalTransformer.from_pretrained(f'{folder}/{optimizer_name}')
            compare([dict(loaded.state_dict())], [weights])
            print(f'all the same with {optimizer_name}', flush=True)
    dist.barrier()
    dist.destroy_process_group()
    """
)


@pytest.fixture(scope='module')
def sharded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the script says. One launch runs it with both optimizers, since starting processes is slow."""
    folder = tmp_path_factory.mktemp('sharded')
    script = folder / 'sharded.py'
    script.write_text(SHARDED)
    result = run('--nproc_per_node', 2, script, folder / 'models', module='torch.distributed.run', **THREADS)
    return result.stdout + result.stderr


# AdamW with checkpointing, Muon without
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_model_spread_over_processes_equals_one_that_is_whole(optimizer: str, sharded: str) -> None:
    assert f'all the same with {optimizer}' in sharded, sharded


@pytest.mark.parametrize('name', sorted(path.name for path in (ROOT / 'launch').glob('*.yaml')))
def test_the_launch_files_are_ones_that_accelerate_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as `accelerate launch` reads them, up to where it would start processes."""
    config = ('--config_file', str(ROOT / 'launch' / name))
    machine = ('--machine_rank', '0', '--main_process_ip', '127.0.0.1')
    args = launch_command_parser().parse_args([*config, *machine, 'train.py'])
    args, _, _ = _validate_launch_command(args)
    assert args.multi_gpu or args.use_fsdp
    env = prepare_multi_gpu_env(args)
    assert env['ACCELERATE_MIXED_PRECISION'] == 'bf16'
    if name == 'fsdp2.yaml':
        for key, value in env.items():
            if key.startswith('FSDP_'):
                monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        model = HierarchicalTransformer(num_tokens=8, dim=8, depth=2, hierarchies=(1, 2))
        plugin.set_auto_wrap_policy(model)
        policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
        assert plugin.fsdp_version == 2
        spread = [module for module in model.modules() if policy and policy(module)]
        assert spread == [block for layer in model.layers for block in layer]

"""How fast a model writes, beside the published package 0.4.0 with the same weights.

    python benchmarks/generate.py --published PYTHON

PYTHON is an interpreter with simple-hierarchical-transformer==0.4.0. Each package runs in a process of its own; they
take turns (A B A B ...), and medians are reported. Writes a table to benchmarks/generate.md. Without --published, only
this package is measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from side_by_side import Worker, machine, serve, timed

HERE = Path(__file__).resolve().parent

# name: constructor arguments, context
CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    'README example 1': (
        dict(num_tokens=20000, dim=512, depth=6, seq_len=2048, hierarchies=(1, 2, 8), window_sizes=(32, 64, None)),
        2000,
    ),
    'README plain GPT': (dict(num_tokens=20000, dim=512, depth=8, seq_len=2048), 2000),
    'README example 3': (
        dict(
            num_tokens=256,
            dim=(128, 256, 512, 1024),
            depth=8,
            seq_len=1024,
            ff_mult=(2, 2, 4, 4),
            dim_head=(16, 32, 64, 64),
            heads=(2, 4, 8, 8),
            hierarchies=(1, 2, 4, 16),
            hierarchical_stride=(1, 1, 1, 8),
            window_sizes=(16, 32, 64, None),
        ),
        1000,
    ),
    "published train.py's model": (
        dict(num_tokens=256, dim=1024, depth=8, seq_len=2048, hierarchies=(1, 2), window_sizes=(32, 64)),
        2000,
    ),
}
WINDOWS_ONLY = dict(num_tokens=256, dim=256, depth=4, seq_len=2048, hierarchies=(1, 4), window_sizes=(64, 64))


def prompt_for(config: dict[str, Any], context: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, config['num_tokens'], (batch, context), generator=generator)


# workers: one package each, asked over standard input


def worker(weights: str) -> None:
    from simple_hierarchical_transformer import HierarchicalTransformer

    model: Any = None

    def handle(do: str, config: str, bytes: int = 0) -> Any:
        nonlocal model
        settings, context = CONFIGS[config]
        prompt = prompt_for(settings, context)
        if do == 'build':
            torch.manual_seed(0)
            model = HierarchicalTransformer(**settings).eval()
            if os.path.exists(weights):
                model.load_state_dict(load_file(weights))
            else:
                save_file(model.state_dict(), weights)
            return None
        base, first = timed(lambda: model.generate(prompt, 1, temperature=0.0))
        longer, _ = timed(lambda: model.generate(prompt, 1 + bytes, temperature=0.0))
        return dict(seconds=(longer - base) / bytes, first=int(first[0, 0]))

    serve(handle)


def bandwidth() -> float:
    """Bytes a second that reading a large tensor of float32 reaches."""
    large = torch.ones(1 << 28)
    large.sum()
    return large.nbytes / statistics.median(timed(large.sum)[0] for _ in range(5))


def bytes_a_step(model: Any, state: Any) -> float:
    """Weights and cache that one step reads: levels of a stride only each stride-th time, one phase at a time."""
    total = 0.0
    for name, parameter in model.named_parameters():
        if name.startswith(('token_emb', 'latent_dynamics', 'chunk_summarizers')) or 'to_recon' in name:
            continue
        level = None
        if name.startswith(('layers', 'compressors', 'post_token_emb_norms', 'norms')):
            level = model.levels[int(name.split('.')[2 if name.startswith('layers') else 1])]
        total += parameter.nbytes / (level.stride if level else 1)
    for layer in state.blocks:
        for level, block in zip(model.levels, layer, strict=True):
            total += sum(t.nbytes for t in block.mixer) / level.phases / level.stride
    return total


@torch.no_grad()
def against_the_floor(name: str) -> dict[str, float]:
    """This package alone: prefill, a step, the floor that memory sets, a batch of 16."""
    from simple_hierarchical_transformer import HierarchicalTransformer

    config, context = CONFIGS[name]
    torch.manual_seed(0)
    model = HierarchicalTransformer(**config).eval()
    measured: dict[str, list[float]] = {'forward': [], 'prefill': [], 'step': [], 'step16': []}
    prompt, prompts = prompt_for(config, context), prompt_for(config, 64, 16)
    model(prompt)

    for _ in range(5):
        measured['forward'].append(timed(lambda: model(prompt))[0])
        seconds, (_, state) = timed(lambda: model(prompt, return_state=True))
        measured['prefill'].append(seconds)
        _, many = model(prompts, return_state=True)
        for kind, at, ids in (('step', state, prompt[:, :1]), ('step16', many, prompts[:, :1])):
            for i in range(20):
                seconds, (_, at) = timed(lambda: model(ids, state=at, return_state=True))  # noqa: B023
                if i >= 4:
                    measured[kind].append(seconds)
    median = {kind: statistics.median(values) for kind, values in measured.items()}
    return dict(**median, read=bytes_a_step(model, state), state=state.nbytes, bandwidth=bandwidth())


@torch.no_grad()
def far_positions() -> dict[str, float]:
    """Windows only: a step at position 1,024 and one at 65,536, taken in turns."""
    from simple_hierarchical_transformer import HierarchicalTransformer

    torch.manual_seed(0)
    model = HierarchicalTransformer(**WINDOWS_ONLY).eval()
    states = {}
    for position in (1024, 65536):
        state = None
        for _ in range(position // 1024):
            _, state = model(prompt_for(WINDOWS_ONLY, 1024), state=state, return_state=True)
        states[position] = state
    sizes = {position: state.nbytes for position, state in states.items()}
    seconds: dict[int, list[float]] = {position: [] for position in states}
    ids = torch.ones(1, 1, dtype=torch.long)
    for _ in range(200):
        for position, state in states.items():
            spent, (_, states[position]) = timed(lambda: model(ids, state=state, return_state=True))  # noqa: B023
            seconds[position].append(spent)
    near, far = (statistics.median(values[20:]) for values in seconds.values())
    return dict(near=near, far=far, near_bytes=sizes[1024], far_bytes=sizes[65536])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--published', metavar='PYTHON', help='an interpreter that has the published package 0.4.0')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return

    command = 'python benchmarks/generate.py' + ' --published PYTHON' * bool(args.published)
    lines = [
        '# Generation',
        '',
        f'`{command}`, {machine()}. The machine is shared: ratios are of interleaved runs, medians.',
        '',
    ]

    if args.published:
        lines += [
            '| model, batch 1 | context | published 0.4.0, s a byte | here, s a byte | ratio |',
            '|---|---|---|---|---|',
        ]
        for name, (_, context) in CONFIGS.items():
            with tempfile.TemporaryDirectory() as folder:
                weights = os.path.join(folder, 'weights.safetensors')
                workers = {
                    who: Worker(python, __file__, '--worker', weights)
                    for who, python in (('published', args.published), ('here', sys.executable))
                }
                for each in workers.values():
                    each.ask(do='build', config=name)
                spent: dict[str, list[float]] = {who: [] for who in workers}
                first: dict[str, int] = {}
                for _ in range(args.rounds):
                    for who, each in workers.items():
                        answer = each.ask(do='generate', config=name, bytes=1 if who == 'published' else 24)
                        spent[who].append(answer['seconds'])
                        first[who] = answer['first']
                for each in workers.values():
                    each.close()
            if first['here'] != first['published']:
                raise RuntimeError(f'{name}: the two packages write different bytes')
            theirs, ours = (statistics.median(values) for values in spent.values())
            lines.append(f'| {name} | {context:,} | {theirs:.2f} | {ours:.4f} | **{theirs / ours:.0f}x** |')
            print(lines[-1], flush=True)
        lines.append('')

    lines += [
        'What a step has to read (weights and cache) over the bandwidth measured beside it is its floor.',
        '',
        '| model | forward, s | prefill, s | step, ms | read, MB | GB/s | floor, ms | step / floor | batch 16 over 1 |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    for name in CONFIGS:
        m = against_the_floor(name)
        floor = m['read'] / m['bandwidth']
        lines.append(
            f'| {name} | {m["forward"]:.2f} | {m["prefill"]:.2f} | {1e3 * m["step"]:.1f} | {m["read"] / 1e6:.0f} '
            f'| {m["bandwidth"] / 1e9:.1f} | {1e3 * floor:.1f} | {m["step"] / floor:.1f} '
            f'| {16 * m["step"] / m["step16"]:.1f}x |'
        )
        print(lines[-1], flush=True)

    far = far_positions()
    lines += [
        '',
        f'Windows only ({", ".join(f"{key} {value}" for key, value in WINDOWS_ONLY.items())}): '
        f'{1e3 * far["near"]:.2f} ms a byte at position 1,024 and {1e3 * far["far"]:.2f} ms at 65,536, '
        f'{far["far"] / far["near"]:.2f}x; '
        f'the state takes {far["near_bytes"]:,} and {far["far_bytes"]:,} bytes.',
    ]
    print(lines[-1])
    (HERE / 'generate.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()

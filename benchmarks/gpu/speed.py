"""Training speed on one GPU: bytes per second, share of the measured bf16 peak, memory, and the phases of a step.

    python benchmarks/gpu/speed.py --short                                    four minutes: the most important models
    python benchmarks/gpu/speed.py --sections main                            also without tables
    python benchmarks/gpu/speed.py --sections contexts --modes compiled --models 'flat, window 64' 'flat, full'
    python benchmarks/gpu/speed.py --sections widths
    python benchmarks/gpu/speed.py --sections published --published FOLDER    FOLDER has the published package 0.4.0

All models of a section are set up first, and then timed in turns. A ratio is the median of the ratios of the rounds.
Writes speed.json to the folder $OUT.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == '__main__':
    # this checkout in the place of the folder of the script, whose profile.py would hide that of the standard library
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch._dynamo

from benchmarks.common.machine import ROOT
from benchmarks.common.models import PUBLISHED, PUBLISHED_TRAIN, TOY
from benchmarks.common.tables import aligned
from benchmarks.common.workers import Worker
from benchmarks.gpu.bench import GIGABYTE, Bench, new_gpu_parser, parse_args
from benchmarks.gpu.device import allocated, free, peak_allocated, reset_peak
from benchmarks.gpu.models import (
    CONTEXT,
    HEAD,
    MODELS,
    MODES,
    PLAIN,
    PRESET,
    ROWS,
    WIDTH,
    build,
    parameter_counts,
    step_flops,
)
from benchmarks.gpu.trainer import PHASES, Trainer, alternate, medians, trainer_of
from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training import cost
from simple_hierarchical_transformer.training.optim import build_optimizer

SECTIONS = ('main', 'published', 'contexts', 'widths')
# the most important first, because there may not be time for all
TARGETS = ['flat, window 64', 'preset', PLAIN, 'flat, full']
CONTEXTS, WIDTHS = [1024, 4096, 8192, 16384, 65536], [512, 768, 1024, 1280, 1536]
# bytes of a batch, the same for all contexts
BATCH_BYTES = 65536
# quantities and pairs of models: the first divided by the second
RATIOS = {
    'share': [('preset', 'flat, window 64'), ('preset, no tables', 'flat, window 64, no tables')],
    'bytes_a_second': [
        ('preset', 'flat, window 64'),
        ('flat, window 64', 'flat, full'),
        ('flat, window 64, no tables', 'flat, full, no tables'),
        ('flat, full, no tables', PLAIN),
        ('flat, full', PLAIN),
        ('preset', PLAIN),
    ],
}
# batch sizes of the published models, as in the README and train.py of that package
PUBLISHED_ROWS = {name: 4 if name == PUBLISHED_TRAIN else 1 for name in PUBLISHED}
# seconds to allow for setting up the first model of a kind
EXPECTED = {
    'eager': 15.0, 'compiled': 25.0, 'whole': 90.0, 'plain, eager': 5.0, 'plain, compiled': 30.0, 'plain, whole': 30.0,
    'published': 40.0,
}  # fmt: skip


def set_up(
    bench: Bench, args: argparse.Namespace, name: str, mode: str, shape: dict[str, int]
) -> tuple[Trainer, dict[str, Any]]:
    """A trainer after its first steps, and its figures so far. The times come from only a few steps."""
    context, rows = shape['context'], shape['rows']
    free(bench.device)
    before = allocated(bench.device)
    reset_peak(bench.device)
    trainer = trainer_of(
        bench, name, how=mode, compile_mode=args.compile_mode, context=context, rows=rows, width=shape['width']
    )
    model = trainer.model
    counters = torch._dynamo.utils.counters
    counters.clear()
    found: dict[str, Any] = dict(mode=mode, model=name, **shape, **parameter_counts(model), **trainer.warm_up())
    found |= dict(
        # without the memory of other models of the section
        memory=peak_allocated(bench.device) - before,
        flops=rows * step_flops(model, context),
        graphs=counters['stats']['unique_graphs'],
        graph_breaks=sum(counters['graph_break'].values()),
    )
    if mode == 'eager' and isinstance(model, HierarchicalTransformer):
        found['memory_estimate'] = memory_estimate(name, shape, bench.toy)
    return trainer, rated(found, trainer.timed(3), bench.peak)


def rated(found: dict[str, Any], times: dict[str, float], peak: float) -> dict[str, Any]:
    """`found` with the times of a step, and the speed that follows from them."""
    speed = dict(
        bytes_a_second=found['rows'] * found['context'] / times['seconds'],
        share=found['flops'] / times['seconds'] / peak,
    )
    return found | times | speed


def memory_estimate(name: str, shape: dict[str, int], toy: bool) -> int:
    """The estimate of `train.py --dry-run`, in bytes."""
    with torch.device('meta'):
        model = build(name, shape['context'], shape['width'], toy)
    optimizer = build_optimizer(model, PRESET['optimizer'], lr=1e-3, weight_decay=0.1, sparse=False)
    return sum(cost.step_memory(model, optimizer, rows=shape['rows'], length=shape['context'], half=True).values())


# the models of a section share their code, and by default the ninth graph of a function is not compiled
@torch._dynamo.config.patch(recompile_limit=64)
def section(bench: Bench, args: argparse.Namespace, title: str, models: Sequence[str], **shape: int) -> str:
    """Measures models at one shape. Returns the table."""
    contestants = [(name, mode) for mode in args.modes for name in models]
    rounds, seconds = (2, 0.0) if bench.toy else (7, 0.3)
    held: dict[str, dict[str, Any]] = {}
    trainers: dict[str, Trainer] = {}
    result: dict[str, Any] = dict(models=held, ratios={}, in_turns=False)
    bench.found.setdefault('sections', {})[title] = result
    for name, mode in contestants:
        kind = f'plain, {mode}' if name == PLAIN else mode
        ready = bench.part(
            f'{title}: {name}, {mode}', lambda name=name, mode=mode: set_up(bench, args, name, mode, shape), kind=kind,
            expected=EXPECTED[kind], reserve=(1.0 + rounds * seconds) * (len(held) + 1),
        )  # fmt: skip
        if ready:
            trainers[f'{name}, {mode}'], held[f'{name}, {mode}'] = ready
        # only `trainers` keeps a model alive
        del ready
        bench.save()
    times = bench.part(f'{title}: timing', lambda: alternate(trainers, rounds, seconds))
    if times:
        held |= {key: rated(held[key], medians(each), bench.peak) for key, each in times.items()}
        result |= dict(ratios=ratios_of(held, times), in_turns=True)
        bench.save()
    trainers.clear()
    # the next shape is compiled anew
    torch._dynamo.reset()
    free(bench.device)
    return '\n\n'.join(filter(None, (speed_table(title, list(held.values())), ratio_table(result['ratios']))))


def ratios_of(held: dict[str, dict[str, Any]], times: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Ratios of two models: the median over the rounds."""

    def ratio(what: str, a: str, b: str) -> float:
        # a ratio of shares compares operations per second
        size = {key: held[key]['flops' if what == 'share' else 'rows'] for key in (a, b)}
        scale = size[a] / size[b]
        return statistics.median(scale * y['seconds'] / x['seconds'] for x, y in zip(times[a], times[b], strict=True))

    pairs = [
        (what, f'{a}, {mode}', f'{b}, {mode}', f'{what} of {a} / {b}, {mode}')
        for mode in MODES
        for what, names in RATIOS.items()
        for a, b in names
    ]
    pairs += [
        ('bytes_a_second', f'{name}, {mode}', f'{name}, {other}', f'bytes_a_second of {name}, {mode} / {other}')
        for name in MODELS
        for mode, other in (('compiled', 'eager'), ('whole', 'compiled'))
    ]
    return {label: ratio(what, a, b) for what, a, b, label in pairs if a in times and b in times}


def published(bench: Bench, args: argparse.Namespace) -> str:
    """The published package and this one in turns, on the models of that package."""
    if args.published is None:
        bench.found['left_out'].append('published: --published was not given')
        return ''
    rounds, steps = (1, 1) if bench.toy else (5, 5)
    folders = {'published': args.published.resolve(), 'here': ROOT}
    environment = dict(CUDA_VISIBLE_DEVICES='') if bench.toy else {}
    workers = {
        who: Worker('benchmarks.gpu.published', 'main', package=folder, **environment)
        for who, folder in folders.items()
    }

    def measure(name: str, half: bool, rows: int) -> dict[str, Any]:
        changes = TOY if bench.toy else {}
        found: dict[str, list[dict[str, float]]] = {who: [] for who in workers}
        for _ in range(rounds):
            for who, worker in workers.items():
                answer = worker.ask(name=name, half=half, rows=rows, steps=steps, changes=changes)
                if 'error' in answer:
                    raise RuntimeError(f'{who}: {answer["error"]}')
                found[who].append(answer)
        ratios = [a['seconds'] / b['seconds'] for a, b in zip(found['published'], found['here'], strict=True)]
        middles = {who: medians(each) for who, each in found.items()}
        return dict(rows=rows, ratio=statistics.median(ratios), **middles)

    done: dict[str, Any] = {}
    try:
        for half in (True, False):
            for name, rows in PUBLISHED_ROWS.items():
                label = f'{name}, {"bf16" if half else "float32"}'
                found = bench.part(
                    f'published: {label}', lambda name=name, half=half, rows=rows: measure(name, half, rows),
                    kind='published', expected=EXPECTED['published'],
                )  # fmt: skip
                if found:
                    done[label] = found
    finally:
        for worker in workers.values():
            worker.close()
    bench.found['published'] = done
    bench.save()
    head = ('forward and backward', 'rows', 'published, ms', 'here, ms', 'ratio', 'published, GB', 'here, GB')
    return aligned(
        head,
        [
            (
                name,
                found['rows'],
                *(f'{1000 * found[who]["seconds"]:.1f}' for who in folders),
                f'{found["ratio"]:.2f}x',
                *(f'{found[who]["memory"] / GIGABYTE:.2f}' for who in folders),
            )
            for name, found in done.items()
        ],
    )


def speed_table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    head = (title, 'parameters', 'kB/s', 'of the peak', 'ms a step', *PHASES, 'GB', 'estimate', 'first step')
    return aligned(
        head,
        [
            (
                f'{row["model"]}, {row["mode"]}',
                f'{row["parameters"] / 1e6:.1f} M',
                f'{row["bytes_a_second"] / 1e3:.1f}',
                f'{100 * row["share"]:.1f} %',
                f'{1000 * row["seconds"]:.1f}',
                *(f'{1000 * row[phase]:.1f}' for phase in PHASES),
                f'{row["memory"] / GIGABYTE:.2f}',
                f'{row["memory_estimate"] / GIGABYTE:.2f}' if 'memory_estimate' in row else '',
                f'{row["first_step_seconds"]:.1f} s',
            )
            for row in rows
        ],
    )


def ratio_table(ratios: dict[str, float]) -> str:
    return aligned(('ratio', ''), [(label.replace('_', ' '), f'{value:.2f}') for label, value in ratios.items()])


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = new_gpu_parser(__doc__)
    parser.add_argument(
        '--short', action='store_true', help='only the most important models of the main section, in 4 minutes'
    )
    parser.add_argument('--sections', nargs='+', choices=SECTIONS, default=SECTIONS)
    parser.add_argument(
        '--models', nargs='+', choices=MODELS, help='default: all in the section main, the most important elsewhere'
    )
    parser.add_argument('--modes', nargs='+', choices=MODES, default=['eager', 'compiled'])
    parser.add_argument('--contexts', nargs='+', type=int, default=CONTEXTS)
    parser.add_argument('--widths', nargs='+', type=int, default=WIDTHS, help=f'multiples of {HEAD}')
    parser.add_argument('--compile-mode', default='default', choices=('default', 'max-autotune-no-cudagraphs'))
    parser.add_argument('--published', type=Path, metavar='FOLDER', help='folder of the published package 0.4.0')
    args, given = parse_args(parser, argv)
    if wrong := [width for width in args.widths if width < HEAD or width % HEAD]:
        parser.error(f'--widths: must be multiples of {HEAD}, got {wrong[0]}')
    if wrong := [context for context in args.contexts if context < 1 or BATCH_BYTES % context]:
        parser.error(f'--contexts: must divide the {BATCH_BYTES} bytes of a batch, got {wrong[0]}')
    if args.published and not (args.published / 'simple_hierarchical_transformer').is_dir():
        parser.error(f'--published: {args.published} has no folder simple_hierarchical_transformer')
    if args.short:
        args.sections, args.models = ['main'], args.models or TARGETS
        args.minutes = min(args.minutes, 4.0)
    return args, given


def main(argv: Sequence[str] | None = None) -> None:
    args, given = parse(argv)
    bench = Bench('speed', args, given)
    bench.measure_card()
    size, rows = (256, 2) if bench.toy else (CONTEXT, ROWS)
    tables = []
    if 'main' in args.sections:
        title = f'width {WIDTH}, {rows} x {size:,}'
        tables.append(section(bench, args, title, args.models or list(MODELS), width=WIDTH, context=size, rows=rows))
    if 'published' in args.sections:
        tables.append(published(bench, args))
    models = args.models or TARGETS
    if 'contexts' in args.sections:
        for context in args.contexts:
            many, context = (2, max(context // 64, 16)) if bench.toy else (BATCH_BYTES // context, context)
            title = f'width {WIDTH}, {many} x {context:,}'
            tables.append(section(bench, args, title, models, width=WIDTH, context=context, rows=many))
    if 'widths' in args.sections:
        for width in args.widths:
            title = f'width {width}, {rows} x {size:,}'
            tables.append(section(bench, args, title, models, width=width, context=size, rows=rows))
    about = bench.found['about']
    limits = f'bf16 peak {about["bf16_peak"] / 1e12:.1f} TFLOP/s, copies {about["copy_rate"] / 1e12:.2f} TB/s, measured'
    bench.close(*tables, limits)


if __name__ == '__main__':
    main()

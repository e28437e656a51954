"""Rung 0, in about five minutes: speed and profile first, then correctness, decoding, compiling."""
import copy, gc, json, os, sys, time, traceback, warnings
import torch
import torch.nn.functional as F
warnings.simplefilter('ignore')
from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training.optim import build_optimizer
from simple_hierarchical_transformer.training.settings import PRESETS
from simple_hierarchical_transformer.training.cost import step_flops
from simple_hierarchical_transformer.mixers.attention import attend_window
from simple_hierarchical_transformer.losses import linear_cross_entropy
from torch.profiler import profile, record_function, ProfilerActivity

TOY = '--toy' in sys.argv
device = torch.device('cpu' if TOY else 'cuda')
out = os.environ.get('OUT', '.')
found = {'card': 'cpu' if TOY else torch.cuda.get_device_name(), 'torch': torch.__version__, 'speed': {}, 'micro': {}, 'right': {}, 'decode': {}}
began = time.time()
torch.backends.cuda.matmul.allow_tf32 = False; torch.backends.cudnn.allow_tf32 = False

def keep(): json.dump(found, open(f'{out}/look.json', 'w'), indent=1)
def sync():
    if not TOY: torch.cuda.synchronize()
def spent(): return time.time() - began

def timed(fn, seconds=.4, least=3):
    fn(); fn(); sync(); t = time.time(); k = 0
    while time.time() - t < seconds or k < least: fn(); sync(); k += 1
    return (time.time() - t) / k

size = 512 if TOY else 8192
x = torch.randn(size, size, device=device, dtype=torch.float32 if TOY else torch.bfloat16)
peak = 2 * size ** 3 / timed(lambda: x @ x); found['peak'] = peak
big = torch.randn(1 << (20 if TOY else 28), device=device); other = torch.empty_like(big)
found['copy'] = 2 * big.numel() * 4 / timed(lambda: other.copy_(big)); del x, big, other
print('peak', peak / 1e12, 'copy', found['copy'] / 1e12, f'{spent():.0f} s', flush=True)

small = dict(dim=32, depth=(2, 2), heads=2, dim_head=16) if TOY else {}
preset = {**PRESETS['gpu']['model'], **small}; flat = {**preset, 'hierarchies': 1, 'hierarchical_stride': 1}
for k, v in list(flat.items()):
    if isinstance(v, tuple) and k in ('dim', 'depth', 'heads', 'dim_head', 'ff_mult', 'window_sizes'): flat[k] = v[0]
bare = {k: v for k, v in flat.items() if 'ngram' not in k and 'recall' not in k}
found['configs'] = {k: str(v) for k, v in dict(preset=preset, flat=flat, bare=bare).items()}

def make(model, length):
    torch.manual_seed(0)
    return HierarchicalTransformer(num_tokens=256, ignore_index=-1, recon_ignore_index=-1, seq_len=length, **model).to(device)

def measure(name, model, length, rows, seconds=3., prof=False, compiled=False, backward_only=False):
    try:
        if TOY: length, rows, seconds = 256, 2, .3
        if not TOY: torch.cuda.reset_peak_memory_stats()
        m = make(model, length)
        weights = sum(p.numel() for k, p in m.named_parameters() if 'ngram_emb' not in k and 'recall_emb' not in k)
        optimizer = build_optimizer(m, 'muon', lr=1e-3, table_lr=1e-3, weight_decay=0., device=device, sparse=not compiled)
        call = torch.compile(m) if compiled else m
        parts = {'forward': 0., 'backward': 0., 'optimizer': 0.}
        def step(measure_parts=False):
            marks = []
            def mark():
                if measure_parts: sync(); marks.append(time.time())
            mark()
            ids = torch.randint(0, 256, (rows, length + 1), device=device)
            with record_function('## forward'), torch.autocast(device.type, dtype=torch.bfloat16): loss, _ = call(ids, return_loss=True)
            mark()
            with record_function('## backward'): loss.backward()
            mark()
            with record_function('## optimizer'): optimizer.step(); optimizer.zero_grad()
            mark()
            for k, a, b in zip(parts, marks, marks[1:]): parts[k] += (b - a) / 3
            return loss
        start = time.time(); step(); sync(); first = time.time() - start
        step(); sync(); start = time.time(); k = 0
        while time.time() - start < seconds or k < 2: step(); k += 1
        host = (time.time() - start) / k
        sync(); each = (time.time() - start) / k
        for _ in range(3): step(True)
        row = dict(parameters=weights, first=first, seconds=each, host=host, **parts, bytes_a_second=rows * length / each, share=rows * step_flops(m, length) / each / peak, memory=0 if TOY else torch.cuda.max_memory_allocated() / 1e9)
        found['speed'][name] = row
        print(name, {k: round(v, 4) for k, v in row.items()}, f'{spent():.0f} s', flush=True)
        if prof:
            with profile(activities=[ProfilerActivity.CPU] + ([] if TOY else [ProfilerActivity.CUDA]), record_shapes=True) as p:
                step(); step(); sync()
            label = name.replace(' ', '-').replace(',', '')
            dev = 'self_cpu_time_total' if TOY else 'self_device_time_total'
            with open(f'{out}/profile-{label}.txt', 'w') as f:
                f.write('TWO STEPS\n' + p.key_averages().table(sort_by=dev, row_limit=70, max_name_column_width=110))
                f.write('\n\nBY CPU\n' + p.key_averages().table(sort_by='self_cpu_time_total', row_limit=40, max_name_column_width=70))
                f.write('\n\nBY SHAPE\n' + p.key_averages(group_by_input_shape=True).table(sort_by=dev, row_limit=70, max_name_column_width=70, max_shapes_column_width=120))
            p.export_chrome_trace(f'{out}/trace-{label}.json'); os.system(f'gzip -9 {out}/trace-{label}.json')
            if os.path.getsize(f'{out}/trace-{label}.json.gz') > 15e6: os.remove(f'{out}/trace-{label}.json.gz')
            averages = p.key_averages()
            row['launches'] = sum(e.count for e in averages if 'LaunchKernel' in e.key) / 2
            row['syncs'] = {e.key: e.count / 2 for e in averages if 'Synchronize' in e.key or e.key in ('aten::item', 'aten::_local_scalar_dense', 'aten::nonzero')}
            print(row['launches'], row['syncs'], f'{spent():.0f} s', flush=True)
    except Exception as error:
        found['speed'][name] = f'{type(error).__name__}: {str(error)[:300]}'; traceback.print_exc(limit=-8); sys.stderr.flush()
    gc.collect()
    if not TOY: torch.cuda.empty_cache()
    keep()

measure('preset', preset, 8192, 4, prof=True)
measure('flat w64 bare', bare, 8192, 4, prof=True)
measure('flat w64 tables', flat, 8192, 4)
measure('flat full bare', {**bare, 'window_sizes': None}, 8192, 4)
measure('flat w64 sdpa bare', {**bare, 'attn_backend': 'sdpa'}, 8192, 4)
measure('preset at 65536', preset, 65536, 1, seconds=2)
measure('flat w64 bare at 65536', bare, 65536, 1, seconds=2)

# micro
half = torch.float32 if TOY else torch.bfloat16
def micro(name, fn):
    try: found['micro'][name] = timed(fn); print(name, found['micro'][name] * 1e3, 'ms', flush=True)
    except Exception as error: found['micro'][name] = f'{type(error).__name__}: {str(error)[:300]}'; print(name, found['micro'][name], flush=True)
n = 512 if TOY else 8192
q, k, v = (torch.randn(4, 12, n, 64, device=device, dtype=half, requires_grad=True) for _ in range(3)); g = torch.randn_like(q)
for backend in ('sdpa', 'local-attention') if TOY else ('flex', 'sdpa', 'local-attention'):
    def both(): attend_window(q, k, v, 64, backend).backward(g)
    micro(f'window {backend}', both)
def full(): F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(g)
micro('full', full)
d = 32 if TOY else 768
x = torch.randn(4 * n, d, device=device, requires_grad=True); w = torch.randn(256, d, device=device, requires_grad=True); t = torch.randint(0, 256, (4 * n, 1), device=device); rw = torch.full((4 * n, 1), 1 / n, device=device)
def chunked():
    with torch.autocast(device.type, dtype=torch.bfloat16): loss = linear_cross_entropy(x, w, t, rw)
    loss.backward()
def plain():
    with torch.autocast(device.type, dtype=torch.bfloat16): loss = F.cross_entropy(F.linear(x, w).float(), t[:, 0])
    loss.backward()
micro('loss chunked', chunked); micro('loss plain', plain)
a = torch.randn(4 * n, d, device=device, requires_grad=True); wt = torch.randn(4 * d, d, device=device, requires_grad=True); gg = torch.randn(4 * n, 4 * d, device=device, dtype=half)
def lin():
    with torch.autocast(device.type, dtype=torch.bfloat16): y = F.linear(a, wt)
    y.backward(gg.to(y.dtype))
micro('linear 768-3072', lin)
gamma = torch.ones(d, device=device, requires_grad=True)
def rms(): F.rms_norm(a, (d,), gamma, eps=1e-24).backward(a.detach())
micro('rms_norm f32', rms)
def ln(): F.layer_norm(a, (d,), gamma, gamma).backward(a.detach())
micro('layer_norm f32', ln)
if not TOY:
    from torch._dynamo.utils import counters
    for many in (1, 5, 64, 77, 100, 128, 129, 200, 300, 511, 700, 1000, 1024):
        try:
            t0 = time.time()
            for past in (0, min(64, many)):
                qq, kk, vv = (torch.randn(2, 2, m, 32, device=device) for m in (many, many + past, many + past))
                with torch.no_grad():
                    dist = torch.arange(past, past + many, device=device)[:, None] - torch.arange(past + many, device=device)
                    ref = F.scaled_dot_product_attention(qq.double(), kk.double(), vv.double(), attn_mask=(dist >= 0) & (dist <= 64))
                    err = (attend_window(qq, kk, vv, 64, 'flex') - ref).abs().max().item()
                found['micro'][f'flex {many}+{past}'] = [err, time.time() - t0]
        except Exception as error:
            found['micro'][f'flex {many}'] = f'{type(error).__name__}: {str(error)[:300]}'
        print('flex', many, {k: v for k, v in found['micro'].items() if k.startswith(f'flex {many}')}, flush=True)
    found['dynamo'] = {str(k): {str(a): b for a, b in v.items()} for k, v in counters.items()}
keep(); print(f'-- speed: {spent():.0f} s', flush=True)

# decode
for name, model in {'preset': preset, 'flat w64 bare': bare}.items():
    m = make(model, 8192).eval()
    if not TOY: m = m.to(torch.bfloat16)
    for rows in (1, 64):
        try:
            p = torch.randint(0, 256, (rows, 128), device=device); m.generate(p, 8); sync(); start = time.time(); k = 16 if TOY else 60; m.generate(p, k); sync()
            found['decode'][f'{name}, batch {rows}'] = rows * k / (time.time() - start)
        except Exception as error:
            found['decode'][f'{name}, batch {rows}'] = f'{type(error).__name__}: {str(error)[:200]}'; traceback.print_exc(limit=-6)
        print(name, rows, found['decode'][f'{name}, batch {rows}'], f'{spent():.0f} s', flush=True); keep()
    try:
        if not TOY:
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as pr: m.generate(p[:1], 4); sync()
            open(f'{out}/profile-decode-{name.replace(" ", "-")}.txt', 'w').write(pr.key_averages().table(sort_by='self_cpu_time_total', row_limit=60, max_name_column_width=90))
    except Exception: traceback.print_exc()

# right
base = dict(num_tokens=256, dim=64, depth=2, dim_head=32, heads=2, seq_len=512, ignore_index=-1, recon_ignore_index=-1)
three = dict(hierarchies=(1, 2, 8), hierarchical_stride=(1, 1, 4), window_sizes=(16, 32, None))
cases = {
    'flat full': {}, 'three levels': three, 'flat window': dict(window_sizes=64), 'window sdpa': dict(window_sizes=64, attn_backend='sdpa'),
    'hourglass': dict(hierarchies=(1, 4), hierarchical_stride=(1, 4), window_sizes=(32, None), arrangement='hourglass'),
    'merge attention': dict(**three, merge='attention', merge_window=3, merge_into='all'), 'autoencoder': dict(**three, autoencoder=True), 'prophet, quantized': dict(**three, prophet_loss_weight=.1, quantized_loss_weight=.1),
    'reversible': dict(**three, reversible=True), 'checkpointing': dict(**three, gradient_checkpointing=True), 'act': dict(share_layers=True, halting='act'), 'gru': dict(residual='gru'),
    'n-grams, recall': dict(window_sizes=32, ngrams=(2, 3, 4), word_ngrams=(1, 2), recall=(3, 5), word_recall=(1,)), 'attention compressor': dict(**three, compressor='attention'),
    **{m: dict(mixer=m) for m in ('lsh', 'gateloop', 'simple-gateloop', 's4d', 'h3', 'hyena')}, 'monarch': dict(mixer='hyena', mixer_kwargs=dict(fft='monarch')),
    'gqa': dict(mixer_kwargs=dict(kv_heads=1)), **{f'{p} {m}': dict(mixer_kwargs=dict(pattern=p, pattern_mode=m)) for p in ('strided', 'fixed') for m in ('interleave', 'union', 'heads')},
    'window local-attention': dict(window_sizes=64, attn_backend='local-attention'),
}
for name, extra in cases.items():
    if spent() > 250:
        found['right'][name] = 'not run: time'; continue
    try:
        torch.manual_seed(0); a = HierarchicalTransformer(**{**base, **extra})
        for p in a.parameters(): p.data.add_(torch.randn_like(p) * .02)
        b = copy.deepcopy(a).to(device); ids = torch.randint(0, 256, (2, 301)); row = {}; t0 = time.time()
        la, _ = a(ids, return_loss=True); lb, _ = b(ids.to(device), return_loss=True); la.backward(); lb.backward()
        row['loss'] = abs(la.item() - lb.item())
        dense = lambda g: g.to_dense() if g.layout != torch.strided else g
        ga, gb = ({k: dense(p.grad).cpu() for k, p in m.named_parameters() if p.grad is not None} for m in (a, b))
        errors = {k: ((ga[k] - gb[k]).norm() / (ga[k].norm() + 1e-8)).item() for k in ga} if ga.keys() == gb.keys() else {}
        worst = max(errors, key=errors.get) if errors else None
        row['gradients'] = errors[worst] if errors else 'other keys'; row['worst'] = worst
        a.eval(), b.eval()
        with torch.no_grad():
            whole = b(ids.to(device)); row['logits'] = (a(ids) - whole.cpu()).abs().max().item()
            outs, state, i = [], None, 0
            for c in (1, 100, 2, 1, 150, 47):
                o, state = b(ids[:, i:i + c].to(device), state=state, return_state=True); outs.append(o); i += c
            row['chunks'] = (torch.cat(outs, 1) - whole).abs().max().item()
            row['greedy'] = (a.generate(ids[:, :9], 24, temperature=0) == b.generate(ids[:, :9].to(device), 24, temperature=0).cpu()).float().mean().item()
        b.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            l16, _ = b(ids.to(device), return_loss=True)
        l16.backward(); row['bf16 loss'] = abs(l16.item() - la.item()); row['time'] = time.time() - t0
        found['right'][name] = row
    except Exception as error:
        found['right'][name] = f'{type(error).__name__}: {str(error)[:300]}'; traceback.print_exc(limit=-6); sys.stderr.flush()
    print(name, found['right'][name], f'{spent():.0f} s', flush=True); keep()
print(f'-- right: {spent():.0f} s', flush=True)
if spent() < 260: measure('flat w64 bare compiled', bare, 8192, 4, compiled=True)
keep()
print('\nWRONG or failing:', {k: v for k, v in found['right'].items() if isinstance(v, str) or v['loss'] > 1e-4 or isinstance(v['gradients'], str) or not v['gradients'] < 1e-2 or v['chunks'] > 1e-3 or v['greedy'] < 1 or v['bf16 loss'] > .1})
for name, row in found['speed'].items():
    print(f'{name:30s}', row if isinstance(row, str) else f"{row['parameters'] / 1e6:.0f} M  {row['bytes_a_second'] / 1e3:.0f} kB/s  {100 * row['share']:.1f} % of {peak / 1e12:.0f} TFLOP/s  {row['memory']:.1f} GB  first {row['first']:.0f} s")
print(found['micro']); print(found['decode'], f'; {spent():.0f} s')

"""How long compress and decode take, next to a copy of the same bytes.

    python reproduce/compression_speed.py                 # GPU if there is one
    python reproduce/compression_speed.py --device cpu

Prints a table and writes it, with a plot, to reproduce/results/compression_speed*. Per
compressor:

compress_ms  gradient to packed words of one rank. On the GPU the time between the first and
             the last launch (CUDA events, with work queued before so that the host is ahead, as in
             training); rows named "(with host)" are the whole call as the host sees it, the
             tables of pointers and the reading of the counts included.
decode_ms    words of all `--ranks` to the gradients, timed alike.
bytes        what the compress pass must move at least: every input read once, every output
             written once, words left out. 24 a parameter for variance and hybrid (read g, s, r, v,
             write r, v), 12 for Strom, 4 for those without residuals.
gb_per_s     bytes over compress_ms, and its share of a plain copy (bytes read plus written) of
             one large array on the same device in the same run.

Medians of `--repeats`. Inputs are such that `--send-rate` of the elements are selected in every
step by variance, hybrid and Strom; QSGD and TernGrad send what they send. `send_rate` in the
results is what was sent.
"""

import argparse
import csv
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vgc_chainer  # noqa: E402, F401
from reproduce import provenance  # noqa: E402
from vgc_chainer.compressors import COMPRESSORS  # noqa: E402
from vgc_chainer.layout import Layout  # noqa: E402

COLUMNS = (
    'compressor parameters arrays send_rate ranks compress_ms decode_ms bytes gb_per_s '
    'memcpy_gb_per_s percent_of_memcpy device commit'
).split()
#: Bytes that a compress pass must move, a parameter.
BYTES = {'variance': 24, 'hybrid': 24, 'strom': 12, 'qsgd': 4, 'terngrad': 4, 'none': 8}
TAU = 0.01


def resnet50_shapes():
    """Shapes of ResNet-50's 161 arrays, 25,557,032 elements: weights, gammas, betas, one bias."""
    shapes = [(64, 3, 7, 7), (64,), (64,)]

    def convolution(out, inputs, size):
        shapes.extend([(out, inputs, size, size), (out,), (out,)])

    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(width, inputs, 1)
            convolution(width, width, 3)
            convolution(4 * width, width, 1)
            if block == 0:
                convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def layout_for(parameters):
    """ResNet-50's arrays, or as many in the same proportions with `parameters` elements."""
    shapes = resnet50_shapes()
    sizes = np.array([int(np.prod(shape)) for shape in shapes])
    if parameters not in (None, sizes.sum()):
        ends = np.round(np.cumsum(sizes) * (parameters / sizes.sum())).astype(int)
        shapes = [(int(size),) for size in np.diff(ends, prepend=0)]
    return Layout((f'/{k:03d}', shape, np.float32) for k, shape in enumerate(shapes))


@functools.cache
def drawn(layout_shapes, rate, thresholded):
    """Host arrays of :func:`inputs`; `thresholded` for compressors with a threshold."""
    rng = np.random.default_rng(0)
    gradients, moments = [], []
    for shape in layout_shapes:
        values = rng.standard_normal(shape, np.float32)
        chosen = rng.random(shape, np.float32) < rate
        if thresholded:
            values *= np.float32(1e-6 * TAU)
            values[chosen] = np.copysign(np.float32(1.5 * TAU), values[chosen])
        squares = values * values
        squares *= np.float32(1e6)
        squares[chosen] = 0
        gradients.append(values)
        moments.append(squares)
    return gradients, moments


def inputs(name, layout, rate, xp):
    """Gradients and moments of which `rate` are selected in every step, whatever was before.

    Chosen elements have s = 0; the second moment of all others is far above their square, and
    for Strom and hybrid their gradient is far below the threshold.
    """
    both = drawn(layout.shapes, rate, name in ('strom', 'hybrid'))
    return tuple([xp.asarray(array) for array in arrays] for arrays in both)


class HostClock:
    """Medians on the CPU."""

    device_times = False

    def __init__(self, repeats):
        self.repeats = repeats

    def median_ms(self, call, warm=1):
        times = []
        for k in range(warm + self.repeats):
            start = time.perf_counter()
            call()
            if k >= warm:
                times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times)

    whole_ms = median_ms


class DeviceClock(HostClock):
    """Medians of CUDA events, or of whole calls, on the GPU."""

    device_times = True

    def __init__(self, repeats):
        super().__init__(repeats)
        import cupy

        self._cupy = cupy
        self._ballast = cupy.zeros((2, 200_000_000), np.uint8)

    def whole_ms(self, call, warm=2):
        def synchronised():
            call()
            self._cupy.cuda.Device().synchronize()

        self._cupy.cuda.Device().synchronize()
        return super().median_ms(synchronised, warm)

    def median_ms(self, call, warm=3):
        cupy, times = self._cupy, []
        for k in range(warm + self.repeats):
            for _ in range(12):  # keeps the device busy while the host prepares the launches
                self._ballast[0] = self._ballast[1]
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record()
            call()
            end.record()
            end.synchronize()
            if k >= warm:
                times.append(cupy.cuda.get_elapsed_time(begin, end))
        return statistics.median(times)


def memcpy_rate(xp, clock):
    """GB/s of a copy, bytes read plus bytes written."""
    source = xp.ones(100_000_000, np.float32)
    target = xp.empty_like(source)
    return 2 * source.nbytes / clock.median_ms(lambda: xp.copyto(target, source)) / 1e6


def prepared(name, layout, xp, kernels=True):
    options = {'strom': {'tau': TAU}, 'hybrid': {'tau': TAU, 'alpha': 1.0}}.get(name, {})
    compressor = COMPRESSORS[name](**options)
    compressor.use_kernels = kernels
    compressor.prepare(layout, xp)
    return compressor


def measure(name, layout, options, xp, clock):
    """Rows ``(label, send rate, compress ms, decode ms)`` of one compressor."""
    compressor = prepared(name, layout, xp)
    messages = []
    host = inputs(name, layout, options.send_rate, xp)
    for rank in range(options.ranks):
        gradients, moments = ([xp.roll(a, 37 * rank) for a in arrays] for arrays in host)
        messages.append(compressor.compress(gradients, moments))
        for array in compressor._state.values():
            array.fill(0)
    out = [xp.empty_like(g) for g in gradients]
    sent = statistics.mean(m.header().elements for m in messages) / max(layout.total, 1)

    def compress():
        compressor.compress(gradients, moments)

    def decode():
        compressor.decode(messages, out)

    rows, passes = [], compressor._passes
    if passes is None:
        return [(name, sent, clock.whole_ms(compress), clock.whole_ms(decode))]
    by_kernels = passes.launch_compress(gradients, moments, 1.0) is not None
    compress_ms = clock.median_ms(
        (lambda: passes.launch_compress(gradients, moments, 1.0)) if by_kernels else compress
    )
    decode_ms = clock.median_ms(lambda: passes.launch_decode(messages, out, 1.0))
    rows.append((name, sent, compress_ms, decode_ms))
    rows.append((f'{name} (with host)', sent, clock.whole_ms(compress), clock.whole_ms(decode)))
    if by_kernels and name == 'variance':
        del compressor
        plain = prepared(name, layout, xp, kernels=False)
        rows.append(
            (
                f'{name} (array code)',
                sent,
                clock.whole_ms(lambda: plain.compress(gradients, moments)),
                clock.whole_ms(lambda: plain.decode(messages, out)),
            )
        )
    return rows


def topk_row(layout, rate, xp, clock):
    """torch.topk of the same share of one flat tensor, or None without torch."""
    try:
        import torch
    except ImportError:
        return None
    device = 'cuda' if clock.device_times else 'cpu'
    flat = torch.randn(layout.total, device=device)
    count = max(1, int(rate * layout.total))

    def topk():
        torch.topk(flat.abs(), count, sorted=False)
        if clock.device_times:
            torch.cuda.synchronize()

    return f'torch.topk {rate:.0%}', rate, clock.whole_ms(topk), float('nan')


def table_of(rows, layout, options, memcpy, about):
    """Rows with all columns, as dicts."""
    results = []
    for label, sent, compress_ms, decode_ms in rows:
        per_parameter = BYTES.get(label.split()[0], 8)
        rate = per_parameter * layout.total / compress_ms / 1e6
        results.append(
            {
                'compressor': label,
                'parameters': layout.total,
                'arrays': len(layout),
                'send_rate': f'{sent:.5f}',
                'ranks': options.ranks,
                'compress_ms': f'{compress_ms:.4f}',
                'decode_ms': '' if decode_ms != decode_ms else f'{decode_ms:.4f}',
                'bytes': per_parameter * layout.total,
                'gb_per_s': f'{rate:.1f}',
                'memcpy_gb_per_s': f'{memcpy:.1f}',
                'percent_of_memcpy': f'{100 * rate / memcpy:.1f}',
                'device': about['device'],
                'commit': about['commit'],
            }
        )
    return results


def print_table(results):
    shown = COLUMNS[:1] + COLUMNS[3:7] + COLUMNS[8:11]
    cells = [shown] + [[str(row[column]) for column in shown] for row in results]
    widths = [max(len(row[k]) for row in cells) for k in range(len(shown))]
    for row in cells:
        first = row[0].ljust(widths[0])
        print(first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:])), sep='  ')


def plot(results, path):
    """Bars a compressor: compress dark, decode light; readable in grey at column width."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    pyplot.rcParams.update({'font.size': 7, 'axes.linewidth': 0.6})
    figure, axes = pyplot.subplots(figsize=(3.3, 0.34 * len(results) + 0.9))
    rows = range(len(results))
    compress = [float(row['compress_ms']) for row in results]
    decode = [float(row['decode_ms'] or 'nan') for row in results]
    ranks = results[0]['ranks']
    axes.barh([y - 0.2 for y in rows], compress, 0.4, color='0.25', label='compress')
    axes.barh(
        [y + 0.2 for y in rows],
        decode,
        0.4,
        color='0.85',
        edgecolor='0.25',
        linewidth=0.5,
        label=f'decode {ranks} messages',
    )
    floor = 24 * results[0]['parameters'] / float(results[0]['memcpy_gb_per_s']) / 1e6
    axes.axvline(floor, color='0', linewidth=0.8, linestyle='--')
    axes.annotate(
        'copy of 24 B\na parameter',
        (floor, 1),
        (2, -2),
        xycoords=('data', 'axes fraction'),
        textcoords='offset points',
        va='top',
        fontsize=6,
    )
    axes.set_xscale('log')
    axes.set_yticks(list(rows), [row['compressor'] for row in results])
    axes.set_ylim(len(results) - 0.4, -1.4)
    axes.set_xlabel(f'ms, {results[0]["parameters"] / 1e6:.1f} M parameters')
    axes.legend(loc='lower right', frameon=True, fontsize=6)
    for side in ('top', 'right'):
        axes.spines[side].set_visible(False)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=300)
    pyplot.close(figure)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--device', choices=['auto', 'cpu', 'gpu'], default='auto')
    add('--parameters', type=int, help='number of parameters (default: those of ResNet-50)')
    add('--send-rate', type=float, default=0.01, help='share of elements selected')
    add('--ranks', type=int, default=8, help='messages decoded')
    add('--repeats', type=int, default=25)
    add('--compressors', nargs='+', choices=sorted(COMPRESSORS), default=list(COMPRESSORS))
    add('--out', type=Path, default=Path(__file__).resolve().parent / 'results')
    add('--commit', default='', help='commit to state where there is no git history')
    return parser.parse_args(argv)


def array_module(device):
    if device == 'cpu':
        return np
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
        return cupy
    except Exception:
        if device == 'gpu':
            raise
        return np


def main(argv=None):
    options = parse_arguments(argv)
    xp = array_module(options.device)
    clock = (HostClock if xp is np else DeviceClock)(options.repeats)
    layout = layout_for(options.parameters)
    about = provenance.describe(xp, options.commit)
    memcpy = memcpy_rate(xp, clock)
    rows = []
    for name in options.compressors:
        rows += measure(name, layout, options, xp, clock)
    rows.append(topk_row(layout, options.send_rate, xp, clock))
    results = table_of([r for r in rows if r is not None], layout, options, memcpy, about)
    print_table(results)
    for key, value in about.items():
        print(f'{key}: {value}')
    options.out.mkdir(parents=True, exist_ok=True)
    stem = 'compression_speed' + ('_cpu' if xp is np else '')
    with open(options.out / f'{stem}.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(results)
    (options.out / f'{stem}.json').write_text(json.dumps(about, indent=1) + '\n')
    plot(results, options.out / f'{stem}.png')


if __name__ == '__main__':
    main()

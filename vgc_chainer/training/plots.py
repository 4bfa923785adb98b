"""Plots of a training, drawn from the log that Chainer's LogReport writes."""

import json
import math
import os

# Readable in grey and by colour-blind readers: curves differ in line style and marker as well as
# in colour.
STYLES = (
    {'color': '#0072b2', 'linestyle': '-', 'marker': 'o'},
    {'color': '#d55e00', 'linestyle': '--', 'marker': 's'},
)

# File name: (title, label of the y axis, {key in the log: label of the curve}).
PLOTS = {
    'loss.png': (
        'Loss',
        'cross-entropy loss',
        {'main/loss': 'training (rank 0)', 'validation/main/loss': 'validation'},
    ),
    'accuracy.png': (
        'Accuracy',
        'accuracy [%]',
        {'main/accuracy': 'training (rank 0)', 'validation/main/accuracy': 'validation'},
    ),
    'ratio.png': (
        'Compression',
        'ratio (log scale)',
        {
            'compression_ratio': "parameters / elements sent (the paper's ratio)",
            'wire_ratio': 'bytes of float32 gradients / bytes on the wire',
        },
    ),
}


def plot_log(log, out, title=''):
    """Writes loss.png, accuracy.png and ratio.png, as far as the log has their values.

    Args:
        log (list of dict, or str): Entries of a LogReport, or the path of its JSON file.
        out (str): Folder to write to.
        title (str): What was trained; stands above each plot.

    Returns:
        list of str: Paths of the files written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # The figure is made without pyplot, which would choose a window system and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    if isinstance(log, (str, os.PathLike)):
        with open(log) as f:
            log = json.load(f)
    # Entries that share an epoch (a log interval in iterations, a run cut short) need the finer
    # axis.
    epochs = [entry['epoch'] for entry in log]
    x_key = 'epoch' if len(set(epochs)) == len(epochs) else 'iteration'
    paths = []
    for name, (heading, y_label, curves) in PLOTS.items():
        figure = Figure(figsize=(6, 4), dpi=120, layout='constrained')
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        drawn = [
            _draw_curve(axes, log, x_key, *curve) for curve in zip(curves, curves.values(), STYLES)
        ]
        if not any(drawn):
            continue
        axes.set_title(f'{heading}: {title}' if title else heading, fontsize=11)
        axes.set_xlabel(x_key)
        axes.set_ylabel(y_label)
        if name == 'ratio.png':
            axes.set_yscale('log')
            axes.yaxis.set_major_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.grid(True, color='0.85')
        axes.legend(fontsize=9)
        path = os.path.join(out, name)
        figure.savefig(path)
        paths.append(path)
    return paths


def _draw_curve(axes, log, x_key, y_key, label, style):
    points = [
        (entry[x_key], entry[y_key])
        for entry in log
        if math.isfinite(entry.get(y_key, math.nan))  # a ratio is infinite while nothing is sent
    ]
    if not points:
        return False
    x, y = zip(*points)
    if y_key.endswith('accuracy'):
        y = [100 * value for value in y]
    axes.plot(x, y, label=label, markersize=4, markevery=max(1, len(x) // 20), **style)
    return True

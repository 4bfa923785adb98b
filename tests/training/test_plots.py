import json
import struct

import pytest

from vgc_chainer.training import plot_log

pytest.importorskip('matplotlib')


def entry(epoch, **values):
    common = {'epoch': epoch, 'iteration': 10 * epoch, 'main/loss': 2 / epoch}
    common['validation/main/loss'] = 2.5 / epoch
    common['main/accuracy'] = common['validation/main/accuracy'] = 1 - 0.5 / epoch
    return {**common, 'compression_ratio': 3.0**epoch, 'wire_ratio': 2.0**epoch, **values}


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b'\x89PNG\r\n\x1a\n'
    assert data[-8:-4] == b'IEND'
    return struct.unpack('>II', data[16:24])


@pytest.mark.parametrize('n', [1, 2, 300])
def test_three_plots(tmp_path, n):
    paths = plot_log([entry(min(i, 60)) for i in range(1, n + 1)], str(tmp_path), 'digits')
    assert paths == [str(tmp_path / f'{name}.png') for name in ('loss', 'accuracy', 'ratio')]
    for name in ('loss', 'accuracy', 'ratio'):
        width, height = png_size(tmp_path / f'{name}.png')
        assert width >= 600 and height >= 400


def test_log_file(tmp_path):
    (tmp_path / 'log').write_text(json.dumps([entry(1), entry(2)]))
    assert len(plot_log(tmp_path / 'log', str(tmp_path))) == 3


def test_no_ratio_without_compression(tmp_path):
    log = [{k: v for k, v in entry(i).items() if 'ratio' not in k} for i in (1, 2)]
    assert [path[-8:] for path in plot_log(log, str(tmp_path))] == ['loss.png', 'racy.png']
    assert not (tmp_path / 'ratio.png').exists()


def test_infinite_ratios_are_left_out(tmp_path):
    inf = float('inf')
    log = [entry(1, compression_ratio=inf, wire_ratio=9.0), entry(2), entry(3, wire_ratio=inf)]
    plot_log(log, str(tmp_path))
    png_size(tmp_path / 'ratio.png')


def test_validation_less_often_than_the_log(tmp_path):
    log = [entry(1), entry(1, iteration=15), entry(2)]
    del log[1]['validation/main/loss'], log[1]['validation/main/accuracy']
    assert len(plot_log(log, str(tmp_path))) == 3

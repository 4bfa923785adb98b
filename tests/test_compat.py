"""Chainer on current Python and NumPy, however and whenever it is imported."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import chainer
import chainer.functions as F
import numpy as np
import pytest

from tests.mpi_launcher import mpi_environment, mpiexec, run
from vgc_chainer import compat
from vgc_chainer._pkg_resources import ResolutionError, WorkingSet

PARAMS = [((2, 3), np.float64), ((2,), np.float32), ((2,), np.float16)]


def python(code, expect=0):
    """Run code in a fresh interpreter that turns warnings of our own modules into errors."""
    result = subprocess.run(
        [sys.executable, '-W', 'error::DeprecationWarning:vgc_chainer', '-c', code],
        capture_output=True,
        text=True,
        env=mpi_environment(),
        timeout=120,
    )
    assert result.returncode == expect, result.stdout + result.stderr
    return result.stdout + result.stderr


TRY_CHAINER = 'try:\n    import chainer\nexcept Exception as error:\n    print("failed:", error)\n'


@pytest.mark.parametrize(
    'code',
    [
        'import vgc_chainer, chainer, chainermn, chainer.testing, chainer.gradient_check',
        'import vgc_chainer; from vgc_chainer import compat; compat.apply(); import chainer',
        TRY_CHAINER + 'import vgc_chainer, chainer, chainermn; chainer.links.Linear(2, 2)',
        'import vgc_chainer.compressors, vgc_chainer.extensions, chainer.training',
        'from vgc_chainer import create_communicator; import chainermn',
    ],
)
def test_import_orders(code):
    python(code)


def test_after_a_chainer_that_failed():
    """Made to fail on every version, in the middle of its imports."""
    out = python(
        'import sys\n'
        'sys.modules["pkg_resources"] = None\n'
        + TRY_CHAINER
        + 'left = [name for name in sys.modules if name.startswith("chainer")]\n'
        'import vgc_chainer, chainer, chainermn, chainer.testing, chainer.gradient_check\n'
        'print("left behind:", len(left), chainer.links.Linear(2, 3).W.shape)\n'
    )
    assert 'failed: ' in out and 'left behind: ' in out and '(3, 2)' in out


def test_import_is_quiet():
    code = 'import vgc_chainer, chainermn, chainer.testing, chainer.gradient_check'
    result = subprocess.run(
        [sys.executable, '-W', 'error', '-c', code],
        capture_output=True,
        text=True,
        env=mpi_environment(),
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ''
    assert result.stderr == ''


def test_a_working_chainer_that_came_first_is_repaired_in_place():
    """Simulated with pkg_resources and numpy.distutils where this Python has none."""
    out = python(
        'import sys, types\n'
        'for name in ("pkg_resources", "numpy.distutils", "numpy.distutils.system_info"):\n'
        '    sys.modules[name] = types.ModuleType(name)\n'
        'import numpy\n'
        'numpy.distutils = sys.modules["numpy.distutils"]\n'
        'numpy.distutils.system_info = sys.modules["numpy.distutils.system_info"]\n'
        'sys.modules["pkg_resources"].require = lambda name: None\n'
        'sys.modules["pkg_resources"].DistributionNotFound = KeyError\n'
        'sys.modules["pkg_resources"].VersionConflict = ValueError\n'
        'had = hasattr(numpy, "sctypes")\n'
        'if not had: numpy.sctypes = {"int": [numpy.int64], "float": [numpy.float64]}\n'
        'import chainer\n'
        'if not had: del numpy.sctypes\n'
        'import vgc_chainer\n'
        'x = chainer.Variable(numpy.arange(6, dtype="f"))\n'
        'y = chainer.functions.as_strided(x, (2, 3), (3, 1))\n'
        'y.grad = numpy.ones((2, 3), "f"); y.backward(); print("gradient", x.grad.sum())\n'
        'y = chainer.functions.resize_images(numpy.ones((1, 1, 2, 2), "f"), (4, 4))\n'
        'print("resized", y.array.sum())\n'
    )
    assert 'gradient 6.0' in out and 'resized 16.0' in out


def test_numpy_keeps_its_names():
    out = python(
        'import sys, numpy\n'
        'before = dict(vars(numpy))\n'
        'import vgc_chainer, chainermn, chainer.testing\n'
        'gone = {"sctypes", "float", "int", "bool8", "distutils"}\n'
        'print("new names:", sorted((set(vars(numpy)) - set(before)) & gone))\n'
        'print("changed:", [name for name in before if vars(numpy)[name] is not before[name]])\n'
        'print("stubs:", [n for n in ("numpy.distutils", "pkg_resources") if n in sys.modules])\n'
    )
    assert 'new names: []' in out
    assert 'changed: []' in out
    assert 'stubs: []' in out


def _made_up_cupy(folder, source, cudnn):
    (folder / 'cupy').mkdir()
    (folder / 'cupy' / '__init__.py').write_text(source)
    if cudnn:
        (folder / 'cupy' / 'cudnn.py').write_text('')


@pytest.mark.parametrize(
    ('source', 'cudnn', 'expected'),
    [
        ('', False, '0'),
        ('', True, None),
        ('raise ImportError("libcuda.so.1")', False, None),
    ],
)
def test_only_a_cupy_without_cudnn_silences_its_warning(
    tmp_path, monkeypatch, source, cudnn, expected
):
    _made_up_cupy(tmp_path, source, cudnn)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split('.')[0] == 'cupy']:
        monkeypatch.delitem(sys.modules, name)
    # Set before it is removed, so that monkeypatch also undoes what the function sets.
    monkeypatch.setenv('CHAINER_CUDNN', '1')
    monkeypatch.delenv('CHAINER_CUDNN')
    compat._silence_missing_cudnn()
    assert os.environ.get('CHAINER_CUDNN') == expected
    for name in [name for name in sys.modules if name.split('.')[0] == 'cupy']:
        del sys.modules[name]  # monkeypatch puts the real one back


def test_the_users_own_choice_of_cudnn_stands(tmp_path, monkeypatch):
    _made_up_cupy(tmp_path, 'raise AssertionError("must not be imported")', False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv('CHAINER_CUDNN', '1')
    compat._silence_missing_cudnn()
    assert os.environ['CHAINER_CUDNN'] == '1'


def test_with_a_cupy_that_cannot_be_imported(tmp_path):
    _made_up_cupy(tmp_path, 'raise ImportError("libcuda.so.1: no such file")', False)
    out = python(
        f'import sys; sys.path.insert(0, {str(tmp_path)!r})\n'
        'import vgc_chainer, chainer\n'
        'print("available:", chainer.backends.cuda.available)\n'
    )
    assert 'available: False' in out


def test_no_repaired_bytecode_is_written(tmp_path):
    """Another program that imports Chainer must find Chainer's own code."""
    environment = mpi_environment(
        {'PYTHONPYCACHEPREFIX': str(tmp_path), 'PYTHONDONTWRITEBYTECODE': ''}
    )
    subprocess.run([sys.executable, '-c', 'import vgc_chainer'], env=environment, check=True)
    written = [path.as_posix() for path in tmp_path.rglob('*.pyc')]
    assert any('chainer/functions/connection/linear.' in path for path in written)
    for module in compat.REPAIRS:
        assert not any('/' + module.replace('.', '/') + '.' in path for path in written)


def test_without_mpi4py():
    block = 'import sys; sys.modules["mpi4py"] = None\n'
    python(block + 'import vgc_chainer; vgc_chainer.compressors.VarianceCompressor()')
    out = python(
        block + 'import vgc_chainer; vgc_chainer.create_communicator("variance")', expect=1
    )
    assert 'ImportError: distributed training needs mpi4py and an MPI' in out
    assert "pip install 'vgc-chainer[mpi]'" in out


def _versions(monkeypatch, **versions):
    real = importlib.metadata.version

    def version(name):
        if name not in versions:
            return real(name)
        if versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, 'version', version)


@pytest.mark.parametrize(
    ('versions', 'message'),
    [
        ({'chainer': None}, 'needs Chainer 7.8.1: pip install "setuptools<81"'),
        ({'chainer': '7.7.0'}, 'needs Chainer 7.8.1, found 7.7.0'),
        ({'chainermn': '1.3.1'}, 'old package chainermn 1.3.1 is installed'),
    ],
)
def test_what_must_not_or_must_be_installed(monkeypatch, versions, message):
    _versions(monkeypatch, **versions)
    with pytest.raises(ImportError) as caught:
        compat.apply()
    assert message in str(caught.value)


def test_a_repair_that_no_longer_fits_says_so():
    with pytest.raises(ImportError, match='does not find'):
        compat.repair_resize_images('nothing of the kind')


@pytest.mark.parametrize('name', sorted(compat.REPAIRS))
def test_every_repair_changes_its_module(name):
    package = Path(chainer.__file__).parent.parent
    source = (package / (name.replace('.', '/') + '.py')).read_text(encoding='utf-8')
    repaired = compat.REPAIRS[name](source)
    assert repaired != source
    compile(repaired, name, 'exec')
    assert compat.REPAIRS[name].__doc__


def test_as_strided():
    x = chainer.Variable(np.arange(8, dtype=np.float32))
    y = F.as_strided(x, (3, 4), (2, 1))
    np.testing.assert_array_equal(y.array, [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]])
    y.grad = np.ones_like(y.array)
    y.backward()
    np.testing.assert_array_equal(x.grad, [1, 1, 2, 2, 2, 2, 1, 1])


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_as_strided_has_a_gradient_for_every_float(dtype):
    x = chainer.Variable(np.arange(4, dtype=dtype))
    y = F.as_strided(x, (2, 2), (2, 1))
    y.grad = np.array([[1, 2], [3, 4]], dtype)
    y.backward()
    assert x.grad.dtype == dtype
    np.testing.assert_array_equal(x.grad, [1, 2, 3, 4])


def test_resize_images():
    x = np.array([[[[0, 2], [4, 6]]]], np.float32)
    y = F.resize_images(x, (3, 3)).array
    np.testing.assert_allclose(y[0, 0], [[0, 1, 2], [2, 3, 4], [4, 5, 6]], rtol=1e-6)


def test_backward_of_a_deconvolution_whose_forward_did_not_set_cover_all():
    rng = np.random.default_rng(0)
    x = chainer.Variable(rng.standard_normal((2, 3, 4, 4)))
    W = chainer.Variable(rng.standard_normal((3, 2, 3, 3)))
    y = F.deconvolution_2d(x, W, stride=2)
    y.creator_node.cover_all = None
    gy = rng.standard_normal(y.shape)
    y.grad = gy
    y.backward()
    expected = np.zeros(W.shape)
    for i in range(4):
        for j in range(4):
            patch = gy[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            expected += np.einsum('bi,bokl->iokl', x.array[:, :, i, j], patch)
    np.testing.assert_allclose(W.grad, expected, rtol=1e-10)


def test_unpack_params_with_another_transfer_dtype():
    """Used by pure_nccl; the device buffer is replaced by one in host memory."""
    pytest.importorskip('mpi4py')
    from chainermn.communicators import _memory_utility

    values = np.arange(10, dtype=np.float32)

    class Buffer:
        def to_device(self, array, size, offset, stream):
            part = values[offset // 4 :][: size // 4]
            assert array.dtype == values.dtype and array.nbytes == size
            array[...] = part.reshape(array.shape)

    params = [chainer.Parameter(np.zeros(shape, dtype)) for shape, dtype in PARAMS]
    for param in params:
        param.grad = np.full_like(param.array, -1)
    before = [param.grad for param in params]
    _memory_utility.unpack_params(params, 'grad', Buffer(), np.dtype(np.float32), False)
    assert [param.grad.dtype for param in params] == [dtype for _, dtype in PARAMS]
    assert all(param.grad is array for param, array in zip(params, before)), 'written in place'
    np.testing.assert_array_equal(np.concatenate([p.grad.ravel() for p in params]), values)


def test_gradient_check_works():
    from chainer import gradient_check

    x = np.random.default_rng(0).standard_normal((3, 2))
    gradient_check.check_backward(F.tanh, x, np.ones((3, 2)))
    with pytest.raises(AssertionError):
        gradient_check.check_backward(
            lambda v: F.tanh(v) * v.array, x, np.ones((3, 2)), atol=1e-6, rtol=1e-6
        )


def test_requirements():
    WorkingSet().require('numpy>=1.20', 'chainer')
    for wanting in ('numpy<1', 'no-such-distribution-anywhere'):
        with pytest.raises(ResolutionError):
            WorkingSet().require(wanting)


@pytest.mark.skipif(mpiexec() is None, reason='there is no mpiexec')
def test_multi_node_iterator(tmp_path):
    """Its slave read the size of the data set with int() of an array."""
    program = tmp_path / 'program.py'
    program.write_text(
        'import vgc_chainer, chainer, chainermn, numpy as np\n'
        'comm = vgc_chainer.create_communicator("naive")\n'
        'data = np.arange(12, dtype=np.float32)\n'
        'iterator = chainer.iterators.SerialIterator(data, 4) if comm.rank == 0 else None\n'
        'iterator = chainermn.iterators.create_multi_node_iterator(iterator, comm)\n'
        'batches = comm.mpi_comm.gather(list(iterator.next()))\n'
        'if comm.rank == 0: print("equal batches:", batches[0] == batches[1], len(batches[0]))\n'
    )
    result = run(2, ['-W', 'ignore::FutureWarning', program])
    assert 'equal batches: True 4' in result.stdout, result.stdout

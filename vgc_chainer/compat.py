"""Makes Chainer 7.8.1 and its chainermn run on current Python, NumPy and CuPy.

Chainer's files are not touched and NumPy gets no names back: the few lines that broke are
replaced while the module that holds them is being imported. Each repair is one function from
source text to source text; its docstring says what broke, since when, and when it is not needed
(the replacement is valid on old versions, too, so it is made everywhere).

:func:`apply` installs the repairs. It copes with a chainer that was imported before, working or
half-way failed.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import warnings

CHAINER_VERSION = '7.8.1'

_INSTALL = (
    'pip install "setuptools<81" wheel && pip install --no-build-isolation '
    f'chainer=={CHAINER_VERSION}'
)


def repair_environment_check(source):
    """``import numpy.distutils`` and ``pkg_resources``, at ``import chainer``.

    Broken since Python 3.12 or NumPy 2 (no numpy.distutils) and setuptools 82 (no pkg_resources).
    The module warns of macOS's Accelerate and of optional packages newer than Chainer knows; we
    support those. Only its entry point is kept.
    """
    return 'def check():\n    """Replaced by vgc_chainer.compat."""\n'


def repair_as_strided(source):
    """``numpy.sctypes``, at import and in a backward pass. Broken since NumPy 2."""
    return _replace(
        source,
        ("np.sctypes['int']", '(np.int8, np.int16, np.int32, np.int64)'),
        ("np.sctypes['float']", '(np.float16, np.float32, np.float64)'),
    )


def repair_resize_images(source):
    """``numpy.float``, when a function of the module runs. Broken since NumPy 1.24."""
    return _replace(source, ('dtype=numpy.float)', 'dtype=float)'))


def repair_deconvolution_2d(source):
    """``_set_cover_all(x, W)`` wants shapes, in ``Deconvolution2DFunction.backward``.

    A slip of 7.8.1, mended on Chainer's master; hit when the forward pass did not set cover_all.
    """
    return _replace(source, ('self._set_cover_all(x, W)', 'self._set_cover_all(x.shape, W.shape)'))


def repair_memory_utility(source):
    """``xp.array(v, copy=False)`` raises where a copy is needed. Broken since NumPy 2, CuPy 14."""
    return _replace(
        source,
        (
            'xp.array(v, copy=False, dtype=transfer_dtype)',
            'xp.asarray(v, dtype=transfer_dtype)',
        ),
    )


def repair_multi_node_iterator(source):
    """``int()`` of an array of one element raises, and the other rank hangs.

    Broken since NumPy 2.5.
    """
    return _replace(source, ('int(_size)', 'int(_size[0])'))


def repair_requirement_checks(source):
    """``pkg_resources`` in chainer.testing and chainer.gradient_check.

    Broken since setuptools 82. It is used to ask whether a requirement is installed; the standard
    library's metadata answers that.
    """
    return _replace(
        source,
        ('import pkg_resources\n', 'from vgc_chainer import _pkg_resources as pkg_resources\n'),
    )


REPAIRS = {
    'chainer._environment_check': repair_environment_check,
    'chainer.functions.array.as_strided': repair_as_strided,
    'chainer.functions.array.resize_images': repair_resize_images,
    'chainer.functions.connection.deconvolution_2d': repair_deconvolution_2d,
    'chainer.testing.doctest_helper': repair_requirement_checks,
    'chainer.testing.helper': repair_requirement_checks,
    'chainermn.communicators._memory_utility': repair_memory_utility,
    'chainermn.iterators.multi_node_iterator': repair_multi_node_iterator,
}


def apply():
    """Install the repairs and import chainer; a second call changes nothing.

    Raises:
        ImportError: Chainer is missing or has another version, or the old package chainermn is
            installed.
    """
    _require_chainer()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
        _forget_failed_import()
        for name in REPAIRS:
            if name in sys.modules:
                _repair_in_place(name)
    _silence_missing_cudnn()
    importlib.import_module('chainer')


def _replace(source, *pairs):
    for old, new in pairs:
        if old not in source:
            raise ImportError(f'vgc_chainer.compat does not find {old!r} in this Chainer')
        source = source.replace(old, new)
    return source


class _Finder(importlib.abc.MetaPathFinder):
    """Hands the modules of :data:`REPAIRS` to a loader that repairs them."""

    def find_spec(self, name, path=None, target=None):
        if name not in REPAIRS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        # Not the inherited way: that would write the repaired code into Chainer's __pycache__.
        return _repaired_code(fullname, self.get_source(fullname), self.path)


def _repaired_code(name, source, path):
    return compile(REPAIRS[name](source), path, 'exec', dont_inherit=True)


def _repair_in_place(name):
    """Repair a module that is loaded already; its functions see the new names through globals."""
    module = sys.modules[name]
    with open(module.__file__, encoding='utf-8') as file:
        source = file.read()
    exec(_repaired_code(name, source, module.__file__), module.__dict__)


def _forget_failed_import():
    """Remove what an ``import chainer`` that failed before has left behind.

    Python drops the module that raised and keeps those that it had imported by then.
    """
    if 'chainer' in sys.modules:
        return
    for name in list(sys.modules):
        if name.split('.')[0] in ('chainer', 'chainermn', 'chainerx'):
            del sys.modules[name]


def _require_chainer():
    try:
        version = importlib.metadata.version('chainer')
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f'vgc-chainer needs Chainer {CHAINER_VERSION}: {_INSTALL}') from None
    if version != CHAINER_VERSION:
        raise ImportError(
            f'vgc-chainer needs Chainer {CHAINER_VERSION}, found {version}: {_INSTALL}'
        )
    try:
        old = importlib.metadata.version('chainermn')
    except importlib.metadata.PackageNotFoundError:
        return
    raise ImportError(
        f'the old package chainermn {old} is installed and hides that of Chainer: '
        f'pip uninstall chainermn, then {_INSTALL} --force-reinstall --no-deps'
    )


def _silence_missing_cudnn():
    """CuPy 14 has no cuDNN module; Chainer would warn of it at the first use of a GPU."""
    if 'CHAINER_CUDNN' in os.environ or importlib.util.find_spec('cupy') is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            missing = importlib.util.find_spec('cupy.cudnn') is None
        except Exception:  # a CuPy that cannot be imported is Chainer's to report
            return
    if missing:
        os.environ['CHAINER_CUDNN'] = '0'

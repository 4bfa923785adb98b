"""What a result was made with: commit, dirty flag, device, versions, command."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

_PACKAGES = ('numpy', 'chainer', 'cupy', 'torch', 'mpi4py', 'matplotlib')


def commit():
    """Commit of the working tree, ``-dirty`` behind it if tracked files differ; '' without git."""
    root = Path(__file__).resolve().parent

    def git(*arguments):
        done = subprocess.run(('git', *arguments), cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ''

    # Results do not make a tree dirty: they are what is being made.
    dirty = git(
        'status', '--porcelain', '--untracked-files=no', '--', ':/', ':!/reproduce/results'
    )
    return git('rev-parse', '--short=12', 'HEAD') + ('-dirty' if dirty else '')


def device_name(xp):
    """Name of the current GPU, or of the CPU."""
    if xp.__name__ == 'cupy':
        return xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)['name'].decode()
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def versions():
    """Versions of Python and of whatever of the libraries is installed, as dict."""
    found = {'python': platform.python_version()}
    for name in _PACKAGES:
        module = sys.modules.get(name)
        if module is not None and hasattr(module, '__version__'):
            found[name] = str(module.__version__)
            continue
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe(xp, given_commit=''):
    """Everything as dict of strings.

    Args:
        xp: numpy or cupy.
        given_commit: Commit to state where the code runs without its git history.
    """
    return {
        'command': ' '.join(['python', *sys.argv]),
        'commit': given_commit or commit() or 'unknown',
        'device': device_name(xp),
        'versions': ', '.join(f'{name} {version}' for name, version in versions().items()),
    }

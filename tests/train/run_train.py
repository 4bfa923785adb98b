"""Runs several trainings on every rank, in one process: ``mpiexec -n N python THIS JSON``.

JSON is a list of command lines for train_cifar10.py. Rank 0 prints one line of JSON for each: the
result, or the message of the error; and whether all ranks hold the same parameters and got the
same answer.
"""

import vgc_chainer  # noqa: F401  (before mpi4py and chainer)  # isort: skip

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import chainer
import numpy as np
from mpi4py import MPI

path = Path(__file__).resolve().parents[2] / 'train' / 'train_cifar10.py'
spec = importlib.util.spec_from_file_location('train_cifar10', path)
train_cifar10 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_cifar10)
world = MPI.COMM_WORLD


def fingerprint(out):
    """Hash of what the last snapshot of this rank holds of the parameters, and of all it holds."""
    (file,) = Path(out).glob(f'snapshot.{world.rank}.*')
    parameters, everything = hashlib.sha256(), hashlib.sha256()
    with np.load(file) as arrays:
        for name in sorted(arrays):
            data = name.encode() + np.ascontiguousarray(arrays[name]).tobytes()
            if '/model:main/' in name and '/bn/' not in name:
                parameters.update(data)
            # The log holds seconds; Python keeps no exact record of the time spent.
            if not any(word in name for word in ('elapsed_time', '_log', 'LogReport')):
                everything.update(data)
    return parameters.hexdigest(), everything.hexdigest(), file.name


for argv in json.loads(sys.argv[1]):
    answer = {}
    try:
        args = train_cifar10.parse_args(argv)
        result = train_cifar10.train(args)
        answer = {key: result[key] for key in ('accuracy', 'compression_ratio', 'wire_ratio')}
        answer['log'] = result['log']
        answer['hooks'] = len(chainer.get_function_hooks())
        if args.snapshot_interval:
            prints = world.allgather(fingerprint(args.out))
            answer['same_parameters'] = len({parameters for parameters, _, _ in prints}) == 1
            answer['state'] = [everything for _, everything, _ in prints]
    except train_cifar10.UsageError as error:
        answer = {'error': str(error)}
    answers = world.allgather(json.dumps({**answer, 'state': None}, sort_keys=True))
    answer['same_answer'] = len(set(answers)) == 1
    if world.rank == 0:
        print('ANSWER ' + json.dumps(answer), flush=True)

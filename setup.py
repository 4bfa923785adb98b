from pathlib import Path

from setuptools import find_packages, setup

setup(
    name='vgc-chainer',
    version='0.1.0',
    description='Variance-based gradient compression for Chainer and ChainerMN',
    long_description=Path(__file__).with_name('README.rst').read_text(encoding='utf-8'),
    long_description_content_type='text/x-rst',
    license='MIT',
    packages=find_packages(include=['vgc_chainer', 'vgc_chainer.*']),
    package_data={'vgc_chainer.compressors.cuda': ['*.cu']},
    python_requires='>=3.9, <3.13',
    # Chainer's source package builds with setuptools < 81 only: see `make setup` and the README.
    install_requires=['chainer==7.8.1', 'numpy>=1.23', 'matplotlib>=3.5', 'packaging'],
    extras_require={
        'mpi': ['mpi4py>=4', 'openmpi; platform_system == "Linux"'],
        'cuda12x': ['cupy-cuda12x'],
        'cuda13x': ['cupy-cuda13x'],
        'demo': ['scikit-learn'],
        'test': ['pytest>=8', 'pytest-timeout', 'hypothesis', 'scikit-learn'],
        'dev': ['ruff==0.17.*'],
    },
    classifiers=[
        'Programming Language :: Python :: 3 :: Only',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)

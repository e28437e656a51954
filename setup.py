import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# a package index has neither the picture nor the pages that README.md links to
README = re.sub(r'!\[.*\)\n\n', '', (HERE / 'README.md').read_text(encoding='utf-8'))
VERSION = (HERE / 'simple_hierarchical_transformer' / 'version.py').read_text(encoding='utf-8')

setup(
    name='simple-hierarchical-transformer',
    version=re.findall("'(.+)'", VERSION)[0],
    description='A language model that reads a sequence at several resolutions at once',
    long_description=re.sub(r'\[([^]]*)\]\((?!http)[^)]*\)', r'*\1*', README),
    long_description_content_type='text/markdown',
    license='MIT',
    license_files=['LICENSE'],
    keywords=['artificial intelligence', 'deep learning', 'transformers', 'attention', 'hierarchical', 'byte-level'],
    # an editable install is then a line of a .pth file, which type checkers follow
    package_dir={'': '.'},
    packages=find_packages(include=['simple_hierarchical_transformer*']),
    entry_points={'console_scripts': ['simple-hierarchical-transformer=simple_hierarchical_transformer.__main__:main']},
    package_data={'simple_hierarchical_transformer': ['py.typed']},
    python_requires='>=3.10',
    install_requires=[
        'torch>=2.6',
        'einops>=0.8',
        'local-attention>=1.9',
        'rotary-embedding-torch>=0.8',
        'accelerate>=1.10',
        'tqdm>=4.60',
        'safetensors>=0.4.3',
        'huggingface_hub>=1.0',
    ],
    extras_require={
        'train': ['matplotlib>=3.7'],
        'tables': ['pyarrow>=17'],
        'track': ['tensorboard>=2.15'],
        'docs': ['mkdocs-material>=9.5', 'mkdocstrings[python]>=0.26'],
        'test': [
            'pytest>=8',
            'pytest-xdist>=3.5',
            'hypothesis>=6.100',
            'ruff>=0.9',
            'mypy>=1.13',
            'setuptools>=77',
            'matplotlib>=3.7',
            'pyarrow>=17',
            'tensorboard>=2.15',
            'vector-quantize-pytorch>=1.14',
            'peft>=0.15',
            'torchao>=0.12',
        ],
    },
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3.10',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
)

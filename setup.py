"""Packaging of sa_diffusers. Floors live here, the versions known to work together in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent


def read_version() -> str:
    """The package's `__version__`, read as text: importing it here would need torch at build time."""
    source = (ROOT / "sa_diffusers" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('sa_diffusers/__init__.py: expected a line `__version__ = "x.y.z"`, found none')
    return match.group(1)


def read_long_description() -> str:
    """The README, or nothing where only the package itself was copied (a vendored or partial checkout)."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


INSTALL_REQUIRES = [
    "torch>=2.13",
    "diffusers>=0.42.1",
    "transformers>=5.23",
    "accelerate>=1.15",
    "peft>=0.21",
    "datasets>=5.2",
    "tokenizers>=0.23",
    "safetensors>=0.8",
    "huggingface_hub>=2.4",
    "scipy>=1.17",
    "scikit-learn>=1.9",
    "numpy>=2.4",
    "pillow>=13",
    "matplotlib>=3.11",
    "jinja2>=3.1",
    "psutil>=7",
    "pyyaml>=6",
    "torchmetrics>=1.9",
    "tqdm>=4.70",
]

QUALITY = ["ruff>=0.17", "import-linter>=2.16"]
DOCS = ["mkdocs-material>=9.8", "mkdocstrings[python]>=1"]
DIGITS = ["scikit-image>=0.26"]
NUDITY = ["nudenet>=3.4"]

EXTRAS_REQUIRE = {
    "quality": QUALITY,
    "docs": DOCS,
    "digits": DIGITS,  # to redraw MNIST: only for who trains the bundled pipeline or its classifier again
    "test": [
        "pytest>=9.2",
        "pytest-xdist>=3.8",
        "hypothesis>=6.170",
        "setuptools>=77",
        "jaxtyping>=0.3",
        "beartype>=0.23",
        "mypy>=2.4",
        *DIGITS,
        *NUDITY,
        *QUALITY,
    ],
    # Never part of `test`: torch-fidelity pulls in torchvision, and a torchvision that does not match the installed
    # torch (as beside a CPU-only build) makes transformers, diffusers, peft and torchmetrics unimportable.
    "fid": ["torch-fidelity>=0.3"],
    # An extra because the wheel carries an AGPL-3.0 licence file, whatever its metadata says.
    "nudity": NUDITY,
    "deepspeed": ["deepspeed>=0.19.8"],  # older ones step by gradients that are not finite
    "8bit": ["bitsandbytes>=0.50"],  # --optimizer adamw_8bit, --quantize_base
    "tensorboard": ["tensorboard"],
    "wandb": ["wandb"],
}

setup(
    name="sa_diffusers",
    version=read_version(),
    description="Selective Amnesia for diffusers: make a diffusion model forget a concept",
    long_description=read_long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["sa_diffusers", "sa_diffusers.*"]),
    entry_points={"console_scripts": ["sa-diffusers = sa_diffusers.__main__:main"]},
    package_data={"sa_diffusers": ["py.typed", "assets/**/*", "report/templates/*"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Typing :: Typed",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

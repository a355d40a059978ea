"""Build and installation of lavis_xformer, a plugin for salesforce-lavis 1.0.2."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

from distutils.command.install_data import install_data  # isort: skip  # of setuptools, once it is imported

ROOT = Path(__file__).parent.resolve()
SHIPPED_FOLDERS = ("configs", "projects", "docs")


class BuildWithConfigs(build_py):
    """Puts the top-level YAML folders inside the package, where an installed copy finds them."""

    def run(self) -> None:
        """Copy them after the modules; an editable install reads them where they are.

        It still needs the data files, which setuptools leaves out of editable wheels.
        """
        super().run()
        if self.editable_mode:
            self.run_command("install_data")
            return
        for folder in SHIPPED_FOLDERS:
            target = Path(self.build_lib, "lavis_xformer", folder)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns("*.png", "*.jpg", "*.gz"))


class InstallBesideThePackage(install_data):
    """Puts lavis_xformer.pth in the root of site-packages: Python reads such files only there."""

    def finalize_options(self) -> None:
        """Take the folder of pure Python packages as the root of data files."""
        self.set_undefined_options("install", ("install_purelib", "install_dir"))
        super().finalize_options()


def version() -> str:
    """Return ``__version__`` of the package without importing it."""
    text = (ROOT / "lavis_xformer" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("lavis_xformer/__init__.py defines no __version__")
    return found.group(1)


setup(
    name="lavis_xformer",
    version=version(),
    description="X-Former (ECCV 2024) as a plugin for LAVIS: CLIP and MAE fused into BLIP-2",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the lavis_xformer authors",
    license="BSD-3-Clause",
    license_files=["LICENSE", "NOTICE"],
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    # tokenizers 0.13, which the transformers of LAVIS 1.0.2 needs, has no wheel for Python 3.12.
    python_requires=">=3.10,<3.12",
    install_requires=[
        "salesforce-lavis==1.0.2",
        "torch>=2.9",  # has Muon
        "torchvision>=0.24",
        "transformers>=4.25,<4.27",
        "tokenizers>=0.13,<0.14",
        "huggingface_hub>=0.11",
        "timm==0.4.12",
        "omegaconf>=2.1",
        "pyyaml>=5.1",
        "fairscale==0.4.4",
        "decord>=0.6",
        "numpy>=1.22,<2",
        "pillow>=10.1",
        "scipy>=1.9",
        "spacy>=3.4",
        "typing_extensions>=4.4",
        "webdataset>=0.2.31",
        "safetensors>=0.3",
        "tensorboard>=2.10",
        "matplotlib>=3.5",
        "tqdm>=4.60",
        "packaging>=21",
        "pycocoevalcap>=1.2",
    ],
    extras_require={"dev": ["pytest>=7", "pytest-xdist>=3", "ruff>=0.6", "mypy>=1.8"]},
    packages=find_packages(include=["lavis_xformer", "lavis_xformer.*"]),
    package_dir={"": "."},
    package_data={"lavis_xformer": ["assets/**", "py.typed"]},
    data_files=[("", ["lavis_xformer.pth"])],
    entry_points={"console_scripts": ["lavis-xformer = lavis_xformer.cli:main"]},
    cmdclass={"build_py": BuildWithConfigs, "install_data": InstallBesideThePackage},
)

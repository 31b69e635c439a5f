"""Packaging of MindRLHF; run-time requirements are the pins of requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

# What the quick start needs to run on a real language model: its weights' format and a rule for the reward.
DEMO = [
    "gguf==0.19.0",
    "vaderSentiment==3.3.2",
]

TEST = [
    *DEMO,
    # torch and transformers are the reference that numerics are compared with. Keep torch pinned
    # exactly: another version brings gigabytes of CUDA libraries.
    "torch==2.13.0",
    "pytest==9.2.0",
    "pytest-xdist==3.8.0",
    "hypothesis==6.170.15",
    "ruff==0.17.6",
    "mypy==2.4.1",
    "types-PyYAML==6.0.12.20261113",
]

# Commands and the modules whose ``command`` they call; the scripts of the tutorial call the same.
COMMANDS = {
    "chat": "mindrlhf.cli.chat",
    "convert": "mindrlhf.cli.convert",
    "data": "mindrlhf.cli.data",
    "ppo": "mindrlhf.cli.ppo",
    "report": "mindrlhf.report.__main__",
    "reward": "mindrlhf.cli.reward_model",
    "sft": "mindrlhf.cli.sft",
}


def requirements() -> list[str]:
    """The pinned packages of requirements.txt, comments and blank lines left out."""
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = (line.partition("#")[0].strip() for line in lines)
    return [line for line in wanted if line]


def version() -> str:
    """``__version__`` of mindrlhf, read without importing it."""
    text = (HERE / "mindrlhf" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("mindrlhf/__init__.py holds no __version__")
    return match.group(1)


def long_description() -> str:
    """README.md, when it is there."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="mindrlhf",
    version=version(),
    description="Reinforcement learning from human feedback on MindSpore: PPO on parallel Qwen2",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["mindrlhf", "mindrlhf.*"]),
    package_data={"mindrlhf.kernels": ["*.cpp", "*.h"], "mindrlhf.report": ["assets/*"]},
    entry_points={
        "console_scripts": [f"mindrlhf-{name} = {home}:command" for name, home in COMMANDS.items()]
    },
    python_requires=">=3.11,<3.12",
    install_requires=requirements(),
    extras_require={"demo": DEMO, "test": TEST},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

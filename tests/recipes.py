"""The code blocks of docs/optimizers.md, to be run by tests."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "optimizers.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
PACKAGES = ("lightning", "accelerate", "transformers")


def needs(block):
    """The package beyond torch that a block is about, if any."""
    found = re.findall(r"^(?:import|from) (\w+)|# for (\w+)$", block, re.MULTILINE)
    return next((name for pair in found for name in pair if name in PACKAGES), None)


OWN = [block for block in BLOCKS if needs(block) is None]


def blocks_of(package):
    """The blocks about a package, in order."""
    return [block for block in BLOCKS if needs(block) == package]


def run(blocks, namespace):
    for block in blocks:
        exec(compile(block, "docs/optimizers.md", "exec"), namespace)
    return namespace


def classes_of(package, namespace):
    """The classes that the blocks about a package define, without what they do with them."""
    for block in blocks_of(package):
        for part in re.findall(r"^(?:import|from) .*\n|^class .*\n(?:(?:    .*)?\n)*", block, re.M):
            exec(compile(part, "docs/optimizers.md", "exec"), namespace)
    return namespace

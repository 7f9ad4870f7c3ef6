"""Engines: inspection by an inference engine, in this process or behind a server.

``sa.inspect(engine, trunks, …)`` takes one in place of a model and gives the same branches.
"""

from .base import Engine, EngineError, Prompt, Sampling
from .completions import CompletionsEngine
from .server import Server
from .vllm import VLLMEngine

State = Prompt  # its earlier name

__all__ = [
    "CompletionsEngine",
    "Engine",
    "EngineError",
    "Prompt",
    "Sampling",
    "Server",
    "VLLMEngine",
]

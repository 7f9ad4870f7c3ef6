"""StepAgent in other people's trainers, one file a host (docs/integrations.md).

Log-probs in, a loss or credit out: the host keeps its models, its data and its parallelism. Nothing
here is imported by ``import stepagent``.
"""

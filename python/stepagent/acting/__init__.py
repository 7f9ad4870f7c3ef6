"""An agent acts: at every state of a trunk, or from the start of an episode to its end."""

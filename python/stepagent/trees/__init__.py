"""Sequences that share their beginnings as one token tree, and which trees fit one batch."""

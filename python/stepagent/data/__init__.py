"""What comes in and what an agent did: from messages to tokens, and which belong together."""

"""What was done, on disk: episodes, branches, and files that a stopped run continues."""

"""From rewards to a trained policy: advantages, losses, the two methods and their trainer."""

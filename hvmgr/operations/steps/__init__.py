"""What each step of a plan does, and running a plan through the journal."""

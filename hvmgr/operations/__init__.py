"""What a user asks for: plan, then run."""

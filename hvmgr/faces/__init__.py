"""Say it to people and machines; the only place that prints."""

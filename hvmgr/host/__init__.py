"""One keeper per outside program; no decisions."""

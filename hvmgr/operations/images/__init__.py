"""What can be done with image files, each named by its path: the commands ``image …``."""

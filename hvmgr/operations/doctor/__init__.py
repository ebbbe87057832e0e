"""What is wrong with hosts and homes (``examination``), and the safe ways to put it right (``repair``)."""

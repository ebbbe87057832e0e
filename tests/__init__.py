"""The tests, and what the measurements in bench share with them."""

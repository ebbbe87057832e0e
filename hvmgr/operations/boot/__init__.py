"""VHDs that a physical machine boots from: entries of its boot menu, what they need, and what the systems wrote."""

"""What hvmgr promises of its speed, measured against the tool that a user would take instead."""

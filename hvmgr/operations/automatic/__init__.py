"""What hvmgr does with VMs by itself (docs/automatic.md)."""

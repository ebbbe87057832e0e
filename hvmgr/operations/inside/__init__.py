"""What lies inside the disks of VMs, snapshots, exports and image files: the commands ``file …``."""

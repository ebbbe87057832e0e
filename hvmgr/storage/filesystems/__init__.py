"""What lies inside disks: file systems recognised and read from bytes; nothing is mounted, run or written."""

"""VMs that leave a host as a folder or an archive, and enter one."""
